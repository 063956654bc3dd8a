//! What to run, as plain data: a [`Plan`] is one op's forward or backward, a list of [`Launch`]es over named buffers.
//!
//! Nothing here knows a GPU API. An executor allocates the plan's outputs and scratch, then for each launch
//! assembles the text (`assemble`), compiles it, and binds `arguments` in order, the
//! parameter bytes last. Launches of one plan run in order, each seeing what the ones before it wrote.

use thiserror::Error;

/// Threads that run in step: `simdgroup` in Metal, warp in CUDA. Every target of the dialect has 32.
pub const SIMDGROUP_SIZE: u32 = 32;
/// The most threads a threadgroup may have on any target. A Metal pipeline may allow fewer: the executor asks it.
pub const MAX_THREADS: u32 = 1024;
/// The most threadgroup memory a launch may declare, in bytes.
pub const MAX_THREADGROUP_BYTES: u32 = 32 * 1024;
/// CUDA's limit on the second and third dimension of the grid; Metal and CUDA allow 2³¹ − 1 in the first.
pub const MAX_GRID_YZ: u32 = 65_535;
/// The alignment, in bytes, of a vector access.
pub const VECTOR_BYTES: usize = 16;
/// The dialect's `TILE`: rows, and columns, of the tiles that matrix units multiply.
pub const TILE: usize = 16;

/// The dictionary that a text is assembled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Metal Shading Language 3.1, compiled at run time by the driver.
    Metal,
    /// CUDA C++ through NVRTC, with no header.
    Cuda,
    /// C++17 for the host's compiler, run by the kernel simulator.
    Simulator,
}

impl Target {
    /// Every target.
    pub const ALL: [Self; 3] = [Self::Metal, Self::Cuda, Self::Simulator];

    /// The lower-case name that `wick kernels --target` takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Simulator => "simulator",
        }
    }
}

/// The type of a kernel's tensors in memory, its `T`. Arithmetic is in f32 whatever the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// The upper half of a 32-bit IEEE float.
    BF16,
}

impl Storage {
    /// Every storage type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// The type's word in the dialect.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::F16 => "half",
            Self::BF16 => "bfloat",
        }
    }

    /// The buffer element of this storage.
    #[must_use]
    pub const fn element(self) -> Element {
        match self {
            Self::F32 => Element::F32,
            Self::F16 => Element::F16,
            Self::BF16 => Element::BF16,
        }
    }

    /// Bytes of one value.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.element().bytes()
    }

    /// Values in one 16-byte access.
    #[must_use]
    pub const fn vector(self) -> usize {
        VECTOR_BYTES / self.bytes()
    }
}

/// The element type of one buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// The upper half of a 32-bit IEEE float.
    BF16,
    /// 32-bit unsigned integer.
    U32,
    /// 64-bit signed integer.
    I64,
}

impl Element {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::I64 => 8,
        }
    }

    /// The type's word in the dialect.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::F16 => "half",
            Self::BF16 => "bfloat",
            Self::U32 => "uint",
            Self::I64 => "long",
        }
    }
}

/// Who writes a buffer, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Given by the caller; only read.
    Input,
    /// Allocated by the executor, uninitialised; every element is written by the plan.
    Output,
    /// Allocated by the executor, uninitialised; written by one launch, read by a later one, then dropped.
    Scratch,
}

/// One buffer of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its name in messages, and in the plan's documentation.
    pub name: &'static str,
    /// What it holds.
    pub element: Element,
    /// How many elements the kernels may touch, counted from the address that is bound: for a strided input
    /// that is the distance to the last element, plus one.
    pub len: usize,
    /// Who writes it.
    pub role: Role,
}

impl Buffer {
    /// Its size in bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.len * self.element.bytes()
    }
}

/// The file a kernel is written in, `kernels/<op>.metal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KernelFile {
    /// `adam.metal`
    Adam,
    /// `add.metal`
    Add,
    /// `attention.metal`
    Attention,
    /// `attention_backward.metal`
    AttentionBackward,
    /// `softmax.metal`
    Softmax,
    /// `rms_norm.metal`
    RmsNorm,
    /// `layer_norm.metal`
    LayerNorm,
    /// `rope.metal`
    Rope,
    /// `silu_mul.metal`
    SiluMul,
    /// `gelu_mul.metal`
    GeluMul,
    /// `cross_entropy.metal`
    CrossEntropy,
    /// `lora.metal`
    Lora,
    /// `lora_gradient.metal`
    LoraGradient,
    /// `lora_mask.metal`
    LoraMask,
    /// `column_sum.metal`, the second stage of every gradient that sums over rows.
    ColumnSum,
}

