//! Kernels for one architecture alone, NVIDIA's Hopper (compute capability 9.0), whose matrix units no word of the dialect
//! reaches at their full speed. They are texts for CUDA, `kernels/hopper/`, beside what runs everywhere; where they do not
//! serve, the dialect's kernels or the device's own products do the same work.
//!
//! [`SumOfProducts`] is a base product with LoRA's as the last steps of its sum, [`LowRankGradient`] one pass over a gradient
//! for what two products would read it twice for, [`attention`] attention with heads of 64 or 128 columns.

pub mod attention;
mod lora;

use std::fmt::Write as _;

pub use self::attention::Walk;
pub use self::lora::{GradientPass, LowRankGradient, SumOfProducts};
use crate::launch::{Storage, Target};
use crate::source::{SourceFile, source_file};

/// The compute capability that they are for.
pub const COMPUTE_CAPABILITY: (i32, i32) = (9, 0);
/// Rows of matrices begin at multiples of so many bytes.
pub const ROW_ALIGNMENT: usize = 16;

const TILES: SourceFile = source_file!("kernels/hopper/tiles.h");
const SUM_OF_PRODUCTS: SourceFile = source_file!("kernels/hopper/sum_of_products.cu");
const LOW_RANK_GRADIENT: SourceFile = source_file!("kernels/hopper/low_rank_gradient.cu");
const HEADS: SourceFile = source_file!("kernels/hopper/heads.h");

/// Columns of a tile, and rows but for the halves of a product's factors.
const BOX: u32 = 64;
/// Beside the tiles: barriers, and the way to a multiple of 1024 bytes.
const ROOM_BESIDE: u32 = 1024 + 256;
/// What a multiprocessor has for one threadgroup.
#[cfg(test)]
const SHARED_BYTES: u32 = 227 * 1024;

/// A text of `kernels/hopper/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Text {
    /// `sum_of_products.cu`
    SumOfProducts {
        /// Of all matrices, 16 bits.
        storage: Storage,
        /// Whether the right factors lie as they are, row after row.
        turned: bool,
        /// Whether there is a bias.
        bias: bool,
    },
    /// `low_rank_gradient.cu`
    LowRankGradient {
        /// Of all matrices but the factor's gradient, 16 bits.
        storage: Storage,
        /// Ranks that there is room for, 16 or 32.
        room: u32,
        /// Of the factor's gradient.
        factor: Storage,
    },
    /// `attention*.cu`
    Attention {
        /// Which of them.
        walk: Walk,
        /// Of q, k, v, y and their gradients, 16 bits.
        storage: Storage,
        /// Of a head, 64 or 128.
        width: u32,
        /// Whether there is a causal mask.
        causal: bool,
    },
}

impl Text {
    /// Every text.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let narrow = [Storage::F16, Storage::BF16];
        let products = narrow.into_iter().flat_map(|storage| {
            [(false, false), (false, true), (true, false), (true, true)]
                .map(|(turned, bias)| Self::SumOfProducts { storage, turned, bias })
        });
        let gradients = narrow.into_iter().flat_map(|storage| {
            [(16, storage), (32, storage), (16, Storage::F32), (32, Storage::F32)]
                .map(|(room, factor)| Self::LowRankGradient { storage, room, factor })
        });
        let heads =
            narrow.into_iter().flat_map(|storage| {
                Walk::ALL.into_iter().flat_map(move |walk| {
                    [(64, false), (64, true), (128, false), (128, true)]
                        .map(|(width, causal)| Self::Attention { walk, storage, width, causal })
                })
            });
        products.chain(gradients).chain(heads).collect()
    }

    /// The whole text, for `--gpu-architecture=sm_90a`.
    #[must_use]
    pub fn source(self) -> String {
        let (files, storage, defines) = match self {
            Self::SumOfProducts { storage, turned, bias } => {
                let defines =
                    vec![("TURNED", u8::from(turned).to_string()), ("BIAS", u8::from(bias).to_string())];
                (vec![SUM_OF_PRODUCTS], storage, defines)
            }
            Self::LowRankGradient { storage, room, factor } => {
                let defines = vec![("RANK", format!("{room}u")), ("FACTOR", factor.word().to_owned())];
                (vec![LOW_RANK_GRADIENT], storage, defines)
            }
            Self::Attention { walk, storage, width, causal } => {
                let mut defines = walk.form(width).defines();
                defines.extend([("DIM", format!("{width}u")), ("CAUSAL", causal.to_string())]);
                (vec![HEADS, walk.file()], storage, defines)
            }
        };
        let element = if storage == Storage::F16 { "\"f16\"" } else { "\"bf16\"" };
        let defines =
            [("T", storage.word().to_owned()), ("ELEMENT", element.to_owned())].into_iter().chain(defines);
        let mut text = String::new();
        let dialect = Target::Cuda.dialect();
        // Writing into a String cannot fail.
        let _ = writeln!(text, "#line 1 \"{}\"\n{}\n#line 1 \"defines\"", dialect.path, dialect.text);
        for (name, value) in defines {
            let _ = writeln!(text, "#define {name} {value}");
        }
        for part in [TILES].into_iter().chain(files) {
            let _ = writeln!(text, "#line 1 \"{}\"\n{}", part.path, part.text);
        }
        text
    }
}

/// A tensor of 16-bit values as a kernel takes it, tile by tile (a `MAP` of its text).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tiled {
    /// A matrix.
    Matrix {
        /// Rows in memory, as they lie.
        rows: usize,
        /// Values of each.
        columns: usize,
        /// Rows and columns of a tile. Its rows take 32 or 128 bytes, which is also what its swizzle spans.
        tile: [u32; 2],
    },
    /// `[batch, tokens, heads, width]`, of any strides.
    Heads {
        /// These sizes.
        sizes: [usize; 4],
        /// Tokens of a tile, which has 64 columns of one head.
        tokens: u32,
    },
}

/// One dispatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The entry point's name.
    pub kernel: &'static str,
    /// The text that holds it.
    pub text: Text,
    /// The kernel's first arguments, in order; addresses come next, the parameters last.
    pub tiles: Vec<Tiled>,
    /// Threadgroups of the grid, along x and y.
    pub threadgroups: [u32; 2],
    /// Threads of each.
    pub threads: u32,
    /// Shared memory of each that the launch asks for, in bytes.
    pub shared_bytes: u32,
    /// The bytes of the `PARAM` struct.
    pub params: Vec<u8>,
}
