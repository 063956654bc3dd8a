//! Attention (Vaswani et al., 2017): `y = softmax(scale·q·kᵀ)·v` for each head, keys and values shared by groups of query
//! heads (Ainslie et al., 2023).
//!
//! On the processor a block of queries is taken at a time: its scores and weights exist only while its result is computed,
//! and under the causal mask for no more keys than the block sees. The backward computes the weights again, block by
//! block, so that nothing is saved beside the arguments: with `P` the weights and `g` the gradient of `y`,
//! `dv = Pᵀ·g`, `ds = scale·P∘(g·vᵀ − Σ_k P∘(g·vᵀ))`, `dq = ds·k`, `dk = dsᵀ·q`. The gradients of shared keys and values
//! are the sums over their group, in its order.
//!
//! On a GPU it is composed: Candle's products around [`softmax`](crate::softmax), which hold all scores.

use candle_core::{D, DType, Device, Result, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::softmax::{self, Mask, SoftmaxOptions};
use crate::backend;
use crate::backend::products::{Heads, with_heads};
use crate::check;
use crate::cpu::attention::{Head, HeadGradients, QUERIES};
use crate::cpu::gemm::{self, Store};
use crate::graph::{self, Backward};

const OP: &str = "attention";

/// `softmax(scale · q·kᵀ)·v` for queries `q [b, t, h, d]`, keys and values `k, v [b, s, g, d]` (f32, f16 or bf16, views of
/// any strides), in `q`'s shape and dtype. `g` divides `h`: query head `i` reads head `i / (h/g)` of keys and values.
/// [`Mask::Causal`] takes the queries for the last of the keys.
///
/// # Errors
/// Other ranks, shapes, dtypes or devices, a scale that is not finite; under [`Mask::Causal`] more queries than keys.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: SoftmaxOptions) -> Result<Tensor> {
    check(q, k, v, options)?;
    let composition = || composed(q, k, v, options, crate::softmax);
    backend::dispatch(OP, q, || Ok(fused(q, k, v, options)?), composition)
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, options: SoftmaxOptions) -> Result<()> {
    check::float(OP, "q", q)?;
    check::rank(OP, "q", q, 4)?;
    check::rank(OP, "k", k, 4)?;
    check::finite(OP, "scale", options.scale)?;
    let ((b, t, h, d), (_, s, g, _)) = (q.dims4()?, k.dims4()?);
    check::like(OP, "k", k, q, &[b, s, g, d])?;
    check::like(OP, "v", v, q, &[b, s, g, d])?;
    if g == 0 || h % g != 0 {
        bail!("{OP}: the heads of k must divide the {h} of q, got {g}");
    }
    if options.mask == Mask::Causal && t > s {
        bail!("{OP}: causal queries must not be more than the {s} keys, got {t}");
    }
    Ok(())
}

/// [`attention`] in plain Candle operations.
pub fn reference(q: &Tensor, k: &Tensor, v: &Tensor, options: SoftmaxOptions) -> Result<Tensor> {
    check(q, k, v, options)?;
    composed(q, k, v, options, softmax::reference)
}

fn composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: SoftmaxOptions,
    softmax: impl Fn(&Tensor, SoftmaxOptions) -> Result<Tensor>,
) -> Result<Tensor> {
    let ((b, t, h, d), (_, s, g, _)) = (q.dims4()?, k.dims4()?);
    if q.elem_count() == 0 || s == 0 {
        return q.zeros_like();
    }
    // A group's queries are the rows of one product with its keys.
    let rows = h / g * t;
    let by_head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let q = by_head(q)?.reshape((b, g, rows, d))?;
    let scores = q.matmul(&by_head(k)?.transpose(D::Minus2, D::Minus1)?)?.reshape((b, h, t, s))?;
    let weights = softmax(&scores, options)?.reshape((b, g, rows, s))?;
    weights.matmul(&by_head(v)?)?.reshape((b, h, t, d))?.transpose(1, 2)?.contiguous()
}

