//! LoRA on a device whose products add to what is there ([`product_onto`]).
//!
//! The base product is bound by arithmetic and the rest by memory, so the rest makes the fewest passes. Where the device has
//! kernels for it (Hopper), it makes none: `h`, `e` and the factors' gradients come of what the base products read
//! (`adapted_product`, `adapted_gradient`), or at least the update is part of their sums, and one pass over the gradient serves
//! both that need it (`sum_of_products`, `low_rank_gradient`). Elsewhere `y` is written once as `h·Bᵀ`, and the base product
//! adds itself to it, reading it while it multiplies; `dx = e·A` likewise.
//!
//! Factors, `h` and `e` are in the dtype of `x`: f32 factors beside a bf16 `x`, whose range they share, are rounded for
//! the products. Sums are f32, and the factors' gradients are rounded to their own dtype. Dropout takes a pass of its own,
//! which rounds nothing: its factor goes into the next product.

use candle_core::{DType, Result, Tensor};
use candlewick_kernels::lora::{Lora as Plans, LoraGradients};

use super::low_rank::LowRank;
use crate::backend::{
    Attempt, Place, adapted_gradient, adapted_product, fewest_for_products, gpu, low_rank_gradient,
    product_onto, sum_of_products,
};

/// Whether these are the way for `x [n, in]`, `a [r, in]` and `b [out, r]`.
pub(super) fn serve(x: &Tensor, a: &Tensor, b: &Tensor) -> bool {
    let (Ok((n, inputs)), Ok((outputs, rank))) = (x.dims2(), b.dims2()) else { return false };
    let multiplications = n.saturating_mul(rank).saturating_mul(inputs.saturating_add(outputs));
    let enough = fewest_for_products(x.device()).is_some_and(|fewest| multiplications >= fewest);
    enough && inputs > 0 && outputs > 0 && (a.dtype() == x.dtype() || x.dtype() == DType::BF16)
}

/// A dropout's mask, and the factor of what it keeps.
struct Mask {
    plans: Plans,
    kept: f32,
}

impl Mask {
    fn of(call: &LowRank, [x, a, b]: [&Tensor; 3]) -> Result<Option<Self>> {
        let dropout = call.dropout.filter(|dropout| dropout.p > 0.0);
        let mask = |p: f32| Ok(Self { plans: call.plans(x, a, b)?, kept: 1.0 / (1.0 - p) });
        dropout.map(|dropout| mask(dropout.p)).transpose()
    }
}

/// The factor of a product with what was masked.
fn factor(mask: Option<&Mask>) -> f32 {
    mask.map_or(1.0, |mask| mask.kept)
}

/// `x`, masked where there is a dropout.
fn masked(mask: Option<&Mask>, x: &Tensor) -> Attempt<Tensor> {
    let Some(Mask { plans, .. }) = mask else { return Ok(x.clone()) };
    Ok(gpu::run(&[x], &[x.shape()], gpu::kept(*plans, Plans::mask))?.take()?)
}

/// As [`masked`], of a fresh tensor that nobody else has, in its place.
fn masked_in_place(mask: Option<&Mask>, x: Tensor) -> Attempt<Tensor> {
    let Some(Mask { plans, .. }) = mask else { return Ok(x) };
    Ok(gpu::run_in_place(&[&x], &[x.shape()], gpu::kept(*plans, Plans::mask))?.take()?)
}

/// `left·right + bias`, of matrices that are not empty.
pub(super) fn base(left: &Tensor, right: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    product_onto(left, right, 1.0, Place::of_rows(left.dim(0)?, bias, left.dtype())?)
}

/// The result `[n, out]`, and `h`.
pub(super) fn forward(
    call: &LowRank,
    [x, a, b]: [&Tensor; 3],
    bias: Option<&Tensor>,
) -> Attempt<(Tensor, Tensor)> {
    let dtype = x.dtype();
    let mask = Mask::of(call, [x, a, b])?;
    let scale = call.scaling * factor(mask.as_ref());
    let (a, b) = (a.to_dtype(dtype)?.t()?, b.to_dtype(dtype)?.t()?);
    if let (Some(weight), None) = (&call.weight, &mask)
        && let Some([y, h]) = adapted_product([x, &weight.t()?], [&a, &b], bias, scale)?
    {
        return Ok((y, h));
    }
    let h = product_onto(&masked(mask.as_ref(), x)?, &a, scale, Place::Fresh(dtype))?;
    let y = match &call.weight {
        Some(weight) => sum_of_products([x, &weight.t()?], [&h, &b], bias)?,
        None => base(&h, &b, bias)?,
    };
    Ok((y, h))
}

/// `scale·left·right`, of the dtype of the matrix whose gradient it is, and lying as that does.
fn like(matrix: &Tensor, left: &Tensor, right: &Tensor, scale: f32) -> Result<Tensor> {
    let place = Place::Fresh(matrix.dtype());
    if matrix.is_contiguous() {
        product_onto(left, right, scale, place)
    } else {
        product_onto(&right.t()?, &left.t()?, scale, place)?.t()
    }
}

/// The gradients of `x`, `a` and `b` that are wanted.
pub(super) fn gradients(
    call: &LowRank,
    [x, a, b]: [&Tensor; 3],
    [h, grad]: [&Tensor; 2],
    wanted: LoraGradients,
) -> Attempt<[Option<Tensor>; 3]> {
    let dtype = x.dtype();
    let mask = Mask::of(call, [x, a, b])?;
    let (mask, kept) = (mask.as_ref(), factor(mask.as_ref()));
    if let (Some(weight), None) = (&call.weight, mask)
        && wanted == (LoraGradients { x: true, a: true, b: true })
        && a.is_contiguous()
        && b.is_contiguous()
    {
        let factors = [&a.to_dtype(dtype)?, &b.to_dtype(dtype)?];
        if let Some(all) = adapted_gradient([grad, weight], factors, [x, h], call.scaling, a.dtype())? {
            return Ok(all.map(Some));
        }
    }
    let mut gradients = [None, None, None];
    let wants_e = wanted.x || wanted.a;
    let e = if wants_e && wanted.b && b.is_contiguous() {
        let [e, db] = low_rank_gradient([grad, &b.to_dtype(dtype)?, h], call.scaling, b.dtype())?;
        gradients[2] = Some(db);
        Some(e)
    } else {
        if wanted.b {
            gradients[2] = Some(like(b, &grad.t()?, h, 1.0)?);
        }
        let e = || product_onto(grad, &b.to_dtype(dtype)?, call.scaling, Place::Fresh(dtype));
        wants_e.then(e).transpose()?
    };
    let Some(e) = e else { return Ok(gradients) };
    if wanted.a {
        gradients[1] = Some(like(a, &e.t()?, &masked(mask, x)?, kept)?);
    }
    if wanted.x {
        let a = a.to_dtype(dtype)?;
        let low = || masked_in_place(mask, product_onto(&e, &a, kept, Place::Fresh(dtype))?);
        gradients[0] = Some(match &call.weight {
            Some(weight) if mask.is_none() => sum_of_products([grad, weight], [&e, &a], None)?,
            Some(weight) => product_onto(grad, weight, 1.0, Place::Onto(low()?))?,
            None => low()?,
        });
    }
    Ok(gradients)
}
