//! Every operation, forward and backward, against float64: by the error rule in every dtype, size, layout and
//! magnitude, and by central differences.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
#![expect(clippy::cast_possible_wrap, reason = "small integers")]

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_fused::ops;
use candle_fused::{Dropout, LoraLayout, LoraLinearOptions, Mask, RopeLayout, SoftmaxOptions};
use common::{Arg, Case, DTYPES, LAYOUTS, Lies, SIZES, arg, bases, devices, oracle, run, values};

fn softmax(x: Arg, scale: f32, mask: Mask) -> Case {
    let options = SoftmaxOptions { scale, mask };
    Case {
        what: format!("softmax {options:?}"),
        slack: 1.0,
        args: vec![x],
        fused: Box::new(move |a| candle_fused::softmax(&a[0], options)),
        reference: Box::new(move |a| ops::softmax::reference(&a[0], options)),
        oracle: Box::new(move |a| oracle::softmax(&a[0], scale.into(), mask == Mask::Causal)),
    }
}

fn rms_norm(args: Vec<Arg>, eps: f32) -> Case {
    Case {
        what: format!("rms_norm eps {eps}"),
        // The gradient of a row of one element is what rounding leaves of a cancellation.
        slack: if args[0].dims.ends_with(&[1]) { 4096.0 } else { 1.0 },
        args,
        fused: Box::new(move |a| candle_fused::rms_norm(&a[0], a.get(1), eps)),
        reference: Box::new(move |a| ops::rms_norm::reference(&a[0], a.get(1), eps)),
        oracle: Box::new(move |a| oracle::rms_norm(&a[0], a.get(1), eps.into())),
    }
}

/// `weighted`: whether the second argument is the weight.
fn layer_norm(args: Vec<Arg>, weighted: bool, eps: f32) -> Case {
    let split = move |a: &[Tensor]| {
        let (weight, bias) = if weighted { (a.get(1), a.get(2)) } else { (None, a.get(1)) };
        (weight.cloned(), bias.cloned())
    };
    Case {
        what: format!("layer_norm eps {eps} weighted {weighted}"),
        slack: 1.0,
        args,
        fused: Box::new(move |a| {
            let (weight, bias) = split(a);
            candle_fused::layer_norm(&a[0], weight.as_ref(), bias.as_ref(), eps)
        }),
        reference: Box::new(move |a| {
            let (weight, bias) = split(a);
            ops::layer_norm::reference(&a[0], weight.as_ref(), bias.as_ref(), eps)
        }),
        oracle: Box::new(move |a| {
            let (weight, bias) = split(a);
            oracle::layer_norm(&a[0], weight.as_ref(), bias.as_ref(), eps.into())
        }),
    }
}

/// Angles of whatever size; `wide` tables are f32 beside any `x`.
fn rope(x: Arg, half: usize, per_batch: bool, wide: bool, layout: RopeLayout) -> Case {
    let (b, t) = (x.dims[0], x.dims[2]);
    let shape = if per_batch { vec![b, t, half] } else { vec![t, half] };
    // Exact in bf16, so that the tables are the same in every dtype.
    let table = move |seed| {
        let table =
            Tensor::from_vec(values(shape.iter().product(), seed), shape.clone(), &Device::Cpu).unwrap();
        table.to_dtype(DType::BF16).unwrap()
    };
    let (cos, sin) = (table(7), table(8));
    let (cos_oracle, sin_oracle) = (oracle::wide(&cos), oracle::wide(&sin));
    let tables = move |x: &Tensor| -> Result<(Tensor, Tensor)> {
        let dtype = if wide { DType::F32 } else { x.dtype() };
        let table = |t: &Tensor| t.to_dtype(dtype)?.to_device(x.device());
        Ok((table(&cos)?, table(&sin)?))
    };
    let tables_too = tables.clone();
    Case {
        what: format!("rope half {half} per_batch {per_batch} {layout:?}"),
        slack: 1.0,
        args: vec![x],
        fused: Box::new(move |a| {
            let (cos, sin) = tables(&a[0])?;
            candle_fused::rope(&a[0], &cos, &sin, layout)
        }),
        reference: Box::new(move |a| {
            let (cos, sin) = tables_too(&a[0])?;
            ops::rope::reference(&a[0], &cos, &sin, layout)
        }),
        oracle: Box::new(move |a| oracle::rope(&a[0], &cos_oracle, &sin_oracle, half, per_batch, layout)),
    }
}

fn silu_mul(gate: Arg, up: Arg) -> Case {
    Case {
        what: "silu_mul".into(),
        slack: 1.0,
        args: vec![gate, up],
        fused: Box::new(|a| candle_fused::silu_mul(&a[0], &a[1])),
        reference: Box::new(|a| ops::silu_mul::reference(&a[0], &a[1])),
        oracle: Box::new(|a| oracle::silu_mul(&a[0], &a[1])),
    }
}

