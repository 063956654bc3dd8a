//! Kernels for one architecture alone, NVIDIA's Hopper (compute capability 9.0), whose matrix units no word of the dialect
//! reaches at their full speed. They are texts for CUDA, `kernels/hopper/`, beside what runs everywhere; where they do not
//! serve, the dialect's kernels or the device's own products do the same work.
//!
//! [`SumOfProducts`] is a base product with LoRA's as the last steps of its sum, [`AdaptedProduct`] the same where it computes
//! all that LoRA needs of a matrix while it reads it, [`LowRankGradient`] one pass over a gradient for what two products would
//! read it twice for, [`attention`] attention with heads of 64 or 128 columns.

mod adapted;
pub mod attention;
mod low_rank_gradient;
mod product;

use std::fmt::Write as _;

pub use self::adapted::{AdaptedPass, AdaptedProduct, Way};
pub use self::attention::Walk;
pub use self::low_rank_gradient::{GradientPass, LowRankGradient};
pub use self::product::SumOfProducts;
use crate::launch::{Storage, Target};
use crate::source::{SourceFile, source_file};

/// The compute capability that they are for.
pub const COMPUTE_CAPABILITY: (i32, i32) = (9, 0);
/// Rows of matrices begin at multiples of so many bytes.
pub const ROW_ALIGNMENT: usize = 16;

const TILES: SourceFile = source_file!("kernels/hopper/tiles.h");
const PRODUCT: SourceFile = source_file!("kernels/hopper/product.h");
const SUM_OF_PRODUCTS: SourceFile = source_file!("kernels/hopper/sum_of_products.cu");
const ADAPTED_PRODUCT: SourceFile = source_file!("kernels/hopper/adapted_product.cu");
const LOW_RANK_GRADIENT: SourceFile = source_file!("kernels/hopper/low_rank_gradient.cu");
const HEADS: SourceFile = source_file!("kernels/hopper/heads.h");

/// Columns of a tile, and rows but for the halves of a product's factors.
const BOX: u32 = 64;
/// What one product of tiles sums over, and the columns of a tile of a factor.
const UNIT: u32 = 16;
/// Beside the tiles: barriers, and the way to a multiple of 1024 bytes.
const ROOM_BESIDE: u32 = 1024 + 256;
/// What a multiprocessor has for one threadgroup.
#[cfg(test)]
const MOST_SHARED_BYTES: u32 = 227 * 1024;

/// Whether a dimension of rows in memory serves: not empty, rows of whole 16 bytes, and an index fits 31 bits.
fn serves(columns: usize) -> bool {
    columns > 0 && columns.is_multiple_of(ROW_ALIGNMENT / 2) && i32::try_from(columns).is_ok()
}

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
    /// `adapted_product.cu`, the forward.
    Adapted {
        /// Of all matrices, 16 bits.
        storage: Storage,
        /// Whether there is a bias.
        bias: bool,
    },
    /// `adapted_product.cu`, the backward.
    AdaptedGradient {
        /// Of all matrices but the factors' gradients, 16 bits.
        storage: Storage,
        /// Of these.
        factor: Storage,
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
        let adapted = narrow.into_iter().flat_map(|storage| {
            [
                Self::Adapted { storage, bias: false },
                Self::Adapted { storage, bias: true },
                Self::AdaptedGradient { storage, factor: storage },
                Self::AdaptedGradient { storage, factor: Storage::F32 },
            ]
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
        products.chain(adapted).chain(gradients).chain(heads).collect()
    }

    /// The whole text, for `--gpu-architecture=sm_90a`.
    #[must_use]
    pub fn source(self) -> String {
        let (files, storage, defines) = match self {
            Self::SumOfProducts { storage, turned, bias } => {
                (vec![PRODUCT, SUM_OF_PRODUCTS], storage, product::defines(turned, bias))
            }
            Self::Adapted { storage, bias } => {
                (vec![PRODUCT, ADAPTED_PRODUCT], storage, product::defines(false, bias))
            }
            Self::AdaptedGradient { storage, factor } => {
                let mut defines = product::defines(true, false);
                defines.push(("FACTOR", factor.word().to_owned()));
                (vec![PRODUCT, ADAPTED_PRODUCT], storage, defines)
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
        /// Rows and columns of a tile. Its rows take 32, 64 or 128 bytes, which is also what its swizzle spans.
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
    /// Whether the kernel asks for all of them to be at work at once.
    pub at_once: bool,
    /// The bytes of the `PARAM` struct.
    pub params: Vec<u8>,
}
