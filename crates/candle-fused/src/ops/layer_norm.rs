//! Layer normalisation (Ba, Kiros and Hinton, 2016) of rows of `d` elements:
//! `x̂ = (x − mean(x))·r`, `y = x̂·w + b`, with `r = 1/√(mean((x − mean(x))²) + eps)`.
//!
//! Backward, with the saved mean and `r` of each row and `h = g·w`:
//! `dx = r·(h − mean(h) − x̂·mean(h·x̂))`, `dw = Σ_rows g·x̂`, `db = Σ_rows g`.

use candle_core::{D, DType, Result, Tensor};

use crate::backend::cpu::{fold_rows, map_rows, to_vec};
use crate::backend::{self, Kernel};
use crate::check;
use crate::cpu::norm as row;
use crate::graph::{self, Backward, tracked};

const OP: &str = "layer_norm";

/// Normalises the last dimension of `x [..., d]` (f32, f16 or bf16) to mean 0 and variance 1, multiplies by
/// `weight [d]` and adds `bias [d]`, both of `x`'s dtype.
///
/// # Errors
/// A scalar, another dtype, a weight or bias of another shape, dtype or device, an `eps` that is negative or not
/// finite.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    check(x, weight, bias, eps)?;
    backend::dispatch(OP, x, || fused(x, weight, bias, eps), || reference(x, weight, bias, eps))
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

fn fused(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Result<Tensor> {
    let (y, moments) = backend::run(x.device(), &Forward { x, weight, bias, eps })?;
    let op = LayerNorm { moments, weighted: weight.is_some() };
    match (weight, bias) {
        (Some(weight), Some(bias)) => graph::record3(x, weight, bias, y, op),
        (Some(parameter), None) | (None, Some(parameter)) => graph::record2(x, parameter, y, op),
        (None, None) => graph::record1(x, y, op),
    }
}

struct LayerNorm {
    /// The mean and `r` of each row, `[rows, 2]` in f32.
    moments: Tensor,
    /// Of two arguments, the second is the weight.
    weighted: bool,
}

impl LayerNorm {
    fn gradients(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        g: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let moments = &self.moments;
        let dx = || backend::run(x.device(), &Gradient { x, moments, weight, g });
        let dw = || backend::run(x.device(), &WeightGradient { x, moments, g });
        let db = || backend::run(x.device(), &BiasGradient { g });
        Ok([
            tracked(x, dx)?,
            weight.map_or(Ok(None), |weight| tracked(weight, dw))?,
            bias.map_or(Ok(None), |bias| tracked(bias, db))?,
        ])
    }
}

impl Backward<1> for LayerNorm {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let [dx, ..] = self.gradients(x, None, None, g)?;
        Ok([dx])
    }
}

impl Backward<2> for LayerNorm {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [x, p]: [&Tensor; 2], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 2]> {
        if self.weighted {
            let [dx, dw, _] = self.gradients(x, Some(p), None, g)?;
            Ok([dx, dw])
        } else {
            let [dx, _, db] = self.gradients(x, None, Some(p), g)?;
            Ok([dx, db])
        }
    }
}

impl Backward<3> for LayerNorm {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [x, w, b]: [&Tensor; 3], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 3]> {
        self.gradients(x, Some(w), Some(b), g)
    }
}

struct Forward<'a> {
    x: &'a Tensor,
    weight: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    eps: f32,
}

impl Kernel for Forward<'_> {
    /// The result, and the mean and `r` of each row.
    type Output = (Tensor, Tensor);

    fn cpu(&self) -> Result<(Tensor, Tensor)> {
        let weight = self.weight.map(to_vec).transpose()?;
        let bias = self.bias.map(to_vec).transpose()?;
        let ([y], moments) = map_rows([self.x], self.x.dtype(), |_, [x], [y]| {
            row::layer_forward(x, weight.as_deref(), bias.as_deref(), self.eps, y)
        })?;
        let shape = (moments.len(), 2);
        Ok((y, Tensor::from_vec(moments.into_flattened(), shape, self.x.device())?))
    }
}

struct Gradient<'a> {
    x: &'a Tensor,
    moments: &'a Tensor,
    weight: Option<&'a Tensor>,
    g: &'a Tensor,
}

impl Kernel for Gradient<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let (moments, weight) = (to_vec(self.moments)?, self.weight.map(to_vec).transpose()?);
        let (moments, _) = moments.as_chunks::<2>();
        let ([dx], _) = map_rows([self.x, self.g], self.x.dtype(), |i, [x, g], [dx]| {
            row::layer_backward(x, moments[i], weight.as_deref(), g, dx);
        })?;
        Ok(dx)
    }
}

struct WeightGradient<'a> {
    x: &'a Tensor,
    moments: &'a Tensor,
    g: &'a Tensor,
}

impl Kernel for WeightGradient<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let moments = to_vec(self.moments)?;
        let (moments, _) = moments.as_chunks::<2>();
        let [dw] = fold_rows([self.x, self.g], self.x.dtype(), |i, [x, g], [dw]| {
            row::weight_backward(x, moments[i], g, dw);
        })?;
        Ok(dw)
    }
}

struct BiasGradient<'a> {
    g: &'a Tensor,
}

impl Kernel for BiasGradient<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let [db] = fold_rows([self.g], self.g.dtype(), |_, [g], [db]| row::bias_backward(g, db))?;
        Ok(db)
    }
}
