//! Views of tensors that [`backward`](crate::backward()) sees through: Candle's own, made known to it.

use candle_core::shape::ShapeWithOneHole;
use candle_core::{Result, Tensor};

use crate::graph::{self, Undo};

/// [`Tensor::reshape`].
pub fn reshape(x: &Tensor, shape: impl ShapeWithOneHole) -> Result<Tensor> {
    Ok(graph::register_view(x.reshape(shape)?, x, Undo::Reshape(x.shape().clone())))
}

/// [`Tensor::transpose`], of two dimensions by their numbers.
pub fn transpose(x: &Tensor, first: usize, second: usize) -> Result<Tensor> {
    if first == second {
        // Candle's is no view of its own.
        return x.transpose(first, second);
    }
    Ok(graph::register_view(x.transpose(first, second)?, x, Undo::Transpose(first, second)))
}
