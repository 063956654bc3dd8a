//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder `checkpoint-<step>` that one rename makes visible, so it is there whole or not at all.
//! It holds the model's own files, ready to use, and `training_state.safetensors`:
//!
//! | tensor | |
//! |---|---|
//! | `parameter.<name>` | the parameter, in its own dtype |
//! | `optimizer.{first,second}.<name>` | Adam's moments, f32 |
//! | `optimizer.master.<name>` | the f32 value of a 16-bit parameter |
//!
//! and, as the metadata entry `candlewick`, JSON with the [`Progress`] and the settings that decide a run's course.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use candle_core::safetensors::Load;
use safetensors::{SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::staged::{self, Staged};
use super::{Artifacts, Optimizer, Parameter};
use crate::data::Position;
use crate::{Error, Result};

const PREFIX: &str = "checkpoint-";
const STATE: &str = "training_state.safetensors";
const ENTRY: &str = "candlewick";
const VERSION: u32 = 1;

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: usize,
    /// Where the next batch is.
    pub position: Position,
    /// Counted tokens so far.
    pub trained_tokens: u64,
    /// Since the last report: the losses' sum over tokens,
    pub window_loss: Exact,
    /// and the tokens.
    pub window_tokens: u64,
    /// The step of the last validation.
    pub validated: Option<usize>,
    /// Validation loss before the first step.
    pub first_validation: Option<Exact>,
    /// The latest validation loss.
    pub last_validation: Option<Exact>,
}

/// A number that JSON hands back bit for bit: written as the integer that its bits are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "u64", into = "u64")]
pub struct Exact(pub f64);

impl From<u64> for Exact {
    fn from(bits: u64) -> Self {
        Self(f64::from_bits(bits))
    }
}

impl From<Exact> for u64 {
    fn from(exact: Exact) -> Self {
        exact.0.to_bits()
    }
}

/// The metadata of a checkpoint.
#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    iters: usize,
    progress: Progress,
    settings: Map<String, Value>,
}

/// What a checkpoint holds.
pub struct State<'a> {
    /// How far the run is.
    pub progress: Progress,
    /// How far it is to go.
    pub iters: usize,
    /// All that decides its course, by name.
    pub settings: &'a Map<String, Value>,
    /// The tensors that it trains.
    pub parameters: &'a [Parameter],
    /// The optimizer.
    pub optimizer: &'a Optimizer,
    /// The model's own files.
    pub artifacts: &'a dyn Artifacts,
}

/// The checkpoints in one folder.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    /// The checkpoints in `folder`, which need not exist yet.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_path_buf() }
    }

    /// Where the checkpoint of a step is.
    #[must_use]
    pub fn path(&self, step: usize) -> PathBuf {
        self.folder.join(format!("{PREFIX}{step}"))
    }

    /// The steps of the checkpoints there are, rising.
    pub fn steps(&self) -> Result<Vec<usize>> {
        let mut steps = Vec::new();
        if self.folder.try_exists().map_err(Error::io(&self.folder))? {
            for entry in fs::read_dir(&self.folder).map_err(Error::io(&self.folder))? {
                let name = entry.map_err(Error::io(&self.folder))?.file_name();
                let step = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse().ok());
                // `checkpoint-007` is not a name that `path` gives.
                steps.extend(step.filter(|step| self.path(*step).file_name() == Some(&name)));
            }
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest checkpoint's step and planned last step, when it has not reached that.
    pub fn unfinished(&self) -> Result<Option<(usize, usize)>> {
        let Some(&step) = self.steps()?.last() else {
            return Ok(None);
        };
        let path = self.path(step).join(STATE);
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let (_, header) = parse(&bytes).map_err(|message| broken(&path, message))?;
        Ok((header.progress.step < header.iters).then_some((header.progress.step, header.iters)))
    }

    /// Writes the checkpoint of `state.progress.step`, and removes those of the steps `replaced` when it is complete
    /// on the disk but not visible yet: so the newest visible one never belongs to a run that was given up.
    ///
    /// On failure the earlier checkpoints are as they were.
    pub fn save(&self, state: &State<'_>, replaced: &[usize]) -> Result<PathBuf> {
        fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        staged::remove_leftovers(&self.folder, PREFIX)?;
        let path = self.path(state.progress.step);
        let staged = Staged::folder(&path, |folder| {
            state.artifacts.save(folder)?;
            write_state(&folder.join(STATE), state)
        })?;
        self.remove(replaced)?;
        staged.publish()?;
        Ok(path)
    }

    /// Removes the checkpoints of these steps.
    pub fn remove(&self, steps: &[usize]) -> Result<()> {
        steps.iter().try_for_each(|&step| staged::remove_folder(&self.path(step)))
    }

    /// Reads the newest checkpoint into the parameters and the optimizer.
    ///
    /// Fails, and changes nothing, when there is none, when it is damaged, when it was made with other settings, or
    /// when its tensors are not the parameters'; the message names what differs.
    pub fn load(
        &self,
        settings: &Map<String, Value>,
        parameters: &[Parameter],
        optimizer: &mut Optimizer,
    ) -> Result<Progress> {
        let Some(&step) = self.steps()?.last() else {
            return Err(broken(&self.folder, "there is no checkpoint to resume from".to_owned()));
        };
        let path = self.path(step).join(STATE);
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let (tensors, header) = parse(&bytes).map_err(|message| broken(&path, message))?;
        if header.progress.step != step {
            let message = format!("is of step {}, its folder of step {step}", header.progress.step);
            return Err(broken(&path, message));
        }
        same_settings(&header.settings, settings).map_err(|message| broken(&path, message))?;
        restore(&tensors, step, parameters, optimizer).map_err(|error| match error {
            Restore::Tensor(error) => Error::Candle(error),
            Restore::Mismatch(message) => broken(&path, message),
        })?;
        Ok(header.progress)
    }
}

