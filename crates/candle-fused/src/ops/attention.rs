//! Attention (Vaswani et al., 2017): `y = softmax(scale·q·kᵀ)·v` for each head, keys and values shared by groups of query
//! heads (Ainslie et al., 2023).
//!
//! On the processor a block of queries is taken at a time: its scores and weights exist only while its result is computed,
//! and under the causal mask for no more keys than the block sees. The backward computes the weights again, block by
//! block, so that nothing is saved beside the arguments: with `P` the weights and `g` the gradient of `y`,
//! `dv = Pᵀ·g`, `ds = scale·P∘(g·vᵀ − Σ_k P∘(g·vᵀ))`, `dq = ds·k`, `dk = dsᵀ·q`. The gradients of shared keys and values
//! are the sums over their group, in its order.
//!
//! On a GPU some queries of some groups of heads are taken at a time: their scores exist between two of Candle's products
//! and a softmax, and again in the backward. Under the causal mask a part has no keys after its last query's.

use candle_core::{D, DType, Device, Result, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::softmax::{self, Mask, SoftmaxOptions};
use crate::backend::products::{Heads, with_heads};
use crate::backend::{self, Attempt, Kernel, gpu};
use crate::check;
use crate::cpu::attention::{Head, HeadGradients, QUERIES};
use crate::cpu::gemm;
use crate::cpu::lanes::Element;
use crate::graph::{self, Backward};

const OP: &str = "attention";

/// Scores that exist at a time on a GPU, if that is more than those of one group of heads.
const SCORES: usize = 1 << 27;
/// Parts of the queries under the causal mask, where that leaves each so many.
const SPANS: usize = 4;
const SPAN: usize = 256;

/// `softmax(scale · q·kᵀ)·v` for queries `q [b, t, h, d]`, keys and values `k, v [b, s, g, d]` (f32, f16 or bf16, views of
/// any strides), in `q`'s shape and dtype. `g` divides `h`: query head `i` reads head `i / (h/g)` of keys and values.
/// [`Mask::Causal`] takes the queries for the last of the keys.
///
/// # Errors
/// Other ranks, shapes, dtypes or devices, a scale that is not finite; under [`Mask::Causal`] more queries than keys.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: SoftmaxOptions) -> Result<Tensor> {
    check(q, k, v, options)?;
    let composition = || composed(q, k, v, options, crate::softmax);
    backend::dispatch(OP, q, || fused(q, k, v, options), composition)
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

fn fused(q: &Tensor, k: &Tensor, v: &Tensor, options: SoftmaxOptions) -> Attempt<Tensor> {
    let arguments = [q, k, v].map(Tensor::detach);
    let y = backend::run(q.device(), &Forward { arguments: &arguments, options })?;
    Ok(graph::record3(q, k, v, y, Attention { options })?)
}

struct Forward<'a> {
    /// q, k and v
    arguments: &'a [Tensor; 3],
    options: SoftmaxOptions,
}

impl Kernel for Forward<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let [q, k, v] = self.arguments;
        match q.dtype() {
            DType::F32 => forward::<f32>(q, k, v, self.options),
            DType::F16 => forward::<f16>(q, k, v, self.options),
            _ => forward::<bf16>(q, k, v, self.options),
        }
    }

    fn gpu(&self) -> Attempt<Tensor> {
        self.in_parts(SCORES, SPAN)
    }
}

impl Forward<'_> {
    /// The output of [`Kernel::gpu`], with so many scores at a time and at least so many queries.
    fn in_parts(&self, scores: usize, span: usize) -> Attempt<Tensor> {
        let [q, k, v] = self.arguments;
        let groups = Groups::of(q, k, self.options)?;
        if groups.is_empty() {
            return Ok(q.zeros_like()?);
        }
        let [q, k, v] = [groups.rows(q)?, groups.rows(k)?, groups.rows(v)?];
        let mut spans = Vec::new();
        for span in groups.spans(span) {
            let q = span.queries(&q)?;
            let part = |(first, count)| -> Attempt<Tensor> {
                let q = q.narrow(0, first, count)?;
                let [k, v] = [span.keys(&k, first, count)?, span.keys(&v, first, count)?];
                Ok(span.weights(&q, &k, self.options)?.matmul(&v)?)
            };
            let parts = groups.parts(&span, scores).map(part).collect::<Attempt<Vec<Tensor>>>()?;
            spans.push(gpu::contiguous(&groups.heads(&Tensor::cat(&parts, 0)?, groups.heads)?)?);
        }
        Ok(Tensor::cat(&spans, 1)?.contiguous()?)
    }
}

