//! `y = h·Bᵀ` with `h = s·x·Aᵀ`, for few ranks, and its gradients: all products for the same rows, one block after the
//! other.
//!
//! The rows of a block stay in the second-level cache between the products; each is read from memory once. Where rows
//! are multiplied with factors, the lanes run along both: a tile of [`TALL`] rows and [`WIDE`] ranks has its sums in
//! registers, and both sides come from the first-level cache, because columns are taken [`COLUMNS`] at a time. Where
//! factors are added up, the lanes run along the row of the result, [`TALL`] + 1 rows at once, which share what is read
//! of the factors. Where rows are, the lanes run along them, for [`RANKS`] ranks at once, which share what is read of the
//! rows.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::mem::MaybeUninit;

use super::dispatch::Vectorised;
use super::lanes::{Element, LANES, Lanes, Piece, as_room};
use super::rows::{Out, load_part, map};

/// Rows of a block.
pub(crate) const ROWS: usize = 12;
const TALL: usize = 3;
const WIDE: usize = 2;
/// Ranks whose sums are in registers at a time.
const RANKS: usize = 4;
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

/// Some rows of a matrix, and those after them.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    /// From the first row's first element on.
    pub(crate) data: &'a [T],
    /// From a row to the next.
    pub(crate) stride: usize,
}

/// The rows of a block in f32.
type Wide<'a> = [&'a [f32]; ROWS];

impl<'a, T: Element> Rows<'a, T> {
    /// From the row `first` on.
    pub(crate) fn after(self, first: usize) -> Self {
        Self { data: self.data.get(first * self.stride..).unwrap_or_default(), ..self }
    }

    /// Room for [`Self::wide`].
    #[inline(always)]
    fn room(self, columns: usize) -> Vec<f32> {
        vec![0f32; if T::as_f32(self.data).is_some() { 0 } else { ROWS * columns }]
    }

    /// The first `columns` elements of `count` rows from `first` on, widened into `room` where that is needed.
    #[inline(always)]
    fn wide<'b, L: Lanes>(self, [first, count, columns]: [usize; 3], room: &'b mut [f32]) -> Wide<'b>
    where
        'a: 'b,
    {
        let Self { data, stride } = self;
        let mut rows: Wide = [&[]; ROWS];
        if let Some(data) = T::as_f32(data) {
            for (i, row) in rows[..count].iter_mut().enumerate() {
                *row = &data[(first + i) * stride..][..columns];
            }
            return rows;
        }
        for (i, to) in room.chunks_exact_mut(columns.max(1)).take(count).enumerate() {
            map(
                [&data[(first + i) * stride..][..columns]],
                [],
                Out::over(to),
                #[inline(always)]
                |[x]: [L; 1], []| x,
            );
        }
        for (row, wide) in rows.iter_mut().zip(room.chunks_exact(columns.max(1))).take(count) {
            *row = wide;
        }
        rows
    }
}

/// Some rows of a product.
pub(crate) struct Block<'a, T> {
    pub(crate) delta: Delta<'a>,
    pub(crate) x: Rows<'a, T>,
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
        let Self { delta: Delta { a, b, rank, inputs, outputs, scaling }, x, h, y, stream } = self;
        let mut room = x.room(inputs);
        let mut sums = vec![[0f32; LANES]; ROWS * rank];
        let count = h.len() / rank.max(1);
        for first in (0..count).step_by(ROWS) {
            let count = ROWS.min(count - first);
            let rows = x.wide::<L>([first, count, inputs], &mut room);
            let h = &mut h[first * rank..(first + count) * rank];
            contract::<L>(&rows[..count], a, rank, scaling, &mut sums, h);
            expand_all::<L, T>(
                h,
                b,
                [rank, outputs],
                &mut y[first * outputs..(first + count) * outputs],
                stream,
            );
        }
        if stream {
            L::fence();
        }
    }
}

