//! Attention (Vaswani et al., 2017): `y = softmax(scale·q·kᵀ)·v` for each head, keys and values shared by groups of query
//! heads (Ainslie et al., 2023).
//!
//! On the processor a block of queries is taken at a time: its scores and weights exist only while its result is computed,
//! and under the causal mask for no more keys than the block sees. The backward computes the weights again, block by
//! block, so that nothing is saved beside the arguments: with `P` the weights and `g` the gradient of `y`,
//! `dv = Pᵀ·g`, `ds = scale·P∘(g·vᵀ − Σ_k P∘(g·vᵀ))`, `dq = ds·k`, `dk = dsᵀ·q`. The gradients of shared keys and values
//! are the sums over their group, in its order.
//!
//! On a GPU the heads' rows are tiles of 16-bit values, multiplied by its matrix units: scores exist in registers alone
//! (`kernels/attention.metal`), and the logarithms of the sums of their exponentials are saved for the backward. Where a GPU
//! has units that the dialect does not reach, kernels of its own do the same (`kernels/hopper/`). What has no such tiles is
//! done by products (`attention_products.rs`).

use candle_core::{D, DType, Result, Shape, Tensor, bail};
use candlewick_kernels::attention::{Attention as Plans, AttentionGradients};
use half::{bf16, f16};

use super::attention_products;
use super::softmax::{self, Mask, SoftmaxOptions};
use crate::DeviceError;
use crate::backend::attention::{backward, forward};
use crate::backend::{self, Attempt, DeviceKind, Failure, Kernel, gpu};
use crate::check;
use crate::graph::{self, Backward};
use crate::telemetry;

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
    let Attended { y, logarithms } = backend::run(q.device(), &Forward { arguments: &arguments, options })?;
    Ok(graph::record3(q, k, v, y, Attention { options, logarithms })?)
}

pub(super) struct Forward<'a> {
    /// q, k and v
    pub(super) arguments: &'a [Tensor; 3],
    pub(super) options: SoftmaxOptions,
}

/// A forward's result, and what tiles save for the backward.
pub(super) struct Attended {
    pub(super) y: Tensor,
    logarithms: Option<Tensor>,
}

impl Kernel for Forward<'_> {
    type Output = Attended;

    fn cpu(&self) -> Result<Attended> {
        let [q, k, v] = self.arguments;
        if is_empty(q, k) {
            return Ok(Attended { y: q.zeros_like()?, logarithms: None });
        }
        let (scale, causal) = (self.options.scale, self.options.mask == Mask::Causal);
        let y = match q.dtype() {
            DType::F32 => forward::<f32>([q, k, v], scale, causal),
            DType::F16 => forward::<f16>([q, k, v], scale, causal),
            _ => forward::<bf16>([q, k, v], scale, causal),
        };
        Ok(Attended { y: y?, logarithms: None })
    }

    fn gpu(&self) -> Attempt<Attended> {
        let [q, k, v] = self.arguments;
        if is_empty(q, k) {
            return Ok(Attended { y: q.zeros_like()?, logarithms: None });
        }
        if let Some(tiles) = Tiles::of([q, k, v], self.options)? {
            match tiles.forward() {
                Err(Failure::Device(error @ DeviceError::Unsupported { .. })) => {
                    telemetry::warn_once("attention by tiles", DeviceKind::of(q.device()), &error);
                }
                attempt => return attempt,
            }
        }
        Ok(Attended { y: attention_products::forward(self.arguments, self.options)?, logarithms: None })
    }
}

/// Whether there is nothing to compute, or nothing to compute it from.
fn is_empty(q: &Tensor, k: &Tensor) -> bool {
    q.elem_count() == 0 || k.elem_count() == 0
}

/// Attention by tiles, with arguments whose rows are vectors.
struct Tiles {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Plans,
}

impl Tiles {
    /// None where there are no kernels for such heads.
    fn of(arguments: [&Tensor; 3], options: SoftmaxOptions) -> Result<Option<Self>> {
        let ((batch, queries, heads, width), (_, keys, kv_heads, _)) =
            (arguments[0].dims4()?, arguments[1].dims4()?);
        let storage = gpu::storage(arguments[0])?;
        if !Plans::supports(storage, width, queries.max(keys), options.scale) {
            return Ok(None);
        }
        let [q, k, v] = arguments.map(gpu::vector_rows);
        let (q, k, v) = (q?, k?, v?);
        let plans = Plans {
            batch,
            queries,
            keys,
            heads,
            kv_heads,
            width,
            q: strides(&q),
            k: strides(&k),
            v: strides(&v),
            storage,
            scale: options.scale,
            causal: options.mask == Mask::Causal,
        };
        Ok(Some(Self { q, k, v, plans }))
    }

