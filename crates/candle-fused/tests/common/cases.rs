//! Each operation applied to arguments: fused, as its reference, and as its float64 oracle.

#![expect(clippy::cast_possible_wrap, reason = "small integers")]

use candle_core::{DType, Device, Result, Tensor};
use candle_fused::ops;
use candle_fused::{Dropout, LoraLayout, LoraLinearOptions, Mask, RopeLayout, SoftmaxOptions};

use super::{Arg, Case, Lies, arg, oracle, values};

pub fn softmax(x: Arg, scale: f32, mask: Mask) -> Case {
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

pub fn rms_norm(args: Vec<Arg>, eps: f32) -> Case {
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
pub fn layer_norm(args: Vec<Arg>, weighted: bool, eps: f32) -> Case {
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
pub fn rope(x: Arg, half: usize, per_batch: bool, wide: bool, layout: RopeLayout) -> Case {
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

pub fn silu_mul(gate: Arg, up: Arg) -> Case {
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
pub fn cross_entropy(logits: Arg) -> Case {
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

/// Two query heads to each head of keys and values; weights of unequal size.
pub fn attention(q: Arg, kv: [Arg; 2], scale: f32, mask: Mask) -> Case {
    let options = SoftmaxOptions { scale, mask };
    let [k, v] = kv;
    Case {
        what: format!("attention {options:?}"),
        // Scores and weights go through products that differ in the order of their factors.
        slack: 4.0,
        args: vec![q, k, v],
        fused: Box::new(move |a| candle_fused::attention(&a[0], &a[1], &a[2], options)),
        reference: Box::new(move |a| ops::attention::reference(&a[0], &a[1], &a[2], options)),
        oracle: Box::new(move |a| {
            oracle::attention([&a[0], &a[1], &a[2]], scale.into(), mask == Mask::Causal)
        }),
    }
}

pub fn add(x: Arg, y: Arg) -> Case {
    Case {
        what: "add".into(),
        slack: 1.0,
        args: vec![x, y],
        fused: Box::new(|a| candle_fused::add(&a[0], &a[1])),
        reference: Box::new(|a| ops::add::reference(&a[0], &a[1])),
        oracle: Box::new(|a| &a[0] + &a[1]),
    }
}

/// Arguments: x and the weight. Every third row does not count, unless `all` do.
pub fn linear_cross_entropy(args: Vec<Arg>, all: bool) -> Case {
    let (n, v) = (args[0].dims[0], args[1].dims[0]);
    let columns: Vec<Option<usize>> =
        (0..n).map(|row| if (row % 3 == 1 && !all) || v == 0 { None } else { Some(row * 7 % v) }).collect();
    let targets: Vec<i64> =
        columns.iter().map(|column| column.map_or(-100, |column| column as i64)).collect();
    let targets_too = targets.clone();
    Case {
        what: format!("linear_cross_entropy all {all}"),
        slack: 4.0,
        args,
        fused: Box::new(move |a| {
            let targets = Tensor::new(targets.as_slice(), a[0].device())?;
            candle_fused::linear_cross_entropy(&a[0], &a[1], &targets, Some(-100))
        }),
        reference: Box::new(move |a| {
            let targets = Tensor::new(targets_too.as_slice(), a[0].device())?;
            ops::linear_cross_entropy::reference(&a[0], &a[1], &targets, Some(-100))
        }),
        oracle: Box::new(move |a| oracle::cross_entropy(&oracle::product(&a[0], &a[1].t()?)?, &columns)),
    }
}

/// The products are Candle's own on both sides, and differ in the order of their factors alone: hence the slack.
pub fn lora_delta(args: Vec<Arg>, layout: LoraLayout) -> Case {
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
pub fn lora_linear(args: Vec<Arg>, dropout: Option<Dropout>) -> Case {
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

pub fn gelu_mul(gate: Arg, up: Arg) -> Case {
    Case {
        what: "gelu_mul".into(),
        slack: 1.0,
        args: vec![gate, up],
        fused: Box::new(|a| candle_fused::gelu_mul(&a[0], &a[1])),
        reference: Box::new(|a| ops::gelu_mul::reference(&a[0], &a[1])),
        oracle: Box::new(|a| oracle::gelu_mul(&a[0], &a[1])),
    }
}

pub fn frozen_linear(args: Vec<Arg>) -> Case {
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
pub fn softmax_cases(n: usize, lies: Lies) -> Vec<Case> {
    // Candle itself cannot read a window of an empty tensor.
    let lies = if n == 0 { Lies::Contiguous } else { lies };
    let x = |q| arg(&[2, q, n]).lies(lies);
    vec![
        softmax(x(3), 1.0, Mask::None),
        softmax(x(3), 0.3, Mask::None),
        softmax(x(n.min(3)), -0.7, Mask::Causal),
    ]
}

pub fn rms_norm_cases(n: usize, lies: Lies) -> Vec<Case> {
    let (x, p) = (arg(&[2, 3, n]).lies(lies), arg(&[n]).lies(lies));
    vec![
        rms_norm(vec![x.clone()], 1e-6),
        rms_norm(vec![x.clone(), p.clone()], 1e-5),
        rms_norm(vec![x.clone(), p.clone().frozen()], 1e-5),
        rms_norm(vec![x.frozen(), p], 1e-5),
    ]
}

pub fn layer_norm_cases(n: usize, lies: Lies) -> Vec<Case> {
    let (x, p) = (arg(&[2, 3, n]).lies(lies), arg(&[n]).lies(lies));
    vec![
        layer_norm(vec![x.clone()], false, 1e-6),
        layer_norm(vec![x.clone(), p.clone()], true, 1e-5),
        layer_norm(vec![x.clone(), p.clone()], false, 1e-5),
        layer_norm(vec![x.clone(), p.clone(), p.clone()], true, 1e-5),
        layer_norm(vec![x.frozen(), p.clone().frozen(), p], true, 1e-5),
    ]
}

pub fn rope_cases(n: usize, lies: Lies) -> Vec<Case> {
    let x = arg(&[2, 3, 4, n]).lies(lies);
    vec![
        rope(x.clone(), n / 2, false, true, RopeLayout::Half),
        rope(x.clone(), n / 2, true, false, RopeLayout::Interleaved),
        rope(x.clone(), n / 4, true, true, RopeLayout::Half),
        rope(x, n / 4, false, false, RopeLayout::Interleaved),
    ]
}

pub fn silu_mul_cases(n: usize, lies: Lies) -> Vec<Case> {
    let x = arg(&[2, 3, n]).lies(lies);
    vec![
        silu_mul(x.clone(), x.clone()),
        silu_mul(x.clone().times(20.0), arg(&[2, 3, n])),
        silu_mul(arg(&[n]), arg(&[n]).frozen()),
        silu_mul(x.clone().frozen(), x),
    ]
}

pub fn gelu_mul_cases(n: usize, lies: Lies) -> Vec<Case> {
    let x = arg(&[2, 3, n]).lies(lies);
    vec![
        gelu_mul(x.clone(), x.clone()),
        gelu_mul(x.clone().times(20.0), arg(&[2, 3, n])),
        gelu_mul(arg(&[n]), arg(&[n]).frozen()),
        gelu_mul(x.clone().frozen(), x),
    ]
}

pub fn cross_entropy_cases(n: usize, lies: Lies) -> Vec<Case> {
    vec![cross_entropy(arg(&[5, n]).lies(lies)), cross_entropy(arg(&[n.min(1000), 7]).times(9.0).lies(lies))]
}

pub fn lora_delta_cases(n: usize, lies: Lies) -> Vec<Case> {
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

pub fn lora_linear_cases(n: usize, lies: Lies) -> Vec<Case> {
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
    let mut narrow_base = args(n, 200);
    narrow_base[3] = narrow_base[3].clone().narrow();
    vec![
        lora_linear(args(n, 5), None),
        lora_linear(narrow_base.clone(), None),
        lora_linear(narrow_base, dropout),
        lora_linear(wide_adapter, dropout),
        lora_linear(without_bias, dropout),
        lora_linear(frozen_x, dropout),
    ]
}

pub fn frozen_linear_cases(n: usize, lies: Lies) -> Vec<Case> {
    let lying = |dims: &[usize]| arg(dims).lies(lies);
    vec![
        frozen_linear(vec![lying(&[2, 3, n]), lying(&[5, n]).frozen(), lying(&[5]).frozen()]),
        frozen_linear(vec![lying(&[3, 5]), lying(&[n, 5]).frozen()]),
        frozen_linear(vec![lying(&[2, 3, n]), lying(&[200, n]).frozen().narrow(), lying(&[200]).frozen()]),
        frozen_linear(vec![lying(&[40, 3]), lying(&[n, 3]).frozen().narrow()]),
    ]
}

pub fn attention_cases(n: usize, lies: Lies) -> Vec<Case> {
    // The sizes are of the head's width or of the keys; Candle itself cannot read a window of an empty tensor.
    let lies = if n == 0 { Lies::Contiguous } else { lies };
    let kv = |s, d| [arg(&[2, s, 2, d]).lies(lies), arg(&[2, s, 2, d]).lies(lies)];
    let keys = n.min(100);
    vec![
        attention(arg(&[2, 3, 4, n.min(1000)]).lies(lies), kv(5, n.min(1000)), 0.3, Mask::Causal),
        attention(arg(&[2, keys, 4, 8]).lies(lies), kv(keys, 8), 0.3, Mask::Causal),
        attention(arg(&[2, 2, 4, 8]).lies(lies), kv(keys.max(2), 8), 0.3, Mask::None),
        // Whole tiles, for a GPU.
        attention(arg(&[2, 2, 4, 16]).lies(lies), kv(keys.max(2), 16), 0.3, Mask::None),
        // Two keys at least: with one the gradient of scores is a difference of equals, of which the reference has none.
        attention(arg(&[2, keys.max(2), 4, 48]).lies(lies), kv(keys.max(2), 48), 0.2, Mask::Causal),
        attention(arg(&[2, 2, 4, 16]).lies(lies).frozen(), kv(keys.max(2), 16), 0.7, Mask::Causal),
        // A scale for which there are no tiles.
        attention(arg(&[2, 3, 2, 16]), kv(5, 16), -0.3, Mask::None),
    ]
}

pub fn add_cases(n: usize, lies: Lies) -> Vec<Case> {
    vec![add(arg(&[2, 3, n]).lies(lies), arg(&[2, 3, n]).lies(lies)), add(arg(&[n]), arg(&[n]).frozen())]
}

pub fn linear_cross_entropy_cases(n: usize, lies: Lies) -> Vec<Case> {
    let lying = |dims: [usize; 2]| arg(&dims).lies(lies);
    let args = |rows: usize, width: usize, vocabulary: usize| {
        vec![lying([rows, width]), lying([vocabulary, width]).frozen()]
    };
    let mut narrow = args(7, 33, n);
    narrow[1] = narrow[1].clone().narrow();
    vec![
        linear_cross_entropy(args(7, 5, n), false),
        linear_cross_entropy(args(n.min(1000), 5, 9), false),
        linear_cross_entropy(args(n.min(1000), 5, 9), true),
        linear_cross_entropy(narrow, false),
    ]
}

/// The cases of every operation.
pub fn all_cases(n: usize, lies: Lies) -> Vec<Case> {
    [
        softmax_cases,
        rms_norm_cases,
        layer_norm_cases,
        rope_cases,
        silu_mul_cases,
        gelu_mul_cases,
        cross_entropy_cases,
        linear_cross_entropy_cases,
        attention_cases,
        add_cases,
        lora_delta_cases,
        lora_linear_cases,
        frozen_linear_cases,
    ]
    .into_iter()
    .flat_map(|cases| cases(n, lies))
    .collect()
}
