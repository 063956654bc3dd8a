//! The log-sum-exp of a row, and the gradient of its cross-entropy.

use super::lanes::{exp, max, sum};

/// `log Σ_j exp(x_j) = max + ln(total)`, as `[max, total]`.
pub(crate) fn log_sum_exp(x: &[f32]) -> [f32; 2] {
    let max = max(x, |x| x);
    [max, sum([x], |[x]| exp(x - max))]
}

/// `lse − x`: the cross-entropy of a row whose target's logit is `x`.
pub(crate) fn loss([max, total]: [f32; 2], x: f32) -> f32 {
    total.ln() - (x - max)
}

/// `dx_j = g·(exp(x_j − lse) − [j = target])`.
pub(crate) fn backward(x: &[f32], [max, total]: [f32; 2], target: usize, g: f32, dx: &mut [f32]) {
    let factor = g / total;
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = exp(x - max) * factor;
    }
    if let Some(dx) = dx.get_mut(target) {
        *dx -= g;
    }
}