    fn forward(&self) -> Attempt<Attended> {
        let Self { q, k, v, plans } = self;
        if let Some([y, logarithms]) = backend::attention_by_units([q, k, v], plans)? {
            return Ok(Attended { y, logarithms: Some(logarithms) });
        }
        let logarithms = Shape::from((plans.batch, plans.heads, plans.queries));
        let recipe = gpu::kept(*plans, Plans::forward);
        let mut outputs = gpu::run(&[q, k, v], &[q.shape(), &logarithms], recipe)?;
        Ok(Attended { y: outputs.take()?, logarithms: Some(outputs.take()?) })
    }

    /// The gradients that are wanted, from the forward's results and the gradient of `y`.
    fn backward(
        &self,
        y: &Tensor,
        logarithms: &Tensor,
        grad: &Tensor,
        wanted: [bool; 3],
    ) -> Attempt<[Option<Tensor>; 3]> {
        let Self { q, k, v, plans } = self;
        let (y, grad) = (gpu::vector_rows(&gpu::contiguous(y)?)?, gpu::vector_rows(grad)?);
        if wanted == [true; 3]
            && let Some(gradients) =
                backend::attention_gradients_by_units([q, k, v], [&y, &grad, logarithms], plans)?
        {
            return Ok(gradients.map(Some));
        }
        let shapes = [(q, wanted[0]), (k, wanted[1]), (v, wanted[2])];
        let shapes: Vec<&Shape> =
            shapes.iter().filter(|(_, wanted)| *wanted).map(|(x, _)| x.shape()).collect();
        let [of_q, of_k, of_v] = wanted;
        let constants = (*plans, strides(&grad), AttentionGradients { q: of_q, k: of_k, v: of_v });
        let recipe =
            gpu::kept(constants, |&(plans, grad, wanted), tuning| plans.backward(grad, wanted, tuning));
        let mut outputs = gpu::run(&[q, k, v, &y, logarithms, &grad], &shapes, recipe)?;
        Ok([outputs.take_if(of_q)?, outputs.take_if(of_k)?, outputs.take_if(of_v)?])
    }
}

/// Over batch, tokens and heads.
fn strides(x: &Tensor) -> [usize; 3] {
    match *x.stride() {
        [batch, token, head, _] => [batch, token, head],
        _ => [0; 3],
    }
}

struct Attention {
    options: SoftmaxOptions,
    /// Of the sums of exponentials, where tiles have computed `y`.
    logarithms: Option<Tensor>,
}

impl Backward<3> for Attention {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [q, k, v]: [&Tensor; 3], y: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let wanted = [q.track_op(), k.track_op(), v.track_op()];
        let arguments = [q, k, v].map(Tensor::detach);
        let saved = self.logarithms.as_ref().map(|logarithms| (y, logarithms));
        let gradients = Gradients { arguments: &arguments, grad, options: self.options, wanted, saved };
        Ok(backend::run(q.device(), &gradients)?)
    }
}

pub(super) struct Gradients<'a> {
    /// q, k and v
    pub(super) arguments: &'a [Tensor; 3],
    pub(super) grad: &'a Tensor,
    pub(super) options: SoftmaxOptions,
    pub(super) wanted: [bool; 3],
    /// The forward's results, where it was computed by tiles.
    pub(super) saved: Option<(&'a Tensor, &'a Tensor)>,
}

impl Gradients<'_> {
    /// Those of arguments with nothing to compute.
    fn zeros(&self) -> Result<[Option<Tensor>; 3]> {
        let [q, k, v] = self.arguments;
        let zeros = |(x, wanted): (&Tensor, bool)| wanted.then(|| x.zeros_like()).transpose();
        let [wants_q, wants_k, wants_v] = self.wanted;
        Ok([zeros((q, wants_q))?, zeros((k, wants_k))?, zeros((v, wants_v))?])
    }
}

impl Kernel for Gradients<'_> {
    /// Those that are wanted.
    type Output = [Option<Tensor>; 3];

    fn cpu(&self) -> Result<Self::Output> {
        let [q, k, v] = self.arguments;
        if is_empty(q, k) {
            return self.zeros();
        }
        let (scale, causal) = (self.options.scale, self.options.mask == Mask::Causal);
        let gradients = match q.dtype() {
            DType::F32 => backward::<f32>([q, k, v], self.grad, scale, causal),
            DType::F16 => backward::<f16>([q, k, v], self.grad, scale, causal),
            _ => backward::<bf16>([q, k, v], self.grad, scale, causal),
        };
        let [dq, dk, dv] = gradients?;
        let [wants_q, wants_k, wants_v] = self.wanted;
        let gradient = |wanted: bool, x: Tensor| wanted.then(|| x.transpose(1, 2)).transpose();
        Ok([gradient(wants_q, dq)?, gradient(wants_k, dk)?, gradient(wants_v, dv)?])
    }

    fn gpu(&self) -> Attempt<Self::Output> {
        let [q, k, v] = self.arguments;
        if is_empty(q, k) {
            return Ok(self.zeros()?);
        }
        match (self.saved, Tiles::of([q, k, v], self.options)?) {
            (Some((y, logarithms)), Some(tiles)) => tiles.backward(y, logarithms, self.grad, self.wanted),
            _ => attention_products::gradients(self),
        }
    }
}
