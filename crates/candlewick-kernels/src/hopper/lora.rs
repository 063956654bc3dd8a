//! A base product with LoRA's update in its sum, and one pass over a gradient for both that need it.

use super::{BOX, Launch, ROOM_BESIDE, ROW_ALIGNMENT, Text, Tiled};
use crate::launch::Storage;
use crate::params::{Params, small};

const BOX_BYTES: u32 = BOX * BOX * 2;
/// What one product of tiles sums over, and the columns of a tile of a factor.
const UNIT: u32 = 16;

/// Whether a dimension of rows in memory serves: not empty, rows of whole 16 bytes, and an index fits 31 bits.
fn serves(columns: usize) -> bool {
    columns > 0 && columns.is_multiple_of(ROW_ALIGNMENT / 2) && i32::try_from(columns).is_ok()
}

/// `y = L·R + l·r + bias` with `L [rows, inner]`, `R [inner, columns]`, `l [rows, rank]`, `r [rank, columns]`, all of one
/// 16-bit type, summed in f32 and rounded once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumOfProducts {
    /// Rows of `y`.
    pub rows: usize,
    /// Columns of `y`.
    pub columns: usize,
    /// What the base product sums over.
    pub inner: usize,
    /// What the low-rank product sums over.
    pub rank: usize,
    /// F16 or BF16.
    pub storage: Storage,
    /// Whether `R` and `r` lie row after row, else column after column.
    pub turned: bool,
    /// Whether there is a bias `[columns]`.
    pub bias: bool,
}

impl SumOfProducts {
    const CLUSTER: usize = 2;
    const PART_ROWS: usize = 256;
    const PART_COLUMNS: usize = 256;

    /// The launch: tiles of `L`, `R`, `l`, `r` and `y`; the bias' address, or any. `None` where it does not serve:
    /// another type, rows that tiles cannot have, or a shape for which the device's own products, one for the update and
    /// one that adds to it, take less time.
    #[must_use]
    pub fn launch(&self, multiprocessors: usize) -> Option<Launch> {
        let Self { rows, columns, inner, rank, storage, turned, bias } = *self;
        let fits = [columns, inner, rank].into_iter().all(serves) && i32::try_from(rows).is_ok();
        let clusters = multiprocessors / Self::CLUSTER;
        if storage.bytes() != 2 || !fits || rows == 0 || clusters == 0 || !self.pays(clusters) {
            return None;
        }
        let half = 2 * BOX;
        let right = |inner| {
            if turned {
                Tiled::Matrix { rows: inner, columns, tile: [BOX, BOX] }
            } else {
                Tiled::Matrix { rows: columns, columns: inner, tile: [half, BOX] }
            }
        };
        let left = |columns| Tiled::Matrix { rows, columns, tile: [half, BOX] };
        let result = Tiled::Matrix { rows, columns, tile: [BOX, BOX] };
        let stages = 4 * (Self::PART_ROWS / Self::CLUSTER + Self::PART_COLUMNS);
        Some(Launch {
            kernel: "sum_of_products",
            text: Text::SumOfProducts { storage, turned, bias },
            tiles: vec![left(inner), right(inner), left(rank), right(rank), result],
            threadgroups: [small(self.parts().min(clusters) * Self::CLUSTER), 1],
            threads: 384,
            shared_bytes: small(stages) * BOX * 2 + 4 * BOX_BYTES + ROOM_BESIDE,
            params: [rows, columns, inner, rank]
                .into_iter()
                .fold(Params::default(), |params, size| params.u32(small(size)))
                .bytes(),
        })
    }

    /// Parts of `y` that a cluster computes at a time.
    fn parts(&self) -> usize {
        self.rows.div_ceil(Self::PART_ROWS) * self.columns.div_ceil(Self::PART_COLUMNS)
    }

    /// Whether what rounds leave idle costs less than another launch and another pass over `y`. In steps of one part, each
    /// about 0.55 µs on an H100: a launch and its beginning 9, and a value written and read 1 / 800,000.
    fn pays(&self, clusters: usize) -> bool {
        const LAUNCH: usize = 9;
        const VALUES_A_STEP: usize = 800_000;
        let steps = self.inner.div_ceil(BOX as usize);
        let taken = self.parts().div_ceil(clusters).saturating_mul(steps);
        let values = self.rows.saturating_mul(self.columns);
        let needed = (values / (Self::PART_ROWS * Self::PART_COLUMNS)).saturating_mul(steps) / clusters;
        taken <= needed + LAUNCH + values / VALUES_A_STEP
    }
}

