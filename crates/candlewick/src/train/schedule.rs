//! Learning rate schedules, as Hugging Face's `get_scheduler` defines them.

#![expect(clippy::cast_precision_loss, reason = "steps are far below 2^53")]

use crate::{Error, Result};

/// What the learning rate does after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScheduleKind {
    /// It stays.
    Constant,
    /// It falls in a straight line.
    Linear,
    /// It falls along half a cosine.
    Cosine,
}

impl ScheduleKind {
    /// The name that flags and files use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Linear => "linear",
            Self::Cosine => "cosine",
        }
    }
}

/// The learning rate at every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape after the warmup.
    pub kind: ScheduleKind,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// What it falls to at step `total`.
    pub min_learning_rate: f64,
    /// Steps over which it rises from zero.
    pub warmup: usize,
    /// Steps in all, the warmup among them.
    pub total: usize,
}

impl Schedule {
    /// The learning rate of the step that follows `done` completed ones. With a warmup, that of the first step is
    /// zero.
    #[must_use]
    pub fn at(&self, done: usize) -> f64 {
        if done < self.warmup {
            return self.learning_rate * (done as f64 / self.warmup as f64);
        }
        let falling = self.total.saturating_sub(self.warmup).max(1);
        let progress = ((done - self.warmup) as f64 / falling as f64).min(1.0);
        let factor = match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => 1.0 - progress,
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * factor
    }

    /// Refuses rates that are not numbers, negative, or above each other.
    pub(super) fn check(&self) -> Result<()> {
        let Self { learning_rate, min_learning_rate, .. } = *self;
        if !(learning_rate.is_finite() && learning_rate >= 0.0) {
            return Err(Error::Config(format!("learning-rate must be 0 or above, got {learning_rate}")));
        }
        if !(0.0..=learning_rate).contains(&min_learning_rate) {
            return Err(Error::Config(format!(
                "min-learning-rate must lie between 0 and learning-rate ({learning_rate}), got {min_learning_rate}"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: ScheduleKind, warmup: usize, min_learning_rate: f64, steps: &[usize]) -> Vec<f64> {
        let schedule = Schedule { kind, learning_rate: 2e-4, min_learning_rate, warmup, total: 10 };
        steps.iter().map(|&step| schedule.at(step)).collect()
    }

    fn close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() <= 1e-15, "{got} is not {expected}");
        }
    }

    // By hand from the definitions of get_{constant,linear,cosine}_schedule_with_warmup.
    #[test]
    fn constant() {
        close(&rates(ScheduleKind::Constant, 0, 0.0, &[0, 9, 50]), &[2e-4, 2e-4, 2e-4]);
        close(
            &rates(ScheduleKind::Constant, 4, 0.0, &[0, 1, 2, 3, 4, 9]),
            &[0.0, 0.5e-4, 1e-4, 1.5e-4, 2e-4, 2e-4],
        );
    }

    #[test]
    fn linear() {
        close(
            &rates(ScheduleKind::Linear, 0, 0.0, &[0, 1, 5, 9, 10, 11]),
            &[2e-4, 1.8e-4, 1e-4, 0.2e-4, 0.0, 0.0],
        );
        close(&rates(ScheduleKind::Linear, 2, 0.0, &[0, 1, 2, 4, 10]), &[0.0, 1e-4, 2e-4, 1.5e-4, 0.0]);
    }

    #[test]
    fn cosine() {
        let root = std::f64::consts::FRAC_1_SQRT_2;
        let expected = [0.0, 1e-4, 2e-4, 1e-4 * (1.0 + root), 1e-4, 1e-4 * (1.0 - root), 0.0, 0.0];
        close(&rates(ScheduleKind::Cosine, 2, 0.0, &[0, 1, 2, 4, 6, 8, 10, 12]), &expected);
        close(
            &rates(ScheduleKind::Cosine, 2, 0.5e-4, &[1, 2, 6, 10, 12]),
            &[1e-4, 2e-4, 1.25e-4, 0.5e-4, 0.5e-4],
        );
    }

    #[test]
    fn a_warmup_longer_than_the_run_is_only_a_warmup() {
        close(&rates(ScheduleKind::Cosine, 40, 0.0, &[0, 10, 20]), &[0.0, 0.5e-4, 1e-4]);
    }

    #[test]
    fn impossible_rates_are_refused() {
        let schedule = |learning_rate, min_learning_rate| {
            Schedule { kind: ScheduleKind::Linear, learning_rate, min_learning_rate, warmup: 0, total: 1 }
                .check()
        };
        assert!(schedule(1e-3, 0.0).is_ok());
        assert!(schedule(f64::NAN, 0.0).is_err());
        assert!(schedule(-1.0, 0.0).is_err());
        assert!(schedule(1e-3, 2e-3).is_err());
        assert!(schedule(1e-3, f64::NAN).is_err());
    }
}
