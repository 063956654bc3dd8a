//! What a run tells while it runs.

use std::path::PathBuf;

/// Something happened.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The run starts.
    Started {
        /// Steps already done, above zero for a resumed run.
        step: usize,
        /// Steps in all.
        iters: usize,
        /// Numbers that training changes.
        trainable: usize,
    },
    /// An optimizer step was done.
    Step {
        /// Steps done.
        iter: usize,
        /// The loss before the step's update.
        loss: f64,
    },
    /// The numbers of the steps since the last report.
    Report(TrainReport),
    /// The loss on data that is not learned from.
    Validation {
        /// Steps done.
        iter: usize,
        /// The result.
        evaluation: Evaluation,
    },
    /// Every parameter was seen to learn.
    AuditPassed {
        /// How many parameters.
        parameters: usize,
    },
    /// A checkpoint is complete on disk.
    Saved {
        /// Steps done.
        iter: usize,
        /// The checkpoint's folder.
        path: PathBuf,
    },
}

/// A report on some steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainReport {
    /// Steps done.
    pub iter: usize,
    /// Mean loss per token.
    pub loss: f64,
    /// The last step's learning rate.
    pub learning_rate: f64,
    /// Steps per second, validation and saving left out.
    pub iterations_per_second: f64,
    /// Counted tokens per second, likewise.
    pub tokens_per_second: f64,
    /// Counted tokens since step 0.
    pub trained_tokens: u64,
    /// The peak memory in bytes, where known: on a GPU, of its tensors; else of the process.
    pub peak_memory: Option<u64>,
}

/// The loss over a data set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean negative log-likelihood per counted token.
    pub loss: f64,
    /// Counted tokens.
    pub tokens: usize,
    /// How long it took.
    pub seconds: f64,
}

impl Evaluation {
    /// e to the loss.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// How a run went.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Steps done.
    pub steps: usize,
    /// It was asked to stop before its last step.
    pub stopped: bool,
    /// Counted tokens since step 0.
    pub trained_tokens: u64,
    /// Counted tokens per second of training in this process, validation and saving left out.
    pub tokens_per_second: f64,
    /// Validation loss before the first step.
    pub first_validation: Option<f64>,
    /// The latest validation loss.
    pub last_validation: Option<f64>,
    /// As in the reports.
    pub peak_memory: Option<u64>,
    /// The newest checkpoint, if there is one.
    pub checkpoint: Option<PathBuf>,
}
