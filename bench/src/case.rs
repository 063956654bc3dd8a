//! Case files: what is measured, and what each case stands for.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// An operation, as named in case files and requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    Attention,
    Softmax,
    RmsNorm,
    LayerNorm,
    Rope,
    SiluMul,
    GeluMul,
    CrossEntropy,
    FrozenLinear,
    LoraDelta,
    LoraLinear,
}

impl Op {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Softmax => "softmax",
            Self::RmsNorm => "rms_norm",
            Self::LayerNorm => "layer_norm",
            Self::Rope => "rope",
            Self::SiluMul => "silu_mul",
            Self::GeluMul => "gelu_mul",
            Self::CrossEntropy => "cross_entropy",
            Self::FrozenLinear => "frozen_linear",
            Self::LoraDelta => "lora_delta",
            Self::LoraLinear => "lora_linear",
        }
    }
}

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// What of an operation is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The result, with nothing tracked.
    Forward,
    /// The gradients, from a forward pass made outside the clock.
    Backward,
    /// Both, as a training step has them.
    Both,
}

impl Mode {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Both => "both",
        }
    }
}

/// Where a case runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceName {
    Cpu,
    Cuda,
}

impl DeviceName {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// The sizes of a case; what an operation does not have is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Rows of `x`: tokens.
    pub rows: usize,
    /// Columns of `x`: the input width, or the vocabulary.
    pub cols: usize,
    /// Output width of a linear layer; the width of all keys of attention.
    #[serde(default)]
    pub out: usize,
    /// Rank of an adapter.
    #[serde(default)]
    pub rank: usize,
    /// Width of a head.
    #[serde(default)]
    pub width: usize,
}

impl Size {
    fn label(self) -> String {
        let mut label = format!("{}x{}", self.rows, self.cols);
        for (prefix, value) in [("x", self.out), (" r", self.rank), (" heads of ", self.width)] {
            if value > 0 {
                label = format!("{label}{prefix}{value}");
            }
        }
        label
    }
}

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Case {
    pub op: Op,
    #[serde(flatten)]
    pub size: Size,
    pub dtype: Dtype,
    pub mode: Mode,
    /// Successive calls read different buffers, together larger than the cache.
    pub rotate: bool,
    /// Compiling this case is worth the compiler's time.
    pub compiled: bool,
}

impl Case {
    /// Its name in tables and on the command line.
    pub fn id(&self) -> String {
        format!("{} {} {} {}", self.op.name(), self.size.label(), self.dtype.name(), self.mode.name())
    }
}

/// A case file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseFile {
    op: Op,
    /// What the operation is in a model.
    about: String,
    groups: Vec<Group>,
}

/// Cases that stand for one thing.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    /// What that is.
    about: String,
    devices: Vec<DeviceName>,
    sizes: Vec<Size>,
    dtypes: Vec<Dtype>,
    modes: Vec<Mode>,
    #[serde(default)]
    rotate: bool,
    #[serde(default)]
    compiled: bool,
    /// Part of the small set.
    #[serde(default)]
    small: bool,
}

/// The cases of one file that run on a device, and the prose about them.
#[derive(Debug, Serialize)]
pub struct Chosen {
    pub op: Op,
    pub about: String,
    pub groups: Vec<(String, Vec<Case>)>,
}

/// Reads every case file of a folder, in the order of their names. With `small`, the small set only.
pub fn read(folder: &Path, device: DeviceName, small: bool) -> Result<Vec<Chosen>> {
    let listing = std::fs::read_dir(folder).map_err(|e| Error::at(folder, e))?;
    let mut paths: Vec<_> = listing
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .collect();
    paths.sort();
    let mut seen = std::collections::BTreeSet::new();
    let mut chosen = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).map_err(|e| Error::at(&path, e))?;
        let file: CaseFile = serde_saphyr::from_str(&text).map_err(|e| Error::at(&path, e))?;
        let mut groups = Vec::new();
        for group in file.groups.iter().filter(|g| g.devices.contains(&device) && (g.small || !small)) {
            let cases: Vec<Case> = group.cases(file.op).filter(|case| seen.insert(case.id())).collect();
            if !cases.is_empty() {
                groups.push((group.about.clone(), cases));
            }
        }
        chosen.push(Chosen { op: file.op, about: file.about, groups });
    }
    Ok(chosen)
}

impl Group {
    fn cases(&self, op: Op) -> impl Iterator<Item = Case> {
        let &Self { rotate, compiled, .. } = self;
        let dtypes =
            self.dtypes.iter().flat_map(move |&dtype| self.modes.iter().map(move |&mode| (dtype, mode)));
        self.sizes.iter().flat_map(move |&size| {
            dtypes.clone().map(move |(dtype, mode)| Case { op, size, dtype, mode, rotate, compiled })
        })
    }
}