/// How heads lie together on a GPU: those of all batches that share keys are the rows of one product with these.
struct Groups {
    batches: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
    causal: bool,
}

/// Some consecutive queries of every head, and how many keys they see.
struct Span {
    first: usize,
    count: usize,
    keys: usize,
    /// Query heads that share keys.
    shared: usize,
}

impl Span {
    /// Of the rows `[b·g, h/g·t, d]` those of this span.
    fn queries(&self, rows: &Tensor) -> Result<Tensor> {
        let (groups, all, width) = rows.dims3()?;
        if all == self.shared * self.count {
            return Ok(rows.clone());
        }
        let of_span = rows.reshape((groups, self.shared, (), width))?.narrow(2, self.first, self.count)?;
        gpu::contiguous(&of_span)?.reshape((groups, self.shared * self.count, width))
    }

    /// Of the keys `[b·g, s, d]` of some groups those that this span sees.
    fn keys(&self, rows: &Tensor, first: usize, count: usize) -> Result<Tensor> {
        rows.narrow(0, first, count)?.narrow(1, 0, self.keys)
    }

    /// The scores `[n, h/g·t, s]` of some groups as `[n·h/g, t, s]`, which a mask knows.
    fn by_query(&self, scores: &Tensor) -> Result<Tensor> {
        scores.reshape(((), self.count, self.keys))
    }

    /// `softmax(scale·q·kᵀ)` of some groups, `[n, h/g·t, s]`.
    fn weights(&self, q: &Tensor, k: &Tensor, options: SoftmaxOptions) -> Attempt<Tensor> {
        let scores = q.matmul(&k.t()?)?;
        Ok(softmax::in_place(&self.by_query(&scores)?, options)?.reshape(scores.shape())?)
    }
}

impl Groups {
    fn of(q: &Tensor, k: &Tensor, options: SoftmaxOptions) -> Result<Self> {
        let ((batches, queries, heads, width), (_, keys, kv_heads, _)) = (q.dims4()?, k.dims4()?);
        let causal = options.mask == Mask::Causal;
        Ok(Self { batches, queries, keys, heads, kv_heads, width, causal })
    }

    fn is_empty(&self) -> bool {
        self.batches * self.queries * self.heads * self.width * self.keys == 0
    }

    /// `[b, tokens, heads, d]` as `[b·g, rows, d]`.
    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let groups = self.batches * self.kv_heads;
        let rows = x.elem_count() / (groups * self.width);
        gpu::contiguous(&x.transpose(1, 2)?)?.reshape((groups, rows, self.width))
    }

    /// The other way, a view: `heads` are those of queries or of keys.
    fn heads(&self, rows: &Tensor, heads: usize) -> Result<Tensor> {
        rows.reshape((self.batches, heads, (), self.width))?.transpose(1, 2)
    }

    /// All queries, in parts of `least` at least if there are so many, where the mask hides keys from the earlier ones.
    fn spans(&self, least: usize) -> impl Iterator<Item = Span> {
        let size = if self.causal { self.queries.div_ceil(SPANS).max(least) } else { self.queries };
        (0..self.queries).step_by(size.max(1)).map(move |first| {
            let count = size.min(self.queries - first);
            let keys = if self.causal { first + count + self.keys - self.queries } else { self.keys };
            Span { first, count, keys, shared: self.heads / self.kv_heads }
        })
    }

    /// The first group and the number of groups of each part, none of which has more scores than this unless it is one
    /// group.
    fn parts(&self, span: &Span, scores: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let all = self.batches * self.kv_heads;
        let of_group = span.shared * span.count * span.keys;
        let count = (scores / of_group.max(1)).clamp(1, all.max(1));
        (0..all).step_by(count).map(move |first| (first, count.min(all - first)))
    }
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

