//! A base product with LoRA's in its sum, where it computes all that LoRA needs of a matrix while it reads it.

use super::product::{CLUSTER, PART_COLUMNS, PART_ROWS, SHARED_BYTES, SumOfProducts, THREADS};
use super::{BOX, Launch, Text, Tiled, UNIT};
use crate::launch::Storage;
use crate::params::{Params, small};

/// Parts in a band, of those that clusters take one after another.
const BAND: usize = 8;
/// Steps before the last with which the backward reads its input.
const LATE: usize = 4;
/// Rows that share a counter, and whose parts of a gradient are one.
const ROWS: usize = PART_ROWS / CLUSTER;
/// Threads that sum parts of gradients, and the columns that they do it for.
const SUM: (u32, usize) = (512, 32);

/// `y = L·R + l·r + bias` with `l = scale·L·P`, for `L [rows, inner]`, `R [inner, columns]`, `P [inner, rank]` and
/// `r [rank, columns]`, all of one 16-bit type, rounded once, as `l` is for the product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptedProduct {
    /// Rows of `y`.
    pub rows: usize,
    /// Columns of `y`.
    pub columns: usize,
    /// What the base product sums over.
    pub inner: usize,
    /// What the low-rank product sums over, at most 16.
    pub rank: usize,
    /// F16 or BF16.
    pub storage: Storage,
    /// What multiplies `l`.
    pub scale: f32,
    /// Which of an adapted layer's products this is.
    pub way: Way,
}

/// Which of an adapted layer's products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// All right factors, and `P`, lie column after column.
    Forward {
        /// Whether there is a bias `[columns]`.
        bias: bool,
    },
    /// They lie row after row; beside `y` come `Lᵀ·k [inner, rank]` for `k [rows, rank]`, and `lᵀ·input [rank, columns]` for
    /// `input [rows, columns]`.
    Backward {
        /// The type of both.
        factor: Storage,
    },
}

/// The launches of an [`AdaptedProduct`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdaptedPass {
    /// Counters, of 32 bits, that are zero before and after.
    pub counters: usize,
    /// Floats of scratch: for parts of `l`, and the backward's for parts of both gradients.
    pub parts: [usize; 3],
    /// Tiles of `L`, `R`, `P`, `l`, `r` and `y`, the backward's of `k` and `input`; the addresses of `l`, of its parts, of the
    /// counters, and of the bias (or any), or of both gradients' parts.
    pub product: Launch,
    /// No tiles; the addresses of both gradients' parts and of both.
    pub sum: Option<Launch>,
}

impl AdaptedProduct {
    /// The launches. `None` where they do not serve: where [`SumOfProducts`] does not, too high a rank, or so few steps or
    /// columns that all would wait for `l`.
    #[must_use]
    pub fn launches(&self, multiprocessors: usize) -> Option<AdaptedPass> {
        let Self { rows, columns, inner, rank, storage, scale, way } = *self;
        let clusters = multiprocessors / CLUSTER;
        let (turned, bias) = match way {
            Way::Forward { bias } => (false, bias),
            Way::Backward { .. } => (true, false),
        };
        let base = SumOfProducts { rows, columns, inner, rank, storage, turned, bias };
        if rank > UNIT as usize || !base.serves(clusters) {
            return None;
        }
        let [leads, slice] = self.leads(clusters)?;
        let tiles_of_rows = PART_ROWS * rows.div_ceil(PART_ROWS) / ROWS;
        let few = |rows, tile| Tiled::Matrix { rows, columns: rank, tile: [tile, UNIT] };
        let [left, right, _, low_right, result] = base.tiles();
        let projection = match way {
            Way::Forward { .. } => Tiled::Matrix { rows: rank, columns: inner, tile: [UNIT, BOX] },
            Way::Backward { .. } => few(inner, BOX),
        };
        let low = few(rows, 2 * BOX);
        let mut tiles = vec![left, right, projection, low, low_right, result];
        let mut sum = None;
        let text = match way {
            Way::Forward { bias } => Text::Adapted { storage, bias },
            Way::Backward { factor } => {
                if factor != storage && factor != Storage::F32 {
                    return None;
                }
                let text = Text::AdaptedGradient { storage, factor };
                tiles.extend([low, Tiled::Matrix { rows, columns, tile: [2 * BOX, BOX] }]);
                sum = Some(self.sum(text));
                text
            }
        };
        let gradients = if sum.is_some() { tiles_of_rows * UNIT as usize } else { 0 };
        let product = Launch {
            kernel: "adapted_product",
            text,
            tiles,
            threadgroups: base.threadgroups(clusters),
            threads: THREADS,
            // Beside a product's: four tiles of P, one of l and one of k.
            shared_bytes: SHARED_BYTES + (4 * BOX + 4 * BOX) * UNIT * 2,
            at_once: true,
            params: [rows, columns, inner, rank, leads, slice]
                .into_iter()
                .fold(Params::default(), |params, size| params.u32(small(size)))
                .f32(scale)
                .bytes(),
        };
        Some(AdaptedPass {
            counters: tiles_of_rows,
            parts: [tiles_of_rows * leads * ROWS * UNIT as usize, gradients * inner, gradients * columns],
            product,
            sum,
        })
    }