/// For `y = s·x·Aᵀ·Bᵀ`, from the gradient `g [rows, columns]` of `y`, `B [columns, rank]` and `h = s·x·Aᵀ [rows, rank]`:
/// `e = scale·g·B [rows, rank]` and B's gradient, `gᵀ·h [columns, rank]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRankGradient {
    /// Rows of `g`.
    pub rows: usize,
    /// Columns of `g`.
    pub columns: usize,
    /// The rank, at most 32.
    pub rank: usize,
    /// Of `g`, `B`, `h` and `e`: F16 or BF16.
    pub storage: Storage,
    /// Of B's gradient.
    pub factor: Storage,
    /// What multiplies `e`.
    pub scale: f32,
}

/// The two launches of a [`LowRankGradient`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GradientPass {
    /// Floats of scratch for parts of `e`, and for parts of B's gradient.
    pub parts: [usize; 2],
    /// Tiles of `g`, `B` and `h`; the addresses of both scratches.
    pub pass: Launch,
    /// No tiles; the addresses of both scratches, of `e` and of B's gradient.
    pub sum: Launch,
}

impl LowRankGradient {
    const PART_COLUMNS: usize = 256;
    /// Threadgroups that a multiprocessor has room for.
    const AT_ONCE: usize = 2;
    /// Parts of B's gradient at most: each is written, and read again.
    const MOST_PARTS: usize = 32;
    /// Floats of parts of `e` at most: what a second-level cache of 50 MB holds beside the rest.
    const MOST_FLOATS: usize = 8 << 20;

    /// The launches. `None` where they do not serve: another type, too high a rank, rows that tiles cannot have, or more parts
    /// than a cache holds.
    #[must_use]
    pub fn launches(&self, multiprocessors: usize) -> Option<GradientPass> {
        let Self { rows, columns, rank, storage, factor, scale } = *self;
        let (room, stages) = if rank <= 16 { (16, 3) } else { (32, 2) };
        let values = i32::try_from(rows.max(columns).checked_mul(room)?).ok()?;
        let fits = serves(columns) && serves(rank) && rank <= room && rows > 0 && values > 0;
        if !fits
            || storage.bytes() != 2
            || multiprocessors == 0
            || (factor != storage && factor != Storage::F32)
        {
            return None;
        }
        let tile = BOX as usize;
        let across = columns.div_ceil(Self::PART_COLUMNS);
        if across * rows * room > Self::MOST_FLOATS {
            return None;
        }
        let down = (Self::AT_ONCE * multiprocessors / across).clamp(1, Self::MOST_PARTS);
        let rows_of_part = rows.div_ceil(down).next_multiple_of(tile);
        let down = rows.div_ceil(rows_of_part);
        let text = Text::LowRankGradient { storage, room: small(room), factor };
        let chunk = |rows| Tiled::Matrix { rows, columns: rank, tile: [BOX, UNIT] };
        let chunk_bytes = BOX * small(room) * 2;
        let stage = (4 * BOX_BYTES + chunk_bytes).next_multiple_of(1024);
        let pass = Launch {
            kernel: "low_rank_gradient",
            text,
            tiles: vec![Tiled::Matrix { rows, columns, tile: [BOX, BOX] }, chunk(columns), chunk(rows)],
            threadgroups: [small(across), small(down)],
            threads: 160,
            shared_bytes: stages * stage + 4 * chunk_bytes + ROOM_BESIDE,
            params: Params::default()
                .u32(small(rows))
                .u32(small(columns))
                .u32(small(rows_of_part))
                .f32(scale)
                .bytes(),
        };
        let sizes = [rows, columns, rank, across, down];
        let threads = 128;
        let sum = Launch {
            kernel: "low_rank_gradient_sum",
            text,
            tiles: Vec::new(),
            threadgroups: [small(((rows + columns) * rank / 4).div_ceil(threads)), 1],
            threads: small(threads),
            shared_bytes: 0,
            params: sizes.into_iter().fold(Params::default(), |params, size| params.u32(small(size))).bytes(),
        };
        Some(GradientPass { parts: [across * rows * room, down * columns * room], pass, sum })
    }
}

