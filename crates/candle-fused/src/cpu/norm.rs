//! RMS and layer normalisation of a row, and their gradients.
//!
//! A row is read from memory once: the sums over it come first, and find it in the cache the next time.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use super::lanes::{Element, Lanes};
use super::rows::{Row, RowLoop, map, pass, sums, wide_sum};

/// Squares below this may have lost bits to subnormals.
const LEAST: f32 = 1e-30;

/// The mean where rows are centred, else 0, and `r = 1/√(mean((x − mean)²) + eps)`.
type Moments = [f32; 2];

/// The mean and `Σ (x − mean)²` of a row, from `Σ x` and `Σ x²`: where these have digits enough, which they lack if the mean is
/// far from zero, and have neither overflowed nor vanished.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the final rounding to f32")]
#[expect(clippy::cast_precision_loss, reason = "a row's length is far below 2^52")]
fn centre<T: Element>(total: f32, squares: f32, len: usize) -> Option<(f32, f64)> {
    // How many variances the squared mean may be: a float has digits to lose where 16 bits are stored.
    let most = if size_of::<T>() == size_of::<f32>() { 0.5 } else { 8.0 };
    let mean = f64::from(total) / len as f64;
    let part = mean * f64::from(total);
    let rest = f64::from(squares) - part;
    let is_good = (LEAST..f32::INFINITY).contains(&squares) && total.is_finite() && part <= most * rest;
    is_good.then_some((mean as f32, rest))
}

/// `Σ (x − mean)²`, also where the squares overflow or vanish in f32: these rows are summed again in f64.
#[inline(always)]
fn or_wide<T: Element>(squares: f32, x: &[T], mean: f32) -> f64 {
    if (LEAST..f32::INFINITY).contains(&squares) {
        f64::from(squares)
    } else {
        wide_sum(x, |x| (x - f64::from(mean)).powi(2))
    }
}

/// Whether products of this sum have neither overflowed nor all vanished. (Those of a sum that is small by chance are found
/// wanting, too.)
#[inline(always)]
fn is_good(sum: f32) -> bool {
    (LEAST..f32::INFINITY).contains(&sum.abs())
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the final rounding to f32")]
#[expect(clippy::cast_precision_loss, reason = "a row's length is far below 2^52")]
fn reciprocal_deviation(squares: f64, len: usize, eps: f32) -> f32 {
    (squares / len as f64 + f64::from(eps)).sqrt().recip() as f32
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the final rounding to f32")]
#[expect(clippy::cast_precision_loss, reason = "a row's length is far below 2^52")]
fn mean<L: Lanes, T: Element>(x: &[T]) -> f32 {
    let [total] = sums::<4, L, T, 1, 0, 1>(
        [x],
        [],
        #[inline(always)]
        |[total], [x]: [L; 1], []| [total + x],
    );
    let total = if total.is_finite() { f64::from(total) } else { wide_sum(x, |x| x) };
    (total / x.len() as f64) as f32
}

/// `Σ (x − mean)²`
#[inline(always)]
fn squares<L: Lanes, T: Element>(x: &[T], mean: f32) -> f64 {
    let [squares] = sums::<4, L, T, 1, 0, 1>(
        [x],
        [],
        #[inline(always)]
        |[squares], [x]: [L; 1], []| {
            let x = x - L::splat(mean);
            [x.mul_add(x, squares)]
        },
    );
    or_wide(squares, x, mean)
}

/// The mean, and [`squares`].
#[inline(always)]
fn centred<L: Lanes, T: Element>(x: &[T]) -> (f32, f64) {
    let [total, all] = sums::<2, L, T, 1, 0, 2>(
        [x],
        [],
        #[inline(always)]
        |[total, squares], [x]: [L; 1], []| [total + x, x.mul_add(x, squares)],
    );
    if let Some(found) = centre::<T>(total, all, x.len()) {
        return found;
    }
    let mean = mean::<L, T>(x);
    (mean, squares::<L, T>(x, mean))
}

#[inline(always)]
#[expect(clippy::cast_precision_loss, reason = "a row's length, to f32's precision")]
fn per_element(sum: f32, len: usize) -> f32 {
    sum / len as f32
}

/// `y = (x − mean)·r·w + b`, with the mean of the row where it is `centred`, else 0.
pub(crate) struct Forward<'a> {
    pub(crate) centred: bool,
    pub(crate) eps: f32,
    pub(crate) weight: Option<&'a [f32]>,
    pub(crate) bias: Option<&'a [f32]>,
}

// SAFETY: `map` writes the whole row.
unsafe impl RowLoop<1, 1, 0> for Forward<'_> {
    type Statistic = ();

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 1, 1, 0>) {
        let ([x], [Some(y)]) = (row.inputs, row.outputs) else { return };
        let (mean, squares) =
            if self.centred { centred::<L, T>(&x) } else { (0.0, squares::<L, T>(&x, 0.0)) };
        let r = reciprocal_deviation(squares, x.len(), self.eps);
        let (mean, r) = (L::splat(mean), L::splat(r));
        match (self.weight, self.bias) {
            (None, None) => map(
                [x],
                [],
                y,
                #[inline(always)]
                |[x]: [L; 1], []| (x - mean) * r,
            ),
            (Some(w), None) => map(
                [x],
                [w],
                y,
                #[inline(always)]
                |[x]: [L; 1], [w]| (x - mean) * r * w,
            ),
            (None, Some(b)) => map(
                [x],
                [b],
                y,
                #[inline(always)]
                |[x]: [L; 1], [b]| (x - mean).mul_add(r, b),
            ),
            (Some(w), Some(b)) => {
                map(
                    [x],
                    [w, b],
                    y,
                    #[inline(always)]
                    |[x]: [L; 1], [w, b]| ((x - mean) * r).mul_add(w, b),
                );
            }
        }
    }
}

