//! Packing of the right matrix: blocks small enough to stay in cache are brought into the order in which the inner loops
//! read them, 16-bit elements widened on the way, or kept in pairs for the bf16 product.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::ops::Range;

use candle_core::DType;
use half::bf16;

use super::super::dispatch::{self, Isa, Vectorised};
use super::super::lanes::{Element, LANES, Lanes, as_room};
use super::matrix::{Data, Matrix};
use super::parts::{self, LINE, SplitPairs};

/// Steps that are turned at a time where columns have to become rows.
const STEPS: usize = 128;
/// Steps that are taken of one panel after the other where they lie in rows.
const STEPS_IN_ROWS: usize = LINE;
/// The greatest width of a panel.
pub(super) const MAX_WIDTH: usize = 32;

/// The panels of some columns, by number, with their columns and steps, of which there are at most so many `at_once`, in an order
/// that reads memory along its rows: all panels of some steps, or all steps of a panel.
fn blocks(
    right: &Matrix,
    steps: &Range<usize>,
    columns: &Range<usize>,
    width: usize,
    at_once: usize,
) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> {
    let by_steps = right.column_stride == 1;
    let (steps, columns) = (steps.clone(), columns.clone());
    let at_once = if by_steps { STEPS_IN_ROWS } else { at_once };
    let (panels, parts) = (columns.len().div_ceil(width), steps.len().div_ceil(at_once));
    (0..panels * parts).map(move |i| {
        let (panel, part) = if by_steps { (i % panels, i / panels) } else { (i / parts, i % parts) };
        let (first, start) = (columns.start + panel * width, steps.start + part * at_once);
        let columns = first..columns.end.min(first + width);
        (panel, columns, start..steps.end.min(start.saturating_add(at_once)))
    })
}

/// Packs `steps` × `columns` of a matrix into panels of `width` columns, for each step side by side, filled up with zero.
/// `to` has `steps · panels · width` elements.
pub(super) fn pack(
    isa: Isa,
    right: &Matrix,
    steps: Range<usize>,
    columns: Range<usize>,
    width: usize,
    to: &mut [f32],
) {
    let all = steps;
    for (panel, columns, steps) in blocks(right, &all, &columns, width, usize::MAX) {
        let (first, count) = (columns.start, columns.len());
        let panel = &mut to[(panel * all.len() + steps.start - all.start) * width..][..steps.len() * width];
        match right.data {
            _ if right.column_stride == 1 && count == width => {
                let start = right.index(steps.start, first);
                copy_steps(isa, right.data, start, right.row_stride, width, panel);
            }
            _ if right.column_stride == 1 => {
                for (k, to) in steps.clone().zip(panel.chunks_exact_mut(width)) {
                    right.data.widen(right.index(k, first), &mut to[..count]);
                }
            }
            Data::F32(data) if right.row_stride == 1 => {
                let from = &data[right.index(steps.start, first)..];
                turn(isa, from, right.column_stride, [count, steps.len()], width, panel);
            }
            _ => turn_widened(isa, right, steps.clone(), first..first + count, width, panel),
        }
        fill_up(panel, width, count);
    }
}

/// Copies steps of `width` columns, which lie `stride` apart, beginning at `start`, widened.
fn copy_steps(isa: Isa, data: Data, start: usize, stride: usize, width: usize, to: &mut [f32]) {
    match data {
        Data::F32(from) => dispatch::vectorise(isa, Widen { from: &from[start..], stride, width, to }),
        Data::F16(from) => dispatch::vectorise(isa, Widen { from: &from[start..], stride, width, to }),
        Data::BF16(from) => dispatch::vectorise(isa, Widen { from: &from[start..], stride, width, to }),
    }
}

struct Widen<'a, T> {
    from: &'a [T],
    stride: usize,
    width: usize,
    to: &'a mut [f32],
}

