//! Layer normalisation (Ba, Kiros and Hinton, 2016) of rows of `d` elements:
//! `x̂ = (x − mean(x))·r`, `y = x̂·w + b`, with `r = 1/√(mean((x − mean(x))²) + eps)`.
//!
//! Backward, with the mean and `r` recomputed and `h = g·w`:
//! `dx = r·(h − mean(h) − x̂·mean(h·x̂))`, `dw = Σ_rows g·x̂`, `db = Σ_rows g`.

use candle_core::{D, DType, Result, Shape, Tensor};
use candlewick_kernels::layer_norm::{LayerNorm as Plans, LayerNormGradients};

use crate::backend::cpu::{Results, map_row, map_rows, to_vec};
use crate::backend::{self, Attempt, Kernel, gpu};
use crate::check;
use crate::cpu::norm as row;
use crate::graph::{self, Backward};

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

fn fused(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Attempt<Tensor> {
    let y = backend::run(x.device(), &Forward { x, weight, bias, eps })?;
    let op = LayerNorm { eps, weighted: weight.is_some() };
    Ok(match (weight, bias) {
        (Some(weight), Some(bias)) => graph::record3(x, weight, bias, y, op),
        (Some(parameter), None) | (None, Some(parameter)) => graph::record2(x, parameter, y, op),
        (None, None) => graph::record1(x, y, op),
    }?)
}

struct LayerNorm {
    eps: f32,
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
        let wanted = LayerNormGradients {
            x: x.track_op(),
            weight: weight.is_some_and(Tensor::track_op),
            bias: bias.is_some_and(Tensor::track_op),
        };
        Ok(backend::run(x.device(), &Gradients { x, weight, g, eps: self.eps, wanted })?)
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

/// The plans for `x`.
fn plans(x: &Tensor, weight: bool, bias: bool, eps: f32) -> Result<Plans> {
    let (rows, columns) = gpu::matrix(x);
    Ok(Plans { rows, columns, storage: gpu::storage(x)?, weight, bias, eps })
}

struct Forward<'a> {
    x: &'a Tensor,
    weight: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    eps: f32,
}

impl Kernel for Forward<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let weight = self.weight.map(to_vec).transpose()?;
        let bias = self.bias.map(to_vec).transpose()?;
        let (weight, bias) = (weight.as_deref(), bias.as_deref());
        map_row([self.x], &row::Forward { centred: true, eps: self.eps, weight, bias })
    }

    fn gpu(&self) -> Attempt<Tensor> {
        let plans = plans(self.x, self.weight.is_some(), self.bias.is_some(), self.eps)?;
        let x = gpu::contiguous(self.x)?;
        let weight = self.weight.map(gpu::contiguous).transpose()?;
        let bias = self.bias.map(gpu::contiguous).transpose()?;
        let inputs: Vec<&Tensor> = [Some(&x), weight.as_ref(), bias.as_ref()].into_iter().flatten().collect();
        Ok(gpu::run(&inputs, &[x.shape()], gpu::kept(plans, Plans::forward))?.take()?)
    }
}

struct Gradients<'a> {
    x: &'a Tensor,
    weight: Option<&'a Tensor>,
    g: &'a Tensor,
    eps: f32,
    wanted: LayerNormGradients,
}

impl Kernel for Gradients<'_> {
    /// Those of `x`, the weight and the bias that are wanted.
    type Output = [Option<Tensor>; 3];

    fn cpu(&self) -> Result<Self::Output> {
        let LayerNormGradients { x, weight, bias } = self.wanted;
        let values = self.weight.map(to_vec).transpose()?;
        let row = row::Backward { centred: true, eps: self.eps, weight: values.as_deref() };
        let Results { outputs: [dx], sums: [dw, db], .. } =
            map_rows([self.x, self.g], [x], [weight, bias], &row)?;
        Ok([dx, dw, db])
    }

    fn gpu(&self) -> Attempt<Self::Output> {
        let Self { wanted, .. } = *self;
        let plans = plans(self.x, self.weight.is_some(), wanted.bias, self.eps)?;
        let (x, g) = (gpu::contiguous(self.x)?, gpu::contiguous(self.g)?);
        let weight = self.weight.map(gpu::contiguous).transpose()?;
        let inputs: Vec<&Tensor> = [Some(&x), Some(&g), weight.as_ref()].into_iter().flatten().collect();
        let parameter = Shape::from(plans.columns);
        let shapes = [(wanted.x, x.shape()), (wanted.weight, &parameter), (wanted.bias, &parameter)];
        let shapes: Vec<&Shape> =
            shapes.into_iter().filter(|(wanted, _)| *wanted).map(|(_, shape)| shape).collect();
        let recipe = gpu::kept((plans, wanted), |(plans, wanted), tuning| plans.backward(*wanted, tuning));
        let mut outputs = gpu::run(&inputs, &shapes, recipe)?;
        Ok([outputs.take_if(wanted.x)?, outputs.take_if(wanted.weight)?, outputs.take_if(wanted.bias)?])
    }
}