fn forward<T: Element>(q: &Tensor, k: &Tensor, v: &Tensor, options: SoftmaxOptions) -> Result<Tensor> {
    let ((batches, tokens, heads, width), (_, _, kv_heads, _)) = (q.dims4()?, k.dims4()?);
    let group = heads / kv_heads;
    let blocks = tokens.div_ceil(QUERIES);
    let y = with_heads([q, k, v], |tensors| {
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
        let wanted = [q.track_op(), k.track_op(), v.track_op()];
        let arguments = [q, k, v].map(Tensor::detach);
        let gradients = Gradients { arguments: &arguments, grad, options: self.options, wanted };
        Ok(backend::run(q.device(), &gradients)?)
    }
}

struct Gradients<'a> {
    /// q, k and v
    arguments: &'a [Tensor; 3],
    grad: &'a Tensor,
    options: SoftmaxOptions,
    wanted: [bool; 3],
}

impl Kernel for Gradients<'_> {
    /// Those that are wanted.
    type Output = [Option<Tensor>; 3];

    fn cpu(&self) -> Result<Self::Output> {
        let [q, k, v] = self.arguments;
        let ((b, t, h, d), (_, s, g, _)) = (q.dims4()?, k.dims4()?);
        let group = h / g;
        let gradients = with_heads([q, k, v, self.grad], |[q, k, v, grad]| {
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
        let gradient = |wanted: bool, values: Vec<f32>, dims: [usize; 4]| {
            if !wanted {
                return Ok(None);
            }
            Tensor::from_vec(values, &dims, &Device::Cpu)?.to_dtype(q.dtype())?.transpose(1, 2).map(Some)
        };
        let [wants_q, wants_k, wants_v] = self.wanted;
        Ok([
            gradient(wants_q, dq, [b, h, t, d])?,
            gradient(wants_k, dk, [b, g, s, d])?,
            gradient(wants_v, dv, [b, g, s, d])?,
        ])
    }

    fn gpu(&self) -> Attempt<Self::Output> {
        self.in_parts(SCORES, SPAN)
    }
}

impl Gradients<'_> {
    /// The output of [`Kernel::gpu`], with so many scores at a time and at least so many queries.
    fn in_parts(&self, scores: usize, span: usize) -> Attempt<[Option<Tensor>; 3]> {
        let [q, k, v] = self.arguments;
        let (groups, [wants_q, wants_k, wants_v]) = (Groups::of(q, k, self.options)?, self.wanted);
        if groups.is_empty() {
            let zeros = |(x, wanted): (&Tensor, bool)| wanted.then(|| x.zeros_like()).transpose();
            return Ok([zeros((q, wants_q))?, zeros((k, wants_k))?, zeros((v, wants_v))?]);
        }
        let [q, k, v, grad] = [groups.rows(q)?, groups.rows(k)?, groups.rows(v)?, groups.rows(self.grad)?];
        let (mut dq, mut dk, mut dv) = (Vec::new(), Sum::default(), Sum::default());
        // Backwards, because the last span sees all keys: its gradients are the sums that the others add to.
        let spans: Vec<Span> = groups.spans(span).collect();
        for span in spans.iter().rev() {
            let (q, grad) = (span.queries(&q)?, span.queries(&grad)?);
            let mut parts = [const { Vec::new() }; 3];
            for (first, count) in groups.parts(span, scores) {
                let [q, grad] = [q.narrow(0, first, count)?, grad.narrow(0, first, count)?];
                let [k, v] = [span.keys(&k, first, count)?, span.keys(&v, first, count)?];
                let weights = span.weights(&q, &k, self.options)?;
                if wants_v {
                    parts[2].push(weights.t()?.matmul(&grad)?);
                }
                if wants_q || wants_k {
                    let of_weights = grad.matmul(&v.t()?)?;
                    let (y, g) = (span.by_query(&weights)?, span.by_query(&of_weights)?);
                    let of_scores = softmax::gradient_in_place(&y, &g, self.options)?;
                    let of_scores = of_scores.reshape(weights.shape())?;
                    drop((weights, of_weights, y, g));
                    if wants_q {
                        parts[0].push(of_scores.matmul(&k)?);
                    }
                    if wants_k {
                        parts[1].push(of_scores.t()?.matmul(&q)?);
                    }
                }
            }
            let [of_q, of_k, of_v] = parts;
            if wants_q {
                dq.push(gpu::contiguous(&groups.heads(&Tensor::cat(&of_q, 0)?, groups.heads)?)?);
            }
            dk.add(&of_k, span.keys)?;
            dv.add(&of_v, span.keys)?;
        }
        dq.reverse();
        let dq = wants_q.then(|| Tensor::cat(&dq, 1)).transpose()?;
        let of_keys = |sum: Sum| match sum.total(k.dtype())? {
            Some(rows) => groups.heads(&rows, groups.kv_heads).map(Some),
            None => Ok(None),
        };
        Ok([dq, of_keys(dk)?, of_keys(dv)?])
    }
}