/// Every third row does not count.
fn cross_entropy(logits: Arg) -> Case {
    let (n, v) = (logits.dims[0], logits.dims[1]);
    let columns: Vec<Option<usize>> =
        (0..n).map(|row| if row % 3 == 1 || v == 0 { None } else { Some(row * 7 % v) }).collect();
    let targets: Vec<i64> =
        columns.iter().map(|column| column.map_or(-100, |column| column as i64)).collect();
    let targets_too = targets.clone();
    Case {
        what: "cross_entropy".into(),
        slack: 1.0,
        args: vec![logits],
        fused: Box::new(move |a| {
            let targets = Tensor::new(targets.as_slice(), a[0].device())?;
            candle_fused::cross_entropy(&a[0], &targets, Some(-100))
        }),
        reference: Box::new(move |a| {
            let targets = Tensor::new(targets_too.as_slice(), a[0].device())?;
            ops::cross_entropy::reference(&a[0], &targets, Some(-100))
        }),
        oracle: Box::new(move |a| oracle::cross_entropy(&a[0], &columns)),
    }
}

/// The products are Candle's own on both sides, and differ in the order of their factors alone: hence the slack.
fn lora_delta(args: Vec<Arg>, layout: LoraLayout) -> Case {
    Case {
        what: format!("lora_delta {layout:?}"),
        slack: 4.0,
        args,
        fused: Box::new(move |a| candle_fused::lora_delta(&a[0], &a[1], &a[2], 1.7, layout)),
        reference: Box::new(move |a| ops::lora_delta::reference(&a[0], &a[1], &a[2], 1.7, layout)),
        oracle: Box::new(move |a| oracle::lora_delta(&a[0], &a[1], &a[2], 1.7f32.into(), layout)),
    }
}

/// Arguments: x, A, B, weight and perhaps bias.
fn lora_linear(args: Vec<Arg>, dropout: Option<Dropout>) -> Case {
    let options = LoraLinearOptions { scaling: 0.6, dropout };
    Case {
        what: format!("lora_linear {dropout:?}"),
        slack: 4.0,
        args,
        fused: Box::new(move |a| candle_fused::lora_linear(&a[0], &a[3], a.get(4), &a[1], &a[2], options)),
        reference: Box::new(move |a| {
            ops::lora_linear::reference(&a[0], &a[3], a.get(4), &a[1], &a[2], options)
        }),
        oracle: Box::new(move |a| {
            oracle::lora_linear([&a[0], &a[3], &a[1], &a[2]], a.get(4), 0.6f32.into(), dropout)
        }),
    }
}

fn frozen_linear(args: Vec<Arg>) -> Case {
    Case {
        what: "frozen_linear".into(),
        slack: 4.0,
        args,
        fused: Box::new(|a| candle_fused::frozen_linear(&a[0], &a[1], a.get(2))),
        reference: Box::new(|a| ops::frozen_linear::reference(&a[0], &a[1], a.get(2))),
        oracle: Box::new(|a| oracle::frozen_linear(&a[0], &a[1], a.get(2))),
    }
}

/// Each operation with rows of `n` elements, its arguments lying so.
fn softmax_cases(n: usize, lies: Lies) -> Vec<Case> {
    // Candle itself cannot read a window of an empty tensor.
    let lies = if n == 0 { Lies::Contiguous } else { lies };
    let x = |q| arg(&[2, q, n]).lies(lies);
    vec![
        softmax(x(3), 1.0, Mask::None),
        softmax(x(3), 0.3, Mask::None),
        softmax(x(n.min(3)), -0.7, Mask::Causal),
    ]
}

fn rms_norm_cases(n: usize, lies: Lies) -> Vec<Case> {
    let (x, p) = (arg(&[2, 3, n]).lies(lies), arg(&[n]).lies(lies));
    vec![
        rms_norm(vec![x.clone()], 1e-6),
        rms_norm(vec![x.clone(), p.clone()], 1e-5),
        rms_norm(vec![x.clone(), p.clone().frozen()], 1e-5),
        rms_norm(vec![x.frozen(), p], 1e-5),
    ]
}

fn layer_norm_cases(n: usize, lies: Lies) -> Vec<Case> {
    let (x, p) = (arg(&[2, 3, n]).lies(lies), arg(&[n]).lies(lies));
    vec![
        layer_norm(vec![x.clone()], false, 1e-6),
        layer_norm(vec![x.clone(), p.clone()], true, 1e-5),
        layer_norm(vec![x.clone(), p.clone()], false, 1e-5),
        layer_norm(vec![x.clone(), p.clone(), p.clone()], true, 1e-5),
        layer_norm(vec![x.frozen(), p.clone().frozen(), p], true, 1e-5),
    ]
}

