//! Root-mean-square normalisation (Zhang and Sennrich, 2019) of rows of `d` elements:
//! `x̂ = x·r`, `y = x̂·w`, with `r = 1/√(mean(x²) + eps)`.
//!
//! Backward, with the saved `r` of each row and `h = g·w`:
//! `dx = r·(h − x̂·mean(h·x̂))`, `dw = Σ_rows g·x̂`.

use candle_core::{D, DType, Result, Tensor};

use crate::backend::cpu::{fold_rows, map_rows, to_vec};
use crate::backend::{self, Kernel};
use crate::check;
use crate::cpu::norm as row;
use crate::graph::{self, Backward, tracked};

const OP: &str = "rms_norm";

/// RMS-normalises the last dimension of `x [..., d]` (f32, f16 or bf16) and multiplies by `weight [d]`, of `x`'s dtype.
///
/// # Errors
/// A scalar, another dtype, a weight of another shape, dtype or device, an `eps` that is negative or not finite.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    check(x, weight, eps)?;
    backend::dispatch(OP, x, || fused(x, weight, eps), || reference(x, weight, eps))
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

fn fused(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    let (y, r) = backend::run(x.device(), &Forward { x, weight, eps })?;
    match weight {
        Some(weight) => graph::record2(x, weight, y, RmsNorm { r }),
        None => graph::record1(x, y, RmsNorm { r }),
    }
}

struct RmsNorm {
    /// The factor `r` of each row, in f32.
    r: Tensor,
}

impl Backward<1> for RmsNorm {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let gradient = Gradient { x, r: &self.r, weight: None, g };
        Ok([tracked(x, || backend::run(x.device(), &gradient))?])
    }
}

impl Backward<2> for RmsNorm {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [x, w]: [&Tensor; 2], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let r = &self.r;
        let gradient = Gradient { x, r, weight: Some(w), g };
        let dx = tracked(x, || backend::run(x.device(), &gradient))?;
        let dw = tracked(w, || backend::run(x.device(), &WeightGradient { x, r, g }))?;
        Ok([dx, dw])
    }
}

struct Forward<'a> {
    x: &'a Tensor,
    weight: Option<&'a Tensor>,
    eps: f32,
}

impl Kernel for Forward<'_> {
    /// The result and the factor of each row.
    type Output = (Tensor, Tensor);

    fn cpu(&self) -> Result<(Tensor, Tensor)> {
        let weight = self.weight.map(to_vec).transpose()?;
        let ([y], r) = map_rows([self.x], self.x.dtype(), |_, [x], [y]| {
            row::rms_forward(x, weight.as_deref(), self.eps, y)
        })?;
        Ok((y, Tensor::new(r, self.x.device())?))
    }
}

struct Gradient<'a> {
    x: &'a Tensor,
    r: &'a Tensor,
    weight: Option<&'a Tensor>,
    g: &'a Tensor,
}

impl Kernel for Gradient<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let (r, weight) = (to_vec(self.r)?, self.weight.map(to_vec).transpose()?);
        let ([dx], _) = map_rows([self.x, self.g], self.x.dtype(), |i, [x, g], [dx]| {
            row::rms_backward(x, r[i], weight.as_deref(), g, dx);
        })?;
        Ok(dx)
    }
}

struct WeightGradient<'a> {
    x: &'a Tensor,
    r: &'a Tensor,
    g: &'a Tensor,
}

impl Kernel for WeightGradient<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let r = to_vec(self.r)?;
        let [dw] = fold_rows([self.x, self.g], self.x.dtype(), |i, [x, g], [dw]| {
            row::weight_backward(x, [0.0, r[i]], g, dw);
        })?;
        Ok(dw)
    }
}
