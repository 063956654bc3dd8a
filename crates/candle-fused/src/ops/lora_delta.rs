//! LoRA's low-rank product (Hu et al., 2021) alone: `y = s·x·Aᵀ·Bᵀ`.
//!
//! With the rows `x [n, in]`, the saved `h = s·x·Aᵀ [n, r]` and `e = s·g·B [n, r]`:
//! `dx = e·A`, `dA = eᵀ·x`, `dB = gᵀ·h`.

use candle_core::{Result, Tensor};

pub use super::low_rank::LoraLayout;
use super::low_rank::{self, LowRank};
use crate::backend;

const OP: &str = "lora_delta";

/// `scaling · x·A·B` for `x [..., in]` (f32, f16 or bf16), A and B in either [`LoraLayout`], strided views included;
/// all three are differentiable. A and B have `x`'s dtype, or f32 beside a 16-bit `x` (as PEFT keeps adapters); the
/// result has `x`'s, and each gradient its argument's.
///
/// # Errors
/// A scalar, another dtype, A or B of another shape or device, a scaling that is not finite.
pub fn lora_delta(x: &Tensor, a: &Tensor, b: &Tensor, scaling: f32, layout: LoraLayout) -> Result<Tensor> {
    low_rank::check_adapter(OP, x, a, b, scaling, layout)?;
    let call = LowRank { op: OP, weight: None, scaling, dropout: None, layout };
    backend::dispatch(OP, x, || call.forward(x, a, b, None), || reference(x, a, b, scaling, layout))
}

/// [`lora_delta`] in plain Candle operations.
pub fn reference(x: &Tensor, a: &Tensor, b: &Tensor, scaling: f32, layout: LoraLayout) -> Result<Tensor> {
    low_rank::check_adapter(OP, x, a, b, scaling, layout)?;
    low_rank::reference_delta(x, a, b, scaling, None, layout)
}
