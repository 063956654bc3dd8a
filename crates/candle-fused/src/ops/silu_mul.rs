//! `SwiGLU`'s product (Shazeer, 2020): `y = silu(gate)·up`, `silu(z) = z·σ(z)`, `σ(z) = 1/(1 + exp(−z))`.
//!
//! Backward, with `σ` recomputed from the gate: `d_gate = g·up·σ·(1 + gate·(1 − σ))`, `d_up = g·gate·σ`.

use candle_core::{DType, Result, Tensor};

use crate::backend::cpu::map_elements;
use crate::backend::{self, Kernel};
use crate::check;
use crate::cpu::silu_mul as row;
use crate::graph::{self, Backward, tracked};

const OP: &str = "silu_mul";

/// `silu(gate) · up`, element by element, for two tensors of one shape and dtype (f32, f16 or bf16).
///
/// # Errors
/// Another dtype, tensors that differ in shape, dtype or device.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check(gate, up)?;
    backend::dispatch(OP, gate, || fused(gate, up), || reference(gate, up))
}

fn check(gate: &Tensor, up: &Tensor) -> Result<()> {
    check::float(OP, "gate", gate)?;
    check::like(OP, "up", up, gate, gate.dims())
}

/// [`silu_mul`] in plain Candle operations.
pub fn reference(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check(gate, up)?;
    let (wide_gate, wide_up) = (gate.to_dtype(DType::F32)?, up.to_dtype(DType::F32)?);
    (wide_gate.silu()? * wide_up)?.to_dtype(gate.dtype())
}

fn fused(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let y = backend::run(gate.device(), &Forward { gate, up })?;
    graph::record2(gate, up, y, SiluMul)
}

struct SiluMul;

impl Backward<2> for SiluMul {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [gate, up]: [&Tensor; 2], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 2]> {
        Ok([
            tracked(gate, || backend::run(gate.device(), &GateGradient { gate, up, g }))?,
            tracked(up, || backend::run(up.device(), &UpGradient { gate, g }))?,
        ])
    }
}

struct Forward<'a> {
    gate: &'a Tensor,
    up: &'a Tensor,
}

impl Kernel for Forward<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let [y] = map_elements([self.gate, self.up], self.gate.dtype(), |_, [gate, up], [y]| {
            row::forward(gate, up, y);
        })?;
        Ok(y)
    }
}

struct GateGradient<'a> {
    gate: &'a Tensor,
    up: &'a Tensor,
    g: &'a Tensor,
}

impl Kernel for GateGradient<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let inputs = [self.gate, self.up, self.g];
        let [d_gate] = map_elements(inputs, self.gate.dtype(), |_, [gate, up, g], [d_gate]| {
            row::backward_gate(gate, up, g, d_gate);
        })?;
        Ok(d_gate)
    }
}

struct UpGradient<'a> {
    gate: &'a Tensor,
    g: &'a Tensor,
}

impl Kernel for UpGradient<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let [d_up] = map_elements([self.gate, self.g], self.gate.dtype(), |_, [gate, g], [d_up]| {
            row::backward_up(gate, g, d_up);
        })?;
        Ok(d_up)
    }
}