    /// How many columns of parts compute `l`, and the steps that each does it in. They are of one band, and at work at once.
    fn leads(&self, clusters: usize) -> Option<[usize; 2]> {
        let pairs = self.inner.div_ceil(2 * BOX as usize);
        let (down, across) = (self.rows.div_ceil(PART_ROWS), self.columns.div_ceil(PART_COLUMNS));
        let most = across.min(clusters / down.min(BAND)).min(pairs);
        if most < 2 {
            return None;
        }
        let slice = 2 * pairs.div_ceil(most);
        let leads = (2 * pairs).div_ceil(slice);
        // The first half of them take their slices in the steps' order.
        let last = slice * (leads / 2).max(1);
        let in_time = match self.way {
            Way::Forward { .. } => true,
            Way::Backward { .. } => last + LATE <= 2 * pairs,
        };
        (leads >= 2 && in_time).then_some([leads, slice])
    }

    fn sum(&self, text: Text) -> Launch {
        let Self { rows, columns, inner, rank, .. } = *self;
        let (threads, of_group) = SUM;
        let groups = inner.div_ceil(of_group) + columns.div_ceil(of_group);
        Launch {
            kernel: "adapted_product_sum",
            text,
            tiles: Vec::new(),
            threadgroups: [small(groups), 1],
            threads,
            shared_bytes: 0,
            at_once: false,
            params: [rows.div_ceil(ROWS), rank, inner, columns]
                .into_iter()
                .fold(Params::default(), |params, size| params.u32(small(size)))
                .bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::MOST_SHARED_BYTES;
    use super::*;

    const MULTIPROCESSORS: usize = 132;
    const BACKWARD: Way = Way::Backward { factor: Storage::F32 };

    fn product(rows: usize, columns: usize, inner: usize, way: Way) -> AdaptedProduct {
        AdaptedProduct { rows, columns, inner, rank: 16, storage: Storage::BF16, scale: 2.0, way }
    }

    #[test]
    fn leads_share_all_steps_and_are_at_work_at_once() {
        for way in [Way::Forward { bias: false }, BACKWARD] {
            for [rows, columns, inner] in [
                [2048, 2048, 2048],
                [8192, 4096, 4096],
                [1000, 520, 584],
                [2062, 712, 968],
                [4096, 8192, 2048],
                [4096, 2048, 8192],
                [256, 4096, 512],
            ] {
                for multiprocessors in [132, 114, 78] {
                    let product = product(rows, columns, inner, way);
                    let Some(pass) = product.launches(multiprocessors) else { continue };
                    let case = format!("{rows}x{columns}x{inner} {way:?} {multiprocessors}");
                    let [leads, slice] = product.leads(multiprocessors / CLUSTER).unwrap();
                    let steps = 2 * inner.div_ceil(128);
                    assert!(leads * slice >= steps && (leads - 1) * slice < steps, "{case}");
                    assert!(slice.is_multiple_of(2) && leads <= columns.div_ceil(PART_COLUMNS), "{case}");
                    let height = rows.div_ceil(PART_ROWS).min(BAND);
                    assert!(leads * height <= multiprocessors / CLUSTER, "{case}");
                    assert_eq!(pass.parts[0], pass.counters * leads * 2048, "{case}");
                    assert_eq!(pass.sum.is_some(), way == BACKWARD);
                    assert!(pass.product.shared_bytes <= MOST_SHARED_BYTES, "{}", pass.product.shared_bytes);
                }
            }
        }
        let pass = product(8192, 4096, 4096, BACKWARD).launches(MULTIPROCESSORS).unwrap();
        assert_eq!(pass.product.threadgroups, [132, 1]);
        assert_eq!(pass.counters, 64);
        assert_eq!(pass.parts, [64 * 8 * 2048, 64 * 4096 * 16, 64 * 4096 * 16]);
        assert_eq!(pass.product.tiles.len(), 8);
        assert_eq!(pass.sum.unwrap().threadgroups, [256, 1]);
    }

    #[test]
    fn where_all_would_wait_others_serve() {
        let serves = |rows, columns, inner, way| {
            product(rows, columns, inner, way).launches(MULTIPROCESSORS).is_some()
        };
        let forward = Way::Forward { bias: true };
        assert!(serves(1000, 512, 256, forward) && serves(1000, 512, 512, BACKWARD));
        assert!(!serves(1000, 256, 512, forward), "one column of parts");
        assert!(!serves(1000, 512, 128, forward), "one pair of steps");
        assert!(!serves(1000, 512, 256, BACKWARD), "slices that end late");
        assert!(!serves(512, 4096, 4096, forward), "most would be idle");
        let much = AdaptedProduct { rank: 24, ..product(1000, 512, 512, forward) };
        assert!(much.launches(MULTIPROCESSORS).is_none());
        let half = product(1000, 512, 512, Way::Backward { factor: Storage::F16 });
        assert!(half.launches(MULTIPROCESSORS).is_none());
    }
}
