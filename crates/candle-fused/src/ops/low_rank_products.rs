//! LoRA on a device whose products add to what is there ([`product_onto`]).
//!
//! The base product is bound by arithmetic and the rest by memory, so the rest makes the fewest passes: `y` is written
//! once as `h·Bᵀ`, and the base product adds itself to it, reading it while it multiplies; `dx = e·A` likewise. Kernels
//! of our own for the thin products would read and write the same bytes.
//!
//! Factors, `h` and `e` are in the dtype of `x`: f32 factors beside a bf16 `x`, whose range they share, are rounded for
//! the products. Sums are f32, and the factors' gradients are rounded to their own dtype.

use candle_core::{DType, Result, Tensor};
use candlewick_kernels::lora::LoraGradients;

use super::low_rank::LowRank;
use crate::backend::{Place, fewest_for_products, product_onto};

/// Whether these are the way for `x [n, in]`, `a [r, in]` and `b [out, r]`: there is enough to compute, and no mask,
/// which the kernels make.
pub(super) fn serve(call: &LowRank, x: &Tensor, a: &Tensor, b: &Tensor) -> bool {
    let (Ok((n, inputs)), Ok((outputs, rank))) = (x.dims2(), b.dims2()) else { return false };
    let multiplications = n.saturating_mul(rank).saturating_mul(inputs.saturating_add(outputs));
    let enough = fewest_for_products(x.device()).is_some_and(|fewest| multiplications >= fewest);
    enough
        && inputs > 0
        && outputs > 0
        && (a.dtype() == x.dtype() || x.dtype() == DType::BF16)
        && call.dropout.is_none_or(|dropout| dropout.p == 0.0)
}

/// `left·right + bias`, for a device of [`fewest_for_products`].
pub(super) fn with_bias(left: &Tensor, right: &Tensor, bias: &Tensor) -> Result<Tensor> {
    product_onto(left, right, 1.0, Place::Onto(as_rows(bias, left.dim(0)?)?))
}

/// `n` rows that each are the bias.
fn as_rows(bias: &Tensor, n: usize) -> Result<Tensor> {
    bias.detach().broadcast_left(n)?.force_contiguous()
}

/// The result `[n, out]`, and `h`.
pub(super) fn forward(
    call: &LowRank,
    [x, a, b]: [&Tensor; 3],
    bias: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let dtype = x.dtype();
    let h = product_onto(x, &a.to_dtype(dtype)?.t()?, call.scaling, Place::Fresh(dtype))?;
    let place = match bias {
        Some(bias) => Place::Onto(as_rows(bias, h.dim(0)?)?),
        None => Place::Fresh(dtype),
    };
    let y = product_onto(&h, &b.to_dtype(dtype)?.t()?, 1.0, place)?;
    match &call.weight {
        Some(weight) => Ok((product_onto(x, &weight.t()?, 1.0, Place::Onto(y))?, h)),
        None => Ok((y, h)),
    }
}

/// `left·right`, of the dtype of the factor whose gradient it is, and lying as that does.
fn like(factor: &Tensor, left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let place = Place::Fresh(factor.dtype());
    if factor.is_contiguous() {
        product_onto(left, right, 1.0, place)
    } else {
        product_onto(&right.t()?, &left.t()?, 1.0, place)?.t()
    }
}

/// The gradients of `x`, `a` and `b` that are wanted.
pub(super) fn gradients(
    call: &LowRank,
    [x, a, b]: [&Tensor; 3],
    [h, grad]: [&Tensor; 2],
    wanted: LoraGradients,
) -> Result<[Option<Tensor>; 3]> {
    let dtype = x.dtype();
    let e = (wanted.x || wanted.a)
        .then(|| product_onto(grad, &b.to_dtype(dtype)?, call.scaling, Place::Fresh(dtype)))
        .transpose()?;
    // The gradient has just been read: some of it is still in the cache.
    let db = wanted.b.then(|| like(b, &grad.t()?, h)).transpose()?;
    let Some(e) = e else { return Ok([None, None, db]) };
    let da = wanted.a.then(|| like(a, &e.t()?, x)).transpose()?;
    let dx = wanted.x.then(|| {
        let dx = product_onto(&e, &a.to_dtype(dtype)?, 1.0, Place::Fresh(dtype))?;
        match &call.weight {
            Some(weight) => product_onto(grad, weight, 1.0, Place::Onto(dx)),
            None => Ok(dx),
        }
    });
    Ok([dx.transpose()?, da, db])
}
