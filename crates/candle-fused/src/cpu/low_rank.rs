//! `y = h·Bᵀ` with `h = s·x·Aᵀ`, for few ranks, and its gradients: all products for the same rows, one block after the
//! other.
//!
//! The rows of a block stay in the second-level cache between the products; each is read from memory once. Where rows
//! are multiplied with factors, the lanes run along both: a tile of some rows and some ranks has its sums in
//! registers. Where factors are added up, the lanes run along the row of the result, [`HIGH`] rows at once, which share
//! what is read of the factors. Both times some columns' factors are taken for all rows, from the first-level cache:
//! they lie in panels of [`LANES`] columns, rank by rank, because whole rows, a power of two apart, would evict each other.
//! Where rows are added up, the lanes run along them, for some ranks at once, which share what is read of the rows.
//! How many sums there are at a time, the number of registers decides ([`Lanes::REGISTERS`]): each waits for the one before.
//!
//! Results are stored by way of the cache, however large: stores past it keep the arithmetic beside them waiting.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::mem::MaybeUninit;
use std::ops::Range;

use super::dispatch::Vectorised;
use super::lanes::{Element, LANES, Lanes, Piece, Room, as_room};
use super::rows::{Out, load_part, map, store_part};

/// Rows of a block.
pub(crate) const ROWS: usize = 12;
/// Rows of a result whose sums are in registers at a time.
const HIGH: usize = 6;
/// Registers for which the larger tiles are.
const MANY: usize = 32;
/// Pieces of the factors that are taken for all rows: half of a first-level cache of 32 KiB.
const STRETCH: usize = 256;

/// The product's constants.
#[derive(Clone, Copy)]
pub(crate) struct Delta<'a> {
    /// `[rank, inputs]` in panels.
    pub(crate) a: &'a [Piece<f32>],
    /// `[rank, outputs]` in panels.
    pub(crate) b: &'a [Piece<f32>],
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

/// `h = scaling·x·Aᵀ` for some rows of a product.
pub(crate) struct Inner<'a, T> {
    pub(crate) delta: Delta<'a>,
    pub(crate) x: Rows<'a, T>,
    /// `[rows, rank]`
    pub(crate) h: &'a mut [f32],
}

impl<T: Element> Vectorised for Inner<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { delta: Delta { a, rank, inputs, scaling, .. }, x, h } = self;
        let mut room = x.room(inputs);
        let mut sums = vec![[0f32; LANES]; ROWS * rank];
        for (block, h) in h.chunks_mut(ROWS * rank).enumerate() {
            let count = h.len() / rank;
            let rows = x.wide::<L>([block * ROWS, count, inputs], &mut room);
            contract::<L>(&rows[..count], a, rank, scaling, &mut sums, h);
        }
    }
}

/// Some rows of a product.
pub(crate) struct Block<'a, T> {
    pub(crate) inner: Inner<'a, T>,
    /// `[rows, outputs]`
    pub(crate) y: &'a mut [MaybeUninit<T>],
}

impl<T: Element> Vectorised for Block<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { inner: Inner { delta, x, h }, y } = self;
        Inner { delta, x, h: &mut *h }.run::<L>();
        expand_all::<L, T>(h, delta.b, [delta.rank, delta.outputs], y);
    }
}

/// The gradients of some rows of a product: `e = s·g·B`, and of what is wanted `dx = e·A`, `dA = eᵀ·x`, `dBᵀ = hᵀ·g`.
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
    /// `[rank, inputs]`
    pub(crate) da: Option<&'a mut [MaybeUninit<f32>]>,
    /// `[rank, outputs]`
    pub(crate) db: Option<&'a mut [MaybeUninit<f32>]>,
}

impl<T: Element, U: Element> Vectorised for Backward<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { delta, x, gradient, h, e, dx, da, db } = self;
        let [mut da, mut db] = [da.map(zeros), db.map(zeros)];
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
        }
        if let Some(dx) = dx {
            expand_all::<L, T>(e, a, [rank, inputs], dx);
        }
    }
}