fn rope_cases(n: usize, lies: Lies) -> Vec<Case> {
    let x = arg(&[2, 3, 4, n]).lies(lies);
    vec![
        rope(x.clone(), n / 2, false, true, RopeLayout::Half),
        rope(x.clone(), n / 2, true, false, RopeLayout::Interleaved),
        rope(x.clone(), n / 4, true, true, RopeLayout::Half),
        rope(x, n / 4, false, false, RopeLayout::Interleaved),
    ]
}

fn silu_mul_cases(n: usize, lies: Lies) -> Vec<Case> {
    let x = arg(&[2, 3, n]).lies(lies);
    vec![
        silu_mul(x.clone(), x.clone()),
        silu_mul(x.clone().times(20.0), arg(&[2, 3, n])),
        silu_mul(arg(&[n]), arg(&[n]).frozen()),
        silu_mul(x.clone().frozen(), x),
    ]
}

fn cross_entropy_cases(n: usize, lies: Lies) -> Vec<Case> {
    vec![cross_entropy(arg(&[5, n]).lies(lies)), cross_entropy(arg(&[n.min(1000), 7]).times(9.0).lies(lies))]
}

fn lora_delta_cases(n: usize, lies: Lies) -> Vec<Case> {
    let lying = |dims: [usize; 2]| arg(&dims).lies(lies);
    let x = arg(&[2, 3, n]).lies(lies);
    let few = arg(&[2, 3, 5]).lies(lies);
    vec![
        lora_delta(vec![x.clone(), lying([4, n]), lying([5, 4])], LoraLayout::Peft),
        lora_delta(
            vec![x, lying([n, 4]).dtype(DType::F32), lying([4, 5]).dtype(DType::F32)],
            LoraLayout::Seed,
        ),
        lora_delta(
            vec![few.clone(), lying([4, 5]).dtype(DType::F32), lying([n, 4]).dtype(DType::F32)],
            LoraLayout::Peft,
        ),
        lora_delta(vec![few, lying([5, 4]), lying([4, n])], LoraLayout::Seed),
    ]
}

fn lora_linear_cases(n: usize, lies: Lies) -> Vec<Case> {
    let lying = |dims: &[usize]| arg(dims).lies(lies);
    let args = |k: usize, out: usize| {
        vec![
            lying(&[2, 3, k]),
            lying(&[4, k]),
            lying(&[out, 4]),
            lying(&[out, k]).frozen(),
            lying(&[out]).frozen(),
        ]
    };
    let dropout = Some(Dropout { p: 0.3, seed: 0x0123_4567_89AB_CDEF });
    let mut wide_adapter = args(n, 5);
    wide_adapter[1] = wide_adapter[1].clone().dtype(DType::F32);
    wide_adapter[2] = wide_adapter[2].clone().dtype(DType::F32);
    let mut without_bias = args(5, n);
    without_bias.truncate(4);
    let mut frozen_x = args(n, 5);
    frozen_x[0] = frozen_x[0].clone().frozen();
    vec![
        lora_linear(args(n, 5), None),
        lora_linear(wide_adapter, dropout),
        lora_linear(without_bias, dropout),
        lora_linear(frozen_x, dropout),
    ]
}

fn frozen_linear_cases(n: usize, lies: Lies) -> Vec<Case> {
    let lying = |dims: &[usize]| arg(dims).lies(lies);
    vec![
        frozen_linear(vec![lying(&[2, 3, n]), lying(&[5, n]).frozen(), lying(&[5]).frozen()]),
        frozen_linear(vec![lying(&[3, 5]), lying(&[n, 5]).frozen()]),
    ]
}

/// The cases of one operation in every size, layout and dtype.
fn everywhere(cases: fn(usize, Lies) -> Vec<Case>) {
    for device in devices() {
        for n in SIZES {
            for lies in LAYOUTS {
                for case in cases(n, lies) {
                    for dtype in DTYPES {
                        case.error_rule(dtype, &device);
                    }
                }
            }
        }
    }
}

/// Small cases of one operation, element by element.
fn differences(cases: fn(usize, Lies) -> Vec<Case>) {
    for device in devices() {
        for lies in LAYOUTS {
            for case in cases(7, lies) {
                case.central_differences(&device);
            }
        }
    }
}

macro_rules! op_tests {
    ($($op:ident: $cases:ident;)+) => {
        $(mod $op {
            #[test]
            fn error_rule() {
                super::everywhere(super::$cases);
            }

            #[test]
            fn central_differences() {
                super::differences(super::$cases);
            }
        })+
    };
}