#[cfg(test)]
mod tests {
    use super::super::SHARED_BYTES;
    use super::*;

    const MULTIPROCESSORS: usize = 132;

    fn product(rows: usize, columns: usize, inner: usize) -> SumOfProducts {
        SumOfProducts { rows, columns, inner, rank: 16, storage: Storage::BF16, turned: false, bias: false }
    }

    #[test]
    fn a_product_has_as_many_clusters_as_it_has_parts_at_most() {
        let large = product(8192, 4096, 4096).launch(MULTIPROCESSORS).unwrap();
        assert_eq!(large.threadgroups, [132, 1]);
        assert!(large.shared_bytes <= SHARED_BYTES, "{}", large.shared_bytes);
        let small = product(1000, 520, 328).launch(MULTIPROCESSORS).unwrap();
        assert_eq!(small.threadgroups, [2 * 4 * 3, 1]);
        assert_eq!(small.tiles[1], Tiled::Matrix { rows: 520, columns: 328, tile: [128, 64] });
        let turned =
            SumOfProducts { turned: true, ..product(1000, 520, 328) }.launch(MULTIPROCESSORS).unwrap();
        assert_eq!(turned.tiles[1], Tiled::Matrix { rows: 328, columns: 520, tile: [64, 64] });
        assert_eq!(turned.tiles[3], Tiled::Matrix { rows: 16, columns: 520, tile: [64, 64] });
    }

    #[test]
    fn where_most_would_be_idle_the_devices_own_products_serve() {
        assert!(product(2048, 2048, 2048).launch(MULTIPROCESSORS).is_some());
        assert!(product(512, 4096, 4096).launch(MULTIPROCESSORS).is_none());
        assert!(product(256, 256, 4096).launch(MULTIPROCESSORS).is_none());
    }

    #[test]
    fn what_tiles_cannot_hold_is_declined() {
        let declined = |change: fn(&mut SumOfProducts)| {
            let mut product = product(1024, 512, 512);
            assert!(product.launch(MULTIPROCESSORS).is_some());
            change(&mut product);
            product.launch(MULTIPROCESSORS).is_none()
        };
        assert!(declined(|product| product.columns = 513));
        assert!(declined(|product| product.inner = 4));
        assert!(declined(|product| product.rank = 12));
        assert!(declined(|product| product.rows = 0));
        assert!(declined(|product| product.rank = 0));
        assert!(declined(|product| product.storage = Storage::F32));
        assert!(product(1024, 512, 512).launch(1).is_none());
    }

    fn gradient(rows: usize, columns: usize, rank: usize) -> LowRankGradient {
        LowRankGradient { rows, columns, rank, storage: Storage::BF16, factor: Storage::F32, scale: 2.0 }
    }

    #[test]
    fn a_gradients_rows_are_parted_in_whole_tiles() {
        for (rows, columns) in [(1, 8), (64, 256), (65, 264), (1000, 520), (8192, 512), (8192, 7168)] {
            for rank in [8, 16, 24, 32] {
                let pass = gradient(rows, columns, rank).launches(MULTIPROCESSORS).unwrap();
                let [across, down] = pass.pass.threadgroups.map(|count| count as usize);
                let bytes = pass.pass.params[8..12].try_into().unwrap();
                let of_part = u32::from_le_bytes(bytes) as usize;
                assert!(of_part.is_multiple_of(64) && down <= LowRankGradient::MOST_PARTS);
                assert!((down - 1) * of_part < rows && down * of_part >= rows, "{rows} {columns}");
                let room = if rank <= 16 { 16 } else { 32 };
                assert_eq!(pass.parts, [across * rows * room, down * columns * room]);
                assert!(2 * (pass.pass.shared_bytes + 1024) <= 228 * 1024, "{}", pass.pass.shared_bytes);
                assert!(pass.sum.threadgroups[0] as usize * 128 * 4 >= (rows + columns) * rank);
            }
        }
        assert!(gradient(8192, 14336, 16).launches(MULTIPROCESSORS).is_some());
        assert!(gradient(8192, 14336, 32).launches(MULTIPROCESSORS).is_none());
        assert!(gradient(64, 256, 40).launches(MULTIPROCESSORS).is_none());
        assert!(gradient(64, 256, 12).launches(MULTIPROCESSORS).is_none());
        assert!(gradient(0, 256, 16).launches(MULTIPROCESSORS).is_none());
    }
}