fn zeros(room: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    room.fill(MaybeUninit::new(0.0));
    // SAFETY: initialised.
    unsafe { room.assume_init_mut() }
}

/// `to[i][k] = scaling·rows[i]·factors[k]`. `sums` is room for as many pieces as `to` has elements.
#[inline(always)]
fn contract<L: Lanes>(
    rows: &[&[f32]],
    factors: &[Piece<f32>],
    rank: usize,
    scaling: f32,
    sums: &mut [Piece<f32>],
    to: &mut [f32],
) {
    let width = rows.first().map_or(0, |row| row.len());
    let sums = &mut sums[..rows.len() * rank];
    sums.fill([0.0; LANES]);
    let panels = (STRETCH / rank).max(1);
    for (stretch, factors) in factors.chunks(panels * rank).enumerate() {
        let start = stretch * panels * LANES;
        let columns = start..(start + panels * LANES).min(width);
        if L::REGISTERS >= MANY {
            tall_tiles::<L, 6, 4>(rows, columns, factors, rank, sums);
        } else {
            tall_tiles::<L, 3, 2>(rows, columns, factors, rank, sums);
        }
    }
    for (to, sums) in to.iter_mut().zip(sums.iter()) {
        *to = scaling * L::load(sums).sum();
    }
}

/// `sums[i][k] += rows[i]·factors[k]`, lane by lane, in tiles of `TALL` rows and `WIDE` ranks.
#[inline(always)]
fn tall_tiles<L: Lanes, const TALL: usize, const WIDE: usize>(
    rows: &[&[f32]],
    columns: Range<usize>,
    factors: &[Piece<f32>],
    rank: usize,
    sums: &mut [Piece<f32>],
) {
    let (tall, rest) = rows.as_chunks::<TALL>();
    let (tall_sums, rest_sums) = sums.split_at_mut(tall.len() * TALL * rank);
    for (rows, sums) in tall.iter().zip(tall_sums.chunks_exact_mut(TALL * rank)) {
        tiles::<L, TALL, WIDE>(rows, columns.clone(), factors, rank, sums);
    }
    for (&row, sums) in rest.iter().zip(rest_sums.chunks_exact_mut(rank)) {
        tiles::<L, 1, WIDE>(&[row], columns.clone(), factors, rank, sums);
    }
}

/// [`tall_tiles`] for `M` rows.
#[inline(always)]
fn tiles<L: Lanes, const M: usize, const WIDE: usize>(
    rows: &[&[f32]; M],
    columns: Range<usize>,
    factors: &[Piece<f32>],
    rank: usize,
    sums: &mut [Piece<f32>],
) {
    let mut pieces: [&[Piece<f32>]; M] = [&[]; M];
    let mut rest = [L::splat(0.0); M];
    for i in 0..M {
        let (whole, part) = rows[i][columns.clone()].as_chunks();
        (pieces[i], rest[i]) = (whole, load_part(part));
    }
    for k in (0..rank - rank % WIDE).step_by(WIDE) {
        tile::<L, M, WIDE>(pieces, rest, factors, [rank, k], sums);
    }
    for k in rank - rank % WIDE..rank {
        tile::<L, M, 1>(pieces, rest, factors, [rank, k], sums);
    }
}

