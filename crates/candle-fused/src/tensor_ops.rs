//! The operations as methods of [`Tensor`].

use candle_core::Tensor;

use crate::{LoraLayout, SoftmaxOptions, TrainingError};

/// Fused, differentiable operations as methods of a tensor, on every device: Metal's kernels gave the trait its name,
/// and where there are none the reference runs (see [`telemetry`](crate::telemetry)).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_fused::CustomMetalOps;
/// let x = Tensor::ones((2, 8), DType::F32, &Device::Cpu)?;
/// let y = x.softmax_fused()?;
/// assert_eq!(y.to_vec2::<f32>()?[0][0], 0.125);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait CustomMetalOps {
    /// `scaling · x·A·B`, see [`lora_delta`](crate::lora_delta). The shapes tell the layout: A `[in, r]` and B
    /// `[r, out]`, or PEFT's A `[r, in]` and B `[out, r]`; the first where both fit.
    fn lora_forward_fused(
        &self,
        lora_a: &Tensor,
        lora_b: &Tensor,
        scaling: f32,
    ) -> Result<Tensor, TrainingError>;

    /// The softmax of the last dimension, see [`softmax`](crate::softmax).
    fn softmax_fused(&self) -> Result<Tensor, TrainingError>;

    /// RMS normalisation without a weight, see [`rms_norm`](crate::rms_norm).
    fn rms_norm_fused(&self, eps: f32) -> Result<Tensor, TrainingError>;

    /// Layer normalisation without weight and bias, see [`layer_norm`](crate::layer_norm).
    fn layer_norm_fused(&self, eps: f32) -> Result<Tensor, TrainingError>;
}

impl CustomMetalOps for Tensor {
    fn lora_forward_fused(
        &self,
        lora_a: &Tensor,
        lora_b: &Tensor,
        scaling: f32,
    ) -> Result<Tensor, TrainingError> {
        let layout = match (self.dims(), lora_a.dims(), lora_b.dims()) {
            ([.., d], [a_in, a_rank], [b_rank, _]) if a_in == d && a_rank == b_rank => LoraLayout::Seed,
            _ => LoraLayout::Peft,
        };
        Ok(crate::lora_delta(self, lora_a, lora_b, scaling, layout)?)
    }

    fn softmax_fused(&self) -> Result<Tensor, TrainingError> {
        Ok(crate::softmax(self, SoftmaxOptions::default())?)
    }

    fn rms_norm_fused(&self, eps: f32) -> Result<Tensor, TrainingError> {
        Ok(crate::rms_norm(self, None, eps)?)
    }

    fn layer_norm_fused(&self, eps: f32) -> Result<Tensor, TrainingError> {
        Ok(crate::layer_norm(self, None, None, eps)?)
    }
}