/// The gradients of some rows of a product: `e = s·g·B`, and of what is wanted `dx = e·A`, `dA += eᵀ·x`, `dBᵀ += hᵀ·g`.
pub(crate) struct Backward<'a, T, U> {
    pub(crate) delta: Delta<'a>,
    pub(crate) x: Rows<'a, U>,
    /// That of `y`.
    pub(crate) gradient: Rows<'a, T>,
    /// `[rows, rank]`
    pub(crate) h: &'a [f32],
    /// `[rows, rank]`
    pub(crate) e: &'a mut [f32],
    /// `[rows, inputs]`
    pub(crate) dx: Option<&'a mut [MaybeUninit<T>]>,
    /// `[rank, inputs]`, to be added to.
    pub(crate) da: Option<&'a mut [f32]>,
    /// `[rank, outputs]`, to be added to.
    pub(crate) db: Option<&'a mut [f32]>,
    /// Whether results go past the cache.
    pub(crate) stream: bool,
}

impl<T: Element, U: Element> Vectorised for Backward<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { delta, x, gradient, h, e, mut dx, mut da, mut db, stream } = self;
        let Delta { a, b, rank, inputs, outputs, scaling } = delta;
        let (mut x_room, mut room) = (x.room(inputs), gradient.room(outputs));
        let mut sums = vec![[0f32; LANES]; ROWS * rank];
        let count = e.len() / rank.max(1);
        for first in (0..count).step_by(ROWS) {
            let count = ROWS.min(count - first);
            let ranks = first * rank..(first + count) * rank;
            let rows = gradient.wide::<L>([first, count, outputs], &mut room);
            let e = &mut e[ranks.clone()];
            contract::<L>(&rows[..count], b, rank, scaling, &mut sums, e);
            if let Some(db) = &mut db {
                update_all::<L>(&rows[..count], &h[ranks], [rank, outputs], db);
            }
            if let Some(da) = &mut da {
                let rows = x.wide::<L>([first, count, inputs], &mut x_room);
                update_all::<L>(&rows[..count], e, [rank, inputs], da);
            }
            if let Some(dx) = &mut dx {
                let dx = &mut dx[first * inputs..(first + count) * inputs];
                expand_all::<L, T>(e, a, [rank, inputs], dx, stream);
            }
        }
        if stream {
            L::fence();
        }
    }
}

