//! A projection of the model: frozen, trainable, or frozen with a LoRA adapter beside it.

use candle_core::{Tensor, Var};
use candle_fused::{Dropout, LoraLinearOptions};

use crate::Result;

/// `y = x·Wᵀ + bias`, with whatever is trained of it.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The module's path, `model.layers.0.self_attn.q_proj`.
    pub(crate) path: String,
    /// `[out, in]`; a variable when all parameters are trained.
    pub(crate) weight: Tensor,
    /// `[out]`
    pub(crate) bias: Option<Tensor>,
    pub(crate) adapter: Option<Adapter>,
}

/// The trainable pair beside a frozen projection, in PEFT's layout.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// `[r, in]`
    pub a: Var,
    /// `[out, r]`
    pub b: Var,
    /// `alpha / r`, or `alpha / √r` with rsLoRA.
    pub scaling: f32,
    /// Dropout on the adapter's input while training, 0 for none.
    pub dropout: f32,
    /// Tells this adapter's dropout mask from the others' of the same step.
    pub index: u64,
}

impl Linear {
    /// `[…, in]` to `[…, out]`. `dropout_seed` is the step's, while training.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit, from the op.
    pub fn forward(&self, x: &Tensor, dropout_seed: Option<u64>) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        if let Some(adapter) = &self.adapter {
            let dropout = dropout_seed
                .filter(|_| adapter.dropout > 0.0)
                .map(|seed| Dropout { p: adapter.dropout, seed: mix(seed, adapter.index) });
            let options = LoraLinearOptions { scaling: adapter.scaling, dropout };
            return Ok(candle_fused::lora_linear(x, &self.weight, bias, &adapter.a, &adapter.b, options)?);
        }
        if !self.weight.track_op() {
            return Ok(candle_fused::frozen_linear(x, &self.weight, bias)?);
        }
        let (out, inner) = self.weight.dims2()?;
        let rows = x.elem_count() / inner;
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = out;
        }
        let y = x.reshape((rows, inner))?.matmul(&self.weight.t()?)?;
        let y = match bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        };
        Ok(y.reshape(shape)?)
    }

    /// The weight, if that is all there is and it is not trained.
    pub(crate) fn frozen_weight(&self) -> Option<&Tensor> {
        let alone = self.adapter.is_none() && self.bias.is_none() && !self.weight.track_op();
        alone.then_some(&self.weight)
    }

    /// Input and output width.
    #[must_use]
    pub fn dims(&self) -> (usize, usize) {
        let dims = self.weight.dims();
        (dims[1], dims[0])
    }
}

/// Decorrelates seeds: the finalizer of `SplitMix64` (Steele, Lea, Flood 2014).
pub(crate) fn mix(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
