//! `y = h·Bᵀ` with `h = s·x·Aᵀ`, for few ranks: both products for the same rows, one block after the other.
//!
//! The rows of a block stay in the second-level cache between the two products; each is read from memory once. For `h`
//! the lanes run along a row: a tile of [`TALL`] rows and [`WIDE`] ranks has its sums in registers, and both sides come
//! from the first-level cache, because columns are taken [`COLUMNS`] at a time. For `y` the lanes run along the row of
//! the result, [`TALL`] + 1 rows at once, which share what is read of B.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::mem::MaybeUninit;

use super::dispatch::Vectorised;
use super::lanes::{Element, LANES, Lanes, Piece, as_room};
use super::rows::{Out, load_part, map};

/// Rows of a block.
pub(crate) const ROWS: usize = 12;
const TALL: usize = 3;
const WIDE: usize = 2;
/// A multiple of [`LANES`].
const COLUMNS: usize = 512;

/// The product's constants.
#[derive(Clone, Copy)]
pub(crate) struct Delta<'a> {
    /// `[rank, inputs]`
    pub(crate) a: &'a [f32],
    /// `[rank, outputs]`
    pub(crate) b: &'a [f32],
    pub(crate) rank: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) scaling: f32,
}

/// Some rows of a product.
pub(crate) struct Block<'a, T> {
    pub(crate) delta: Delta<'a>,
    /// The first row and those after it, each this far from the one before.
    pub(crate) x: &'a [T],
    pub(crate) stride: usize,
    /// `[rows, rank]`
    pub(crate) h: &'a mut [f32],
    /// `[rows, outputs]`
    pub(crate) y: &'a mut [MaybeUninit<T>],
    /// Whether results go past the cache.
    pub(crate) stream: bool,
}

impl<T: Element> Vectorised for Block<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { delta, x, stride, h, y, stream } = self;
        let Delta { a, rank, inputs, outputs, scaling, .. } = delta;
        let mut wide = vec![0f32; if T::as_f32(x).is_some() { 0 } else { ROWS * inputs }];
        let mut sums = vec![[0f32; LANES]; ROWS * rank];
        let count = h.len() / rank.max(1);
        for first in (0..count).step_by(ROWS) {
            let count = ROWS.min(count - first);
            let mut rows: [&[f32]; ROWS] = [&[]; ROWS];
            if let Some(x) = T::as_f32(x) {
                for (i, row) in rows[..count].iter_mut().enumerate() {
                    *row = &x[(first + i) * stride..][..inputs];
                }
            } else {
                for (i, to) in wide.chunks_exact_mut(inputs.max(1)).take(count).enumerate() {
                    let from = &x[(first + i) * stride..][..inputs];
                    map(
                        [from],
                        [],
                        Out::over(to),
                        #[inline(always)]
                        |[x]: [L; 1], []| x,
                    );
                }
                for (row, wide) in rows.iter_mut().zip(wide.chunks_exact(inputs.max(1))).take(count) {
                    *row = wide;
                }
            }
            sums.fill([0.0; LANES]);
            for start in (0..inputs).step_by(COLUMNS) {
                let columns = start..(start + COLUMNS).min(inputs);
                for i in (0..count).step_by(TALL) {
                    for k in (0..rank).step_by(WIDE) {
                        let x = |row: usize| &rows[i + row][columns.clone()];
                        let a = |rank: usize| &a[(k + rank) * inputs..][columns.clone()];
                        let sums = &mut sums[i * rank + k..];
                        match (count - i, rank - k) {
                            (1, 1) => tile::<L, 1, 1>([x(0)], [a(0)], sums, rank),
                            (2, 1) => tile::<L, 2, 1>([x(0), x(1)], [a(0)], sums, rank),
                            (_, 1) => tile::<L, 3, 1>([x(0), x(1), x(2)], [a(0)], sums, rank),
                            (1, _) => tile::<L, 1, 2>([x(0)], [a(0), a(1)], sums, rank),
                            (2, _) => tile::<L, 2, 2>([x(0), x(1)], [a(0), a(1)], sums, rank),
                            (..) => tile::<L, 3, 2>([x(0), x(1), x(2)], [a(0), a(1)], sums, rank),
                        }
                    }
                }
            }
            let h = &mut h[first * rank..(first + count) * rank];
            for (h, sums) in h.iter_mut().zip(&sums) {
                *h = scaling
                    * L::load(sums).join(
                        #[inline(always)]
                        |a, b| a + b,
                    );
            }
            let y = &mut y[first * outputs..(first + count) * outputs];
            for (h, y) in h.chunks(4 * rank.max(1)).zip(y.chunks_mut(4 * outputs.max(1))) {
                match h.len() / rank.max(1) {
                    1 => expand::<L, T, 1>(delta, h, y, stream),
                    2 => expand::<L, T, 2>(delta, h, y, stream),
                    3 => expand::<L, T, 3>(delta, h, y, stream),
                    _ => expand::<L, T, 4>(delta, h, y, stream),
                }
            }
        }
        if stream {
            L::fence();
        }
    }
}

