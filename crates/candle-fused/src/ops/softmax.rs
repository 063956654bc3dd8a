//! Softmax over the last dimension: `y_j = exp(s·x_j − m) / Σ_k exp(s·x_k − m)` with `m = max_k s·x_k`.
//!
//! The causal mask is part of the operation: for `x [..., q, k]` key `j` is visible to query `i` iff
//! `j <= i + (k − q)`, so that attention builds no mask tensor; what is not visible is not read.
//!
//! Backward, from the saved result: `dx_j = s·y_j·(g_j − Σ_k g_k·y_k)`.

use candle_core::{D, DType, Result, Tensor, bail};
use candlewick_kernels::softmax::Softmax as Plans;

use crate::backend::cpu::map_row;
use crate::backend::{self, Attempt, Kernel, gpu};
use crate::check;
use crate::cpu::softmax as row;
use crate::graph::{self, Backward, tracked};

const OP: &str = "softmax";

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mask {
    /// All of them.
    #[default]
    None,
    /// Those up to its own position, when the queries are the last of the keys.
    Causal,
}

/// What [`softmax`] does beside the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftmaxOptions {
    /// Multiplies `x` first.
    pub scale: f32,
    /// Which entries of a row take part; the others are 0 in the result.
    pub mask: Mask,
}

impl Default for SoftmaxOptions {
    fn default() -> Self {
        Self { scale: 1.0, mask: Mask::None }
    }
}

/// `softmax(scale · x)` over the last dimension of `x [..., k]` (f32, f16 or bf16), in `x`'s shape and dtype.
///
/// # Errors
/// A scalar, another dtype, a scale that is not finite; under [`Mask::Causal`] fewer than 2 dimensions, or more
/// queries than keys.
pub fn softmax(x: &Tensor, options: SoftmaxOptions) -> Result<Tensor> {
    check(x, options)?;
    backend::dispatch(OP, x, || fused(x, options), || reference(x, options))
}

fn check(x: &Tensor, options: SoftmaxOptions) -> Result<()> {
    check::float(OP, "x", x)?;
    check::last_dim(OP, "x", x)?;
    check::finite(OP, "scale", options.scale)?;
    if options.mask == Mask::Causal {
        match x.dims() {
            [.., q, k] if q <= k => {}
            dims => bail!("{OP}: a causal x must be [..., q, k] with q <= k, got {dims:?}"),
        }
    }
    Ok(())
}

/// [`softmax`] in plain Candle operations.
pub fn reference(x: &Tensor, options: SoftmaxOptions) -> Result<Tensor> {
    check(x, options)?;
    if x.elem_count() == 0 {
        return x.copy();
    }
    let mut logits = (x.to_dtype(DType::F32)? * f64::from(options.scale))?;
    if options.mask == Mask::Causal {
        let (q, k) = (x.dim(D::Minus2)?, x.dim(D::Minus1)?);
        let queries = Tensor::arange(0u32, u32::try_from(q)?, x.device())?.reshape((q, 1))?;
        let keys = Tensor::arange(0u32, u32::try_from(k)?, x.device())?;
        let limits = (queries.to_dtype(DType::I64)? + f64::from(u32::try_from(k - q)?))?;
        let visible = keys.to_dtype(DType::I64)?.broadcast_as((q, k))?.broadcast_le(&limits)?;
        let hidden = Tensor::new(f32::NEG_INFINITY, x.device())?.broadcast_as(x.shape())?;
        logits = visible.broadcast_as(x.shape())?.where_cond(&logits, &hidden)?;
    }
    let max = logits.max_keepdim(D::Minus1)?.detach();
    let exp = logits.broadcast_sub(&max)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?.to_dtype(x.dtype())
}

fn fused(x: &Tensor, options: SoftmaxOptions) -> Attempt<Tensor> {
    let y = backend::run(x.device(), &Forward { x, options })?;
    Ok(graph::record1(x, y, Softmax { options })?)
}

struct Softmax {
    options: SoftmaxOptions,
}

impl Backward<1> for Softmax {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [x]: [&Tensor; 1], y: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let gradient = Gradient { y, g, options: self.options };
        Ok([tracked(x, || Ok(backend::run(x.device(), &gradient)?))?])
    }
}

/// The plans for `x`.
fn plans(x: &Tensor, options: SoftmaxOptions) -> Result<Plans> {
    let (rows, columns) = gpu::matrix(x);
    let causal_queries = match options.mask {
        Mask::None => None,
        Mask::Causal => Some(x.dim(D::Minus2)?),
    };
    Ok(Plans { rows, columns, storage: gpu::storage(x)?, scale: options.scale, causal_queries })
}

/// What the loops need to know of the mask.
fn visible(x: &Tensor, mask: Mask) -> Result<row::Visible> {
    let queries = match mask {
        Mask::None => 0,
        Mask::Causal => x.dim(D::Minus2)?,
    };
    Ok(row::Visible { queries })
}

struct Forward<'a> {
    x: &'a Tensor,
    options: SoftmaxOptions,
}

impl Kernel for Forward<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let visible = visible(self.x, self.options.mask)?;
        map_row([self.x], &row::Forward { scale: self.options.scale, visible })
    }

    fn gpu(&self) -> Attempt<Tensor> {
        let (plans, x) = (plans(self.x, self.options)?, gpu::contiguous(self.x)?);
        Ok(gpu::run(&[&x], &[x.shape()], gpu::kept(plans, Plans::forward))?.take()?)
    }
}

/// On a GPU, in the place of `x`, which is contiguous, fresh and nobody else's.
pub(super) fn in_place(x: &Tensor, options: SoftmaxOptions) -> Attempt<Tensor> {
    Ok(gpu::run_in_place(&[x], &[x.shape()], gpu::kept(plans(x, options)?, Plans::forward))?.take()?)
}

/// As [`in_place`]: the gradient, from the result `y`, in the place of that of the result.
pub(super) fn gradient_in_place(y: &Tensor, g: &Tensor, options: SoftmaxOptions) -> Attempt<Tensor> {
    Ok(gpu::run_in_place(&[y, g], &[y.shape()], gpu::kept(plans(y, options)?, Plans::backward))?.take()?)
}

struct Gradient<'a> {
    y: &'a Tensor,
    g: &'a Tensor,
    options: SoftmaxOptions,
}

impl Kernel for Gradient<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let visible = visible(self.y, self.options.mask)?;
        map_row([self.y, self.g], &row::Backward { scale: self.options.scale, visible })
    }

    fn gpu(&self) -> Attempt<Tensor> {
        let (plans, y, g) =
            (plans(self.y, self.options)?, gpu::contiguous(self.y)?, gpu::contiguous(self.g)?);
        Ok(gpu::run(&[&y, &g], &[y.shape()], gpu::kept(plans, Plans::backward))?.take()?)
    }
}
