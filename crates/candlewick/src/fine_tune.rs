//! A decoder as the training loop sees it: trainable tensors and a loss.

use candle_core::Tensor;

use crate::Result;
use crate::model::Decoder;
use crate::train::{Batch, Parameter, Pass, Trainable};

/// A decoder with what is trained of it: an adapter's tensors, or all parameters.
pub struct FineTune {
    decoder: Decoder,
    parameters: Vec<Parameter>,
}

impl FineTune {
    /// Pairs a decoder with its trainable tensors, as [`lora::attach`](crate::lora::attach),
    /// [`lora::load`](crate::lora::load) or [`model::load_trainable`](crate::model::load_trainable) return them.
    #[must_use]
    pub fn new(decoder: Decoder, parameters: Vec<Parameter>) -> Self {
        Self { decoder, parameters }
    }

    /// The model.
    #[must_use]
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }
}

impl Trainable for FineTune {
    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn loss(&self, batch: &Batch, pass: Pass) -> Result<Tensor> {
        let dropout_seed = match pass {
            Pass::Train { seed } => Some(seed),
            Pass::Evaluate => None,
        };
        self.decoder.loss(&batch.input_ids, &batch.targets, crate::data::IGNORED, dropout_seed)
    }
}
