//! The operations in float64, written from their definitions in plain Candle operations.

use candle_core::{D, DType, Result, Tensor};
use candle_fused::{Dropout, LoraLayout, RopeLayout};

pub fn softmax(x: &Tensor, scale: f64, causal: bool) -> Result<Tensor> {
    let mut logits = (x * scale)?;
    if causal && x.elem_count() > 0 {
        let (q, k) = (x.dim(D::Minus2)?, x.dim(D::Minus1)?);
        let hidden: Vec<f64> =
            (0..q * k).map(|i| if i % k <= i / k + (k - q) { 0.0 } else { f64::NEG_INFINITY }).collect();
        logits = logits.broadcast_add(&Tensor::from_vec(hidden, (q, k), x.device())?)?;
    }
    if x.elem_count() == 0 {
        return Ok(logits);
    }
    let exp = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    normalised(x, x, weight, None, eps)
}

pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return normalised(x, x, weight, bias, eps);
    }
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    normalised(x, &centred, weight, bias, eps)
}

fn normalised(
    x: &Tensor,
    centred: &Tensor,
    w: Option<&Tensor>,
    b: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let mut y = if x.elem_count() == 0 {
        (centred * 1.5)?
    } else {
        centred.broadcast_div(&(centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?
    };
    if let Some(w) = w {
        y = y.broadcast_mul(w)?;
    }
    if let Some(b) = b {
        y = y.broadcast_add(b)?;
    }
    Ok(y)
}

/// As `x·C + partner(x)·S` with tables of full width, so that it shares nothing with the other two.
pub fn rope(
    x: &Tensor,
    cos: &[f64],
    sin: &[f64],
    half: usize,
    per_batch: bool,
    layout: RopeLayout,
) -> Result<Tensor> {
    let (b, _, t, d) = x.dims4()?;
    if x.elem_count() == 0 {
        return x * 1.0;
    }
    let mut partner: Vec<u32> = (0..d as u32).collect();
    let (mut c, mut s) = (vec![1f64; b * t * d], vec![0f64; b * t * d]);
    for i in 0..half {
        let (u, v) = match layout {
            RopeLayout::Half => (i, i + half),
            RopeLayout::Interleaved => (2 * i, 2 * i + 1),
        };
        partner.swap(u, v);
        for position in 0..b * t {
            let at = if per_batch { position } else { position % t } * half + i;
            c[position * d + u] = cos[at];
            c[position * d + v] = cos[at];
            s[position * d + u] = -sin[at];
            s[position * d + v] = sin[at];
        }
    }
    let table = |values| Tensor::from_vec(values, (b, 1, t, d), x.device());
    let swapped = x.contiguous()?.index_select(&Tensor::new(partner, x.device())?, 3)?;
    x.broadcast_mul(&table(c)?)? + swapped.broadcast_mul(&table(s)?)?
}

pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    // σ(z) = (1 + tanh(z/2))/2, whose derivative does not overflow.
    let sigmoid = (((gate * 0.5)?.tanh()? + 1.0)? * 0.5)?;
    (gate * sigmoid)? * up
}

pub fn gelu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let root = std::f64::consts::FRAC_2_PI.sqrt();
    let t = ((gate + ((gate * 0.044_715)? * gate.sqr()?)?)? * root)?;
    let share = ((t.tanh()? + 1.0)? * 0.5)?;
    (gate * share)? * up
}

/// Head by head, on tensors that hold nothing else.
pub fn attention([q, k, v]: [&Tensor; 3], scale: f64, causal: bool) -> Result<Tensor> {
    let ((b, _, h, _), g) = (q.dims4()?, k.dim(2)?);
    if q.elem_count() == 0 {
        return q * 1.0;
    }
    let matrix = |x: &Tensor, b: usize, h: usize| {
        x.narrow(0, b, 1)?.narrow(2, h, 1)?.squeeze(2)?.squeeze(0)?.contiguous()
    };
    let head = |i: usize| -> Result<Tensor> {
        let (b, h, g) = (i / h, i % h, i % h / (h / g));
        let weights = softmax(&matrix(q, b, h)?.matmul(&matrix(k, b, g)?.t()?)?, scale, causal)?;
        weights.matmul(&matrix(v, b, g)?)
    };
    let heads = (0..b * h).map(head).collect::<Result<Vec<_>>>()?;
    let batches = heads.chunks(h).map(|heads| Tensor::stack(heads, 1)).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&batches, 0)
}

