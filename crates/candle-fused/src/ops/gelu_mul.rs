//! `GeGLU`'s product (Shazeer, 2020) with the GELU that is made of a tanh (Hendrycks and Gimpel, 2016):
//! `y = gelu(gate)·up`, `gelu(z) = z·(1 + tanh t)/2 = z·σ(2t)`, `t = √(2/π)·(z + 0.044715·z³)`.
//!
//! Backward, with `σ = σ(2t)` recomputed from the gate: `d_gate = g·up·(σ + gate·σ·(1 − σ)·2t′)`, `d_up = g·gelu(gate)`.

use candle_core::{DType, Result, Tensor};

use super::gated::{self, Gate};

/// `gelu(gate) · up`, element by element, for two tensors of one shape and dtype (f32, f16 or bf16): the
/// `gelu_pytorch_tanh` of Gemma.
///
/// # Errors
/// Another dtype, tensors that differ in shape, dtype or device.
pub fn gelu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated::check(Gate::Gelu, gate, up)?;
    gated::mul(Gate::Gelu, gate, up, reference)
}

/// [`gelu_mul`] in plain Candle operations.
pub fn reference(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated::check(Gate::Gelu, gate, up)?;
    let (wide_gate, wide_up) = (gate.to_dtype(DType::F32)?, up.to_dtype(DType::F32)?);
    (wide_gate.gelu()? * wide_up)?.to_dtype(gate.dtype())
}
