//! The launch of a kernel that works row by row: how many threads share a row, and how much of it each one holds.
//!
//! The shapes that training meets want different launches. Thousands of short rows: one simdgroup a row, no
//! barrier. Thousands of long rows: 64 to 512 threads a row, each of which holds what [`Held`] says, which on an H200 gave
//! the best bandwidth (larger threadgroups lose a quarter, waiting at barriers). One row, or a few: nothing else fills
//! the device, so as many threads as the row has chunks. Rows that do not fit into registers: a threadgroup walks them.

use crate::launch::{SIMDGROUP_SIZE, Storage};
use crate::params::{Tuning, define, small};

/// From this many rows on, rows alone fill a device, and threads are better spent on holding more.
const MANY_ROWS: usize = 256;
/// Simdgroups in a threadgroup whose simdgroups each have their own row.
const SIMDGROUPS_WITH_ROWS: usize = 8;
/// The most threads for one of many rows, where it fits.
const MANY_ROWS_SIMDGROUPS: usize = 16;
/// A simdgroup's threads, for sizes.
pub(crate) const LANES: usize = SIMDGROUP_SIZE as usize;
/// Bytes of the reduction scratch of `common/row.h`: two places for four sums of every simdgroup.
pub(crate) const SCRATCH_BYTES: u32 = 2 * 4 * SIMDGROUP_SIZE * 4;

/// How many values of a row a thread holds in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// How many it should, when there are many rows.
    pub good: usize,
    /// The most.
    pub most: usize,
}

impl Held {
    /// For a kernel that reads one row and computes much with it: where rows are long, more loads at once keep memory busy
    /// meanwhile.
    pub(crate) fn computing(storage: Storage, columns: usize) -> Self {
        let is_long = columns >= 4096 && storage != Storage::F32;
        Self { good: if is_long { 32 } else { 16 }, most: 32 }
    }

    /// For a kernel that reads one row and little else.
    pub(crate) const READING: Self = Self { good: 16, most: 32 };

    /// For a kernel that reads two rows.
    pub(crate) const READING_TWO: Self = Self { good: 16, most: 16 };

    /// For a kernel that takes many pairs of rows, keeps the sums of its columns, and has the next pair on its way: with more
    /// than what is good, a multiprocessor has no room for 512 threads.
    pub(crate) fn summing(storage: Storage) -> Self {
        Self { good: if storage == Storage::F32 { 8 } else { 16 }, most: 16 }
    }
}

/// How a row is shared. See `kernels/common/row.h`, whose defines these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowGeometry {
    /// Values in one access.
    pub width: usize,
    /// Accesses that a thread holds in registers; 0 when the row is walked.
    pub items: usize,
    /// Simdgroups that share a row.
    pub simdgroups: usize,
    /// Rows a threadgroup works on at the same time.
    pub teams: usize,
}

impl RowGeometry {
    /// The geometry for `rows` × `columns`.
    pub(crate) fn choose(rows: usize, columns: usize, storage: Storage, tuning: Tuning, held: Held) -> Self {
        let width = width(storage, tuning, &[columns]);
        let chunks = columns.div_ceil(width);
        let most_items = (held.most / width).max(1);
        let most_simdgroups = tuning.max_simdgroups();
        let many = rows >= MANY_ROWS;
        let good_items = if many { (held.good / width).clamp(1, most_items) } else { 1 };
        if many && chunks <= LANES * good_items {
            let items = chunks.div_ceil(LANES).max(1);
            return Self { width, items, simdgroups: 1, teams: SIMDGROUPS_WITH_ROWS.min(most_simdgroups) };
        }
        let wanted = chunks.div_ceil(LANES * good_items).max(1);
        let preferred = if many { MANY_ROWS_SIMDGROUPS.min(most_simdgroups) } else { most_simdgroups };
        // Prefer few simdgroups holding more, then the largest threadgroup, then walking.
        for limit in [preferred, most_simdgroups] {
            let simdgroups = wanted.min(limit);
            let items = chunks.div_ceil(LANES * simdgroups).max(1);
            if items <= most_items {
                return Self { width, items, simdgroups, teams: 1 };
            }
        }
        Self { width, items: 0, simdgroups: preferred, teams: 1 }
    }

    /// The same threads, but walking the row: for kernels that read it only once.
    pub(crate) fn walking(rows: usize, columns: usize, storage: Storage, tuning: Tuning) -> Self {
        Self { items: 0, ..Self::choose(rows, columns, storage, tuning, Held::READING_TWO) }
    }