fn fused(q: &Tensor, k: &Tensor, v: &Tensor, options: SoftmaxOptions) -> Result<Tensor> {
    let y = match q.dtype() {
        DType::F32 => forward::<f32>(q, k, v, options),
        DType::F16 => forward::<f16>(q, k, v, options),
        _ => forward::<bf16>(q, k, v, options),
    }?;
    graph::record3(q, k, v, y, Attention { options })
}

/// The head `h` of batch `b`, whose keys and values are those of `h / group`.
fn head<'a>(
    [q, k, v]: &[Heads<'a>; 3],
    group: usize,
    [b, h]: [usize; 2],
    options: SoftmaxOptions,
) -> Result<Head<'a>> {
    Ok(Head {
        q: q.at(b, h)?,
        k: k.at(b, h / group)?,
        v: v.at(b, h / group)?,
        scale: options.scale,
        causal: options.mask == Mask::Causal,
    })
}

fn forward<T: Store>(q: &Tensor, k: &Tensor, v: &Tensor, options: SoftmaxOptions) -> Result<Tensor> {
    let ((batches, tokens, heads, width), (_, _, kv_heads, _)) = (q.dims4()?, k.dims4()?);
    let group = heads / kv_heads;
    let blocks = tokens.div_ceil(QUERIES);
    let y = with_heads([q.detach(), k.detach(), v.detach()].each_ref(), |tensors| {
        // A block's queries are side by side in the result, all heads of one after the other.
        let block = |index: usize| -> Result<Vec<T>> {
            let (b, first) = (index / blocks, index % blocks * QUERIES);
            let count = QUERIES.min(tokens - first);
            let compute = |h| Ok(head(&tensors, group, [b, h], options)?.forward(first, count));
            let of_heads = (0..heads).into_par_iter().map(compute).collect::<Result<Vec<_>>>()?;
            let mut rows = Vec::with_capacity(count * heads * width);
            for i in 0..count {
                for y in &of_heads {
                    gemm::append(&y[i * width..(i + 1) * width], &mut rows);
                }
            }
            Ok(rows)
        };
        (0..batches * blocks).into_par_iter().map(block).collect::<Result<Vec<_>>>()
    })?;
    Tensor::from_vec(y.concat(), q.shape(), &Device::Cpu)
}

struct Attention {
    options: SoftmaxOptions,
}

impl Backward<3> for Attention {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [q, k, v]: [&Tensor; 3], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let ((b, t, h, d), (_, s, g, _)) = (q.dims4()?, k.dims4()?);
        let group = h / g;
        let arguments = [q, k, v].map(Tensor::detach);
        let [arg_q, arg_k, arg_v] = arguments.each_ref();
        let gradients = with_heads([arg_q, arg_k, arg_v, grad], |[q, k, v, grad]| {
            let tensors = [q, k, v];
            let compute = |i: usize| {
                let at = [i / h, i % h];
                Ok(head(&tensors, group, at, self.options)?.backward(grad.at(at[0], at[1])?))
            };
            (0..b * h).into_par_iter().map(compute).collect::<Result<Vec<HeadGradients>>>()
        })?;
        let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
        for (i, head) in gradients.into_iter().enumerate() {
            dq.extend(head.q);
            for (sums, part) in [(&mut dk, head.k), (&mut dv, head.v)] {
                if i % group == 0 {
                    sums.extend(part);
                } else {
                    let start = sums.len() - part.len();
                    sums[start..].iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
            }
        }
        let gradient = |arg: &Tensor, values: Vec<f32>, dims: [usize; 4]| {
            if !arg.track_op() {
                return Ok(None);
            }
            Tensor::from_vec(values, &dims, &Device::Cpu)?.to_dtype(arg.dtype())?.transpose(1, 2).map(Some)
        };
        Ok([gradient(q, dq, [b, h, t, d])?, gradient(k, dk, [b, g, s, d])?, gradient(v, dv, [b, g, s, d])?])
    }
}
