//! Which elements a dropout keeps.
//!
//! A mask of its bits takes a thirty-second of what it masks in f32. What makes it are integers alone, sixteen counters of
//! the generator side by side, which the compiler turns into each instruction set's.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::slice;

use super::dispatch::{self, Isa, Vectorised};
use super::lanes::{Element, LANES, Lanes, as_room};
use super::rows::{Row, RowLoop, map};
use super::spread::spread;
use crate::ops::dropout::Dropout;
use crate::philox::{halves, philox4x32};

/// Elements of a word, and counters, each of which makes four.
const BITS: usize = 64;
const COUNTERS: usize = BITS / 4;
/// Words of a task, and those that are worth waking another thread.
const TASK: usize = 256;
const PARALLEL: usize = 1024;

/// A bit for each element of a matrix, row by row without a gap: whether it is kept.
pub(crate) struct Mask {
    /// And one more, so that there are always two to read from.
    words: Vec<u64>,
}

impl Mask {
    /// Of so many elements.
    pub(crate) fn new(dropout: Dropout, count: usize) -> Self {
        Self::with(dispatch::isa(), dropout, count)
    }

    fn with(isa: Isa, dropout: Dropout, count: usize) -> Self {
        let mut words = vec![0; count.div_ceil(BITS) + 1];
        let parallel = words.len() >= PARALLEL;
        spread(words.chunks_mut(TASK).enumerate().collect(), parallel, |(): &mut (), (i, words)| {
            dispatch::vectorise(isa, Words { dropout, first: i * TASK, to: words });
        });
        Self { words }
    }

    /// The factors of the elements from this index on: 1 for what is kept, else 0.
    #[inline(always)]
    fn factors<L: Lanes>(&self, index: usize) -> L {
        let words = &self.words[index / BITS..][..2];
        let words = u128::from(words[1]) << BITS | u128::from(words[0]);
        L::of_bits((words >> (index % BITS) & 0xFFFF) as u16)
    }

    /// Multiplies all elements.
    pub(crate) fn apply_to(&self, isa: Isa, to: &mut [f32]) {
        dispatch::vectorise(isa, Part { mask: self, index: 0, row: to });
    }

    /// Multiplies rows of so many elements, the first of which has this index, and the first of the next one `columns` more.
    ///
    /// # Safety
    /// Each of the `rows` has `width` initialised elements, `stride` after those of the one before, which nobody else uses.
    pub(crate) unsafe fn apply(
        &self,
        isa: Isa,
        [first, columns]: [usize; 2],
        [rows, width, stride]: [usize; 3],
        to: *mut f32,
    ) {
        for i in 0..rows {
            // SAFETY: one of the rows.
            let row = unsafe { slice::from_raw_parts_mut(to.add(i * stride), width) };
            dispatch::vectorise(isa, Part { mask: self, index: first + i * columns, row });
        }
    }
}

/// The words from the first one on.
struct Words<'a> {
    dropout: Dropout,
    first: usize,
    to: &'a mut [u64],
}

impl Vectorised for Words<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { dropout, first, to } = self;
        let (threshold, key) = (dropout.threshold(), halves(dropout.seed));
        for (i, word) in (first..).zip(to) {
            let (mut low, mut high) = ([0; COUNTERS], [0; COUNTERS]);
            for (counter, (low, high)) in (i * COUNTERS..).zip(low.iter_mut().zip(&mut high)) {
                [*low, *high] = halves(counter as u64);
            }
            let random = philox4x32([low, high, [0; COUNTERS], [0; COUNTERS]], key);
            *word = 0;
            for j in 0..COUNTERS {
                let mut kept = 0;
                for (lane, random) in random.iter().enumerate() {
                    kept |= u32::from(random[j] >= threshold) << lane;
                }
                *word |= u64::from(kept) << (4 * j);
            }
        }
    }
}

/// A part of a row that is multiplied where it lies.
struct Part<'a> {
    mask: &'a Mask,
    index: usize,
    row: &'a mut [f32],
}

impl Vectorised for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { mask, mut index, row } = self;
        let (pieces, rest) = row.as_chunks_mut();
        for piece in pieces {
            (L::load(piece) * mask.factors(index)).store(as_room(piece));
            index += LANES;
        }
        if !rest.is_empty() {
            for (x, factor) in rest.iter_mut().zip(mask.factors::<L>(index).to_array()) {
                *x *= factor;
            }
        }
    }
}

/// Multiplies by the mask.
pub(crate) struct Masked<'a>(pub(crate) &'a Mask);

// SAFETY: `map` writes the whole row.
unsafe impl RowLoop<1, 1, 0> for Masked<'_> {
    type Statistic = ();

    const SCRATCH: bool = true;

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 1, 1, 0>) {
        let ([x], [Some(y)]) = (row.inputs, row.outputs) else { return };
        let factors = &mut row.scratch[..x.len()];
        let (pieces, rest) = factors.as_chunks_mut();
        let mut index = row.index;
        for piece in pieces {
            self.0.factors::<L>(index).store(as_room(piece));
            index += LANES;
        }
        if !rest.is_empty() {
            let last = self.0.factors::<L>(index).to_array();
            rest.copy_from_slice(&last[..rest.len()]);
        }
        map(
            [x.soon()],
            [&*factors],
            y,
            #[inline(always)]
            |[x]: [L; 1], [factor]| x * factor,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every instruction set makes the mask that the definition says, and reads any part of it.
    #[test]
    fn masks_are_as_defined() {
        let places = [0, 1, 13, 64, 2050, 150_003, 299_990];
        for (p, seed) in [(0.3, 7), (0.5, 0xFEDC_BA98_7654_3210), (1.0 - f32::EPSILON / 2.0, 1)] {
            let dropout = Dropout { p, seed };
            for count in [0, 1, 15, 16, 17, 63, 64, 65, 1000, 4097, 300_001usize] {
                let defined: Vec<_> = (0..count.div_ceil(4) as u64)
                    .flat_map(|block| dropout.factors(block))
                    .take(count)
                    .collect();
                for isa in dispatch::instruction_sets() {
                    let mask = Mask::with(isa, dropout, count);
                    for first in places.into_iter().filter(|&first| first <= count) {
                        let mut row: Vec<f32> = (1u8..=70).map(f32::from).collect();
                        row.truncate(count - first);
                        let expected: Vec<f32> = row
                            .iter()
                            .zip(&defined[first..])
                            .map(|(x, factor)| if *factor == 0.0 { 0.0 } else { *x })
                            .collect();
                        // SAFETY: one row.
                        unsafe { mask.apply(isa, [first, 0], [1, row.len(), 0], row.as_mut_ptr()) };
                        assert_eq!(row, expected, "{isa:?} {dropout:?} {count} from {first}");
                    }
                }
            }
        }
    }
}