/// The sum of gradients of keys or values, `[b·g, s, d]`, of which later ones reach less far. More than one are added in f32.
#[derive(Default)]
struct Sum(Vec<Tensor>);

impl Sum {
    /// Adds what is in parts along the groups, for the first `keys`.
    fn add(&mut self, parts: &[Tensor], keys: usize) -> Result<()> {
        if parts.is_empty() {
            return Ok(());
        }
        let part = Tensor::cat(parts, 0)?;
        let Some(before) = self.0.pop() else {
            self.0.push(part);
            return Ok(());
        };
        // What this part reaches is added to; the rest is done.
        let (before, part) = (before.to_dtype(DType::F32)?, part.to_dtype(DType::F32)?);
        let rest = before.dim(1)? - keys;
        self.0.push(before.narrow(1, keys, rest)?);
        self.0.push((gpu::contiguous(&before.narrow(1, 0, keys)?)? + part)?);
        Ok(())
    }

    /// The sum, in this dtype.
    fn total(mut self, dtype: DType) -> Result<Option<Tensor>> {
        self.0.reverse();
        match &self.0[..] {
            [] => Ok(None),
            [all] => all.to_dtype(dtype).map(Some),
            stretches => {
                let stretches = stretches.iter().map(|x| gpu::contiguous(x)?.to_dtype(dtype));
                Tensor::cat(&stretches.collect::<Result<Vec<_>>>()?, 1).map(Some)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::backend::simulate;

    /// A GPU's parts, from one group of heads at a time to all at once, against the processor's blocks.
    #[test]
    fn parts_are_those_of_the_processor() {
        let random = |dims: [usize; 4]| Tensor::randn(0f32, 1.0, &dims, &Device::Cpu).unwrap();
        let arguments = [random([2, 5, 6, 4]), random([2, 7, 3, 4]), random([2, 7, 3, 4])];
        let grad = random([2, 5, 6, 4]);
        for mask in [Mask::None, Mask::Causal] {
            let options = SoftmaxOptions { scale: 0.6, mask };
            let forward = Forward { arguments: &arguments, options };
            let gradients = Gradients { arguments: &arguments, grad: &grad, options, wanted: [true; 3] };
            let expected = (forward.cpu().unwrap(), gradients.cpu().unwrap());
            for (scores, span) in [(1, 1), (2 * 5 * 7 * 2, 2), (2 * 5 * 7 * 4, 3), (SCORES, SPAN)] {
                let got = simulate(|| {
                    (forward.in_parts(scores, span).unwrap(), gradients.in_parts(scores, span).unwrap())
                });
                let pairs = [(Some(got.0), Some(&expected.0))];
                for (got, expected) in
                    pairs.into_iter().chain(got.1.into_iter().zip(expected.1.iter().map(Option::as_ref)))
                {
                    let (got, expected) = (got.unwrap(), expected.unwrap());
                    assert_eq!(got.dims(), expected.dims());
                    let difference = (got - expected).unwrap().abs().unwrap().flatten_all().unwrap();
                    assert!(
                        difference.max(0).unwrap().to_scalar::<f32>().unwrap() < 1e-5,
                        "{mask:?} {scores}"
                    );
                }
            }
            for wanted in [[true, false, false], [false, true, false], [false, false, true]] {
                let gradients = Gradients { arguments: &arguments, grad: &grad, options, wanted };
                let got = simulate(|| gradients.in_parts(1, 2)).unwrap();
                assert_eq!(got.map(|gradient| gradient.is_some()), wanted);
            }
        }
    }
}
