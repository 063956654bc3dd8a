//! The training loop: one loop for every model and for every set of trainable parameters.
//!
//! A model implements [`Trainable`]: it names its [`Parameter`]s and computes the loss of a [`Batch`]. [`train`]
//! does the rest and prints nothing; it reports [`Event`]s. What is written to disk are whole [`checkpoint`]s, and
//! in each the model's own files, which [`Artifacts`] writes.
//!
//! The same seed gives the same run, bit for bit on one number of threads, also when it is interrupted anywhere and
//! resumed: every random choice is a function of the seed and the step, and a checkpoint holds all the rest.

mod audit;
pub mod checkpoint;
mod config;
mod event;
mod gradients;
mod memory;
mod optimizer;
mod schedule;
mod staged;
mod trainer;

use std::path::Path;

use candle_core::{Tensor, Var};

use crate::Result;

pub use config::TrainConfig;
pub use event::{Evaluation, Event, Summary, TrainReport};
pub use gradients::{Gradients, accumulate};
pub use memory::{peak_memory, peak_resident_bytes};
pub use optimizer::{Optimizer, OptimizerConfig, OptimizerKind};
pub use schedule::{Schedule, ScheduleKind};
pub use trainer::{Job, Start, evaluate, train};

/// A tensor that training changes.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its name in messages and checkpoints; unique in its model.
    pub name: String,
    /// The tensor.
    pub var: Var,
    /// Its first gradient is zero by construction, as that of LoRA's A is while B is zero.
    pub zero_first_gradient: bool,
}

/// What a loss is computed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// To learn from.
    Train {
        /// For dropout: different for every step and micro-batch, the same when a run is repeated or resumed.
        seed: u64,
    },
    /// To report: no dropout.
    Evaluate,
}

/// Some sequences, padded to one length.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, `[b, t]`, u32.
    pub input_ids: Tensor,
    /// The token after each position, `[b, t]`, i64; -100 where it does not count.
    pub targets: Tensor,
    /// How many targets count.
    pub tokens: usize,
}

/// A model that can learn.
pub trait Trainable {
    /// The tensors to train, in a fixed order.
    fn parameters(&self) -> &[Parameter];

    /// The mean negative log-likelihood over the batch's counted targets: a differentiable f32 scalar.
    fn loss(&self, batch: &Batch, pass: Pass) -> Result<Tensor>;
}

/// The files that training is for: an adapter, or a model.
pub trait Artifacts {
    /// Writes them, as the parameters are now, into a folder that exists. Each file must appear whole or not at all,
    /// for which there is [`files`](crate::files).
    fn save(&self, folder: &Path) -> Result<()>;
}
