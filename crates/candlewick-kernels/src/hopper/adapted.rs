//! A base product with LoRA's in its sum, where it computes all that LoRA needs of a matrix while it reads it.

use super::product::{CLUSTER, PART_COLUMNS, PART_ROWS, SHARED_BYTES, SumOfProducts, THREADS};
use super::{BOX, Launch, Text, Tiled, UNIT};
use crate::launch::Storage;
use crate::params::{Params, small};

/// `GROUP` of `product.h`: parts, one below the other, of a band.
const BAND: usize = 8;
/// `LATE` of `adapted_product.cu`: before so many last steps the backward needs `l`.
const LATE: usize = 4;
/// Rows that share a counter, and whose parts of a gradient are one.
const ROWS: usize = PART_ROWS / CLUSTER;
/// Of `adapted_product_sum`: threads of a threadgroup, and the columns that it sums parts for.
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
        const CLUSTERS: usize = 66;
        for way in [Way::Forward { bias: false }, BACKWARD] {
            for (pairs, across) in (1..=24).flat_map(|pairs| (1..=20).map(move |across| (pairs, across))) {
                for down in [1, 3, 8, 40] {
                    let product = product(down * PART_ROWS, across * PART_COLUMNS, pairs * 128, way);
                    let case = format!("{pairs} {across} {down} {way:?}");
                    let Some([leads, slice]) = product.leads(CLUSTERS) else {
                        assert!(across == 1 || pairs < 4, "{case}");
                        continue;
                    };
                    let steps = 2 * pairs;
                    assert!(leads * slice >= steps && (leads - 1) * slice < steps, "{case}");
                    assert!(slice.is_multiple_of(2) && (2..=across).contains(&leads), "{case}");
                    assert!(leads * down.min(BAND) <= CLUSTERS, "{case}");
                    // As the kernel orders them: the second half of the leads begin with their slices.
                    for lead in 0..leads {
                        let (begin, end) = (lead * slice, steps.min((lead + 1) * slice));
                        let end = if lead < leads / 2 { end } else { end - begin };
                        assert!(way != BACKWARD || end + LATE <= steps, "{case}");
                    }
                }
            }
        }
    }

    #[test]
    fn scratch_and_launches_are_those_of_the_parts() {
        let forward =
            product(8192, 4096, 4096, Way::Forward { bias: true }).launches(MULTIPROCESSORS).unwrap();
        assert_eq!((forward.counters, forward.parts, forward.sum), (64, [64 * 8 * 2048, 0, 0], None));
        let pass = product(8192, 4096, 4096, BACKWARD).launches(MULTIPROCESSORS).unwrap();
        assert_eq!(pass.product.threadgroups, [132, 1]);
        assert!(pass.product.at_once && pass.product.shared_bytes <= MOST_SHARED_BYTES);
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
