//! The loop.

#![expect(clippy::cast_precision_loss, reason = "token and step counts are far below 2^53")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use serde_json::{Map, Value, json};

use super::audit::Audit;
use super::checkpoint::{Checkpoints, Exact, Progress, State};
use super::gradients::{accumulate, non_finite};
use super::{
    Artifacts, Batch, Evaluation, Event, Optimizer, Parameter, Pass, Summary, TrainConfig, TrainReport,
    Trainable, peak_memory,
};
use crate::data::{Batches, Dataset, in_order};
use crate::{Error, Result};

/// How a run begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// Anew. Checkpoints of a finished run in the same folder are replaced; those of an unfinished one are an error.
    #[default]
    New,
    /// Anew, whatever is there. Nothing is removed before the new run's first checkpoint is about to appear.
    Replace,
    /// From the newest checkpoint.
    Resume,
}

/// What to train on what, and where to put it.
pub struct Job<'a> {
    /// The model.
    pub model: &'a dyn Trainable,
    /// Writes the model's own files.
    pub artifacts: &'a dyn Artifacts,
    /// What to learn.
    pub train: &'a Dataset,
    /// What to measure on.
    pub valid: Option<&'a Dataset>,
    /// Where checkpoints go, and in the end the artifacts.
    pub folder: &'a Path,
    /// What else decides the run, by the names of its flags: the model, the adapter's shape. A resumed run must have
    /// the same.
    pub settings: &'a [(String, String)],
    /// How the run begins.
    pub start: Start,
}

/// Trains until the last step, or until `stop` is set, and then saves.
///
/// Fails on impossible settings, on a run to resume that is not this one, when a parameter does not learn, when the
/// loss or a gradient is not finite any more, and when saving fails. Checkpoints already made stay as they are.
pub fn train(
    job: &Job<'_>,
    config: &TrainConfig,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<Summary> {
    config.check()?;
    let mut run = Run::start(job, config)?;
    on_event(run.started());
    let stopped = loop {
        if run.validation_due()
            && let Some(event) = run.validate(stop)?
        {
            on_event(event);
        }
        if run.save_due() {
            on_event(run.save()?);
        }
        if run.progress.step >= config.iters {
            break false;
        }
        if stop.load(Ordering::Relaxed) {
            break true;
        }
        run.step(on_event)?;
        if run.report_due() {
            on_event(Event::Report(run.report()?));
        }
    };
    if run.progress.step > 0 {
        if run.saved != Some(run.progress.step) {
            on_event(run.save()?);
        }
        job.artifacts.save(job.folder)?;
    }
    run.summary(stopped)
}

/// The mean loss per token over the first `limit` batches of a data set, or over all of it. `None` when `stop` was
/// set meanwhile.
pub fn evaluate(
    model: &dyn Trainable,
    dataset: &Dataset,
    batch_size: usize,
    limit: Option<usize>,
    device: &Device,
    stop: &AtomicBool,
) -> Result<Option<Evaluation>> {
    let start = Instant::now();
    let (mut sum, mut tokens) = (0.0, 0);
    for batch in in_order(dataset, batch_size, device)?.take(limit.unwrap_or(usize::MAX)) {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let batch = batch?;
        let loss = model.loss(&batch, Pass::Evaluate)?.to_scalar::<f32>()?;
        sum += f64::from(loss) * batch.tokens as f64;
        tokens += batch.tokens;
    }
    Ok(Some(Evaluation { loss: sum / tokens as f64, tokens, seconds: start.elapsed().as_secs_f64() }))
}

/// One run's state.
struct Run<'a> {
    job: &'a Job<'a>,
    config: &'a TrainConfig,
    settings: Map<String, Value>,
    device: Device,
    batches: Batches<'a>,
    optimizer: Optimizer,
    checkpoints: Checkpoints,
    progress: Progress,
    audit: Audit,
    /// The step of the newest checkpoint that is this run's.
    saved: Option<usize>,
    /// Checkpoints of another run, to be removed when this one's first appears.
    replaced: Vec<usize>,
    /// Since the last report.
    window: Speed,
    /// Since this process began.
    total: Speed,
}

