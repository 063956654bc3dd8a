//! Runs training steps: a fresh process for every measurement, the engines in turn.

use crate::Result;
use crate::case::{DeviceName, Dtype};
use crate::judge::Physics;
use crate::ops::as_f64;
use crate::protocol::{Reply, Request, Trained};
use crate::report::{TrainingOutcome, TrainingReport};
use crate::session::{Session, Start};
use crate::statistics::median;
use crate::training::Training;

/// An engine and one of its variants.
pub struct Trainer {
    pub label: String,
    pub variant: String,
    pub start: Start,
}

/// What one process did.
struct Run {
    tokens_per_second: f64,
    peak_bytes: Option<f64>,
    trained: Trained,
    problem: Option<String>,
    /// A single step took longer than the limit of all.
    is_slow: bool,
}

/// Measures one training step with every trainer, ours first.
pub fn run(
    training: &Training,
    trainers: &[Trainer],
    device: DeviceName,
    threads: usize,
    rounds: usize,
    physics: &Physics,
    allow_fallback: bool,
) -> TrainingReport {
    let mut runs: Vec<Vec<Result<Run>>> = trainers.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (trainer, runs) in trainers.iter().zip(&mut runs) {
            // Who failed, or needs minutes, is not asked again.
            if runs.iter().all(|run: &Result<Run>| run.as_ref().is_ok_and(|run| !run.is_slow)) {
                runs.push(once(training, trainer, device, threads, physics, allow_fallback));
            }
        }
    }
    let mut outcomes: Vec<TrainingOutcome> =
        trainers.iter().zip(&runs).map(|(trainer, runs)| outcome(&trainer.label, runs)).collect();
    let ours = outcomes.first().map(|ours| ours.rounds.clone()).unwrap_or_default();
    for outcome in &mut outcomes {
        let ratios: Vec<f64> = ours.iter().zip(&outcome.rounds).map(|(ours, theirs)| ours / theirs).collect();
        outcome.ratio = (!ratios.is_empty()).then(|| median(&ratios));
    }
    TrainingReport { id: training.id(), training: training.clone(), outcomes }
}

fn outcome(label: &str, runs: &[Result<Run>]) -> TrainingOutcome {
    let good: Vec<&Run> = runs.iter().filter_map(|run| run.as_ref().ok()).collect();
    let problem = runs.iter().find_map(|run| match run {
        Ok(run) => run.problem.clone(),
        Err(error) => Some(error.to_string()),
    });
    let rounds: Vec<f64> = match problem {
        Some(_) => Vec::new(),
        None => good.iter().map(|run| run.tokens_per_second).collect(),
    };
    let most = |of: fn(&Run) -> Option<f64>| good.iter().filter_map(|run| of(run)).reduce(f64::max);
    TrainingOutcome {
        label: label.to_owned(),
        tokens_per_second: (!rounds.is_empty()).then(|| median(&rounds)),
        rounds,
        ratio: None,
        peak_bytes: most(|run| run.peak_bytes),
        driver_bytes: most(|run| run.trained.driver_device_bytes),
        losses: good.last().and_then(|run| Some((*run.trained.losses.first()?, *run.trained.losses.last()?))),
        problem,
    }
}

fn once(
    training: &Training,
    trainer: &Trainer,
    device: DeviceName,
    threads: usize,
    physics: &Physics,
    allow_fallback: bool,
) -> Result<Run> {
    let mut session = Session::start(&trainer.start, device, threads)?;
    let request = Request::Train { training: training.clone(), variant: trainer.variant.clone() };
    let (reply, wall) = session.ask(&request)?;
    let Reply::Trained(trained) = reply else {
        return Err(session.unexpected("training", &reply));
    };
    let peak_bytes = match device {
        DeviceName::Cpu => session.peak_resident_bytes(),
        DeviceName::Cuda => trained.peak_device_bytes,
    };
    let problem = judge(training, &trained, wall.as_secs_f64(), physics, allow_fallback);
    let tokens_per_second = as_f64(training.batch * training.tokens) / median(&trained.step_seconds);
    let is_slow = median(&trained.step_seconds) > training.limit_seconds;
    Ok(Run { tokens_per_second, peak_bytes, trained, problem, is_slow })
}

/// What speaks against these steps: too few, more time than passed, less than the products of the frozen weights take,
/// a first loss that is not a random model's, a loss that several steps on one batch did not lower, a path that is not the fused one.
fn judge(
    training: &Training,
    trained: &Trained,
    wall: f64,
    physics: &Physics,
    allow_fallback: bool,
) -> Option<String> {
    let seconds = &trained.step_seconds;
    let (Some(&first), Some(&last)) = (trained.losses.first(), trained.losses.last()) else {
        return Some("no losses".to_owned());
    };
    if seconds.is_empty() || trained.losses.len() < seconds.len() {
        return Some(format!("{} steps and {} losses", seconds.len(), trained.losses.len()));
    }
    let claimed: f64 = seconds.iter().sum();
    if claimed > wall {
        return Some(format!("claims {claimed:.2} s where {wall:.2} s passed"));
    }
    let rate = if training.dtype == Dtype::F32 { physics.f32_products } else { physics.short_products };
    let floor = 4.0 * training.projected() * as_f64(training.batch * training.tokens) / (2.0 * rate);
    if seconds.iter().any(|&step| step < floor) {
        return Some(format!(
            "a step of {:.4} s is below the device's limit of {floor:.4} s",
            median(seconds)
        ));
    }
    #[expect(clippy::cast_precision_loss, reason = "a vocabulary")]
    let chance = (training.vocabulary() as f64).ln();
    if !(0.9 * chance..1.2 * chance).contains(&first) {
        return Some(format!("the first loss is {first:.3}, a random model's is about {chance:.3}"));
    }
    if last.is_nan() || (trained.losses.len() > 1 && last >= first) {
        return Some(format!("the loss went from {first:.4} to {last:.4} on one batch"));
    }
    match &trained.paths {
        Some(paths) if paths.fallback > 0 && !allow_fallback => {
            Some(format!("fell back ({})", paths.reasons.join("; ")))
        }
        _ => None,
    }
}
