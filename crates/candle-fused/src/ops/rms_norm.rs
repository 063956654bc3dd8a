//! Root-mean-square normalisation (Zhang and Sennrich, 2019) of rows of `d` elements:
//! `x̂ = x·r`, `y = x̂·w`, with `r = 1/√(mean(x²) + eps)`.
//!
//! Backward, with `r` recomputed and `h = g·w`: `dx = r·(h − x̂·mean(h·x̂))`, `dw = Σ_rows g·x̂`.

use candle_core::{D, DType, Result, Shape, Tensor};
use candlewick_kernels::rms_norm::{RmsNorm as Plans, RmsNormGradients};

use crate::backend::cpu::{Results, map_row, map_rows, to_vec};
use crate::backend::{self, Attempt, Kernel, gpu};
use crate::check;
use crate::cpu::norm as row;
use crate::graph::{self, Backward};

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

fn fused(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Attempt<Tensor> {
    let y = backend::run(x.device(), &Forward { x, weight, eps })?;
    Ok(match weight {
        Some(weight) => graph::record2(x, weight, y, RmsNorm { eps }),
        None => graph::record1(x, y, RmsNorm { eps }),
    }?)
}

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    fn gradients(&self, x: &Tensor, weight: Option<&Tensor>, g: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let wanted = RmsNormGradients { x: x.track_op(), weight: weight.is_some_and(Tensor::track_op) };
        Ok(backend::run(x.device(), &Gradients { x, weight, g, eps: self.eps, wanted })?)
    }
}

impl Backward<1> for RmsNorm {
    fn op(&self) -> &'static str {
        OP
    }

    fn reads_output(&self) -> bool {
        false
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let [dx, _] = self.gradients(x, None, g)?;
        Ok([dx])
    }
}

impl Backward<2> for RmsNorm {
    fn op(&self) -> &'static str {
        OP
    }

    fn reads_output(&self) -> bool {
        false
    }

    fn backward(&self, [x, w]: [&Tensor; 2], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 2]> {
        self.gradients(x, Some(w), g)
    }
}

/// The plans for `x`.
fn plans(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Result<Plans> {
    let (rows, columns) = gpu::matrix(x);
    Ok(Plans { rows, columns, storage: gpu::storage(x)?, weight: weight.is_some(), eps })
}

struct Forward<'a> {
    x: &'a Tensor,
    weight: Option<&'a Tensor>,
    eps: f32,
}

impl Kernel for Forward<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let weight = self.weight.map(to_vec).transpose()?;
        let (centred, weight) = (false, weight.as_deref());
        map_row([self.x], &row::Forward { centred, eps: self.eps, weight, bias: None })
    }

    fn gpu(&self) -> Attempt<Tensor> {
        let plans = plans(self.x, self.weight, self.eps)?;
        let (x, weight) = (gpu::contiguous(self.x)?, self.weight.map(gpu::contiguous).transpose()?);
        let inputs: Vec<&Tensor> = [Some(&x), weight.as_ref()].into_iter().flatten().collect();
        Ok(gpu::run(&inputs, &[x.shape()], gpu::kept(plans, Plans::forward))?.take()?)
    }
}

struct Gradients<'a> {
    x: &'a Tensor,
    weight: Option<&'a Tensor>,
    g: &'a Tensor,
    eps: f32,
    wanted: RmsNormGradients,
}

impl Kernel for Gradients<'_> {
    /// Those of `x` and the weight that are wanted.
    type Output = [Option<Tensor>; 2];

    fn cpu(&self) -> Result<Self::Output> {
        let RmsNormGradients { x, weight } = self.wanted;
        let values = self.weight.map(to_vec).transpose()?;
        let row = row::Backward { centred: false, eps: self.eps, weight: values.as_deref() };
        let Results { outputs: [dx], sums: [dw, _], .. } =
            map_rows([self.x, self.g], [x], [weight, false], &row)?;
        Ok([dx, dw])
    }

    fn gpu(&self) -> Attempt<Self::Output> {
        let Self { wanted, .. } = *self;
        let plans = plans(self.x, self.weight, self.eps)?;
        let (x, g) = (gpu::contiguous(self.x)?, gpu::contiguous(self.g)?);
        let weight = self.weight.map(gpu::contiguous).transpose()?;
        let inputs: Vec<&Tensor> = [Some(&x), Some(&g), weight.as_ref()].into_iter().flatten().collect();
        let shapes =
            [wanted.x.then(|| x.shape()), weight.as_ref().filter(|_| wanted.weight).map(Tensor::shape)];
        let shapes: Vec<&Shape> = shapes.into_iter().flatten().collect();
        let recipe = gpu::kept((plans, wanted), |(plans, wanted), tuning| plans.backward(*wanted, tuning));
        let mut outputs = gpu::run(&inputs, &shapes, recipe)?;
        Ok([outputs.take_if(wanted.x)?, outputs.take_if(wanted.weight)?])
    }
}
