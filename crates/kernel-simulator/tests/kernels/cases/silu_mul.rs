//! `y = a · σ(a) · u`.

use crate::case::{Case, Size, wanted_only};
use crate::oracle::Arithmetic;
use candlewick_kernels::silu_mul::{SiluMul, SiluMulGradients};

pub fn cases(size: Size) -> Vec<Case> {
    let mut cases = vec![forward(size), backward(size)];
    if size.columns == 257 {
        cases.extend(
            [(true, false), (false, true)].map(|(gate, up)| backward_of(size, SiluMulGradients { gate, up })),
        );
    }
    cases
}

fn op(size: Size) -> SiluMul {
    SiluMul { elements: size.elements(), storage: size.storage }
}

pub fn forward(size: Size) -> Case {
    let (gate, up) = (size.matrix(1, 8.0), size.matrix(2, 2.0));
    let plan = op(size).forward(size.tuning).unwrap();
    Case::new("silu_mul forward", size, plan, &[&gate.clone(), &up.clone()], move |a| {
        let pairs = gate.values.iter().zip(&up.values);
        vec![pairs.map(|(&gate, up)| a.round(a.round(gate * sigmoid(a, gate)) * up)).collect()]
    })
}

pub fn backward(size: Size) -> Case {
    backward_of(size, SiluMulGradients { gate: true, up: true })
}

fn backward_of(size: Size, wanted: SiluMulGradients) -> Case {
    let (gate, up, grad) = (size.matrix(1, 8.0), size.matrix(2, 2.0), size.matrix(3, 1.0));
    let plan = op(size).backward(wanted, size.tuning).unwrap();
    let inputs = [&gate.clone(), &up.clone(), &grad.clone()];
    Case::new("silu_mul backward", size, plan, &inputs, move |a| {
        let (mut grad_gate, mut grad_up) = (Vec::new(), Vec::new());
        for ((&gate, up), grad) in gate.values.iter().zip(&up.values).zip(&grad.values) {
            let s = sigmoid(a, gate);
            let slope = a.round(s * a.round(1.0 + a.round(gate * a.round(1.0 - s))));
            grad_gate.push(a.round(a.round(grad * up) * slope));
            grad_up.push(a.round(grad * a.round(gate * s)));
        }
        wanted_only([(wanted.gate, grad_gate), (wanted.up, grad_up)])
    })
}

fn sigmoid(a: Arithmetic, v: f64) -> f64 {
    a.round(1.0 / a.round(1.0 + a.exp(-v)))
}
