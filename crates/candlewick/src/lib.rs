//! LoRA fine-tuning for Candle: data, models, the training loop, adapters and generation.

pub mod data;
mod error;
pub mod train;

pub use error::{Error, Result};
