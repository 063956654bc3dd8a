//! [`attention`](super::attention) on a GPU where there are no kernels for tiles of it: in f32, whose products CUDA's matrix
//! units round, for heads that are not whole tiles or very wide, and before `sm_80`.
//!
//! Some queries of some groups of heads are taken at a time: their scores exist between two of Candle's products and a
//! softmax, and again in the backward. Under the causal mask a part has no keys after its last query's.

use candle_core::{DType, Result, Tensor};

use super::attention::Gradients;
use super::softmax::{self, Mask, SoftmaxOptions};
use crate::backend::{Attempt, gpu};

/// Scores that exist at a time, if that is more than those of one group of heads.
const SCORES: usize = 1 << 27;
/// Parts of the queries under the causal mask, where that leaves each so many.
const SPANS: usize = 4;
const SPAN: usize = 256;

/// `softmax(scale · q·kᵀ)·v`.
pub(super) fn forward(arguments: &[Tensor; 3], options: SoftmaxOptions) -> Attempt<Tensor> {
    forward_in_parts(arguments, options, SCORES, SPAN)
}

/// The gradients that are wanted.
pub(super) fn gradients(gradients: &Gradients) -> Attempt<[Option<Tensor>; 3]> {
    gradients_in_parts(gradients, SCORES, SPAN)
}

/// With so many scores at a time and at least so many queries.
fn forward_in_parts(
    [q, k, v]: &[Tensor; 3],
    options: SoftmaxOptions,
    scores: usize,
    span: usize,
) -> Attempt<Tensor> {
    let groups = Groups::of(q, k, options)?;
    let [q, k, v] = [groups.rows(q)?, groups.rows(k)?, groups.rows(v)?];
    let mut spans = Vec::new();
    for span in groups.spans(span) {
        let q = span.queries(&q)?;
        let part = |(first, count)| -> Attempt<Tensor> {
            let q = q.narrow(0, first, count)?;
            let [k, v] = [span.keys(&k, first, count)?, span.keys(&v, first, count)?];
            Ok(span.weights(&q, &k, options)?.matmul(&v)?)
        };
        let parts = groups.parts(&span, scores).map(part).collect::<Attempt<Vec<Tensor>>>()?;
        spans.push(gpu::contiguous(&groups.heads(&Tensor::cat(&parts, 0)?, groups.heads)?)?);
    }
    Ok(Tensor::cat(&spans, 1)?.contiguous()?)
}

/// With so many scores at a time and at least so many queries.
fn gradients_in_parts(
    &Gradients { arguments: [q, k, v], grad, options, wanted: [wants_q, wants_k, wants_v], .. }: &Gradients,
    scores: usize,
    span: usize,
) -> Attempt<[Option<Tensor>; 3]> {
    let groups = Groups::of(q, k, options)?;
    let [q, k, v, grad] = [groups.rows(q)?, groups.rows(k)?, groups.rows(v)?, groups.rows(grad)?];
    let (mut dq, mut dk, mut dv) = (Vec::new(), Sum::default(), Sum::default());
    // Backwards, because the last span sees all keys: its gradients are the sums that the others add to.
    let spans: Vec<Span> = groups.spans(span).collect();
    for span in spans.iter().rev() {
        let (q, grad) = (span.queries(&q)?, span.queries(&grad)?);
        let mut parts = [const { Vec::new() }; 3];
        for (first, count) in groups.parts(span, scores) {
            let [q, grad] = [q.narrow(0, first, count)?, grad.narrow(0, first, count)?];
            let [k, v] = [span.keys(&k, first, count)?, span.keys(&v, first, count)?];
            let weights = span.weights(&q, &k, options)?;
            if wants_v {
                parts[2].push(weights.t()?.matmul(&grad)?);
            }
            if wants_q || wants_k {
                let of_weights = grad.matmul(&v.t()?)?;
                let (y, g) = (span.by_query(&weights)?, span.by_query(&of_weights)?);
                let of_scores = softmax::gradient_in_place(&y, &g, options)?;
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

    use candle_core::Device;

    use super::super::attention::Forward;
    use super::*;
    use crate::backend::{Kernel, simulate};

    /// A GPU's parts, from one group of heads at a time to all at once, against the processor's blocks.
    #[test]
    fn parts_are_those_of_the_processor() {
        let random = |dims: [usize; 4]| Tensor::randn(0f32, 1.0, &dims, &Device::Cpu).unwrap();
        let arguments = [random([2, 5, 6, 4]), random([2, 7, 3, 4]), random([2, 7, 3, 4])];
        let grad = random([2, 5, 6, 4]);
        for mask in [Mask::None, Mask::Causal] {
            let options = SoftmaxOptions { scale: 0.6, mask };
            let forward = Forward { arguments: &arguments, options };
            let gradients =
                |wanted| Gradients { arguments: &arguments, grad: &grad, options, wanted, saved: None };
            let all = gradients([true; 3]);
            let expected = (forward.cpu().unwrap().y, all.cpu().unwrap());
            for (scores, span) in [(1, 1), (2 * 5 * 7 * 2, 2), (2 * 5 * 7 * 4, 3), (SCORES, SPAN)] {
                let got = simulate(|| {
                    let y = forward_in_parts(&arguments, options, scores, span).unwrap();
                    (y, gradients_in_parts(&all, scores, span).unwrap())
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
                let got = simulate(|| gradients_in_parts(&gradients(wanted), 1, 2)).unwrap();
                assert_eq!(got.map(|gradient| gradient.is_some()), wanted);
            }
        }
    }
}