op_tests! {
    softmax_tests: softmax_cases;
    rms_norm_tests: rms_norm_cases;
    layer_norm_tests: layer_norm_cases;
    rope_tests: rope_cases;
    silu_mul_tests: silu_mul_cases;
    cross_entropy_tests: cross_entropy_cases;
    lora_delta_tests: lora_delta_cases;
    lora_linear_tests: lora_linear_cases;
    frozen_linear_tests: frozen_linear_cases;
}

/// The cases of every operation.
fn all_cases(n: usize, lies: Lies) -> Vec<Case> {
    [
        softmax_cases,
        rms_norm_cases,
        layer_norm_cases,
        rope_cases,
        silu_mul_cases,
        cross_entropy_cases,
        lora_delta_cases,
        lora_linear_cases,
        frozen_linear_cases,
    ]
    .into_iter()
    .flat_map(|cases| cases(n, lies))
    .collect()
}

/// A gradient arrives for each tracked argument, whichever others are tracked, be it a variable or a view of one; and
/// none is computed for another argument.
#[test]
fn gradients_arrive_exactly_where_tracked() {
    for device in devices() {
        for lies in [Lies::Contiguous, Lies::Window] {
            for case in all_cases(6, lies) {
                let trackable: Vec<usize> = (0..case.args.len()).filter(|&k| case.args[k].tracked).collect();
                for chosen in 1u32..1 << trackable.len() {
                    let mut args = case.args.clone();
                    for (bit, &k) in trackable.iter().enumerate() {
                        args[k].tracked = chosen >> bit & 1 == 1;
                    }
                    let bases = bases(&args, DType::F32).unwrap();
                    run(true, &args, &bases, DType::F32, &device, &case.fused).unwrap();
                }
            }
        }
    }
}

/// Results and gradients are the same bits again, and on one thread as on two.
#[test]
fn same_inputs_same_bits() {
    for device in devices() {
        for mut case in all_cases(300, Lies::Contiguous) {
            // Enough rows for many blocks and partial sums.
            for arg in &mut case.args {
                if let [2, 3, last] = *arg.dims.as_slice() {
                    arg.dims = vec![7, 300, last];
                }
            }
            let bases = bases(&case.args, DType::F32).unwrap();
            let on = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let run = || run(true, &case.args, &bases, DType::F32, &device, &case.fused).unwrap();
                let bits = |tensor: Vec<f64>| tensor.into_iter().map(f64::to_bits).collect::<Vec<_>>();
                pool.install(run).tensors.into_iter().map(bits).collect::<Vec<_>>()
            };
            let two = on(2);
            assert!(two == on(2), "{}: two runs differ", case.what);
            assert!(two == on(1), "{}: one thread and two differ", case.what);
        }
    }
}

#[test]
fn weight_gradients_over_many_rows() {
    for device in devices() {
        for dtype in DTYPES {
            let (x, p) = (arg(&[1100, 33]), arg(&[33]));
            rms_norm(vec![x.clone(), p.clone()], 1e-6).error_rule(dtype, &device);
            layer_norm(vec![x, p.clone(), p], true, 1e-6).error_rule(dtype, &device);
        }
    }
}

#[test]
fn a_row_repeated_by_broadcasting_is_read_in_place() {
    for device in devices() {
        let x = Tensor::from_vec(values(33, 1), (1, 33), &device).unwrap().to_dtype(DType::F32).unwrap();
        let repeated = x.broadcast_as((4, 33)).unwrap();
        let copied = repeated.contiguous().unwrap();
        let norm = |x: &Tensor| candle_fused::rms_norm(x, None, 1e-6).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(norm(&repeated), norm(&copied));
    }
}

#[test]
fn extreme_magnitudes() {
    for device in devices() {
        for magnitude in [1e18, 1e-18] {
            for n in [1, 33, 4097] {
                let x = arg(&[2, 3, n]).times(magnitude);
                let p = arg(&[n]);
                let check = |case: Case| case.error_rule(DType::F32, &device);
                check(softmax(x.clone(), 1.0, Mask::None));
                // The gradient of a row of one element is rounding alone.
                if n > 1 {
                    check(rms_norm(vec![x.clone(), p.clone()], 1e-6));
                    check(rms_norm(vec![x.clone(), p.clone()], 0.0));
                    check(layer_norm(vec![x.clone(), p.clone(), p.clone()], true, 1e-6));
                    check(layer_norm(vec![x.clone(), p.clone(), p.clone()], true, 0.0));
                }
                check(rope(arg(&[2, 3, 4, n]).times(magnitude), n / 2, false, true, RopeLayout::Half));
                check(silu_mul(x.clone(), x.clone()));
                check(cross_entropy(arg(&[5, n]).times(magnitude)));
                check(lora_delta(vec![x.clone(), arg(&[4, n]), arg(&[5, 4])], LoraLayout::Peft));
                check(frozen_linear(vec![x, arg(&[5, n]).frozen()]));
            }
        }
    }
}
