//! `silu(gate)·up` of a row, and its gradients.

use super::lanes::exp;

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}

/// `y = gate·σ(gate)·up`.
pub(crate) fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, &z), &up) in y.iter_mut().zip(gate).zip(up) {
        *y = z * sigmoid(z) * up;
    }
}

/// `d_gate = g·up·σ·(1 + gate·(1 − σ))`.
pub(crate) fn backward_gate(gate: &[f32], up: &[f32], g: &[f32], d_gate: &mut [f32]) {
    for (((d, &z), &up), &g) in d_gate.iter_mut().zip(gate).zip(up).zip(g) {
        let s = sigmoid(z);
        *d = g * up * (s * (1.0 + z * (1.0 - s)));
    }
}

/// `d_up = g·gate·σ`.
pub(crate) fn backward_up(gate: &[f32], g: &[f32], d_up: &mut [f32]) {
    for ((d, &z), &g) in d_up.iter_mut().zip(gate).zip(g) {
        *d = g * (z * sigmoid(z));
    }
}
