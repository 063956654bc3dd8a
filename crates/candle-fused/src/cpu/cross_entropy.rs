//! The log-sum-exp of a row, and the gradient of its cross-entropy.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use super::lanes::{Element, Lanes, NEAR};
use super::rows::{In, Out, Row, RowLoop, extremes, map, one, round, sums, wide};

/// A row longer than this is taken in parts, so that its maximum and the sum over it read the memory once.
const PART: usize = 4096;

/// A row's `log Σ_j exp(x_j) = max + ln(total)` as `[max, total]`, its least logit, and its loss.
pub(crate) type Loss = ([f32; 3], f32);

/// The column each row is to predict; `None` where the row does not count.
pub(crate) struct Forward<'a> {
    pub(crate) columns: &'a [Option<usize>],
}

// SAFETY: no outputs.
unsafe impl RowLoop<1, 0, 0> for Forward<'_> {
    type Statistic = Loss;

    const EXPONENTIALS: bool = true;

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 1, 0, 0>) -> Loss {
        let [x] = row.inputs;
        let Some(column) = self.columns[row.index] else { return Loss::default() };
        let [max, total, least] = log_sum_exp::<L, T>(x);
        ([max, total, least], total.ln() - (wide::<L, T>(x[column]) - max))
    }
}

#[inline(always)]
fn log_sum_exp<L: Lanes, T: Element>(x: In<'_, T>) -> [f32; 3] {
    let (mut least, mut greatest, mut total) = (f32::INFINITY, f32::NEG_INFINITY, 0f32);
    for part in x.parts(PART) {
        let before = greatest;
        let [low, high] = extremes::<L, T>(&part);
        least = if low < least { low } else { least };
        greatest = if high > before { high } else { before };
        // While nothing is above -inf, every exponential is 0, or NaN.
        let shift = if greatest == f32::NEG_INFINITY { 0.0 } else { greatest };
        let [sum] = if shift - low <= NEAR {
            sums::<1, L, T, 1, 0, 1>(
                [part],
                [],
                #[inline(always)]
                |[total], [x]: [L; 1], []| [total + T::exp_near(x - L::splat(shift))],
            )
        } else {
            sums::<1, L, T, 1, 0, 1>(
                [part],
                [],
                #[inline(always)]
                |[total], [x]: [L; 1], []| [total + T::exp(x - L::splat(shift))],
            )
        };
        total = total
            * one::<L>(
                before - shift,
                #[inline(always)]
                |x| T::exp(x),
            )
            + sum;
    }
    [greatest, total, least]
}

/// `dx_j = g·(exp(x_j − lse) − [j = target])`, and 0 where the row does not count.
pub(crate) struct Backward<'a> {
    pub(crate) columns: &'a [Option<usize>],
    /// Each row's `[max, total, least]`.
    pub(crate) lse: &'a [[f32; 3]],
    pub(crate) g: f32,
}

// SAFETY: `fill` or `map` write the whole row.
unsafe impl RowLoop<1, 1, 0> for Backward<'_> {
    type Statistic = ();

    const EXPONENTIALS: bool = true;

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 1, 1, 0>) {
        let ([x], [Some(mut dx)]) = (row.inputs, row.outputs) else { return };
        let Some(column) = self.columns[row.index] else { return dx.fill(T::zero()) };
        let [max, total, least] = self.lse[row.index];
        let factor = self.g / total;
        let here = if max - least <= NEAR {
            shares::<L, T>(
                x,
                dx.reborrow(),
                column,
                #[inline(always)]
                |x| T::exp_near(x - L::splat(max)) * L::splat(factor),
            )
        } else {
            shares::<L, T>(
                x,
                dx.reborrow(),
                column,
                #[inline(always)]
                |x| T::exp(x - L::splat(max)) * L::splat(factor),
            )
        };
        dx.set(column, round::<L, T>(here - self.g));
    }
}

/// Writes the share of each element, and returns that of one.
#[inline(always)]
fn shares<L: Lanes, T: Element>(x: In<'_, T>, dx: Out<'_, T>, column: usize, share: impl Fn(L) -> L) -> f32 {
    map(
        [x],
        [],
        dx,
        #[inline(always)]
        |[x]: [L; 1], []| share(x),
    );
    one::<L>(wide::<L, T>(x[column]), share)
}
