//! One pass over a gradient for both that need it.

use super::{BOX, Launch, ROOM_BESIDE, Text, Tiled, UNIT, serves};
use crate::launch::Storage;
use crate::params::{Params, small};

const BOX_BYTES: u32 = BOX * BOX * 2;

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
            at_once: false,
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
            at_once: false,
            params: sizes.into_iter().fold(Params::default(), |params, size| params.u32(small(size))).bytes(),
        };
        Some(GradientPass { parts: [across * rows * room, down * columns * room], pass, sum })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPROCESSORS: usize = 132;

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
