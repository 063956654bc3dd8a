//! Puts a kernel's text together: the target's dictionary, the launch's defines, the common parts, the op's file.
//!
//! Specialisation is by text alone (`#define T bfloat`, `#define ITEMS 2`), which works the same for every target.
//! `#line` keeps messages pointing at the files that people edit.

use crate::launch::{KernelFile, Launch, Storage, Target};
use std::fmt::Write as _;

/// One file of the dialect, as compiled into this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Its path below the crate, as messages show it.
    pub path: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! source_file {
    ($path:literal) => {
        SourceFile { path: $path, text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/", $path)) }
    };
}

pub(crate) use source_file;

const ATTENTION: SourceFile = source_file!("kernels/common/attention.h");
const CHUNK: SourceFile = source_file!("kernels/common/chunk.h");
const ROW: SourceFile = source_file!("kernels/common/row.h");
const PHILOX: SourceFile = source_file!("kernels/common/philox.h");

impl Target {
    /// The target's dictionary.
    #[must_use]
    pub const fn dialect(self) -> SourceFile {
        match self {
            Self::Metal => source_file!("kernels/dialect/metal.h"),
            Self::Cuda => source_file!("kernels/dialect/cuda.h"),
            Self::Simulator => source_file!("kernels/dialect/simulator.h"),
        }
    }
}

impl KernelFile {
    /// Every file.
    pub const ALL: [Self; 15] = [
        Self::Adam,
        Self::Add,
        Self::Attention,
        Self::AttentionBackward,
        Self::Softmax,
        Self::RmsNorm,
        Self::LayerNorm,
        Self::Rope,
        Self::SiluMul,
        Self::GeluMul,
        Self::CrossEntropy,
        Self::Lora,
        Self::LoraGradient,
        Self::LoraMask,
        Self::ColumnSum,
    ];

    /// The file itself.
    #[must_use]
    pub const fn source(self) -> SourceFile {
        match self {
            Self::Adam => source_file!("kernels/adam.metal"),
            Self::Add => source_file!("kernels/add.metal"),
            Self::Attention => source_file!("kernels/attention.metal"),
            Self::AttentionBackward => source_file!("kernels/attention_backward.metal"),
            Self::Softmax => source_file!("kernels/softmax.metal"),
            Self::RmsNorm => source_file!("kernels/rms_norm.metal"),
            Self::LayerNorm => source_file!("kernels/layer_norm.metal"),
            Self::Rope => source_file!("kernels/rope.metal"),
            Self::SiluMul => source_file!("kernels/silu_mul.metal"),
            Self::GeluMul => source_file!("kernels/gelu_mul.metal"),
            Self::CrossEntropy => source_file!("kernels/cross_entropy.metal"),
            Self::Lora => source_file!("kernels/lora.metal"),
            Self::LoraGradient => source_file!("kernels/lora_gradient.metal"),
            Self::LoraMask => source_file!("kernels/lora_mask.metal"),
            Self::ColumnSum => source_file!("kernels/column_sum.metal"),
        }
    }

    /// Whether its text has tiles, which CUDA has from compute capability 8.0 on.
    #[must_use]
    pub const fn needs_matrix_units(self) -> bool {
        matches!(self, Self::Attention | Self::AttentionBackward)
    }

    /// The common parts it builds on, in order.
    #[must_use]
    pub const fn parts(self) -> &'static [SourceFile] {
        match self {
            Self::Softmax | Self::RmsNorm | Self::LayerNorm | Self::CrossEntropy => &[CHUNK, ROW],
            Self::Attention | Self::AttentionBackward => &[ATTENTION],
            Self::Adam | Self::Add | Self::Rope | Self::SiluMul | Self::GeluMul => &[CHUNK],
            Self::Lora | Self::LoraGradient | Self::LoraMask => &[CHUNK, PHILOX],
            Self::ColumnSum => &[],
        }
    }
}

/// The whole text of one kernel file for a target, storage and defines.
#[must_use]
pub fn assemble(
    target: Target,
    file: KernelFile,
    storage: Storage,
    defines: &[(&'static str, String)],
) -> String {
    let mut text = String::new();
    let dialect = target.dialect();
    // Writing into a String cannot fail.
    let _ = writeln!(text, "#line 1 \"{}\"\n{}", dialect.path, dialect.text);
    let _ = writeln!(text, "#line 1 \"defines\"\n#define T {}", storage.word());
    for (name, value) in defines {
        let _ = writeln!(text, "#define {name} {value}");
    }
    for part in file.parts().iter().chain([&file.source()]) {
        let _ = writeln!(text, "#line 1 \"{}\"\n{}", part.path, part.text);
    }
    text
}

impl Launch {
    /// The text that this launch's kernel is compiled from.
    #[must_use]
    pub fn source(&self, target: Target) -> String {
        assemble(target, self.file, self.storage, &self.defines)
    }
}