/// Work and time, of this process only.
#[derive(Clone, Copy, Default)]
struct Speed {
    steps: usize,
    tokens: usize,
    time: Duration,
}

impl Speed {
    fn add(&mut self, tokens: usize, time: Duration) {
        self.steps += 1;
        self.tokens += tokens;
        self.time += time;
    }

    fn per_second(self, amount: usize) -> f64 {
        amount as f64 / self.time.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

impl<'a> Run<'a> {
    fn start(job: &'a Job<'a>, config: &'a TrainConfig) -> Result<Self> {
        let parameters = job.model.parameters();
        let Some(first) = parameters.first() else {
            return Err(Error::Config("the model has no parameter to train".to_owned()));
        };
        let mut optimizer = Optimizer::new(config.optimizer, parameters)?;
        let checkpoints = Checkpoints::new(job.folder);
        let settings = settings(job, config);
        let mut progress = Progress::default();
        let mut replaced = Vec::new();
        match job.start {
            Start::Resume => progress = checkpoints.load(&settings, parameters, &mut optimizer)?,
            Start::Replace => replaced = checkpoints.steps()?,
            Start::New => {
                if let Some((step, iters)) = checkpoints.unfinished()? {
                    return Err(Error::Checkpoint {
                        path: checkpoints.path(step),
                        message: format!(
                            "an earlier run stopped at step {step} of {iters} and would be lost"
                        ),
                    });
                }
                replaced = checkpoints.steps()?;
            }
        }
        Ok(Self {
            job,
            config,
            settings,
            device: first.var.device().clone(),
            batches: Batches::new(job.train, config.batch_size, config.seed, progress.position)?,
            optimizer,
            checkpoints,
            saved: (progress.step > 0).then_some(progress.step),
            progress,
            audit: Audit::First,
            replaced,
            window: Speed::default(),
            total: Speed::default(),
        })
    }

    fn parameters(&self) -> &'a [Parameter] {
        self.job.model.parameters()
    }

    fn started(&self) -> Event {
        let trainable = self.parameters().iter().map(|parameter| parameter.var.elem_count()).sum();
        Event::Started { step: self.progress.step, iters: self.config.iters, trainable }
    }

    /// One optimizer step: gradients, audit, clipping, update.
    fn step(&mut self, on_event: &mut dyn FnMut(Event)) -> Result<()> {
        let clock = Instant::now();
        let done = self.progress.step;
        let step = done + 1;
        let batches: Vec<Batch> = (0..self.config.grad_accumulation_steps)
            .map(|_| self.batches.next(&self.device))
            .collect::<Result<_>>()?;
        let tokens: usize = batches.iter().map(|batch| batch.tokens).sum();
        let seeds = |micro| pass_seed(self.config.seed, step, micro);
        let (loss, mut gradients) = accumulate(self.job.model, &batches, step, seeds)?;

        let norms = gradients.norms()?;
        let before = self.audit;
        self.audit = before.check(self.parameters(), &norms, self.moved())?;
        if let Some(name) = non_finite(self.parameters(), &norms) {
            return Err(Error::NonFinite { step, what: format!("the gradient of `{name}`") });
        }
        if let Some(limit) = self.config.clip_grad_norm {
            gradients.clip(&norms, limit)?;
        }
        self.optimizer.step(self.parameters(), &gradients, self.config.schedule.at(done))?;

        self.progress.step = step;
        self.progress.position = self.batches.position();
        self.progress.trained_tokens += tokens as u64;
        self.progress.window_loss.0 += loss * tokens as f64;
        self.progress.window_tokens += tokens as u64;
        let time = clock.elapsed();
        self.window.add(tokens, time);
        self.total.add(tokens, time);
        on_event(Event::Step { iter: step, loss });
        if self.audit == Audit::Passed && before != Audit::Passed {
            on_event(Event::AuditPassed { parameters: self.parameters().len() });
        }
        Ok(())
    }

    /// An update with a learning rate above zero has been made.
    fn moved(&self) -> bool {
        (0..self.progress.step).any(|done| self.config.schedule.at(done) > 0.0)
    }

    fn report_due(&self) -> bool {
        self.progress.step.is_multiple_of(self.config.steps_per_report)
            || self.progress.step == self.config.iters
    }

    fn report(&mut self) -> Result<TrainReport> {
        let Progress { step, trained_tokens, window_loss, window_tokens, .. } = self.progress;
        let window = std::mem::take(&mut self.window);
        self.progress.window_loss = Exact::default();
        self.progress.window_tokens = 0;
        Ok(TrainReport {
            iter: step,
            loss: window_loss.0 / window_tokens as f64,
            learning_rate: self.config.schedule.at(step.saturating_sub(1)),
            iterations_per_second: window.per_second(window.steps),
            tokens_per_second: window.per_second(window.tokens),
            trained_tokens,
            peak_memory: peak_memory(&self.device)?,
        })
    }

    fn validation_due(&self) -> bool {
        let step = self.progress.step;
        let due = step.is_multiple_of(self.config.steps_per_eval) || step >= self.config.iters;
        due && self.progress.validated != Some(step)
    }

    fn validate(&mut self, stop: &AtomicBool) -> Result<Option<Event>> {
        let Some(valid) = self.job.valid else {
            return Ok(None);
        };
        let TrainConfig { batch_size, val_batches, .. } = *self.config;
        let Some(evaluation) = evaluate(self.job.model, valid, batch_size, val_batches, &self.device, stop)?
        else {
            return Ok(None);
        };
        let step = self.progress.step;
        if !evaluation.loss.is_finite() {
            return Err(Error::NonFinite { step, what: "the validation loss".to_owned() });
        }
        self.progress.validated = Some(step);
        self.progress.last_validation = Some(Exact(evaluation.loss));
        if step == 0 {
            self.progress.first_validation = self.progress.last_validation;
        }
        Ok(Some(Event::Validation { iter: step, evaluation }))
    }

    fn save_due(&self) -> bool {
        let step = self.progress.step;
        step > 0 && step.is_multiple_of(self.config.save_every) && self.saved != Some(step)
    }

    fn save(&mut self) -> Result<Event> {
        let step = self.progress.step;
        let state = State {
            progress: self.progress,
            iters: self.config.iters,
            settings: &self.settings,
            parameters: self.parameters(),
            optimizer: &self.optimizer,
            artifacts: self.job.artifacts,
        };
        let path = self.checkpoints.save(&state, &self.replaced)?;
        self.replaced.clear();
        self.saved = Some(step);
        let steps = self.checkpoints.steps()?;
        let surplus = steps.len().saturating_sub(self.config.keep_checkpoints);
        self.checkpoints.remove(steps.get(..surplus).unwrap_or_default())?;
        Ok(Event::Saved { iter: step, path })
    }

    fn summary(&self, stopped: bool) -> Result<Summary> {
        Ok(Summary {
            steps: self.progress.step,
            stopped,
            trained_tokens: self.progress.trained_tokens,
            tokens_per_second: self.total.per_second(self.total.tokens),
            first_validation: self.progress.first_validation.map(|loss| loss.0),
            last_validation: self.progress.last_validation.map(|loss| loss.0),
            peak_memory: peak_memory(&self.device)?,
            checkpoint: self.saved.map(|step| self.checkpoints.path(step)),
        })
    }
}

/// All that decides the run's course: its settings, its data, and what the caller adds.
fn settings(job: &Job<'_>, config: &TrainConfig) -> Map<String, Value> {
    let mut settings = config.identity();
    settings.insert("training data".to_owned(), json!(format!("{:016x}", job.train.fingerprint())));
    settings.extend(job.settings.iter().map(|(name, value)| (name.clone(), json!(value))));
    settings
}

/// A number for every pair of step and micro-batch (the finalizer of `SplitMix64`, applied to each in turn).
fn pass_seed(seed: u64, step: usize, micro: usize) -> u64 {
    [step as u64, micro as u64].into_iter().fold(mix(seed), |state, word| mix(state ^ word))
}

const fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
