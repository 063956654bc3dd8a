//! What `wick train` and `wick pretrain` share: the flags of the loop, the data, and the run.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use candlewick::data::{Dataset, Rows};
use candlewick::files::write_atomically;
use candlewick::generate::{GenerateOptions, Sampling, generate};
use candlewick::train::{
    Event, Job, OptimizerConfig, OptimizerKind, Schedule, ScheduleKind, Start, TrainConfig, train,
};
use candlewick::{Error, FineTune, Result, embedded};
use clap::{Args, ValueEnum};
use tokenizers::Tokenizer;

use crate::Outcome;
use crate::metrics::Metrics;
use crate::plot;
use crate::progress::Progress;

/// How many tokens a sample has.
const SAMPLE_TOKENS: usize = 150;

/// The flags of the loop. Where a default depends on what is trained, the value is optional here and [`Defaults`]
/// has it.
#[derive(Debug, Args)]
pub struct LoopOptions {
    /// A YAML file with these flags as keys; flags given here override it
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Optimizer steps
    #[arg(long)]
    pub iters: Option<usize>,
    /// Sequences per forward and backward pass [default: 4]
    #[arg(long)]
    pub batch_size: Option<usize>,
    /// Passes per optimizer step; every token weighs the same
    #[arg(long, default_value_t = 1)]
    pub grad_accumulation_steps: usize,
    /// The longest sequence, in tokens [default: 2048, or the model's limit]
    #[arg(long)]
    pub max_seq_length: Option<usize>,
    /// Seed of the data's order, of new weights and of dropout
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// How parameters are updated
    #[arg(long, value_enum, default_value_t = OptimizerName::Adamw)]
    pub optimizer: OptimizerName,
    /// The highest learning rate
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// What the learning rate does after the warmup
    #[arg(long, value_enum)]
    pub schedule: Option<ScheduleName>,
    /// Steps over which the learning rate rises from zero
    #[arg(long)]
    pub warmup: Option<usize>,
    /// Where the learning rate ends
    #[arg(long, default_value_t = 0.0)]
    pub min_learning_rate: f64,
    /// Weight decay of matrices [default: 0.01 for adamw, 0 for adam]
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// Decay of the optimizer's first moment
    #[arg(long, default_value_t = 0.9)]
    pub beta1: f64,
    /// Decay of the optimizer's second moment
    #[arg(long, default_value_t = 0.999)]
    pub beta2: f64,
    /// Largest norm of all gradients together; 0 for no limit
    #[arg(long, default_value_t = 1.0)]
    pub clip_grad_norm: f64,

    /// Batches per validation; -1 for all
    #[arg(long, allow_negative_numbers = true)]
    pub val_batches: Option<i64>,
    /// Steps between two reports [default: 10]
    #[arg(long)]
    pub steps_per_report: Option<usize>,
    /// Steps between two validations [default: 200]
    #[arg(long)]
    pub steps_per_eval: Option<usize>,
    /// Steps between two checkpoints
    #[arg(long, default_value_t = 100)]
    pub save_every: usize,
    /// How many checkpoints stay
    #[arg(long, default_value_t = 2)]
    pub keep_checkpoints: usize,
    /// Go on from the newest checkpoint, exactly as if the run had not stopped
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,
    /// Start anew although an earlier run in the same folder did not finish
    #[arg(long)]
    pub overwrite: bool,
    /// A text to continue before and after
    #[arg(long, value_name = "TEXT")]
    pub sample_prompt: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OptimizerName {
    Adamw,
    Adam,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScheduleName {
    Constant,
    Linear,
    Cosine,
}

/// The loop's settings where no flag says otherwise.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    pub iters: usize,
    pub batch_size: usize,
    pub learning_rate: f64,
    pub schedule: ScheduleName,
    pub warmup: usize,
    pub val_batches: i64,
    pub steps_per_report: usize,
    pub steps_per_eval: usize,
}

impl LoopOptions {
    /// The loop's settings.
    pub fn train_config(&self, defaults: &Defaults) -> Result<TrainConfig> {
        let kind = match self.optimizer {
            OptimizerName::Adamw => OptimizerKind::AdamW,
            OptimizerName::Adam => OptimizerKind::Adam,
        };
        let decay = if kind == OptimizerKind::AdamW { 0.01 } else { 0.0 };
        let iters = self.iters.unwrap_or(defaults.iters);
        let schedule = match self.schedule.unwrap_or(defaults.schedule) {
            ScheduleName::Constant => ScheduleKind::Constant,
            ScheduleName::Linear => ScheduleKind::Linear,
            ScheduleName::Cosine => ScheduleKind::Cosine,
        };
        let config = TrainConfig {
            iters,
            batch_size: self.batch_size.unwrap_or(defaults.batch_size),
            grad_accumulation_steps: self.grad_accumulation_steps,
            seed: self.seed,
            optimizer: OptimizerConfig {
                kind,
                beta1: self.beta1,
                beta2: self.beta2,
                weight_decay: self.weight_decay.unwrap_or(decay),
                ..OptimizerConfig::default()
            },
            schedule: Schedule {
                kind: schedule,
                learning_rate: self.learning_rate.unwrap_or(defaults.learning_rate),
                min_learning_rate: self.min_learning_rate,
                warmup: self.warmup.unwrap_or(defaults.warmup),
                total: iters,
            },
            clip_grad_norm: (self.clip_grad_norm != 0.0).then_some(self.clip_grad_norm),
            steps_per_report: self.steps_per_report.unwrap_or(defaults.steps_per_report),
            steps_per_eval: self.steps_per_eval.unwrap_or(defaults.steps_per_eval),
            val_batches: limit("val-batches", self.val_batches.unwrap_or(defaults.val_batches))?,
            save_every: self.save_every,
            keep_checkpoints: self.keep_checkpoints,
        };
        config.check()?;
        Ok(config)
    }