impl<T: Element> Vectorised for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { from, stride, width, to } = self;
        for (k, to) in to.chunks_exact_mut(width).enumerate() {
            let pieces = from[k * stride..][..width].as_chunks().0;
            for (piece, to) in pieces.iter().zip(to.as_chunks_mut().0) {
                T::load::<L>(piece).store(as_room(to));
            }
        }
    }
}

/// Columns become rows by way of a small block of f32.
fn turn_widened(
    isa: Isa,
    right: &Matrix,
    steps: Range<usize>,
    columns: Range<usize>,
    width: usize,
    panel: &mut [f32],
) {
    let mut block = [0f32; MAX_WIDTH * STEPS];
    for (first, to) in steps.clone().step_by(STEPS).zip(panel.chunks_mut(STEPS * width)) {
        let count = STEPS.min(steps.end - first);
        for (j, row) in columns.clone().zip(block.chunks_exact_mut(STEPS)) {
            if right.row_stride == 1 {
                right.data.widen(right.index(first, j), &mut row[..count]);
            } else {
                for (k, to) in (first..).zip(&mut row[..count]) {
                    right.data.widen(right.index(k, j), std::slice::from_mut(to));
                }
            }
        }
        turn(isa, &block, STEPS, [columns.len(), count], width, to);
    }
}

/// Packs pairs of steps of a bf16 matrix, or of an f32 one rounded to it, the first in the low half of 32 bits, as [`pack`]
/// does single steps; an odd last step has a zero beside it. `to` has `⌈steps/2⌉ · panels · width` elements.
pub(super) fn pack_pairs(
    isa: Isa,
    right: &Matrix,
    steps: Range<usize>,
    columns: Range<usize>,
    width: usize,
    to: &mut [f32],
) {
    let data = match right.data {
        Data::BF16(data) => data,
        Data::F32(data) => return pack_rounded(isa, right, data, steps, columns, width, to),
        Data::F16(_) => return,
    };
    let all = steps;
    let bits =
        |k: usize, j: usize| if k < all.end { u32::from(data[right.index(k, j)].to_bits()) } else { 0 };
    for (panel, columns, steps) in blocks(right, &all, &columns, width, usize::MAX) {
        let (first, count) = (columns.start, columns.len());
        let panel = &mut to[(panel * all.len().div_ceil(2) + (steps.start - all.start) / 2) * width..]
            [..steps.len().div_ceil(2) * width];
        let mut done = 0;
        if right.row_stride == 1 && cfg!(target_endian = "little") {
            // Two steps of a column are the 32 bits already.
            done = steps.len() / 2;
            let from = &data[right.index(steps.start, first)..];
            turn(isa, from, right.column_stride, [count, done], width, panel);
        } else if right.column_stride == 1 && count == width {
            done = steps.len() / 2;
            let from = &data[right.index(steps.start, first)..];
            let (stride, to) = (right.row_stride, &mut panel[..done * width]);
            dispatch::vectorise(isa, Join { from, stride, count, width, to });
        }
        for (pair, to) in panel.chunks_exact_mut(width).enumerate().skip(done) {
            let k = steps.start + 2 * pair;
            for (j, to) in (first..).zip(&mut to[..count]) {
                *to = f32::from_bits(bits(k, j) | bits(k + 1, j) << 16);
            }
        }
        fill_up(panel, width, count);
    }
}

/// Packs the parts of a matrix of any type, as [`SplitPairs`] has them, the last steps filled up with zeros.
pub(super) fn pack_parts(
    isa: Isa,
    right: &Matrix,
    steps: Range<usize>,
    columns: Range<usize>,
    width: usize,
    to: &mut [f32],
) {
    let mut block = [0f32; MAX_WIDTH * STEPS];
    let (all, words) = (steps, parts::words(width));
    for (panel, columns, steps) in blocks(right, &all, &columns, width, STEPS) {
        let lines = steps.len().div_ceil(LINE);
        let first = panel * all.len().div_ceil(LINE) + (steps.start - all.start) / LINE;
        let to = &mut to[first * words..][..lines * words];
        let split = match right.data {
            Data::F32(data)
                if right.column_stride == 1 && columns.len() == width && steps.len() == STEPS_IN_ROWS =>
            {
                let from = &data[right.index(steps.start, columns.start)..];
                SplitPairs { from, stride: right.row_stride, width, to }
            }
            _ => {
                let (packed, rest) = block[..lines * LINE * width].split_at_mut(steps.len() * width);
                pack(isa, right, steps, columns, width, packed);
                rest.fill(0.0);
                SplitPairs { from: &block, stride: width, width, to }
            }
        };
        dispatch::vectorise(isa, split);
    }
}