/// `sums[i][k] += x[i]·a[k]`, lane by lane; a row of sums has `rank` of them.
#[inline(always)]
fn tile<L: Lanes, const M: usize, const K: usize>(
    x: [&[f32]; M],
    a: [&[f32]; K],
    sums: &mut [Piece<f32>],
    rank: usize,
) {
    let len = x[0].len();
    let mut totals = [[L::splat(0.0); K]; M];
    for (i, totals) in totals.iter_mut().enumerate() {
        for (k, total) in totals.iter_mut().enumerate() {
            *total = L::load(&sums[i * rank + k]);
        }
    }
    let mut x_pieces: [&[Piece<f32>]; M] = [&[]; M];
    let mut a_pieces: [&[Piece<f32>]; K] = [&[]; K];
    for i in 0..M {
        x_pieces[i] = &x[i].as_chunks().0[..len / LANES];
    }
    for k in 0..K {
        a_pieces[k] = &a[k].as_chunks().0[..len / LANES];
    }
    for p in 0..len / LANES {
        for i in 0..M {
            let x = L::load(&x_pieces[i][p]);
            for k in 0..K {
                totals[i][k] = x.mul_add(L::load(&a_pieces[k][p]), totals[i][k]);
            }
        }
    }
    let whole = len - len % LANES;
    if whole < len {
        for i in 0..M {
            let x: L = load_part(&x[i][whole..]);
            for k in 0..K {
                totals[i][k] = x.mul_add(load_part(&a[k][whole..]), totals[i][k]);
            }
        }
    }
    for (i, totals) in totals.iter().enumerate() {
        for (k, total) in totals.iter().enumerate() {
            total.store(as_room(&mut sums[i * rank + k]));
        }
    }
}

/// `y[i] = Σ_k h[i][k]·b[k]` for `M` rows.
#[inline(always)]
fn expand<L: Lanes, T: Element, const M: usize>(
    Delta { b, rank, outputs, .. }: Delta,
    h: &[f32],
    y: &mut [MaybeUninit<T>],
    stream: bool,
) {
    let mut rows = y.chunks_exact_mut(outputs);
    let mut out: [Option<Out<T>>; M] = std::array::from_fn(|_| rows.next().map(|row| Out::new(row, stream)));
    // A rank's factors side by side.
    let turned: Vec<[f32; M]> = (0..rank).map(|k| std::array::from_fn(|i| h[i * rank + k])).collect();
    let whole = outputs - outputs % LANES;
    for start in (0..outputs).step_by(LANES) {
        let mut totals = [L::splat(0.0); M];
        for (h, b) in turned.iter().zip(b.chunks_exact(outputs)) {
            let b = &b[start..];
            let b: L = match b.first_chunk() {
                Some(piece) => L::load(piece),
                None => load_part(b),
            };
            for (total, &h) in totals.iter_mut().zip(h) {
                *total = L::splat(h).mul_add(b, *total);
            }
        }
        for (out, total) in out.iter_mut().flatten().zip(totals) {
            if start < whole { out.piece(start, total) } else { out.rest(start, total) }
        }
    }
}