    fn start(&self) -> Start {
        match (self.resume, self.overwrite) {
            (true, _) => Start::Resume,
            (false, true) => Start::Replace,
            (false, false) => Start::New,
        }
    }
}

/// A number of batches, where -1 means all.
fn limit(name: &str, value: i64) -> Result<Option<usize>> {
    match usize::try_from(value) {
        Ok(0) => Err(Error::Config(format!("{name} must be at least 1, or -1 for all, got 0"))),
        Ok(batches) => Ok(Some(batches)),
        Err(_) if value == -1 => Ok(None),
        Err(_) => Err(Error::Config(format!("{name} must be at least 1, or -1 for all, got {value}"))),
    }
}

/// The rows of a data folder, or the embedded ones; the second are for validation.
pub fn rows(folder: Option<&Path>) -> Result<(Rows, Option<Rows>)> {
    if let Some(folder) = folder {
        let train = Rows::read(&folder.join("train.jsonl"))?;
        return Ok((train, Rows::read_optional(&folder.join("valid.jsonl"))?));
    }
    let read = |name: &str, bytes| Rows::from_reader(&Path::new("(embedded)").join(name), bytes);
    Ok((read("train.jsonl", embedded::TRAIN)?, Some(read("valid.jsonl", embedded::VALID)?)))
}

/// Says what `--truncate` did.
pub fn tell_truncation(dataset: &Dataset) {
    let truncation = dataset.truncation();
    if truncation.cut > 0 {
        eprintln!(
            "warning: {} of the training rows are longer than the maximum and were cut; {} of them had nothing left to \
             learn and were dropped",
            truncation.cut, truncation.dropped
        );
    }
}

/// Trains and tells the user about it: lines or a bar, `metrics.jsonl` and `loss.svg` in the job's folder, the same
/// prompt continued before and after, and a last line with what came out.
pub fn run(
    options: &LoopOptions,
    config: &TrainConfig,
    model: &FineTune,
    tokenizer: &Tokenizer,
    sample_prompt: Option<&str>,
    job: &Job<'_>,
) -> Outcome {
    let job = Job { start: options.start(), ..*job };
    let stop = stop_on_interrupt()?;
    let sample = |when: &str| match sample_prompt {
        Some(prompt) => sample(when, model, tokenizer, prompt),
        None => Ok(()),
    };
    sample("Before")?;

    let mut progress = Progress::new();
    if job.valid.is_none() {
        progress.line("No valid.jsonl: training without validation");
    }
    let mut metrics = Metrics::new(job.folder);
    let mut failure = None;
    let summary = train(&job, config, stop, &mut |event| {
        progress.event(&event);
        if failure.is_none()
            && let Err(error) = metrics.event(&event).and_then(|()| match event {
                Event::Saved { .. } => draw(job.folder, &metrics),
                _ => Ok(()),
            })
        {
            // The loop then saves and returns.
            stop.store(true, Ordering::Relaxed);
            failure = Some(error);
        }
    })?;
    progress.clear();
    if let Some(error) = failure {
        return Err(error);
    }
    let folder = job.folder.display();
    if summary.stopped {
        match &summary.checkpoint {
            Some(checkpoint) => println!("Stopped; saved {}. Go on with --resume", checkpoint.display()),
            None => println!("Stopped before the first step; nothing was written"),
        }
        Progress::summary(&summary);
        return Ok(ExitCode::from(INTERRUPTED));
    }
    sample("After")?;
    println!("Everything is in {folder}");
    Progress::summary(&summary);
    Ok(ExitCode::SUCCESS)
}

fn draw(folder: &Path, metrics: &Metrics) -> Result<()> {
    match plot::loss(metrics.records())? {
        Some(svg) => write_atomically(&folder.join("loss.svg"), svg.as_bytes()),
        None => Ok(()),
    }
}

/// Prints the likeliest continuation.
fn sample(when: &str, model: &FineTune, tokenizer: &Tokenizer, prompt: &str) -> Result<()> {
    let mut text = prompt.to_owned();
    let options = GenerateOptions { max_tokens: SAMPLE_TOKENS, sampling: Sampling::default() };
    generate(model.decoder(), tokenizer, prompt, options, |piece| {
        text.push_str(piece);
        ControlFlow::Continue(())
    })?;
    println!("{when}: {}\n", text.trim_end());
    Ok(())
}

/// The exit code of a process that ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// The flag that the first ctrl-C sets; the second one ends the process at once.
fn stop_on_interrupt() -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
        eprintln!("Stopping after this step, then saving; once more to quit at once");
    })
    .map_err(|error| Error::Config(format!("ctrl-C cannot be caught: {error}")))?;
    Ok(&STOP)
}
