//! Reductions and the exponential, in a form that vectorises.
//!
//! A float sum in order cannot be vectorised; one in sixteen interleaved parts can, and is more accurate too. The order
//! of additions depends on the length alone.

use std::array;

const LANES: usize = 16;

/// `Σ f(row[0][i], …)` over `N` rows of one length.
#[inline]
pub(super) fn sum<const N: usize>(rows: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    fold(rows, 0.0, |acc, x| acc + f(x), |a, b| a + b)
}

/// As [`sum`], in f64, for what overflows or vanishes in f32.
pub(super) fn wide_sum(row: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    row.iter().map(|&x| f(f64::from(x))).sum()
}

/// The greatest of `f(x)`; NaN is passed over, and `-inf` is what an empty row has.
#[inline]
pub(super) fn max(row: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    fold([row], f32::NEG_INFINITY, |acc, [x]| greater(acc, f(x)), greater)
}

/// Writes `f(x)` for each `x` and returns the sum of what was written.
#[inline]
pub(super) fn map_sum(row: &[f32], out: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    for (out, &x) in out.iter_mut().zip(row) {
        *out = f(x);
    }
    sum([out], |[x]| x)
}

#[inline]
fn fold<const N: usize>(
    rows: [&[f32]; N],
    start: f32,
    step: impl Fn(f32, [f32; N]) -> f32,
    join: impl Fn(f32, f32) -> f32,
) -> f32 {
    let pieces = rows.map(|row| row.as_chunks::<LANES>());
    let mut lanes = [start; LANES];
    for i in 0..pieces[0].0.len() {
        let piece = pieces.map(|(whole, _)| &whole[i]);
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane = step(*lane, piece.map(|piece| piece[l]));
        }
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(pieces[0].1.len()) {
        *lane = step(*lane, array::from_fn(|k| pieces[k].1[l]));
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = join(lanes[l], lanes[l + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x`, within 2 units in the last place, subnormal results included; NaN stays NaN.
///
/// `x = n·ln 2 + r` with `|r| <= ln 2 / 2`, and the polynomial of Cephes' `expf` (Moshier) for `e^r`; no branch and no
/// call, so that a loop of it vectorises.
#[inline]
#[expect(clippy::cast_possible_wrap, reason = "bit patterns")]
#[expect(clippy::cast_sign_loss, reason = "bit patterns")]
pub(super) fn exp(x: f32) -> f32 {
    /// Added to a small float, it rounds it to an integer and leaves that in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // Beyond these bounds the result is 0 or infinity anyway. Comparisons, unlike `clamp`, keep NaN.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first so short that its product with n is exact.
    let r = x - n * 0.693_359_375 + n * 2.121_944_4e-4;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let p = p * r * r + r + 1.0;
    // 2^n as two powers, neither of which leaves the range of exponents.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(n >> 1) * power(n.wrapping_sub(n >> 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut x = -104.5f32;
        while x < 89.5 {
            let expected = f64::from(x).exp();
            let got = f64::from(exp(x));
            if expected > f64::from(f32::MAX) {
                assert!(got.is_infinite() || expected < 3.402_823_6e38, "exp({x}) = {got}");
            } else {
                let ulp = f64::from((expected as f32).next_up()) - f64::from(expected as f32);
                assert!((got - expected).abs() <= 2.0 * ulp, "exp({x}) = {got}, expected {expected}");
            }
            x += 0.001_3;
        }
        assert!(exp(f32::NAN).is_nan());
        assert_eq!([exp(f32::NEG_INFINITY), exp(f32::INFINITY), exp(0.0)], [0.0, f32::INFINITY, 1.0]);
    }

    #[test]
    fn folds_take_every_element_once() {
        for n in [0usize, 1, 15, 16, 17, 31, 32, 33, 1000] {
            let row: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(sum([&row], |[x]| x), (0..n).sum::<usize>() as f32);
            assert_eq!(sum([&row, &row], |[x, y]| x - y), 0.0);
            assert_eq!(max(&row, |x| x), if n == 0 { f32::NEG_INFINITY } else { (n - 1) as f32 });
        }
    }
}