/// [`tiles`] for `K` ranks from `k` on.
#[inline(always)]
fn tile<L: Lanes, const M: usize, const K: usize>(
    x: [&[Piece<f32>]; M],
    rest: [L; M],
    factors: &[Piece<f32>],
    [rank, k]: [usize; 2],
    sums: &mut [Piece<f32>],
) {
    let sums = &mut sums[k..];
    let mut totals = [[L::splat(0.0); K]; M];
    for (i, totals) in totals.iter_mut().enumerate() {
        for (k, total) in totals.iter_mut().enumerate() {
            *total = L::load(&sums[i * rank + k]);
        }
    }
    let whole = x[0].len();
    let x = x.map(
        #[inline(always)]
        |row| &row[..whole],
    );
    let mut panels = factors.chunks_exact(rank);
    for (p, panel) in panels.by_ref().take(whole).enumerate() {
        let factors = &panel[k..k + K];
        for i in 0..M {
            let x = L::load(&x[i][p]);
            for k in 0..K {
                totals[i][k] = x.mul_add(L::load(&factors[k]), totals[i][k]);
            }
        }
    }
    if let Some(factors) = panels.next().and_then(|panel| panel[k..].first_chunk::<K>()) {
        for i in 0..M {
            for k in 0..K {
                totals[i][k] = rest[i].mul_add(L::load(&factors[k]), totals[i][k]);
            }
        }
    }
    for (i, totals) in totals.iter().enumerate() {
        for (k, total) in totals.iter().enumerate() {
            total.store(as_room(&mut sums[i * rank + k]));
        }
    }
}

/// `y[i] = Σ_k h[i][k]·factors[k]` for `h [rows, rank]` and `y [rows, columns]`, in the order of the ranks.
#[inline(always)]
fn expand_all<L: Lanes, T: Element>(
    h: &[f32],
    factors: &[Piece<f32>],
    [rank, columns]: [usize; 2],
    y: &mut [MaybeUninit<T>],
) {
    // A rank's weights side by side.
    let mut weights = vec![[0f32; HIGH]; h.len().div_ceil(HIGH * rank) * rank];
    for (h, weights) in h.chunks(HIGH * rank).zip(weights.chunks_exact_mut(rank)) {
        for (i, h) in h.chunks_exact(rank).enumerate() {
            for (weights, &h) in weights.iter_mut().zip(h) {
                weights[i] = h;
            }
        }
    }
    let panels = (STRETCH / rank).max(1);
    for (stretch, factors) in factors.chunks(panels * rank).enumerate() {
        let from = stretch * panels * LANES;
        for (weights, y) in weights.chunks_exact(rank).zip(y.chunks_mut(HIGH * columns)) {
            if y.len() == HIGH * columns {
                expand::<L, T, HIGH>(weights, 0, factors, y, from);
            } else {
                for (i, y) in y.chunks_exact_mut(columns).enumerate() {
                    expand::<L, T, 1>(weights, i, factors, y, from);
                }
            }
        }
    }
}

/// [`expand_all`] for the `M` rows of `y`, whose weights begin with the `first`, and the columns of these factors, the first of
/// which is `from`.
#[inline(always)]
fn expand<L: Lanes, T: Element, const M: usize>(
    weights: &[[f32; HIGH]],
    first: usize,
    factors: &[Piece<f32>],
    y: &mut [MaybeUninit<T>],
    from: usize,
) {
    let rank = weights.len();
    let mut rows = y.chunks_exact_mut(y.len() / M);
    let mut pieces: [&mut [Room<T>]; M] = std::array::from_fn(|_| Default::default());
    let mut rests: [&mut [MaybeUninit<T>]; M] = std::array::from_fn(|_| Default::default());
    for (pieces, rest) in pieces.iter_mut().zip(&mut rests) {
        let row = &mut rows.next().unwrap_or_default()[from..];
        (*pieces, *rest) = row.as_chunks_mut();
    }
    let whole = pieces[0].len().min(factors.len() / rank);
    // Two pieces share a weight that is spread over the lanes.
    let pairs = if L::REGISTERS >= MANY { whole / 2 } else { 0 };
    for p in 0..pairs {
        let totals = weighted::<L, M, 2>(weights, first, &factors[2 * p * rank..]);
        for i in 0..M {
            for j in 0..2 {
                T::store(totals[i][j], &mut pieces[i][2 * p + j]);
            }
        }
    }
    for p in 2 * pairs..whole {
        let totals = weighted::<L, M, 1>(weights, first, &factors[p * rank..]);
        for i in 0..M {
            T::store(totals[i][0], &mut pieces[i][p]);
        }
    }
    if factors.len() / rank > whole {
        let totals = weighted::<L, M, 1>(weights, first, &factors[whole * rank..]);
        for i in 0..M {
            store_part(totals[i][0], rests[i]);
        }
    }
}

