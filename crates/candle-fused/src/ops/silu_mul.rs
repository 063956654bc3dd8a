//! `SwiGLU`'s product (Shazeer, 2020): `y = silu(gate)·up`, `silu(z) = z·σ(z)`, `σ(z) = 1/(1 + exp(−z))`.
//!
//! Backward, with `σ` recomputed from the gate: `d_gate = g·up·σ·(1 + gate·(1 − σ))`, `d_up = g·gate·σ`.

use candle_core::{DType, Result, Tensor};

use crate::{backend, check};

const OP: &str = "silu_mul";

/// `silu(gate) · up`, element by element, for two tensors of one shape and dtype (f32, f16 or bf16).
///
/// # Errors
/// Another dtype, tensors that differ in shape, dtype or device.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check(gate, up)?;
    backend::dispatch(OP, gate, || reference(gate, up), || reference(gate, up))
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
