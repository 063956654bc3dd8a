//! LoRA adapters (Hu et al. 2021) as PEFT keeps them: configuration, files, and merging.

mod adapter;
mod config;
mod merge;

pub use adapter::{CONFIG, WEIGHTS, attach, expand_all_linear, load, save};
pub use config::{Layers, LoraConfig, Modules};
pub use merge::{Direction, merge};