/// `Σ_k weights[k][first + i]·factors[j][k]` for `M` rows `i` and the first `P` panels `j`.
#[inline(always)]
fn weighted<L: Lanes, const M: usize, const P: usize>(
    weights: &[[f32; HIGH]],
    first: usize,
    factors: &[Piece<f32>],
) -> [[L; P]; M] {
    let rank = weights.len();
    let mut panels: [&[Piece<f32>]; P] = [&[]; P];
    for (j, panel) in panels.iter_mut().enumerate() {
        *panel = &factors[j * rank..][..rank];
    }
    let mut totals = [[L::splat(0.0); P]; M];
    for (k, weights) in weights.iter().enumerate() {
        let weights = &weights[first..][..M];
        let mut factors = [L::splat(0.0); P];
        for j in 0..P {
            factors[j] = L::load(&panels[j][k]);
        }
        for i in 0..M {
            let weight = L::splat(weights[i]);
            for j in 0..P {
                totals[i][j] = weight.mul_add(factors[j], totals[i][j]);
            }
        }
    }
    totals
}

/// `to[k] += Σ_i weights[i][k]·rows[i]` for `weights [rows, rank]` and `to [rank, columns]`, in the order of the rows.
#[inline(always)]
fn update_all<L: Lanes>(rows: &[&[f32]], weights: &[f32], [rank, columns]: [usize; 2], to: &mut [f32]) {
    if columns == 0 {
        return;
    }
    let (mut k, mut to) = (0, to);
    while k < rank {
        let ranks = match rank - k {
            8.. if L::REGISTERS >= MANY => 8,
            4.. => 4,
            _ => 1,
        };
        let ranks_to = to.split_off_mut(..ranks * columns).unwrap_or_default();
        match ranks {
            8 => update::<L, 8>(rows, &weights[k..], rank, ranks_to),
            4 => update::<L, 4>(rows, &weights[k..], rank, ranks_to),
            _ => update::<L, 1>(rows, &weights[k..], rank, ranks_to),
        }
        k += ranks;
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
    // Two pieces share a factor that is spread over the lanes.
    let pairs = if L::REGISTERS >= MANY { whole / 2 } else { 0 };
    for p in 0..pairs {
        update_pieces::<L, K, 2>(pieces, &factors, 2 * p, &mut to);
    }
    for p in 2 * pairs..whole {
        update_pieces::<L, K, 1>(pieces, &factors, p, &mut to);
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

/// [`update`] for `P` pieces from `p` on.
#[inline(always)]
fn update_pieces<L: Lanes, const K: usize, const P: usize>(
    rows: &[&[Piece<f32>]],
    factors: &[[f32; K]; ROWS],
    p: usize,
    to: &mut [&mut [f32]; K],
) {
    let mut totals = [[L::splat(0.0); P]; K];
    for (totals, to) in totals.iter_mut().zip(&*to) {
        for (total, to) in totals.iter_mut().zip(&to.as_chunks().0[p..]) {
            *total = L::load(to);
        }
    }
    for (row, factors) in rows.iter().zip(factors) {
        let mut x = [L::splat(0.0); P];
        for j in 0..P {
            x[j] = L::load(&row[p + j]);
        }
        for k in 0..K {
            let factor = L::splat(factors[k]);
            for j in 0..P {
                totals[k][j] = factor.mul_add(x[j], totals[k][j]);
            }
        }
    }
    for (totals, to) in totals.iter().zip(to) {
        for (total, to) in totals.iter().zip(&mut to.as_chunks_mut().0[p..]) {
            total.store(as_room(to));
        }
    }
}
