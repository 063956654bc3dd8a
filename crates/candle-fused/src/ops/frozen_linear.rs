//! A linear layer whose weight is frozen: `y = x·Wᵀ + bias`, and backward `dx = g·W` alone.
//!
//! Candle's own product computes the gradient of both operands at every step, the weight-sized one included.

use candle_core::{Result, Tensor};

use super::low_rank::{self, Base, like_rows, rows};
use crate::backend::{self, Attempt};
use crate::graph::{self, Backward, Reads, tracked};

const OP: &str = "frozen_linear";

/// `x·Wᵀ + bias` for `x [..., in]` (f32, f16 or bf16), `weight [out, in]` and `bias [out]`, both of `x`'s dtype and
/// without a gradient.
///
/// A weight of 16 bits may stay so beside an f32 `x`: the result is that of the widened one, but for the order of additions. A
/// CPU reads it as it is; a GPU widens it for every product. A CPU with a matrix unit for bf16 (AMX) multiplies an f32 `x` in parts,
/// with a bf16 weight in less time than with one of f32.
///
/// # Errors
/// A scalar, another dtype, a weight or bias of another shape, dtype or device.
pub fn frozen_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    low_rank::check_base(OP, x, weight, bias)?;
    backend::dispatch(OP, x, || fused(x, weight, bias), || reference(x, weight, bias))
}

/// [`frozen_linear`] in plain Candle operations, which compute the weight's gradient and then drop it.
pub fn reference(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    low_rank::check_base(OP, x, weight, bias)?;
    low_rank::reference_base(x, weight, bias)
}

/// `x·Wᵀ + bias`, recorded.
fn fused(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Attempt<Tensor> {
    let weight = weight.detach();
    let y = backend::run(x.device(), &Base { left: &rows(&x.detach())?, right: &weight.t()?, bias })?;
    Ok(graph::record1(x, like_rows(&y, x)?, FrozenBackward { weight })?)
}

struct FrozenBackward {
    weight: Tensor,
}

impl Backward<1> for FrozenBackward {
    fn op(&self) -> &'static str {
        OP
    }

    fn reads(&self, _: usize) -> Reads {
        Reads::Never
    }

    fn reads_output(&self) -> bool {
        false
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let gradient = || {
            let base = Base { left: &rows(grad)?, right: &self.weight, bias: None };
            backend::run(x.device(), &base)?.reshape(x.shape())
        };
        Ok([tracked(x, gradient)?])
    }
}
