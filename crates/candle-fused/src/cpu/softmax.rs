//! Softmax of a row, and its gradient.

use super::lanes::{exp, map_sum, max, sum};

/// `y = softmax(scale·x)`. A row with a NaN or `+inf`, or with nothing above `-inf`, is all NaN.
pub(crate) fn forward(scale: f32, x: &[f32], y: &mut [f32]) {
    let m = max(x, |x| scale * x);
    let total = map_sum(x, y, |x| exp(scale * x - m));
    for y in y {
        *y /= total;
    }
}

/// `dx = scale·y·(g − Σ g·y)`.
pub(crate) fn backward(scale: f32, y: &[f32], g: &[f32], dx: &mut [f32]) {
    let dot = sum([g, y], |[g, y]| g * y);
    for ((dx, &y), &g) in dx.iter_mut().zip(y).zip(g) {
        *dx = scale * y * (g - dot);
    }
}
