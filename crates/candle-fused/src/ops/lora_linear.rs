//! A frozen linear layer with its LoRA adapter (Hu et al., 2021): `y = x·Wᵀ + bias + s·D(x)·Aᵀ·Bᵀ`, `D` the dropout.
//!
//! With the rows `x [n, in]`, the saved `h = s·D(x)·Aᵀ [n, r]` and `e = s·g·B [n, r]`:
//! `dx = g·W + D(e·A)`, `dA = eᵀ·D(x)`, `dB = gᵀ·h`.

use candle_core::{Result, Tensor, bail};

use super::dropout::Dropout;
use super::low_rank::{self, LoraLayout, LowRank};
use crate::backend;

const OP: &str = "lora_linear";

/// What [`lora_linear`] does to the low-rank product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraLinearOptions {
    /// Multiplies it.
    pub scaling: f32,
    /// Drops elements of its input.
    pub dropout: Option<Dropout>,
}

/// `x·Wᵀ + bias + scaling·dropout(x)·Aᵀ·Bᵀ` for `x [..., in]` (f32, f16 or bf16), `weight [out, in]` and `bias [out]`,
/// both of `x`'s dtype (a weight of 16 bits may stay so beside an f32 `x`, as for
/// [`frozen_linear`](crate::frozen_linear)) and without a gradient, `a [r, in]` and `b [out, r]`, both differentiable, of
/// `x`'s dtype or f32 beside a 16-bit `x`. Dropout with `p = 0` keeps everything.
///
/// # Errors
/// A scalar, another dtype, a weight, bias, A or B of another shape, dtype or device, a scaling that is not finite, a
/// dropout outside `0..1`.
pub fn lora_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    options: LoraLinearOptions,
) -> Result<Tensor> {
    let LoraLinearOptions { scaling, dropout } = check(x, weight, bias, a, b, options)?;
    let call = LowRank { op: OP, weight: Some(weight.clone()), scaling, dropout, layout: LoraLayout::Peft };
    backend::dispatch(OP, x, || call.forward(x, a, b, bias), || reference(x, weight, bias, a, b, options))
}

/// The options, without a dropout that drops nothing.
fn check(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    options: LoraLinearOptions,
) -> Result<LoraLinearOptions> {
    low_rank::check_base(OP, x, weight, bias)?;
    let out = low_rank::check_adapter(OP, x, a, b, options.scaling, LoraLayout::Peft)?;
    if out != weight.dim(0)? {
        bail!("{OP}: b must have the weight's {} rows, got {out}", weight.dim(0)?);
    }
    if let Some(dropout) = options.dropout {
        dropout.check(OP)?;
    }
    Ok(LoraLinearOptions { dropout: options.dropout.filter(|dropout| dropout.p > 0.0), ..options })
}

/// [`lora_linear`] in plain Candle operations, which compute the weight's gradient and then drop it.
pub fn reference(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    options: LoraLinearOptions,
) -> Result<Tensor> {
    let LoraLinearOptions { scaling, dropout } = check(x, weight, bias, a, b, options)?;
    let delta = low_rank::reference_delta(x, a, b, scaling, dropout, LoraLayout::Peft)?;
    low_rank::reference_base(x, weight, bias)? + delta
}
