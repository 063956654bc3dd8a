//! What a run is told.

use serde_json::{Map, Value, json};

use super::{OptimizerConfig, Schedule, ScheduleKind};
use crate::{Error, Result};

/// The settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Optimizer steps in all.
    pub iters: usize,
    /// Sequences per forward and backward pass.
    pub batch_size: usize,
    /// Passes per optimizer step.
    pub grad_accumulation_steps: usize,
    /// Decides the order of the data and every dropout mask.
    pub seed: u64,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// The learning rate at every step.
    pub schedule: Schedule,
    /// Gradients are scaled down so that their norm over all parameters is at most this.
    pub clip_grad_norm: Option<f64>,
    /// Steps between two training reports.
    pub steps_per_report: usize,
    /// Steps between two validations.
    pub steps_per_eval: usize,
    /// Batches per validation; `None` for the whole set.
    pub val_batches: Option<usize>,
    /// Steps between two checkpoints.
    pub save_every: usize,
    /// How many checkpoints stay.
    pub keep_checkpoints: usize,
}

impl TrainConfig {
    /// Refuses what cannot work, naming the setting as the command's flags do.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("batch-size", self.batch_size),
            ("grad-accumulation-steps", self.grad_accumulation_steps),
            ("steps-per-report", self.steps_per_report),
            ("steps-per-eval", self.steps_per_eval),
            ("save-every", self.save_every),
            ("keep-checkpoints", self.keep_checkpoints),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::Config(format!("{name} must be at least 1, got 0")));
        }
        if self.val_batches == Some(0) {
            return Err(Error::Config("val-batches must be at least 1, or -1 for all, got 0".to_owned()));
        }
        if let Some(norm) = self.clip_grad_norm
            && !(norm.is_finite() && norm > 0.0)
        {
            return Err(Error::Config(format!("clip-grad-norm must be above 0, got {norm}")));
        }
        self.optimizer.check()?;
        self.schedule.check()
    }

    /// All that decides the course of the run, by name, as a checkpoint remembers it. A constant learning rate does
    /// not depend on how many steps are planned, so such a run may be prolonged.
    #[must_use]
    pub(super) fn identity(&self) -> Map<String, Value> {
        let OptimizerConfig { kind, beta1, beta2, eps, weight_decay } = self.optimizer;
        let Schedule { kind: schedule, learning_rate, min_learning_rate, warmup, total } = self.schedule;
        // Floats as text: the shortest digits that mean exactly this number, which any JSON reader hands back whole.
        let number = |value: f64| json!(value.to_string());
        let pairs = [
            ("batch-size", json!(self.batch_size)),
            ("grad-accumulation-steps", json!(self.grad_accumulation_steps)),
            ("seed", json!(self.seed)),
            ("optimizer", json!(kind.name())),
            ("beta1", number(beta1)),
            ("beta2", number(beta2)),
            ("eps", number(eps)),
            ("weight-decay", number(weight_decay)),
            ("clip-grad-norm", json!(self.clip_grad_norm.map(|norm| norm.to_string()))),
            ("schedule", json!(schedule.name())),
            ("learning-rate", number(learning_rate)),
            ("min-learning-rate", number(min_learning_rate)),
            ("warmup", json!(warmup)),
        ];
        let mut identity: Map<_, _> =
            pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        if schedule != ScheduleKind::Constant {
            identity.insert("iters".to_owned(), json!(total));
        }
        identity
    }
}
