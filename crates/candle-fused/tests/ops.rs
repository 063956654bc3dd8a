//! Every operation, forward and backward, against float64: by the error rule in every dtype, size, layout and
//! magnitude, and by central differences.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_fused::{AdamStep, Dropout, LoraLayout, Mask, RopeLayout};
use common::cases::*;
use common::{
    Arg, Case, DTYPES, LAYOUTS, Lies, SIZES, arg, bases, devices, run, to_f64, values, with_less_instructions,
};

/// The cases of one operation in every size, layout and dtype.
fn everywhere(cases: fn(usize, Lies) -> Vec<Case>) {
    for device in devices() {
        // Candle itself cannot cast an empty tensor on CUDA, and Metal makes no empty buffer.
        for n in SIZES.into_iter().filter(|&n| n > 0 || device.is_cpu()) {
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
    gelu_mul_tests: gelu_mul_cases;
    cross_entropy_tests: cross_entropy_cases;
    linear_cross_entropy_tests: linear_cross_entropy_cases;
    attention_tests: attention_cases;
    add_tests: add_cases;
    lora_delta_tests: lora_delta_cases;
    lora_linear_tests: lora_linear_cases;
    frozen_linear_tests: frozen_linear_cases;
}

/// A gradient arrives for each tracked argument, whichever others are tracked, be it a variable or a view of one; and
/// none is computed for another argument.
#[test]
fn gradients_arrive_exactly_where_tracked() {
    for device in devices() {
        for lies in [Lies::Contiguous, Lies::Window] {
            for case in all_cases(6, lies) {
                case.gradients_arrive(&device);
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
fn attention_over_many_blocks() {
    for device in devices() {
        for dtype in DTYPES {
            let (q, kv) = (arg(&[1, 150, 4, 16]), [arg(&[1, 300, 2, 16]), arg(&[1, 300, 2, 16])]);
            attention(q.clone(), kv.clone(), 0.25, Mask::Causal).error_rule(dtype, &device);
            attention(q, kv, 0.25, Mask::None).error_rule(dtype, &device);
            let (q, kv) = (arg(&[2, 133, 6, 64]), [arg(&[2, 133, 2, 64]), arg(&[2, 133, 2, 64])]);
            attention(q, kv, 0.125, Mask::Causal).error_rule(dtype, &device);
            // Heads that kernels of one architecture alone take, over more than one of their blocks.
            for (width, lies) in [(64, Lies::Contiguous), (128, Lies::Contiguous), (64, Lies::Window)] {
                let lying = |tokens, heads| arg(&[1, tokens, heads, width]).lies(lies);
                let (q, kv) = (lying(200, 4), [lying(333, 2), lying(333, 2)]);
                attention(q.clone(), kv.clone(), 0.125, Mask::Causal).error_rule(dtype, &device);
                attention(q, kv, 0.125, Mask::None).error_rule(dtype, &device);
            }
        }
    }
}

/// Products that are large enough for a processor's matrix unit to take floats in parts, in both directions.
#[test]
fn large_products() {
    for device in devices() {
        for (dtype, lies) in DTYPES.into_iter().flat_map(|dtype| LAYOUTS.map(|lies| (dtype, lies))) {
            let lying = |dims: &[usize]| arg(dims).lies(lies);
            let lora = |rank: usize| {
                let factors = [lying(&[rank, 300]), lying(&[270, rank])];
                [lying(&[60, 300])]
                    .into_iter()
                    .chain(factors)
                    .chain([lying(&[270, 300]).frozen(), lying(&[270]).frozen()])
                    .collect::<Vec<_>>()
            };
            let dropout = Some(Dropout { p: 0.3, seed: 7 });
            frozen_linear(vec![lying(&[60, 300]), lying(&[270, 300]).frozen()]).error_rule(dtype, &device);
            frozen_linear(vec![lying(&[49, 1100]), lying(&[257, 1100]).frozen(), lying(&[257]).frozen()])
                .error_rule(dtype, &device);
            lora_linear(lora(4), None).error_rule(dtype, &device);
            lora_linear(lora(40), dropout).error_rule(dtype, &device);
            linear_cross_entropy(vec![lying(&[60, 300]), lying(&[333, 300]).frozen()], true)
                .error_rule(dtype, &device);
        }
    }
}

/// A step of Adam, in the parameter's place, is the processor's.
#[test]
fn adam_on_every_device() {
    let random = |n: usize| Tensor::randn(0f32, 1.0, n, &Device::Cpu).unwrap();
    let step = AdamStep { beta1: 0.9, beta2: 0.999, eps: 1e-8, rate: 2e-3, root: 0.3, shrink: 0.99, l2: 0.1 };
    for n in [1, 31, 1000, 4097] {
        let tensors = [random(n), random(n), random(n).sqr().unwrap(), random(n)];
        let outcome = |device: &Device| {
            let [value, first, second, gradient] = tensors.each_ref().map(|x| x.to_device(device).unwrap());
            let value = Var::from_tensor(&value).unwrap();
            let [first, second] = candle_fused::adam(&value, &first, &second, &gradient, step).unwrap();
            [value.as_detached_tensor(), first, second].map(|x| to_f64(&x).unwrap())
        };
        let expected = outcome(&Device::Cpu);
        for device in devices() {
            for (got, expected) in outcome(&device).iter().flatten().zip(expected.iter().flatten()) {
                assert!((got - expected).abs() <= 1e-6 * (1.0 + expected.abs()), "{got} is not {expected}");
            }
        }
    }
}

/// With this vocabulary a block has 128 rows.
#[test]
fn linear_cross_entropy_over_many_blocks() {
    for device in devices() {
        for all in [false, true] {
            let args = vec![arg(&[300, 2]), arg(&[140_000, 2]).frozen()];
            linear_cross_entropy(args, all).error_rule(DType::F32, &device);
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

/// Enough to compute for a device's own products, where these add to what is there; and the same bits again.
#[test]
fn lora_over_many_rows() {
    let (x, a, b) = (arg(&[2, 1031, 512]), arg(&[12, 512]), arg(&[384, 12]));
    let (weight, bias) = (arg(&[384, 512]).frozen(), arg(&[384]).frozen());
    let wide = |factor: &Arg| factor.clone().dtype(DType::F32);
    let window = |dims: &[usize]| arg(dims).lies(Lies::Window);
    let dropout = Some(Dropout { p: 0.3, seed: 7 });
    let cases = [
        lora_linear(vec![x.clone(), a.clone(), b.clone(), weight.clone(), bias.clone()], None),
        lora_linear(vec![x.clone(), wide(&a), wide(&b), weight.clone()], None),
        lora_linear(vec![x.clone(), a.clone(), b.clone(), weight.clone(), bias.clone()], dropout),
        lora_linear(vec![x.clone(), wide(&a), wide(&b), weight.clone()], dropout),
        lora_linear(vec![x.clone().frozen(), a.clone(), b, weight.clone(), bias.clone()], None),
        lora_delta(vec![x.clone(), a, window(&[384, 12])], LoraLayout::Peft),
        lora_delta(vec![x.clone(), window(&[512, 12]), arg(&[12, 384])], LoraLayout::Seed),
        frozen_linear(vec![x.clone(), weight.clone(), bias.clone()]),
    ];
    // Ranks whose rows are whole pieces of 16 bytes, which a device may take another way.
    let whole = [8, 24, 40].into_iter().flat_map(|rank| {
        let (a, b) = (arg(&[rank, 512]), arg(&[384, rank]));
        let all = |a: &Arg, b: &Arg| vec![x.clone(), a.clone(), b.clone(), weight.clone(), bias.clone()];
        [lora_linear(all(&wide(&a), &wide(&b)), None), lora_linear(all(&a, &b)[..4].to_vec(), None)]
    });
    let apart = vec![
        x.clone(),
        arg(&[16, 512]),
        arg(&[384, 16]),
        weight.clone(),
        arg(&[384]).lies(Lies::Transposed).frozen(),
    ];
    let cases: Vec<Case> = cases.into_iter().chain(whole).chain([lora_linear(apart, None)]).collect();
    for device in devices() {
        for case in &cases {
            for dtype in DTYPES {
                case.error_rule(dtype, &device);
            }
            let bases = bases(&case.args, DType::BF16).unwrap();
            let run = || run(true, &case.args, &bases, DType::BF16, &device, &case.fused).unwrap().tensors;
            assert!(run() == run(), "{}: two runs differ", case.what);
        }
    }
}

#[test]
fn a_row_repeated_by_broadcasting_is_read_in_place() {
    for device in devices() {
        let x = Tensor::from_vec(values(33, 1), (1, 33), &Device::Cpu).unwrap();
        let x = x.to_dtype(DType::F32).unwrap().to_device(&device).unwrap();
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

#[test]
fn less_instructions_pass_the_same_tests() {
    with_less_instructions(&[
        "error_rule",
        "extreme_magnitudes",
        "same_inputs_same_bits",
        "weight_gradients",
    ]);
}
