//! Softmax of a row, and its gradient.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::marker::PhantomData;

use super::dispatch::{self, Vectorised};
use super::lanes::{Element, Lanes, NEAR};
use super::rows::{In, NONE, Out, Row, RowLoop, extremes, map, map_again, map_total, pass, sums};

/// How many entries of a row take part; the others are 0 in the results and are not read.
#[derive(Clone, Copy)]
pub(crate) struct Visible {
    /// Queries of a causal mask, one a row; 0 without one.
    pub(crate) queries: usize,
}

impl Visible {
    /// Query `i` of `q` sees the keys up to `i + (k − q)`, of `k`.
    #[inline(always)]
    fn of(self, row: usize, keys: usize) -> usize {
        if self.queries == 0 { keys } else { row % self.queries + 1 + keys - self.queries }
    }
}

/// `y = softmax(scale·x)`. A row with a NaN or `+inf`, or with nothing above `-inf`, is all NaN.
pub(crate) struct Forward {
    pub(crate) scale: f32,
    pub(crate) visible: Visible,
}

// SAFETY: `forward` writes what is visible, `fill` the rest.
unsafe impl RowLoop<1, 1, 0> for Forward {
    type Statistic = ();

    const SCRATCH: bool = true;
    const EXPONENTIALS: bool = true;

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 1, 1, 0>) {
        let ([x], [Some(y)]) = (row.inputs, row.outputs) else { return };
        let visible = self.visible.of(row.index, x.len());
        let (y, hidden) = y.split_at(visible);
        let scratch = &mut row.scratch[..visible];
        let factor = exponentials::<L, T>(self.scale, x.split_at(visible).0, scratch);
        map_again(
            scratch,
            y,
            #[inline(always)]
            |e: L| e * L::splat(factor),
        );
        hidden.fill(T::zero());
    }
}

/// Writes `exp(scale·x − max)`, as [`map_total`] does, and returns the reciprocal of the sum.
#[inline(always)]
fn exponentials<L: Lanes, T: Element>(scale: f32, x: In<'_, T>, out: &mut [f32]) -> f32 {
    let (greatest, near) = greatest::<L, T>(scale, &x);
    let (scale, greatest) = (L::splat(scale), L::splat(greatest));
    let total = if near {
        map_total(
            x,
            out,
            #[inline(always)]
            |x: L| T::exp_near(x * scale - greatest),
        )
    } else {
        map_total(
            x,
            out,
            #[inline(always)]
            |x: L| T::exp(x * scale - greatest),
        )
    };
    total.recip()
}

/// The greatest `scale·x`, and whether all are so near to it that [`Element::exp_near`] serves.
#[inline(always)]
fn greatest<L: Lanes, T: Element>(scale: f32, x: &[T]) -> (f32, bool) {
    let [mut least, mut greatest] = extremes::<L, T>(x).map(
        #[inline(always)]
        |x| x * scale,
    );
    if scale < 0.0 {
        (least, greatest) = (greatest, least);
    }
    (greatest, greatest - least <= NEAR)
}

/// `dx = scale·y·(g − Σ g·y)`.
pub(crate) struct Backward {
    pub(crate) scale: f32,
    pub(crate) visible: Visible,
}

// SAFETY: `gradient` writes what is visible, `fill` the rest.
unsafe impl RowLoop<2, 1, 0> for Backward {
    type Statistic = ();

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 2, 1, 0>) {
        let ([y, g], [Some(dx)]) = (row.inputs, row.outputs) else { return };
        let visible = self.visible.of(row.index, y.len());
        let (dx, hidden) = dx.split_at(visible);
        gradient::<L, T>(self.scale, y.split_at(visible).0, g.split_at(visible).0, dx);
        hidden.fill(T::zero());
    }
}

#[inline(always)]
fn gradient<L: Lanes, T: Element>(scale: f32, y: In<'_, T>, g: In<'_, T>, dx: Out<'_, T>) {
    let [dot] = sums::<4, L, T, 2, 0, 1>(
        [&*y, &*g],
        [],
        #[inline(always)]
        |[dot], [y, g]: [L; 2], []| [y.mul_add(g, dot)],
    );
    let (scale, dot) = (L::splat(scale), L::splat(dot));
    map(
        [y, g],
        [],
        dx,
        #[inline(always)]
        |[y, g]: [L; 2], []| scale * y * (g - dot),
    );
}

/// [`exponentials`] of one row of scores that are products of `T`, in place.
pub(crate) fn exponentials_in_place<T: Element>(scale: f32, scores: &mut [f32]) -> f32 {
    struct Work<'a, T>(f32, &'a mut [f32], PhantomData<T>);
    impl<T: Element> Vectorised for Work<'_, T> {
        type Output = f32;

        #[inline(always)]
        fn run<L: Lanes>(self) -> f32 {
            let Self(scale, row, _) = self;
            let (greatest, near) = greatest::<L, f32>(scale, row);
            let (scale, greatest) = (L::splat(scale), L::splat(greatest));
            if near {
                in_place(
                    row,
                    #[inline(always)]
                    |x: L| T::exp_near(x * scale - greatest),
                );
            } else {
                in_place(
                    row,
                    #[inline(always)]
                    |x: L| T::exp(x * scale - greatest),
                );
            }
            let [total] = sums::<4, L, f32, 1, 0, 1>(
                [&*row],
                [],
                #[inline(always)]
                |[total], [x]: [L; 1], []| [total + x],
            );
            total.recip()
        }
    }
    dispatch::vectorise(dispatch::isa(), Work::<T>(scale, scores, PhantomData))
}

#[inline(always)]
fn in_place<L: Lanes>(row: &mut [f32], f: impl Fn(L) -> L) {
    pass::<L, f32, f32, 0, 0, 0, 1>(
        NONE,
        [],
        [],
        [Some(row)],
        #[inline(always)]
        |[], [], [x]| ([], [f(x)]),
    );
}

/// Multiplies exponentials by `factor`, which makes them weights, and writes their gradient to that of the scores, in place:
/// [`Backward`] of one row without a mask.
pub(crate) fn backward_in_place(scale: f32, factor: f32, weights: &mut [f32], g: &mut [f32]) {
    struct Work<'a>([f32; 2], [&'a mut [f32]; 2]);
    impl Vectorised for Work<'_> {
        type Output = ();

        #[inline(always)]
        fn run<L: Lanes>(self) {
            let Self([scale, factor], [weights, g]) = self;
            let [dot] = sums::<4, L, f32, 2, 0, 1>(
                [&*weights, &*g],
                [],
                #[inline(always)]
                |[dot], [y, g]: [L; 2], []| [y.mul_add(g, dot)],
            );
            let (dot, scale, factor) = (L::splat(dot * factor), L::splat(scale), L::splat(factor));
            pass::<L, f32, f32, 0, 0, 0, 2>(
                NONE,
                [],
                [],
                [Some(weights), Some(g)],
                #[inline(always)]
                |[], [], [e, g]| {
                    let y = e * factor;
                    ([], [y, scale * y * (g - dot)])
                },
            );
        }
    }
    dispatch::vectorise(dispatch::isa(), Work([scale, factor], [weights, g]));
}
