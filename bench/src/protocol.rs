//! What the runner and an engine say to each other: one JSON object a line, over the engine's standard streams.
//!
//! An engine is asked to prepare a case, to take fresh inputs, to time calls on them, and to hand out what its last timed
//! call computed. It never decides how often it is called, and it sees new numbers before every timing.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::case::{Case, DeviceName};
use crate::training::Training;

/// What the runner asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Who are you?
    Hello { device: DeviceName, threads: usize },
    /// Get ready for a case; forget the one before. Compiling belongs here.
    Prepare { case: Case, variant: String, eps: f32, scaling: f32 },
    /// Read this safetensors file and make this many copies of its tensors; if `warm`, call the operation once on each,
    /// and wait.
    Inputs { path: PathBuf, copies: usize, warm: bool },
    /// Get ready to time in this way with so many calls to a sample: capturing a graph belongs here.
    Ready { way: Way, calls: usize },
    /// Call the operation `samples × calls` times, over the copies in turn, with the clock on, and nothing else.
    Time { way: Way, samples: usize, calls: usize },
    /// Write the outputs of the last timed call as a safetensors file, of the tensors named in `rows` these rows alone.
    Output { path: PathBuf, rows: BTreeMap<String, Vec<usize>> },
    /// The rates of this device that the runner cannot measure by itself.
    Limits,
    /// Train a model and report its steps.
    Train { training: Training, variant: String },
}

/// How a GPU is timed; a processor knows `synced` alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Every call is waited for.
    Synced,
    /// A sample's calls are queued and then waited for together.
    Pipelined,
    /// The device's own time, without the host's.
    Graph,
    /// Calls of which only the last is waited for: not a time, and never in a table. `seed-method` alone asks for it.
    LastOnly,
}

impl Way {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Synced => "synced",
            Self::Pipelined => "pipelined",
            Self::Graph => "graph",
            Self::LastOnly => "last-only",
        }
    }
}

/// What an engine answers; a request has its kind of answer, or `Unsupported`, or `Failed`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Reply {
    Hello(Hello),
    /// Done.
    Done,
    /// This engine has nothing for this case or way.
    Unsupported {
        reason: String,
    },
    Failed {
        reason: String,
    },
    Times(Times),
    Limits(Limits),
    Trained(Trained),
}

/// An engine introduces itself.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Hello {
    pub engine: String,
    /// The ways it can be asked to run a case, the first being its own choice.
    pub variants: Vec<String>,
    pub versions: BTreeMap<String, String>,
    pub threads: usize,
    pub allocator: String,
    /// What else a reader should know: device, driver, settings.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// What calls took.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Times {
    /// Microseconds of each sample, that is of all its calls together.
    pub samples_us: Vec<f64>,
    /// For `ours`: how often which path ran since the inputs were given.
    #[serde(default)]
    pub paths: Option<Paths>,
    /// How the time was taken, where that is not plain.
    #[serde(default)]
    pub note: Option<String>,
}

/// How often an operation took which path.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paths {
    pub fused: u64,
    pub fallback: u64,
    pub reasons: Vec<String>,
}

/// Rates of a device.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes read and written per second by a copy much larger than the cache.
    #[serde(default)]
    pub copy_bytes_per_second: Option<f64>,
    /// Operations per second of a large matrix product, by dtype.
    #[serde(default)]
    pub product_operations_per_second: BTreeMap<String, f64>,
}

/// How training went.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Trained {
    /// Seconds of each step after the warm-up.
    pub step_seconds: Vec<f64>,
    /// The loss of each step, those of the warm-up first.
    pub losses: Vec<f64>,
    /// The device's peak memory in bytes as the framework counts it; of a processor the runner reads it itself.
    #[serde(default)]
    pub peak_device_bytes: Option<f64>,
    /// The device's memory in use as its driver counts it, contexts and caches included.
    #[serde(default)]
    pub driver_device_bytes: Option<f64>,
    #[serde(default)]
    pub paths: Option<Paths>,
}