fn broken(path: &Path, message: String) -> Error {
    Error::Checkpoint { path: path.to_path_buf(), message }
}

fn write_state(path: &Path, state: &State<'_>) -> Result<()> {
    let header = Header {
        version: VERSION,
        iters: state.iters,
        progress: state.progress,
        settings: state.settings.clone(),
    };
    let header = serde_json::to_string(&header).map_err(|error| broken(path, error.to_string()))?;
    let parameter = |p: &Parameter| (parameter_name(p), p.var.as_detached_tensor());
    let mut tensors = state.optimizer.state(state.parameters)?;
    tensors.extend(state.parameters.iter().map(parameter));
    let metadata = HashMap::from([(ENTRY.to_owned(), header)]);
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => Error::io(path)(source),
        other => broken(path, other.to_string()),
    })
}

fn parameter_name(parameter: &Parameter) -> String {
    format!("parameter.{}", parameter.name)
}

fn parse(bytes: &[u8]) -> std::result::Result<(SafeTensors<'_>, Header), String> {
    let damaged = |error: SafeTensorError| format!("is damaged: {error}");
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let entry = metadata.metadata().as_ref().and_then(|entries| entries.get(ENTRY));
    let entry = entry.ok_or_else(|| "is not a training state".to_owned())?;
    let header: Header = serde_json::from_str(entry).map_err(|error| format!("is damaged: {error}"))?;
    if header.version != VERSION {
        return Err(format!("has format version {}, this program reads version {VERSION}", header.version));
    }
    Ok((SafeTensors::deserialize(bytes).map_err(damaged)?, header))
}

/// Names every setting that differs.
fn same_settings(saved: &Map<String, Value>, now: &Map<String, Value>) -> std::result::Result<(), String> {
    let show = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "none".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let only_now = now.keys().filter(|name| !saved.contains_key(*name));
    let differences: Vec<String> = saved
        .keys()
        .chain(only_now)
        .map(|name| (name, saved.get(name), now.get(name)))
        .filter(|(_, saved, now)| saved != now)
        .map(|(name, saved, now)| format!("{name} was {}, now {}", show(saved), show(now)))
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    Err(format!("the run to resume had other settings: {}", differences.join("; ")))
}

enum Restore {
    Tensor(candle_core::Error),
    Mismatch(String),
}

impl From<candle_core::Error> for Restore {
    fn from(error: candle_core::Error) -> Self {
        Self::Tensor(error)
    }
}

/// Checks everything, then changes parameters and optimizer.
fn restore(
    saved: &SafeTensors<'_>,
    step: usize,
    parameters: &[Parameter],
    optimizer: &mut Optimizer,
) -> std::result::Result<(), Restore> {
    let Some(first) = parameters.first() else {
        return Ok(());
    };
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for (name, view) in saved.tensors() {
        tensors.insert(name, view.load(first.var.device())?);
    }
    let mut values = Vec::with_capacity(parameters.len());
    for parameter in parameters {
        let (name, var) = (parameter_name(parameter), &parameter.var);
        let missing = || Restore::Mismatch(format!("has no tensor `{name}`"));
        let value = tensors.remove(&name).ok_or_else(missing)?;
        if value.shape() != var.shape() || value.dtype() != var.dtype() {
            let (expected, got) = ((var.dims(), var.dtype()), (value.dims(), value.dtype()));
            return Err(Restore::Mismatch(format!("tensor `{name}` must be {expected:?}, got {got:?}")));
        }
        values.push(value);
    }
    optimizer.restore(parameters, step, &mut tensors).map_err(Restore::Mismatch)?;
    if let Some(name) = tensors.keys().min() {
        return Err(Restore::Mismatch(format!("has a tensor `{name}` that this run does not know")));
    }
    for (parameter, value) in parameters.iter().zip(&values) {
        parameter.var.set(value)?;
    }
    Ok(())
}