/// The mean over rows with a target.
pub fn cross_entropy(x: &Tensor, targets: &[Option<usize>]) -> Result<Tensor> {
    let (n, v) = x.dims2()?;
    let mut picked = vec![0f64; n * v];
    for (row, target) in targets.iter().enumerate() {
        if let Some(target) = target {
            picked[row * v + target] = 1.0;
        }
    }
    let count = targets.iter().flatten().count();
    if count == 0 {
        return x.flatten_all()?.narrow(0, 0, 0)?.sum_all();
    }
    let counted: Vec<f64> = targets.iter().map(|t| if t.is_some() { 1.0 } else { 0.0 }).collect();
    let counted = Tensor::from_vec(counted, (n, 1), x.device())?;
    let picked = Tensor::from_vec(picked, (n, v), x.device())?;
    let max = x.max_keepdim(1)?.detach();
    let shifted = x.broadcast_sub(&max)?;
    let lse = shifted.exp()?.sum_keepdim(1)?.log()?;
    let loss = (lse - (shifted * picked)?.sum_keepdim(1)?)?;
    (loss * counted)?.sum_all()? / count as f64
}

pub fn lora_delta(x: &Tensor, a: &Tensor, b: &Tensor, scaling: f64, layout: LoraLayout) -> Result<Tensor> {
    let (a, b) = match layout {
        LoraLayout::Peft => (a.t()?, b.t()?),
        LoraLayout::Seed => (a.clone(), b.clone()),
    };
    product(&product(x, &a)?, &b)? * scaling
}

/// `x [..., k] · m [k, n]`.
pub fn product(x: &Tensor, m: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let k = dims.pop().unwrap();
    let rows: usize = dims.iter().product();
    dims.push(m.dim(1)?);
    x.reshape((rows, k))?.matmul(&m.contiguous()?)?.reshape(dims)
}

pub fn lora_linear(
    [x, w, a, b]: [&Tensor; 4],
    bias: Option<&Tensor>,
    scaling: f64,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let mut base = product(x, &w.t()?)?;
    if let Some(bias) = bias {
        base = base.broadcast_add(bias)?;
    }
    let dropped = match dropout {
        Some(dropout) => (x * Tensor::from_vec(mask(dropout, x.elem_count()), x.shape(), x.device())?)?,
        None => x.clone(),
    };
    base + lora_delta(&dropped, a, b, scaling, LoraLayout::Peft)?
}

/// The mask of the documentation's definition, with a second Philox, in 128-bit arithmetic.
pub fn mask(dropout: Dropout, count: usize) -> Vec<f64> {
    let threshold = (f64::from(dropout.p) * 2f64.powi(32)).round() as u64;
    let kept = f64::from(1.0 / (1.0 - dropout.p));
    let words = |block: u64| {
        let (mut c, mut k) =
            ([block & 0xFFFF_FFFF, block >> 32, 0, 0], [dropout.seed & 0xFFFF_FFFF, dropout.seed >> 32]);
        for _ in 0..10 {
            let (m0, m1) = (u128::from(c[0]) * 0xD251_1F53, u128::from(c[2]) * 0xCD9E_8D57);
            let part = |m: u128, shift: u32| ((m >> shift) & 0xFFFF_FFFF) as u64;
            c = [part(m1, 32) ^ c[1] ^ k[0], part(m1, 0), part(m0, 32) ^ c[3] ^ k[1], part(m0, 0)];
            k = [(k[0] + 0x9E37_79B9) & 0xFFFF_FFFF, (k[1] + 0xBB67_AE85) & 0xFFFF_FFFF];
        }
        c
    };
    (0..count).map(|i| if words(i as u64 / 4)[i % 4] >= threshold { kept } else { 0.0 }).collect()
}

pub fn frozen_linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = product(x, &w.t()?)?;
    bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}

pub fn wide(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}
