//! Runs training steps: a fresh process for every measurement, the engines in turn.

use std::collections::BTreeMap;

use crate::case::{DeviceName, Dtype};
use crate::judge::Physics;
use crate::machine::{DISTURBANCE, Work};
use crate::ops::as_f64;
use crate::protocol::{Hello, Reply, Request, Trained};
use crate::report::{TrainingOutcome, TrainingReport};
use crate::session::{Session, Start};
use crate::statistics::median;
use crate::training::Training;
use crate::{Error, Result};

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
    /// Processors that other programs kept busy meanwhile.
    others: f64,
    hello: Hello,
}

/// How steps are measured.
pub struct How<'a> {
    pub device: DeviceName,
    pub threads: usize,
    pub rounds: usize,
    /// Seconds that a step may be expected to take.
    pub patience: f64,
    pub physics: &'a Physics,
    pub allow_fallback: bool,
}

/// The latest step of each engine, by label and dtype: seconds for each product of a frozen number, and which step it
/// was. It tells how long a larger model would take: minutes a step, where a processor has no 16-bit arithmetic.
pub type Pace = BTreeMap<(String, &'static str), (f64, String)>;

/// Measures one training step with every trainer, ours first; and who they are.
pub fn run(
    training: &Training,
    trainers: &[Trainer],
    how: &How<'_>,
    paces: &mut Pace,
) -> (TrainingReport, Vec<Hello>) {
    let dtype = training.dtype.name();
    let work = training.projected() * as_f64(training.batch * training.tokens);
    let mut runs: Vec<Vec<Result<Run>>> = trainers.iter().map(|_| Vec::new()).collect();
    for _ in 0..how.rounds {
        for (trainer, runs) in trainers.iter().zip(&mut runs) {
            let key = (trainer.label.clone(), dtype);
            if runs.is_empty()
                && let Some((pace, before)) = paces.get(&key)
                && pace * work > how.patience
            {
                let reason = format!("not asked: after {before}, a step would take {:.0} s", pace * work);
                runs.push(Err(Error::Engine(reason)));
            } else if runs.iter().all(Result::is_ok) {
                let run = undisturbed(training, trainer, how);
                if let Ok(run) = &run {
                    let pace = median(&run.trained.step_seconds) / work;
                    paces.insert(key, (pace, training.id()));
                }
                runs.push(run);
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
    let engines = runs.iter().filter_map(|runs| Some(runs.first()?.as_ref().ok()?.hello.clone())).collect();
    (TrainingReport { id: training.id(), training: training.clone(), outcomes }, engines)
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
        others: good.iter().map(|run| run.others).reduce(f64::max),
        problem,
    }
}

/// A measurement that other programs did not disturb, or the least disturbed of three.
fn undisturbed(training: &Training, trainer: &Trainer, how: &How<'_>) -> Result<Run> {
    let mut best = once(training, trainer, how)?;
    for _ in 0..2 {
        if how.device == DeviceName::Cpu && best.others > DISTURBANCE && best.problem.is_none() {
            eprintln!(
                "{} {}: other programs kept {:.2} processors busy",
                training.id(),
                trainer.label,
                best.others
            );
            let again = once(training, trainer, how)?;
            if again.others < best.others {
                best = again;
            }
        }
    }
    Ok(best)
}

fn once(training: &Training, trainer: &Trainer, how: &How<'_>) -> Result<Run> {
    let mut session = Session::start(&trainer.start, how.device, how.threads)?;
    let request = Request::Train { training: training.clone(), variant: trainer.variant.clone() };
    let processes: Vec<u32> = session.process().into_iter().collect();
    let before = Work::now(&processes);
    let (reply, wall) = session.ask(&request)?;
    let after = Work::now(&processes);
    let Reply::Trained(trained) = reply else {
        return Err(session.unexpected("training", &reply));
    };
    let peak_bytes = match how.device {
        DeviceName::Cpu => session.peak_resident_bytes(),
        DeviceName::Cuda => trained.peak_device_bytes,
    };
    let problem = judge(training, &trained, wall.as_secs_f64(), how);
    let others = before.zip(after).map_or(0.0, |(before, after)| before.others(after, wall.as_secs_f64()));
    let tokens_per_second = as_f64(training.batch * training.tokens) / median(&trained.step_seconds);
    Ok(Run { tokens_per_second, peak_bytes, trained, problem, others, hello: session.hello.clone() })
}

/// What speaks against these steps: too few, more time than passed, less than the products of the frozen weights take,
/// a first loss that is not a random model's, a loss that several steps on one batch did not lower, a path that is not the fused one.
fn judge(training: &Training, trained: &Trained, wall: f64, how: &How<'_>) -> Option<String> {
    let How { physics, allow_fallback, .. } = *how;
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
    let rate = match (training.dtype, training.stored) {
        (Dtype::F32, None | Some(Dtype::F32)) => physics.f32_products,
        // A float times a number of 16 bits is three products of such.
        (Dtype::F32, Some(_)) => physics.f32_products.max(physics.short_products / 3.0),
        _ => physics.short_products,
    };
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