/// `to[i][k] = scaling·rows[i]·factors[k]` for `factors [rank, columns]`. `sums` is room for as many pieces as `to` has
/// elements.
#[inline(always)]
fn contract<L: Lanes>(
    rows: &[&[f32]],
    factors: &[f32],
    rank: usize,
    scaling: f32,
    sums: &mut [Piece<f32>],
    to: &mut [f32],
) {
    let (count, width) = (rows.len(), rows.first().map_or(0, |row| row.len()));
    sums.fill([0.0; LANES]);
    for start in (0..width).step_by(COLUMNS) {
        let columns = start..(start + COLUMNS).min(width);
        for i in (0..count).step_by(TALL) {
            for k in (0..rank).step_by(WIDE) {
                let x = |row: usize| &rows[i + row][columns.clone()];
                let a = |rank: usize| &factors[(k + rank) * width..][columns.clone()];
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
    for (to, sums) in to.iter_mut().zip(sums.iter()) {
        *to = scaling
            * L::load(sums).join(
                #[inline(always)]
                |a, b| a + b,
            );
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

/// `y[i] = Σ_k h[i][k]·factors[k]` for `h [rows, rank]` and `factors [rank, columns]`.
#[inline(always)]
fn expand_all<L: Lanes, T: Element>(
    h: &[f32],
    factors: &[f32],
    [rank, columns]: [usize; 2],
    y: &mut [MaybeUninit<T>],
    stream: bool,
) {
    for (h, y) in h.chunks(4 * rank.max(1)).zip(y.chunks_mut(4 * columns.max(1))) {
        match h.len() / rank.max(1) {
            1 => expand::<L, T, 1>(h, factors, [rank, columns], y, stream),
            2 => expand::<L, T, 2>(h, factors, [rank, columns], y, stream),
            3 => expand::<L, T, 3>(h, factors, [rank, columns], y, stream),
            _ => expand::<L, T, 4>(h, factors, [rank, columns], y, stream),
        }
    }
}

/// [`expand_all`] for `M` rows.
#[inline(always)]
fn expand<L: Lanes, T: Element, const M: usize>(
    h: &[f32],
    factors: &[f32],
    [rank, columns]: [usize; 2],
    y: &mut [MaybeUninit<T>],
    stream: bool,
) {
    let mut rows = y.chunks_exact_mut(columns);
    let mut out: [Option<Out<T>>; M] = std::array::from_fn(|_| rows.next().map(|row| Out::new(row, stream)));
    // A rank's factors side by side.
    let turned: Vec<[f32; M]> = (0..rank).map(|k| std::array::from_fn(|i| h[i * rank + k])).collect();
    let whole = columns - columns % LANES;
    for start in (0..columns).step_by(LANES) {
        let mut totals = [L::splat(0.0); M];
        for (h, b) in turned.iter().zip(factors.chunks_exact(columns)) {
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

/// `to[k] += Σ_i weights[i][k]·rows[i]` for `weights [rows, rank]` and `to [rank, columns]`, in the order of the rows.
#[inline(always)]
fn update_all<L: Lanes>(rows: &[&[f32]], weights: &[f32], [rank, columns]: [usize; 2], to: &mut [f32]) {
    if columns == 0 {
        return;
    }
    for (first, to) in to.chunks_mut(RANKS * columns).enumerate() {
        let weights = &weights[first * RANKS..];
        match to.len() / columns {
            1 => update::<L, 1>(rows, weights, rank, to),
            2 => update::<L, 2>(rows, weights, rank, to),
            3 => update::<L, 3>(rows, weights, rank, to),
            _ => update::<L, RANKS>(rows, weights, rank, to),
        }
    }
}

/// [`update_all`] for `K` ranks, the first of which has the first weight.
#[inline(always)]
fn update<L: Lanes, const K: usize>(rows: &[&[f32]], weights: &[f32], rank: usize, to: &mut [f32]) {
    let columns = to.len() / K;
    let mut to = to.chunks_exact_mut(columns);
    let mut to: [&mut [f32]; K] = std::array::from_fn(|_| to.next().unwrap_or_default());
    let mut factors = [[0f32; K]; ROWS];
    for (factors, weights) in factors.iter_mut().zip(weights.chunks(rank)).take(rows.len()) {
        factors.copy_from_slice(&weights[..K]);
    }
    let whole = columns / LANES;
    let mut pieces: [&[Piece<f32>]; ROWS] = [&[]; ROWS];
    for (pieces, row) in pieces.iter_mut().zip(rows) {
        *pieces = &row.as_chunks().0[..whole];
    }
    let pieces = &pieces[..rows.len()];
    for p in 0..whole {
        let mut totals = [L::splat(0.0); K];
        for (total, to) in totals.iter_mut().zip(&to) {
            *total = L::load(&to.as_chunks().0[p]);
        }
        for (pieces, factors) in pieces.iter().zip(&factors) {
            let row = L::load(&pieces[p]);
            for (total, &factor) in totals.iter_mut().zip(factors) {
                *total = L::splat(factor).mul_add(row, *total);
            }
        }
        for (total, to) in totals.into_iter().zip(&mut to) {
            total.store(as_room(&mut to.as_chunks_mut().0[p]));
        }
    }
    let rest = whole * LANES..columns;
    if !rest.is_empty() {
        for (k, to) in to.iter_mut().enumerate() {
            let mut total: L = load_part(&to[rest.clone()]);
            for (row, factors) in rows.iter().zip(&factors) {
                total = L::splat(factors[k]).mul_add(load_part(&row[rest.clone()]), total);
            }
            let (to, lanes) = (&mut to[rest.clone()], total.to_array());
            to.copy_from_slice(&lanes[..to.len()]);
        }
    }
}
