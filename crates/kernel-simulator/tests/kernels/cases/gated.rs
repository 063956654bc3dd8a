//! `y = f(a) · u`, with `f(a) = a · σ(a)` in `silu_mul`, and `f(a) = a · σ(2z)`, `z = √(2/π) · (a + 0.044715·a³)`, in
//! `gelu_mul`.

use crate::case::{Case, Size, wanted_only};
use crate::oracle::Arithmetic;
use candlewick_kernels::gated::{Gate, GatedGradients, GatedMul};

/// 2 · √(2/π)
const TWO_ROOT: f64 = 2.0 * 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;

pub fn silu_cases(size: Size) -> Vec<Case> {
    cases(Gate::Silu, size)
}

pub fn gelu_cases(size: Size) -> Vec<Case> {
    cases(Gate::Gelu, size)
}

fn cases(f: Gate, size: Size) -> Vec<Case> {
    let mut cases = vec![forward(f, size), backward(f, size)];
    if size.columns == 257 {
        cases.extend(
            [(true, false), (false, true)]
                .map(|(gate, up)| backward_of(f, size, GatedGradients { gate, up })),
        );
    }
    cases
}

fn op(f: Gate, size: Size) -> GatedMul {
    GatedMul { f, elements: size.elements(), storage: size.storage }
}

pub fn forward(f: Gate, size: Size) -> Case {
    let (gate, up) = (size.matrix(1, 8.0), size.matrix(2, 2.0));
    let plan = op(f, size).forward(size.tuning).unwrap();
    Case::new(&format!("{} forward", f.op()), size, plan, &[&gate.clone(), &up.clone()], move |a| {
        let pairs = gate.values.iter().zip(&up.values);
        vec![pairs.map(|(&gate, up)| a.round(a.round(gate * share(f, a, gate)) * up)).collect()]
    })
}

pub fn backward(f: Gate, size: Size) -> Case {
    backward_of(f, size, GatedGradients { gate: true, up: true })
}

fn backward_of(f: Gate, size: Size, wanted: GatedGradients) -> Case {
    let (gate, up, grad) = (size.matrix(1, 8.0), size.matrix(2, 2.0), size.matrix(3, 1.0));
    let plan = op(f, size).backward(wanted, size.tuning).unwrap();
    let inputs = [&gate.clone(), &up.clone(), &grad.clone()];
    Case::new(&format!("{} backward", f.op()), size, plan, &inputs, move |a| {
        let (mut grad_gate, mut grad_up) = (Vec::new(), Vec::new());
        for ((&gate, up), grad) in gate.values.iter().zip(&up.values).zip(&grad.values) {
            let s = share(f, a, gate);
            let slope = match f {
                Gate::Silu => a.round(s * a.round(1.0 + a.round(gate * a.round(1.0 - s)))),
                Gate::Gelu => {
                    let inner = a.round(TWO_ROOT * a.round(1.0 + a.round(3.0 * CUBIC * gate * gate)));
                    let bend = a.round(a.round(gate * s) * a.round(1.0 - s));
                    a.round(s + a.round(bend * inner))
                }
            };
            grad_gate.push(a.round(a.round(grad * up) * slope));
            grad_up.push(a.round(grad * a.round(gate * s)));
        }
        wanted_only([(wanted.gate, grad_gate), (wanted.up, grad_up)])
    })
}

/// f(a) / a
fn share(f: Gate, a: Arithmetic, gate: f64) -> f64 {
    let exponent = match f {
        Gate::Silu => gate,
        Gate::Gelu => {
            let cubic = a.round(CUBIC * a.round(gate * a.round(gate * gate)));
            a.round(TWO_ROOT * a.round(gate + cubic))
        }
    };
    a.round(1.0 / a.round(1.0 + a.exp(-exponent)))
}