/// [`pack_pairs`] of f32.
fn pack_rounded(
    isa: Isa,
    right: &Matrix,
    data: &[f32],
    steps: Range<usize>,
    columns: Range<usize>,
    width: usize,
    to: &mut [f32],
) {
    let panels = to.chunks_exact_mut(steps.len().div_ceil(2) * width);
    for (first, panel) in columns.clone().step_by(width).zip(panels) {
        let count = width.min(columns.end - first);
        let whole = right.column_stride == 1 && count.is_multiple_of(LANES);
        let done = if whole { steps.len() / 2 } else { 0 };
        let (joined, rest) = panel.split_at_mut(done * width);
        if done > 0 {
            let from = &data[right.index(steps.start, first)..];
            dispatch::vectorise(isa, Join { from, stride: right.row_stride, count, width, to: joined });
        }
        for (pair, to) in rest.chunks_exact_mut(width).enumerate() {
            let k = steps.start + 2 * (done + pair);
            for (j, to) in (first..).zip(&mut to[..count]) {
                let bits =
                    |k| if k < steps.end { bf16::from_f32(data[right.index(k, j)]).to_bits() } else { 0 };
                *to = f32::from_bits(u32::from(bits(k)) | u32::from(bits(k + 1)) << 16);
            }
        }
        fill_up(panel, width, count);
    }
}

/// Puts the steps of `count` columns, which lie `stride` apart, beside each other in pairs of `width`, rounded if they are f32.
struct Join<'a, T> {
    from: &'a [T],
    stride: usize,
    count: usize,
    width: usize,
    to: &'a mut [f32],
}

impl<T: Element> Vectorised for Join<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { from, stride, count, width, to } = self;
        for (pair, to) in to.chunks_exact_mut(width).enumerate() {
            let (low, high) =
                (&from[2 * pair * stride..][..count], &from[(2 * pair + 1) * stride..][..count]);
            let pieces = low.as_chunks().0.iter().zip(high.as_chunks().0);
            for ((low, high), to) in pieces.zip(to.as_chunks_mut().0) {
                let (low, high) = (T::load(low), T::load(high));
                if T::DTYPE == DType::BF16 {
                    L::store_upper_pairs(low, high, as_room(to));
                } else {
                    L::store_bf16_pairs(low, high, as_room(to));
                }
            }
        }
    }
}

/// The columns of a bf16 matrix as rows, each in one piece; how many there are, and how long each is, filled up with zeros.
pub(super) fn turn_pairs(isa: Isa, matrix: &Matrix) -> (Vec<f32>, [usize; 2]) {
    const WIDTH: usize = 16;
    let (pairs, columns) = (matrix.rows.div_ceil(2), matrix.columns.next_multiple_of(WIDTH));
    let mut joined = vec![0f32; columns * pairs];
    pack_pairs(isa, matrix, 0..matrix.rows, 0..matrix.columns, WIDTH, &mut joined);
    let mut turned = vec![0f32; columns * pairs];
    let size = (pairs * WIDTH).max(1);
    for (panel, to) in joined.chunks_exact(size).zip(turned.chunks_exact_mut(size)) {
        turn(isa, panel, WIDTH, [pairs, WIDTH], pairs, to);
    }
    (turned, [columns, 2 * pairs])
}

/// Zeroes what a panel has beyond its columns.
fn fill_up(panel: &mut [f32], width: usize, count: usize) {
    if count < width {
        panel.chunks_exact_mut(width).for_each(|to| to[count..].fill(0.0));
    }
}

