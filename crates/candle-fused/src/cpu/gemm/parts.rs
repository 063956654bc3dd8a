//! f32 as the sum of parts in bf16.
//!
//! A float's 24 bits are three times bf16's eight, so that three parts, each what those before have left, rounded to eight
//! bits, are the float itself, and its product with a bf16 is the exact sum of three exact products (but for what is
//! subnormal, which a matrix unit takes for zero, and for infinity, which times a part that is 0 is NaN).
//!
//! The product of two floats is the sum of nine products of parts. Those of a second and a third part, and of two third ones,
//! are left out: a second part is at most 2⁻⁸ of the power of two below its number, and a third one 2⁻¹⁷, so that together they
//! are at most 2⁻²⁴ of the product, as much as rounding it to f32 may take. (Henry, Tang and Heinecke, "Leveraging the bfloat16
//! artificial intelligence datatype for higher-precision computations", 2019, have the same six.)

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::mem::MaybeUninit;
use std::slice;

use half::bf16;

use super::super::dispatch::{self, Vectorised};
use super::super::lanes::{LANES, Lanes, as_room};
use super::super::spread::spread;
use super::matrix::{Data, Matrix};

/// How many parts are a float.
pub(super) const PARTS: usize = 3;
/// bf16 in a line of the cache.
pub(super) const LINE: usize = 2 * LANES;
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

/// Lines of a row: an odd number, so that no two of those that the unit loads at once share a place in the cache.
fn row_lines(width: usize) -> usize {
    (PARTS * width) | 1
}

impl Parts {
    /// Of an f32 matrix whose rows lie in one piece.
    pub(super) fn of(matrix: &Matrix) -> Option<Self> {
        let (Data::F32(data), offset, stride) = matrix.in_rows()? else { return None };
        let (rows, columns) = (matrix.rows, matrix.columns);
        let width = columns.div_ceil(LINE);
        let row_lines = row_lines(width);
        let mut lines = Vec::with_capacity(rows * row_lines);
        let few = (ELEMENTS / columns.max(1)).max(1);
        let tasks = lines.spare_capacity_mut()[..rows * row_lines].chunks_mut(few * row_lines);
        spread(tasks.enumerate().collect(), rows > few, |(): &mut (), (i, lines): (usize, &mut [_])| {
            for (row, to) in (i * few..).zip(lines.chunks_exact_mut(row_lines)) {
                let from = &data[offset + row * stride..][..columns];
                dispatch::vectorise(dispatch::isa(), Split { from, to });
            }
        });
        // SAFETY: within the capacity; the tasks have written every row, and a row all of its lines.
        unsafe { lines.set_len(rows * row_lines) };
        Some(Self { lines, rows, width })
    }

    /// `[rows, PARTS · whole lines of columns]`
    pub(super) fn matrix(&self) -> Option<Matrix<'_>> {
        let columns = PARTS * self.width * LINE;
        // SAFETY: lines are bf16 side by side.
        let data =
            unsafe { slice::from_raw_parts(self.lines.as_ptr().cast::<bf16>(), self.lines.len() * LINE) };
        Matrix::new(Data::BF16(data), 0, [self.rows, columns], [row_lines(self.width) * LINE, 1])
    }
}

/// Rounded to 8 bits (Veltkamp's splitting, in Dekker, "A floating-point technique for extending the available precision",
/// 1971), which must not overflow.
#[inline(always)]
fn rounded<L: Lanes>(x: L) -> L {
    let large = x * L::splat(65_537.0);
    large - (large - x)
}

/// Far beyond this [`rounded`] overflows: 2¹¹⁰.
const LARGE: f32 = 1.298_074_2e33;

/// The parts, the largest first.
#[inline(always)]
fn parts<L: Lanes>(x: L) -> [L; PARTS] {
    if !x.all_within(LARGE) {
        return parts_of_any(x);
    }
    let first = rounded(x);
    let second = rounded(x - first);
    [first, second, x - first - second]
}

/// [`parts`] whatever the numbers are, the large ones cut instead of rounded. Of an infinite one the others are 0, of a NaN they
/// are NaN.
#[inline(always)]
fn parts_of_any<L: Lanes>(x: L) -> [L; PARTS] {
    let (large, one) = (L::splat(LARGE), L::splat(1.0));
    let first = x.abs().if_less(large, rounded(x), x.upper_halves());
    // 0, or a NaN that may have been one by its lower half alone.
    let none = x.abs().min(one) - one;
    let rest = x.abs().if_less(L::splat(f32::INFINITY), x - first, none);
    let second = x.abs().if_less(large, rounded(rest), rest.upper_halves());
    [first, second, rest - second]
}

