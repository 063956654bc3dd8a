//! `y = a · σ(2z) · u`, `z = √(2/π) · (a + 0.044715·a³)`.

use crate::case::{Case, Size, wanted_only};
use crate::oracle::Arithmetic;
use candlewick_kernels::gelu_mul::{GeluMul, GeluMulGradients};

/// 2 · √(2/π)
const TWO_ROOT: f64 = 2.0 * 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;

pub fn cases(size: Size) -> Vec<Case> {
    let mut cases = vec![forward(size), backward(size)];
    if size.columns == 257 {
        cases.extend(
            [(true, false), (false, true)].map(|(gate, up)| backward_of(size, GeluMulGradients { gate, up })),
        );
    }
    cases
}

fn op(size: Size) -> GeluMul {
    GeluMul { elements: size.elements(), storage: size.storage }
}

pub fn forward(size: Size) -> Case {
    let (gate, up) = (size.matrix(1, 8.0), size.matrix(2, 2.0));
    let plan = op(size).forward(size.tuning).unwrap();
    Case::new("gelu_mul forward", size, plan, &[&gate.clone(), &up.clone()], move |a| {
        let pairs = gate.values.iter().zip(&up.values);
        vec![pairs.map(|(&gate, up)| a.round(a.round(gate * share(a, gate)) * up)).collect()]
    })
}

pub fn backward(size: Size) -> Case {
    backward_of(size, GeluMulGradients { gate: true, up: true })
}

fn backward_of(size: Size, wanted: GeluMulGradients) -> Case {
    let (gate, up, grad) = (size.matrix(1, 8.0), size.matrix(2, 2.0), size.matrix(3, 1.0));
    let plan = op(size).backward(wanted, size.tuning).unwrap();
    let inputs = [&gate.clone(), &up.clone(), &grad.clone()];
    Case::new("gelu_mul backward", size, plan, &inputs, move |a| {
        let (mut grad_gate, mut grad_up) = (Vec::new(), Vec::new());
        for ((&gate, up), grad) in gate.values.iter().zip(&up.values).zip(&grad.values) {
            let s = share(a, gate);
            let inner = a.round(TWO_ROOT * a.round(1.0 + a.round(3.0 * CUBIC * gate * gate)));
            let bend = a.round(a.round(gate * s) * a.round(1.0 - s));
            let slope = a.round(s + a.round(bend * inner));
            grad_gate.push(a.round(a.round(grad * up) * slope));
            grad_up.push(a.round(grad * a.round(gate * s)));
        }
        wanted_only([(wanted.gate, grad_gate), (wanted.up, grad_up)])
    })
}

/// σ(2z)
fn share(a: Arithmetic, gate: f64) -> f64 {
    let cubic = a.round(CUBIC * a.round(gate * a.round(gate * gate)));
    let twice_z = a.round(TWO_ROOT * a.round(gate + cubic));
    a.round(1.0 / a.round(1.0 + a.exp(-twice_z)))
}