/// `to[k·width + j]` is the `k`-th word of 32 bits of the row that begins at `from[j·stride]`, for `rows` rows of `steps`
/// words.
pub(super) fn turn<T: Copy>(
    isa: Isa,
    from: &[T],
    stride: usize,
    [rows, steps]: [usize; 2],
    width: usize,
    to: &mut [f32],
) {
    if rows == 0 || steps == 0 {
        return;
    }
    let (size, stride) = (size_of::<T>(), stride * size_of::<T>());
    assert!((rows - 1) * stride + 4 * steps <= from.len() * size, "a panel's source ends within its rows");
    assert!((steps - 1) * width + rows <= to.len() && rows <= width, "a panel is too small");
    let (from, to) = (from.as_ptr().cast::<u8>(), to.as_mut_ptr());
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 {
        // SAFETY: the ranges above are within both slices, and the processor has AVX2.
        unsafe { turn_avx2(from, stride, [rows, steps], width, to) };
        return;
    }
    let _ = isa;
    for j in 0..rows {
        // SAFETY: as above.
        unsafe { turn_row(from.add(j * stride), 0..steps, width, to.add(j)) };
    }
}

/// # Safety
/// `from` has words and `to` has `width` floats for each of the steps; any bits are a float.
unsafe fn turn_row(from: *const u8, steps: Range<usize>, width: usize, to: *mut f32) {
    for k in steps {
        // SAFETY: the caller's promise.
        unsafe { *to.add(k * width) = from.add(4 * k).cast::<f32>().read_unaligned() };
    }
}

/// In squares of 8 × 8.
///
/// # Safety
/// Each of the rows has as many words as there are steps, and `to` has room for them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn turn_avx2(from: *const u8, stride: usize, [rows, steps]: [usize; 2], width: usize, to: *mut f32) {
    use std::arch::x86_64::{
        _MM_HINT_T0, _mm_prefetch, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps,
        _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    let whole = steps - steps % 8;
    // What of the panel is written stays in the first-level cache for all rows.
    let blocks = (0..whole).step_by(STEPS).map(|first| first..whole.min(first + STEPS));
    for (some, j) in blocks.flat_map(|some| (0..rows - rows % 8).step_by(8).map(move |j| (some.clone(), j))) {
        for k in some.step_by(8) {
            if k % 16 == 0 {
                for i in 8..16 {
                    // The next rows' lines, wherever they are: the processor sees none coming beyond the row it is in.
                    let next = from.wrapping_add((j + i) * stride + 4 * k);
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                }
            }
            let mut x = [_mm256_setzero_ps(); 8];
            for (i, x) in x.iter_mut().enumerate() {
                // SAFETY: eight words of row `j + i` from step `k`.
                *x = unsafe { _mm256_loadu_ps(from.add((j + i) * stride + 4 * k).cast()) };
            }
            let mut y = x;
            for i in 0..4 {
                y[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
                y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
            }
            for half in 0..2 {
                for i in 0..2 {
                    let (low, high) = (y[4 * half + i], y[4 * half + 2 + i]);
                    x[4 * half + 2 * i] = _mm256_shuffle_ps::<0b01_00_01_00>(low, high);
                    x[4 * half + 2 * i + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(low, high);
                }
            }
            for i in 0..4 {
                let (first, second) = (
                    _mm256_permute2f128_ps::<0x20>(x[i], x[i + 4]),
                    _mm256_permute2f128_ps::<0x31>(x[i], x[i + 4]),
                );
                // SAFETY: eight floats of steps `k + i` and `k + i + 4` from column `j`.
                unsafe {
                    _mm256_storeu_ps(to.add((k + i) * width + j), first);
                    _mm256_storeu_ps(to.add((k + i + 4) * width + j), second);
                }
            }
        }
    }
    for j in 0..rows {
        let first = if j < rows - rows % 8 { whole } else { 0 };
        // SAFETY: what the squares left over.
        unsafe { turn_row(from.add(j * stride), first..steps, width, to.add(j)) };
    }
}