/// A row's parts, each as many lines, which zeros fill up, as they do what comes after them.
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
        let (second, rest) = rest.split_at_mut(first.len());
        let (third, rest) = rest.split_at_mut(first.len());
        rest.fill(MaybeUninit::new(Line([bf16::ZERO; LINE])));
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
    let [low, high] = [parts(L::load(&pieces[0])), parts(L::load(&pieces[1]))];
    for ((low, high), to) in low.into_iter().zip(high).zip(to) {
        // SAFETY: a line is these elements, initialised or not.
        L::store_upper_halves(low, high, unsafe { &mut *to.as_mut_ptr().cast() });
    }
}

/// Words of so many columns' parts of [`LINE`] steps.
pub(super) const fn words(width: usize) -> usize {
    PARTS * LINE / 2 * width
}

/// Steps of `width` columns, which lie `stride` apart, in parts: for each [`LINE`] of them the first parts, then the second,
/// then the third, of two steps in a word.
pub(super) struct SplitPairs<'a> {
    pub(super) from: &'a [f32],
    pub(super) stride: usize,
    pub(super) width: usize,
    pub(super) to: &'a mut [f32],
}

impl Vectorised for SplitPairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { from, stride, width, to } = self;
        // The next steps of rows that lie apart, most in a page each, where the processor does not see them coming.
        let asks = stride != width;
        for (block, to) in to.chunks_exact_mut(words(width)).enumerate() {
            let (first, rest) = to.split_at_mut(LINE / 2 * width);
            let (second, third) = rest.split_at_mut(first.len());
            let pairs = first.chunks_exact_mut(width).zip(second.chunks_exact_mut(width));
            for (pair, ((first, second), third)) in pairs.zip(third.chunks_exact_mut(width)).enumerate() {
                let k = block * LINE + 2 * pair;
                let [low, high] = [k, k + 1].map(|k| from[k * stride..][..width].as_chunks().0);
                let rooms = first.as_chunks_mut().0.iter_mut().zip(second.as_chunks_mut().0);
                let rooms = rooms.zip(third.as_chunks_mut().0);
                for ((low, high), ((first, second), third)) in low.iter().zip(high).zip(rooms) {
                    if asks {
                        L::ask::<true>(low.as_ptr().wrapping_add(LINE * stride).cast());
                        L::ask::<true>(high.as_ptr().wrapping_add(LINE * stride).cast());
                    }
                    let (low, high) = (parts(L::load(low)), parts(L::load(high)));
                    L::store_upper_pairs(low[0], high[0], as_room(first));
                    L::store_upper_pairs(low[1], high[1], as_room(second));
                    L::store_upper_pairs(low[2], high[2], as_room(third));
                }
            }
        }
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

    /// As they are packed, two steps in a word.
    #[test]
    fn packed_parts_are_the_number() {
        const WIDTH: usize = 32;
        let numbers = [1.0, -1.0 / 3.0, f32::MAX, 1.000_000_1, -7e-20, 0.0, 2.345_678_9, 1.5e36];
        for (stride, isa) in
            [WIDTH, 40].into_iter().flat_map(|stride| instruction_sets().map(move |isa| (stride, isa)))
        {
            let from: Vec<f32> =
                (0..2 * LINE * stride).map(|i| numbers[i * 5 % 37 % numbers.len()]).collect();
            let mut to = vec![f32::NAN; 2 * words(WIDTH)];
            dispatch::vectorise(isa, SplitPairs { from: &from, stride, width: WIDTH, to: &mut to });
            for (k, j) in (0..2 * LINE).flat_map(|k| (0..WIDTH).map(move |j| (k, j))) {
                let part = |part: usize| {
                    let pair = k / LINE * words(WIDTH) / WIDTH + part * LINE / 2 + k % LINE / 2;
                    let bits = to[pair * WIDTH + j].to_bits();
                    f64::from(f32::from_bits(if k % 2 == 0 { bits << 16 } else { bits & 0xFFFF_0000 }))
                };
                let sum = (0..PARTS).map(part).sum::<f64>();
                assert!(sum == f64::from(from[k * stride + j]), "{isa:?} {stride} {k} {j}: {sum}");
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