/// With `x̂ = (x − mean)·r` and `h = g·w`: `dx = r·(h − mean(h) − x̂·mean(h·x̂))`, where `mean(h)` is the centred row's
/// alone; sums over the rows `dw += g·x̂` and `db += g`.
pub(crate) struct Backward<'a> {
    pub(crate) centred: bool,
    pub(crate) eps: f32,
    pub(crate) weight: Option<&'a [f32]>,
}

// SAFETY: `pass` writes the whole row.
unsafe impl RowLoop<2, 1, 2> for Backward<'_> {
    type Statistic = ();

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 2, 1, 2>) {
        match self.weight {
            None => self.gradients(
                row,
                [],
                #[inline(always)]
                |g: L, []| g,
            ),
            Some(weight) => self.gradients(
                row,
                [weight],
                #[inline(always)]
                |g: L, [w]| g * w,
            ),
        }
    }
}

impl Backward<'_> {
    #[inline(always)]
    fn gradients<L: Lanes, T: Element, const K: usize>(
        &self,
        row: Row<'_, T, 2, 1, 2>,
        weight: [&[f32]; K],
        h: impl Fn(L, [L; K]) -> L,
    ) {
        let [x, g] = row.inputs;
        let ([mean, r], shift, along) = self.sums(&x, &g, weight, &h);
        let (mean, r, shift, along) = (L::splat(mean), L::splat(r), L::splat(shift), L::splat(-along));
        pass(
            [x, g],
            weight,
            row.outputs,
            row.sums,
            #[inline(always)]
            |[x, g]: [L; 2], w, [dw, db]: [L; 2]| {
                let unit = (x - mean) * r;
                // The difference first: it may be all, or nothing.
                let dx = unit.mul_add(along, h(g, w) - shift) * r;
                ([dx], [g.mul_add(unit, dw), db + g])
            },
        );
    }

    /// [`Self::sums`] of a centred row in one pass, where that loses no digits: see [`centre`].
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the final rounding to f32")]
    fn sums_around_zero<L: Lanes, T: Element, const K: usize>(
        &self,
        x: &[T],
        g: &[T],
        weight: [&[f32]; K],
        h: &impl Fn(L, [L; K]) -> L,
    ) -> Option<(Moments, f32, f32)> {
        let len = x.len();
        let [sum, squares, total, along] = sums::<2, L, T, 2, K, 4>(
            [x, g],
            weight,
            #[inline(always)]
            |[sum, squares, total, along], [x, g]: [L; 2], w| {
                let h = h(g, w);
                [sum + x, x.mul_add(x, squares), total + h, h.mul_add(x, along)]
            },
        );
        let (mean, squares) = centre::<T>(sum, squares, len)?;
        if !is_good(along) || !total.is_finite() {
            return None;
        }
        let r = reciprocal_deviation(squares, len, self.eps);
        let along = ((f64::from(along) - f64::from(mean) * f64::from(total)) * f64::from(r)) as f32;
        Some(([mean, r], per_element(total, len), per_element(along, len)))
    }

    /// The moments, `mean(h)` and `mean(h·x̂)`.
    #[inline(always)]
    fn sums<L: Lanes, T: Element, const K: usize>(
        &self,
        x: &[T],
        g: &[T],
        weight: [&[f32]; K],
        h: &impl Fn(L, [L; K]) -> L,
    ) -> (Moments, f32, f32) {
        let len = x.len();
        if self.centred
            && let Some(found) = self.sums_around_zero::<L, T, K>(x, g, weight, h)
        {
            return found;
        }
        let (mean, [squares, total, along]) = if self.centred {
            let mean = mean::<L, T>(x);
            let sums = sums::<2, L, T, 2, K, 3>(
                [x, g],
                weight,
                #[inline(always)]
                |[squares, total, along], [x, g]: [L; 2], w| {
                    let (x, h) = (x - L::splat(mean), h(g, w));
                    [x.mul_add(x, squares), total + h, h.mul_add(x, along)]
                },
            );
            (mean, sums)
        } else {
            let [squares, along] = sums::<2, L, T, 2, K, 2>(
                [x, g],
                weight,
                #[inline(always)]
                |[squares, along], [x, g]: [L; 2], w| [x.mul_add(x, squares), h(g, w).mul_add(x, along)],
            );
            (0.0, [squares, 0.0, along])
        };
        let r = reciprocal_deviation(or_wide(squares, x, mean), len, self.eps);
        let along = if is_good(along) {
            along * r
        } else {
            // The products may have overflowed or vanished; of the unit row they do not.
            let [along] = sums::<2, L, T, 2, K, 1>(
                [x, g],
                weight,
                #[inline(always)]
                |[along], [x, g]: [L; 2], w| [h(g, w).mul_add((x - L::splat(mean)) * L::splat(r), along)],
            );
            along
        };
        ([mean, r], per_element(total, len), per_element(along, len))
    }
}
