//! Root-mean-square normalisation (Zhang and Sennrich, 2019) of rows of `d` elements:
//! `x̂ = x·r`, `y = x̂·w`, with `r = 1/√(mean(x²) + eps)`.
//!
//! Backward, with the saved `r` of each row and `h = g·w`:
//! `dx = r·(h − x̂·mean(h·x̂))`, `dw = Σ_rows g·x̂`.

use candle_core::{D, DType, Result, Tensor};

use crate::{backend, check};

const OP: &str = "rms_norm";

/// RMS-normalises the last dimension of `x [..., d]` (f32, f16 or bf16) and multiplies by `weight [d]`, of `x`'s dtype.
///
/// # Errors
/// A scalar, another dtype, a weight of another shape, dtype or device, an `eps` that is negative or not finite.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    check(x, weight, eps)?;
    backend::dispatch(OP, x, || reference(x, weight, eps), || reference(x, weight, eps))
}

fn check(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Result<()> {
    check::float(OP, "x", x)?;
    let d = check::last_dim(OP, "x", x)?;
    check::epsilon(OP, eps)?;
    weight.map_or(Ok(()), |weight| check::like(OP, "weight", weight, x, &[d]))
}

/// [`rms_norm`] in plain Candle operations. Its squares overflow where those of the fused operation do not.
pub fn reference(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    check(x, weight, eps)?;
    if x.elem_count() == 0 {
        return x.copy();
    }
    let wide = x.to_dtype(DType::F32)?;
    let rms = (wide.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
    let mut y = wide.broadcast_div(&rms)?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    }
    y.to_dtype(x.dtype())
}
