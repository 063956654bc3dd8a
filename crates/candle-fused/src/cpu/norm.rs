//! RMS and layer normalisation of a row, and their gradients.

use super::lanes::{sum, wide_sum};

/// `1/√(mean(f(x)²) + eps)`, also where the squares overflow or vanish in f32: these rows are summed again in f64.
#[expect(clippy::cast_possible_truncation, reason = "the final rounding to f32")]
#[expect(clippy::cast_precision_loss, reason = "a row's length is far below 2^52")]
fn reciprocal_deviation(x: &[f32], mean: f32, eps: f32) -> f32 {
    /// Squares below this may have lost bits to subnormals.
    const LEAST: f32 = 1e-30;
    let squares = sum([x], |[x]| (x - mean) * (x - mean));
    let squares = if (LEAST..f32::INFINITY).contains(&squares) {
        f64::from(squares)
    } else {
        wide_sum(x, |x| (x - f64::from(mean)).powi(2))
    };
    (squares / x.len() as f64 + f64::from(eps)).sqrt().recip() as f32
}

/// `r = 1/√(mean(x²) + eps)`
pub(crate) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    reciprocal_deviation(x, 0.0, eps)
}

/// `y = x·r·w`
pub(crate) fn rms_forward(x: &[f32], weight: Option<&[f32]>, eps: f32, y: &mut [f32]) {
    affine(x, [0.0, inverse_rms(x, eps)], weight, None, y);
}

/// The mean and `r = 1/√(mean((x − mean)²) + eps)`.
#[expect(clippy::cast_possible_truncation, reason = "the final rounding to f32")]
#[expect(clippy::cast_precision_loss, reason = "a row's length is far below 2^52")]
pub(crate) fn moments(x: &[f32], eps: f32) -> [f32; 2] {
    let total = sum([x], |[x]| x);
    let total = if total.is_finite() { f64::from(total) } else { wide_sum(x, |x| x) };
    let mean = (total / x.len() as f64) as f32;
    [mean, reciprocal_deviation(x, mean, eps)]
}

/// `y = (x − mean)·r·w + b`
pub(crate) fn layer_forward(
    x: &[f32],
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    eps: f32,
    y: &mut [f32],
) {
    affine(x, moments(x, eps), weight, bias, y);
}

fn affine(x: &[f32], [mean, r]: [f32; 2], weight: Option<&[f32]>, bias: Option<&[f32]>, y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = (x - mean) * r;
    }
    if let Some(weight) = weight {
        for (y, &w) in y.iter_mut().zip(weight) {
            *y *= w;
        }
    }
    if let Some(bias) = bias {
        for (y, &b) in y.iter_mut().zip(bias) {
            *y += b;
        }
    }
}

/// `dx = r·(h − x̂·mean(h·x̂))` with `h = g·w`.
pub(crate) fn rms_backward(x: &[f32], r: f32, weight: Option<&[f32]>, g: &[f32], dx: &mut [f32]) {
    weigh(g, weight, dx);
    let along = mean([dx, x], |[h, x]| h * (x * r));
    for (h, &x) in dx.iter_mut().zip(x) {
        *h = r * (*h - x * r * along);
    }
}

/// `dx = r·(h − mean(h) − x̂·mean(h·x̂))` with `h = g·w`.
pub(crate) fn layer_backward(
    x: &[f32],
    [mu, r]: [f32; 2],
    weight: Option<&[f32]>,
    g: &[f32],
    dx: &mut [f32],
) {
    weigh(g, weight, dx);
    let shift = mean([dx], |[h]| h);
    let along = mean([dx, x], |[h, x]| h * ((x - mu) * r));
    for (h, &x) in dx.iter_mut().zip(x) {
        *h = r * (*h - shift - (x - mu) * r * along);
    }
}

/// `h = g·w`.
fn weigh(g: &[f32], weight: Option<&[f32]>, h: &mut [f32]) {
    match weight {
        None => h.copy_from_slice(g),
        Some(weight) => {
            for ((h, &g), &w) in h.iter_mut().zip(g).zip(weight) {
                *h = g * w;
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a row's length, to f32's precision")]
fn mean<const N: usize>(rows: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    sum(rows, f) / rows[0].len() as f32
}

/// `dw += g·x̂`.
pub(crate) fn weight_backward(x: &[f32], [mean, r]: [f32; 2], g: &[f32], dw: &mut [f32]) {
    for ((dw, &g), &x) in dw.iter_mut().zip(g).zip(x) {
        *dw += g * ((x - mean) * r);
    }
}

/// `db += g`.
pub(crate) fn bias_backward(g: &[f32], db: &mut [f32]) {
    for (db, &g) in db.iter_mut().zip(g) {
        *db += g;
    }
}