/// One dispatch of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The entry point's name in the text.
    pub kernel: &'static str,
    /// The file that holds it.
    pub file: KernelFile,
    /// The kernel's `T`.
    pub storage: Storage,
    /// The text's `#define`s beside `T`, in order. Two launches with the same file, storage and defines share a text.
    pub defines: Vec<(&'static str, String)>,
    /// Threadgroups of the grid.
    pub threadgroups: [u32; 3],
    /// Threads of each threadgroup, all along x; a multiple of [`SIMDGROUP_SIZE`].
    pub threads: u32,
    /// Threadgroup memory that the kernel declares, in bytes.
    pub threadgroup_bytes: u32,
    /// Indices into [`Plan::buffers`], in argument order. A buffer may appear twice: an optional tensor that is
    /// absent has some input bound in its place, and the text never reads it.
    pub arguments: Vec<usize>,
    /// The bytes of the kernel's one `PARAM` struct (u32, i32 and f32 fields only), bound after the arguments.
    pub params: Vec<u8>,
}

/// One op's forward or backward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Every buffer: first the inputs, in the order of the op's arguments, then the outputs, then scratch.
    pub buffers: Vec<Buffer>,
    /// What to run, in order. Empty when there is nothing to compute.
    pub launches: Vec<Launch>,
}

/// Why a plan cannot be built, or may not run.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// The op's shapes do not fit each other or the kernels' 32-bit sizes.
    #[error("{op}: {what} must be {expected}, got {got}")]
    Shape {
        /// The op.
        op: &'static str,
        /// The size or option at fault.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it was.
        got: String,
    },
    /// A launch breaks a limit that holds on every target.
    #[error("{kernel}: {what} must be {expected}, got {got}")]
    Limit {
        /// The kernel's entry point.
        kernel: &'static str,
        /// The number at fault.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it was.
        got: String,
    },
}

impl Plan {
    /// The buffers of one role, with their indices.
    pub fn with_role(&self, role: Role) -> impl Iterator<Item = (usize, &Buffer)> {
        self.buffers.iter().enumerate().filter(move |(_, buffer)| buffer.role == role)
    }

    /// Checks every launch against the limits of all targets.
    ///
    /// # Errors
    /// [`PlanError::Limit`] naming the kernel and the number.
    pub fn check(&self) -> Result<(), PlanError> {
        for launch in &self.launches {
            launch.check(self.buffers.len())?;
        }
        Ok(())
    }
}

impl Launch {
    /// Checks this launch, in a plan of `buffers` buffers, against the limits of all targets.
    ///
    /// # Errors
    /// [`PlanError::Limit`] naming the kernel and the number.
    pub fn check(&self, buffers: usize) -> Result<(), PlanError> {
        let limit = |what, expected: &str, got: String| {
            Err(PlanError::Limit { kernel: self.kernel, what, expected: expected.into(), got })
        };
        if self.threads == 0 || self.threads > MAX_THREADS || !self.threads.is_multiple_of(SIMDGROUP_SIZE) {
            return limit("threads", "a multiple of 32 in 32..=1024", self.threads.to_string());
        }
        if self.threadgroup_bytes > MAX_THREADGROUP_BYTES {
            return limit("threadgroup memory", "at most 32768 bytes", self.threadgroup_bytes.to_string());
        }
        let [x, y, z] = self.threadgroups;
        if x == 0 || y == 0 || z == 0 || x > i32::MAX.unsigned_abs() || y > MAX_GRID_YZ || z > MAX_GRID_YZ {
            return limit(
                "threadgroups",
                "in 1..=[2147483647, 65535, 65535]",
                format!("{:?}", self.threadgroups),
            );
        }
        if let Some(&index) = self.arguments.iter().find(|&&index| index >= buffers) {
            return limit("argument", &format!("below {buffers}"), index.to_string());
        }
        if self.params.is_empty() || !self.params.len().is_multiple_of(4) {
            return limit("parameter bytes", "a positive multiple of 4", self.params.len().to_string());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch() -> Launch {
        Launch {
            kernel: "k",
            file: KernelFile::RmsNorm,
            storage: Storage::F32,
            defines: Vec::new(),
            threadgroups: [1, 1, 1],
            threads: 64,
            threadgroup_bytes: 128,
            arguments: vec![0],
            params: vec![0; 4],
        }
    }

    #[test]
    fn limits_are_checked() {
        assert_eq!(launch().check(1), Ok(()));
        for broken in [
            Launch { threads: 0, ..launch() },
            Launch { threads: 33, ..launch() },
            Launch { threads: 1056, ..launch() },
            Launch { threadgroup_bytes: 32_769, ..launch() },
            Launch { threadgroups: [1, 65_536, 1], ..launch() },
            Launch { threadgroups: [0, 1, 1], ..launch() },
            Launch { arguments: vec![1], ..launch() },
            Launch { params: vec![], ..launch() },
        ] {
            assert!(broken.check(1).is_err(), "{broken:?}");
        }
    }
}
