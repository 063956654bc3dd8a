//! Layer normalisation (Ba, Kiros and Hinton, 2016) of rows of `d` elements:
//! `x̂ = (x − mean(x))·r`, `y = x̂·w + b`, with `r = 1/√(mean((x − mean(x))²) + eps)`.
//!
//! Backward, with the saved mean and `r` of each row and `h = g·w`:
//! `dx = r·(h − mean(h) − x̂·mean(h·x̂))`, `dw = Σ_rows g·x̂`, `db = Σ_rows g`.

use candle_core::{D, DType, Result, Tensor};

use crate::{backend, check};

const OP: &str = "layer_norm";

/// Normalises the last dimension of `x [..., d]` (f32, f16 or bf16) to mean 0 and variance 1, multiplies by
/// `weight [d]` and adds `bias [d]`, both of `x`'s dtype.
///
/// # Errors
/// A scalar, another dtype, a weight or bias of another shape, dtype or device, an `eps` that is negative or not
/// finite.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    check(x, weight, bias, eps)?;
    backend::dispatch(OP, x, || reference(x, weight, bias, eps), || reference(x, weight, bias, eps))
}

fn check(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Result<()> {
    check::float(OP, "x", x)?;
    let d = check::last_dim(OP, "x", x)?;
    check::epsilon(OP, eps)?;
    if let Some(weight) = weight {
        check::like(OP, "weight", weight, x, &[d])?;
    }
    bias.map_or(Ok(()), |bias| check::like(OP, "bias", bias, x, &[d]))
}

/// [`layer_norm`] in plain Candle operations. Its squares overflow where those of the fused operation do not.
pub fn reference(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    check(x, weight, bias, eps)?;
    if x.elem_count() == 0 {
        return x.copy();
    }
    let wide = x.to_dtype(DType::F32)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
    let mut y = centred.broadcast_div(&deviation)?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(DType::F32)?)?;
    }
    y.to_dtype(x.dtype())
}
