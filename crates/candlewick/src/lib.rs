//! LoRA fine-tuning for Candle: models of the Llama family, data, the training loop, adapters in PEFT's format, and
//! generation, on the fused, differentiable ops of [`candle_fused`].
//!
//! [`model`] reads a Hugging Face folder, [`lora`] puts adapters on it, [`data`] makes batches, [`train`] runs the loop,
//! [`generate`] continues a prompt. The loop knows models only as [`train::Trainable`] and reports through events; only
//! the command `wick` prints.

mod artifacts;
pub mod data;
pub mod embedded;
mod error;
pub mod files;
mod fine_tune;
pub mod generate;
pub mod lora;
pub mod model;
pub mod train;

pub use artifacts::{AdapterArtifacts, ModelArtifacts};
pub use error::{Error, Result};
pub use fine_tune::FineTune;
