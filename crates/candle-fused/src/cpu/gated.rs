//! `f(gate)·up` of a row, and its gradients. A gate is a function to `[f(z), f′(z)]`.

use super::lanes::exp;

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}

/// `z·σ(z)` and its slope `σ·(1 + z·(1 − σ))`.
#[inline]
pub(crate) fn silu(z: f32) -> [f32; 2] {
    let s = sigmoid(z);
    [z * s, s * (1.0 + z * (1.0 - s))]
}

/// `z·σ(2t)` and its slope `σ + z·σ·(1 − σ)·2t′`, with `t = √(2/π)·(z + 0.044715·z³)`.
#[inline]
pub(crate) fn gelu(z: f32) -> [f32; 2] {
    const TWO_ROOT_TWO_OVER_PI: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;
    /// Beyond, σ is 0 or 1 to the last bit, and a cube would overflow.
    const LIMIT: f32 = 16.0;
    let c = if z > LIMIT { LIMIT } else { z };
    let c = if c < -LIMIT { -LIMIT } else { c };
    let twice_t = TWO_ROOT_TWO_OVER_PI * (c + CUBIC * c * c * c);
    let slope = TWO_ROOT_TWO_OVER_PI * (1.0 + 3.0 * CUBIC * c * c);
    // σ·(1 − σ) from the smaller of the two: the greater has lost digits of 1 − σ.
    let e = exp(-twice_t.abs());
    let greater = 1.0 / (1.0 + e);
    let smaller = e * greater;
    let s = if twice_t < 0.0 { smaller } else { greater };
    [z * s, s + c * (smaller * greater) * slope]
}

/// `y = f(gate)·up`.
#[inline]
pub(crate) fn forward(f: impl Fn(f32) -> [f32; 2], gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, &z), &up) in y.iter_mut().zip(gate).zip(up) {
        *y = f(z)[0] * up;
    }
}

/// `d_gate = g·up·f′(gate)`.
#[inline]
pub(crate) fn backward_gate(
    f: impl Fn(f32) -> [f32; 2],
    gate: &[f32],
    up: &[f32],
    g: &[f32],
    d_gate: &mut [f32],
) {
    for (((d, &z), &up), &g) in d_gate.iter_mut().zip(gate).zip(up).zip(g) {
        *d = g * up * f(z)[1];
    }
}

/// `d_up = g·f(gate)`.
#[inline]
pub(crate) fn backward_up(f: impl Fn(f32) -> [f32; 2], gate: &[f32], g: &[f32], d_up: &mut [f32]) {
    for ((d, &z), &g) in d_up.iter_mut().zip(gate).zip(g) {
        *d = g * f(z)[0];
    }
}
