//! f32 as the sum of parts in bf16.
//!
//! A float's 24 bits are three times bf16's eight, so that three parts, each the upper half of what those before have left,
//! are the float itself, and its product with a bf16 is the exact sum of three exact products (but for what is subnormal,
//! which a matrix unit takes for zero, and for infinity, which times a part that is 0 is NaN). Where all parts are taken,
//! rounding them would gain nothing.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::mem::MaybeUninit;
use std::slice;

use half::bf16;

use super::super::dispatch::{self, Vectorised};
use super::super::lanes::{LANES, Lanes};
use super::super::spread::spread;
use super::matrix::{Data, Matrix};

/// How many parts are a float.
pub(super) const PARTS: usize = 3;
/// bf16 in a line of the cache.
const LINE: usize = 2 * LANES;
/// Elements that are worth a task.
const ELEMENTS: usize = 32 * 1024;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([bf16; LINE]);

/// The rows of an f32 matrix, in each the parts of all columns one after the other.
pub(super) struct Parts {
    lines: Vec<Line>,
    rows: usize,
    /// Lines of one part of a row.
    width: usize,
}

impl Parts {
    /// Of an f32 matrix whose rows lie in one piece.
    pub(super) fn of(matrix: &Matrix) -> Option<Self> {
        let (Data::F32(data), offset, stride) = matrix.in_rows()? else { return None };
        let (rows, columns) = (matrix.rows, matrix.columns);
        let width = columns.div_ceil(LINE);
        let mut lines = Vec::with_capacity(rows * PARTS * width);
        let few = (ELEMENTS / columns.max(1)).max(1);
        let tasks =
            lines.spare_capacity_mut()[..rows * PARTS * width].chunks_mut((few * PARTS * width).max(1));
        spread(tasks.enumerate().collect(), rows > few, |(): &mut (), (i, lines): (usize, &mut [_])| {
            for (row, to) in (i * few..).zip(lines.chunks_exact_mut(PARTS * width)) {
                let from = &data[offset + row * stride..][..columns];
                dispatch::vectorise(dispatch::isa(), Split { from, to });
            }
        });
        // SAFETY: within the capacity; the tasks have written every row, and a row all of its lines.
        unsafe { lines.set_len(rows * PARTS * width) };
        Some(Self { lines, rows, width })
    }

    /// `[rows, PARTS · whole lines of columns]`
    pub(super) fn matrix(&self) -> Option<Matrix<'_>> {
        let columns = PARTS * self.width * LINE;
        // SAFETY: lines are bf16 side by side.
        let data =
            unsafe { slice::from_raw_parts(self.lines.as_ptr().cast::<bf16>(), self.lines.len() * LINE) };
        Matrix::new(Data::BF16(data), 0, [self.rows, columns], [columns, 1])
    }
}

/// What is left of finite numbers without their upper halves; 0 of infinite ones.
#[inline(always)]
fn left_over<L: Lanes>(x: L) -> L {
    let one = L::splat(1.0);
    // 0, or a NaN that may have been one by its lower half alone.
    let none = x.abs().min(one) - one;
    x.abs().if_less(L::splat(f32::INFINITY), x - x.upper_halves(), none)
}

/// A row's parts, each as many lines, which zeros fill up.
struct Split<'a> {
    from: &'a [f32],
    to: &'a mut [MaybeUninit<Line>],
}

impl Vectorised for Split<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { from, to } = self;
        let (first, rest) = to.split_at_mut(to.len() / PARTS);
        let (second, third) = rest.split_at_mut(first.len());
        let mut rooms = first.iter_mut().zip(second).zip(third);
        let (pieces, last) = from.as_chunks::<LINE>();
        for (piece, ((first, second), third)) in pieces.iter().zip(&mut rooms) {
            split::<L>(piece, [first, second, third]);
        }
        if let Some(((first, second), third)) = rooms.next() {
            let mut piece = [0.0; LINE];
            piece[..last.len()].copy_from_slice(last);
            split::<L>(&piece, [first, second, third]);
        }
    }
}

#[inline(always)]
fn split<L: Lanes>(from: &[f32; LINE], to: [&mut MaybeUninit<Line>; PARTS]) {
    let (pieces, _) = from.as_chunks();
    let mut x = [L::load(&pieces[0]), L::load(&pieces[1])];
    for to in to {
        // SAFETY: a line is these elements, initialised or not.
        L::store_upper_halves(x[0], x[1], unsafe { &mut *to.as_mut_ptr().cast() });
        x = [left_over(x[0]), left_over(x[1])];
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    #![expect(clippy::float_cmp, reason = "exact sums")]

    use super::*;
    use crate::cpu::dispatch::instruction_sets;

    /// Every float is the sum of its parts, whatever comes after it in the row; what is not finite has one such part.
    #[test]
    fn parts_are_the_number() {
        let numbers = [
            1.0,
            -1.0 / 3.0,
            3.402_823_4e38,
            f32::MAX,
            -f32::MIN_POSITIVE * 65_537.0,
            0.0,
            1.000_000_1,
            f32::from_bits(0x7F7F_8000),
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::from_bits(0x7F80_0001),
            f32::from_bits(0xFFFF_FFFF),
        ];
        for columns in [1, 13, 16, 31, 32, 33, 70] {
            let (rows, stride) = (3, columns + 2);
            let data: Vec<f32> = (0..rows * stride).map(|i| numbers[i * 7 % numbers.len()]).collect();
            let matrix = Matrix::new(Data::F32(&data), 1, [rows, columns], [stride, 1]).unwrap();
            let (parts, width) = (Parts::of(&matrix).unwrap(), columns.div_ceil(LINE));
            let whole = parts.matrix().unwrap().to_f32();
            assert_eq!(whole.len(), rows * PARTS * width * LINE);
            for (i, row) in whole.chunks_exact(PARTS * width * LINE).enumerate() {
                are_parts(&data[1 + i * stride..][..columns], row);
            }
            for isa in instruction_sets() {
                let mut lines = vec![MaybeUninit::new(Line([bf16::NAN; LINE])); PARTS * width];
                dispatch::vectorise(isa, Split { from: &data[..columns], to: &mut lines });
                // SAFETY: initialised.
                let lines = lines.into_iter().flat_map(|line| unsafe { line.assume_init() }.0);
                are_parts(&data[..columns], &lines.map(bf16::to_f32).collect::<Vec<_>>());
            }
        }
    }

    fn are_parts(from: &[f32], row: &[f32]) {
        let width = row.len() / PARTS;
        for j in 0..width {
            let x = from.get(j).copied().unwrap_or(0.0);
            // Exact in f64.
            let sum = (0..PARTS).map(|part| f64::from(row[part * width + j])).sum::<f64>();
            assert!(sum == f64::from(x) || sum.is_nan() && x.is_nan(), "{x} {sum} {j} of {}", from.len());
        }
    }

    #[test]
    fn only_rows_of_f32_have_parts() {
        let (f32, bf16) = ([0f32; 6], [bf16::ZERO; 6]);
        assert!(Parts::of(&Matrix::new(Data::F32(&f32), 0, [2, 3], [1, 2]).unwrap()).is_none());
        assert!(Parts::of(&Matrix::new(Data::BF16(&bf16), 0, [2, 3], [3, 1]).unwrap()).is_none());
        assert!(Parts::of(&Matrix::new(Data::F32(&f32), 0, [0, 3], [3, 1]).unwrap()).is_some());
    }
}
