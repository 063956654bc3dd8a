//! `SwiGLU`'s product (Shazeer, 2020): `y = silu(gate)·up`, `silu(z) = z·σ(z)`, `σ(z) = 1/(1 + exp(−z))`.
//!
//! Backward, with `σ` recomputed from the gate: `d_gate = g·up·σ·(1 + gate·(1 − σ))`, `d_up = g·gate·σ`.

use candle_core::{DType, Result, Tensor};

use super::gated::{self, Gate};

/// `silu(gate) · up`, element by element, for two tensors of one shape and dtype (f32, f16 or bf16).
///
/// # Errors
/// Another dtype, tensors that differ in shape, dtype or device.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated::check(Gate::Silu, gate, up)?;
    gated::mul(Gate::Silu, gate, up, reference)
}

/// [`silu_mul`] in plain Candle operations.
pub fn reference(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated::check(Gate::Silu, gate, up)?;
    let (wide_gate, wide_up) = (gate.to_dtype(DType::F32)?, up.to_dtype(DType::F32)?);
    (wide_gate.silu()? * wide_up)?.to_dtype(gate.dtype())
}
