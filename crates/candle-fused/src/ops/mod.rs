//! The operations, one module each.
//!
//! A module reads from top to bottom: the mathematics and what the backward saves or recomputes; the public function
//! with its checks; `reference`, the same in plain differentiable Candle operations; the private kernels and backward.

pub mod adam;
pub mod add;
pub mod attention;
mod attention_products;
pub mod cross_entropy;
pub mod dropout;
pub mod frozen_linear;
mod gated;
pub mod gelu_mul;
pub mod layer_norm;
pub mod linear_cross_entropy;
pub mod lora_delta;
pub mod lora_linear;
mod low_rank;
mod low_rank_pairs;
mod low_rank_products;
pub mod rms_norm;
pub mod rope;
pub mod silu_mul;
pub mod softmax;
