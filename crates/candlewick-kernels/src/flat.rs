//! The launch of an elementwise kernel: one chunk a thread, the rest one element a thread.

use crate::launch::{PlanError, Storage};
use crate::params::{Params, Tuning, define, groups, size, small};
use crate::rows::{LANES, width};

/// Threads of a threadgroup of a flat kernel: the kernels never wait for each other, so the size matters little.
pub(crate) const FLAT_THREADS: usize = 256;

/// A grid of `units` threads.
pub(crate) struct FlatGrid {
    pub threadgroups: [u32; 3],
    pub threads: u32,
}

impl FlatGrid {
    pub(crate) fn over(op: &'static str, units: usize, tuning: Tuning) -> Result<Self, PlanError> {
        // A unit's number is a u32 in the kernel, the grid's last threadgroup included.
        size(op, "elements", units.saturating_add(FLAT_THREADS))?;
        let threads = FLAT_THREADS.min(tuning.max_simdgroups() * LANES);
        Ok(Self { threadgroups: [groups(op, units.div_ceil(threads))?, 1, 1], threads: small(threads) })
    }
}

/// An elementwise kernel over `elements`: its grid, its WIDTH, and its parameters (whole chunks, elements after them).
pub(crate) struct Elementwise {
    pub grid: FlatGrid,
    pub width: (&'static str, String),
    pub params: Vec<u8>,
}

impl Elementwise {
    pub(crate) fn over(
        op: &'static str,
        elements: usize,
        storage: Storage,
        tuning: Tuning,
    ) -> Result<Self, PlanError> {
        let width = width(storage, tuning, &[]);
        let (chunks, tail) = (elements / width, elements % width);
        Ok(Self {
            grid: FlatGrid::over(op, chunks.max(tail), tuning)?,
            width: define("WIDTH", width),
            params: Params::default().u32(size(op, "chunks", chunks)?).u32(small(tail)).bytes(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_taken_once() {
        for storage in Storage::ALL {
            for elements in [1, 3, 7, 8, 31, 1000, 2047, 2048, 2049, 1_000_003] {
                for aligned in [true, false] {
                    let tuning = Tuning { aligned, ..Tuning::default() };
                    let flat = Elementwise::over("op", elements, storage, tuning).unwrap();
                    let number = |at: usize| {
                        usize::try_from(u32::from_le_bytes(flat.params[at..at + 4].try_into().unwrap()))
                            .unwrap()
                    };
                    let width: usize = flat.width.1.parse().unwrap();
                    assert_eq!(number(0) * width + number(4), elements);
                    let threads = flat.grid.threadgroups[0] as usize * flat.grid.threads as usize;
                    assert!(threads >= number(0) && threads >= number(4));
                    assert!(threads - FLAT_THREADS < number(0).max(number(4)));
                }
            }
        }
    }
}
