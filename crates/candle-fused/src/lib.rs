//! Fused, differentiable operations for [Candle](https://github.com/huggingface/candle) tensors.
//!
//! Candle's own fused operations drop gradients, and its composed ones are slow. Every operation here has a forward
//! and a hand-derived backward, and is recorded on Candle's graph, so that `Tensor::backward` goes through it:
//!
//! | operation | computes |
//! |---|---|
//! | [`attention`] | softmax attention of grouped heads, without the score matrix on the CPU |
//! | [`softmax`] | softmax of the last dimension, with a scale and a causal mask |
//! | [`rms_norm`], [`layer_norm`] | normalisation of the last dimension |
//! | [`rope`] | rotary position embedding, both layouts, any rotary fraction |
//! | [`silu_mul`], [`gelu_mul`] | SwiGLU's `silu(gate) * up`, `GeGLU`'s `gelu(gate) * up` |
//! | [`cross_entropy`] | mean negative log-likelihood with an ignored index |
//! | [`linear_cross_entropy`] | the same of a frozen layer's logits, which are never held all at once |
//! | [`add`] | the sum of two tensors |
//! | [`frozen_linear`] | a linear layer whose weight never gets a gradient |
//! | [`lora_delta`], [`lora_linear`] | LoRA's low-rank product, alone or with its frozen base |
//!
//! [`adam`] is an optimizer's step in one pass, and [`backward`](backward()) a quicker `Tensor::backward`.
//!
//! Storage is f32, f16 or bf16; accumulation is f32. Where a device has no fused kernel for an operation, the plain
//! Candle composition runs in its place: [`telemetry`] counts that and traces it once, [`fused_ops`] says it beforehand.
//! A gradient is computed exactly for those arguments that are tracked.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! let x = Var::randn(0f32, 1.0, (4, 64), &Device::Cpu)?;
//! let weight = Tensor::ones(64, candle_core::DType::F32, &Device::Cpu)?;
//! let loss = candle_fused::rms_norm(&x, Some(&weight), 1e-6)?.sqr()?.sum_all()?;
//! let gradients = loss.backward()?;
//! assert!(gradients.get(&x).is_some());
//! # Ok::<(), candle_core::Error>(())
//! ```

#[cfg(test)]
extern crate self as candle_fused;
/// What the tests of the operations share, beside the integration tests.
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod shared_tests;

mod backend;
mod backward;
mod check;
mod cpu;
mod error;
mod graph;
pub mod ops;
mod philox;
pub mod telemetry;
mod tensor_ops;
pub mod view;

#[cfg(all(target_os = "macos", feature = "custom-metal"))]
pub use backend::MetalKernelCompiler;
pub use backend::{DeviceKind, fused_ops, peak_memory, reset_peak_memory};
pub use backward::{Gradients, backward, backward_from};
pub use error::{DeviceError, TrainingError};
pub use graph::release;
pub use ops::adam::{AdamStep, adam};
pub use ops::add::add;
pub use ops::attention::attention;
pub use ops::cross_entropy::cross_entropy;
pub use ops::dropout::Dropout;
pub use ops::frozen_linear::frozen_linear;
pub use ops::gelu_mul::gelu_mul;
pub use ops::layer_norm::layer_norm;
pub use ops::linear_cross_entropy::linear_cross_entropy;
pub use ops::lora_delta::{LoraLayout, lora_delta};
pub use ops::lora_linear::{LoraLinearOptions, lora_linear};
pub use ops::rms_norm::rms_norm;
pub use ops::rope::{RopeLayout, rope};
pub use ops::silu_mul::silu_mul;
pub use ops::softmax::{Mask, SoftmaxOptions, softmax};
pub use tensor_ops::CustomMetalOps;