    pub(crate) fn threads(self) -> u32 {
        small(self.simdgroups * self.teams * LANES)
    }

    pub(crate) fn defines(self) -> Vec<(&'static str, String)> {
        vec![
            define("WIDTH", self.width),
            define("ITEMS", self.items),
            define("ROW_SIMDGROUPS", self.simdgroups),
        ]
    }
}

/// The widest access that keeps every address a multiple of 16 bytes, given the sizes and strides that addresses
/// are built from.
pub(crate) fn width(storage: Storage, tuning: Tuning, multiples: &[usize]) -> usize {
    let vector = storage.vector();
    if tuning.aligned && multiples.iter().all(|size| size.is_multiple_of(vector)) { vector } else { 1 }
}

/// Simdgroups that share the rows of a sum over rows: 16 for each of the 132 multiprocessors of an H100 or H200, which leave
/// each other registers enough and keep the memory busy. More only leave more partial rows.
const SUMMING_SIMDGROUPS: usize = 132 * 16;

/// How many partial rows the first stage of a sum over `rows` rows leaves: enough teams to fill a device, yet from 256 rows
/// on at most a quarter as many as there are rows.
pub(crate) fn partial_rows(rows: usize, geometry: RowGeometry) -> usize {
    let most = (SUMMING_SIMDGROUPS / geometry.simdgroups).max(64);
    rows.min((rows / 4).clamp(64, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_covered_once() {
        for storage in Storage::ALL {
            for rows in [1, 2, 63, 64, 255, 256, 4096] {
                for columns in [1, 31, 32, 33, 255, 256, 257, 1000, 4096, 4097, 8192, 16_384, 50_257, 151_936]
                {
                    for held in [
                        Held::summing(storage),
                        Held::computing(storage, columns),
                        Held::READING,
                        Held::READING_TWO,
                    ] {
                        for tuning in [
                            Tuning::default(),
                            Tuning { aligned: false, max_threads: 1024 },
                            Tuning { aligned: true, max_threads: 256 },
                        ] {
                            let g = RowGeometry::choose(rows, columns, storage, tuning, held);
                            let case = format!("{storage:?} {rows}x{columns} {held:?} {tuning:?}: {g:?}");
                            assert!(g.threads() <= tuning.max_threads, "{case}");
                            assert!(g.threads().is_multiple_of(SIMDGROUP_SIZE) && g.threads() > 0, "{case}");
                            assert!(columns.is_multiple_of(g.width), "{case}");
                            assert!(g.items * g.width <= held.most, "{case}");
                            assert!(g.teams == 1 || g.simdgroups == 1, "{case}");
                            if g.items > 0 {
                                assert!(g.items * g.width * g.simdgroups * LANES >= columns, "{case}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn teams_that_sum_fill_a_device_and_no_more() {
        let teams = |rows, columns| {
            let geometry = RowGeometry::choose(
                rows,
                columns,
                Storage::BF16,
                Tuning::default(),
                Held::summing(Storage::BF16),
            );
            partial_rows(rows, geometry)
        };
        assert_eq!(teams(131_072, 128), 2112);
        assert_eq!(teams(8192, 1024), 1056);
        assert_eq!(teams(8192, 4096), 264);
        assert_eq!(teams(8192, 8192), 132);
        assert_eq!((teams(100, 8192), teams(3, 8192)), (64, 3));
    }

    #[test]
    fn each_regime_gets_its_launch() {
        let choose = |rows, columns| {
            RowGeometry::choose(rows, columns, Storage::F32, Tuning::default(), Held::READING)
        };
        assert_eq!(choose(1, 4096), RowGeometry { width: 4, items: 1, simdgroups: 32, teams: 1 });
        assert_eq!(choose(64, 1024), RowGeometry { width: 4, items: 1, simdgroups: 8, teams: 1 });
        assert_eq!(choose(4096, 4096), RowGeometry { width: 4, items: 4, simdgroups: 8, teams: 1 });
        assert_eq!(choose(4096, 64), RowGeometry { width: 4, items: 1, simdgroups: 1, teams: 8 });
        assert_eq!(choose(4, 4097), RowGeometry { width: 1, items: 5, simdgroups: 32, teams: 1 });
        assert_eq!(choose(4, 151_936).items, 0);
    }
}
