//! `y = x̂ · w + b`, `x̂ = (x − mean) · r`, `r = 1 / √(variance + eps)`.

use crate::case::{Case, Size};
use crate::oracle::Arithmetic;
use candlewick_kernels::Storage;
use candlewick_kernels::layer_norm::{LayerNorm, LayerNormGradients};

/// What the values of x are like.
#[derive(Clone, Copy)]
pub struct Range {
    magnitude: f64,
    eps: f32,
}

const USUAL: Range = Range { magnitude: 2.0, eps: 1e-5 };
/// Values whose squares f32 cannot hold.
const HUGE: Range = Range { magnitude: 1e25, eps: 1e-5 };
const TINY: Range = Range { magnitude: 1e-25, eps: 0.0 };

pub fn cases(size: Size) -> Vec<Case> {
    let mut cases = vec![forward(size), backward(size)];
    if size.storage != Storage::F16 && [257, 8192].contains(&size.columns) {
        cases.extend([HUGE, TINY].map(|range| forward_over(size, range)));
        cases.extend([HUGE, TINY].map(|range| backward_over(size, range)));
    }
    cases
}

fn op(size: Size, range: Range) -> LayerNorm {
    let Size { storage, rows, columns, .. } = size;
    LayerNorm { rows, columns, storage, weight: true, bias: true, eps: range.eps }
}

pub fn forward(size: Size) -> Case {
    forward_over(size, USUAL)
}

fn forward_over(size: Size, range: Range) -> Case {
    let (x, weight, bias) = (size.matrix(1, range.magnitude), size.vector(2, 1.5), size.vector(3, 1.0));
    let plan = op(size, range).forward(size.tuning).unwrap();
    let inputs = [&x.clone(), &weight.clone(), &bias.clone()];
    Case::new("layer_norm forward", size, plan, &inputs, move |a| {
        let row = |x: &[f64]| {
            let (normal, _) = normalise(a, x, range);
            let scaled = a.multiply(&normal, &weight.values);
            scaled.iter().zip(&bias.values).map(|(y, b)| a.round(y + b)).collect::<Vec<_>>()
        };
        vec![x.values.chunks(size.columns).flat_map(row).collect()]
    })
}

pub fn backward(size: Size) -> Case {
    backward_over(size, USUAL)
}

fn backward_over(size: Size, range: Range) -> Case {
    let (x, weight, grad) = (size.matrix(1, range.magnitude), size.vector(2, 1.5), size.matrix(3, 1.0));
    let wanted = LayerNormGradients { x: true, weight: true, bias: true };
    let plan = op(size, range).backward(wanted, size.tuning).unwrap();
    let inputs = [&x.clone(), &grad.clone(), &weight.clone()];
    Case::new("layer_norm backward", size, plan, &inputs, move |a| {
        let mut grad_x = Vec::new();
        let (mut grad_weight, mut grad_bias) = (vec![0.0; size.columns], vec![0.0; size.columns]);
        for (x, g) in x.values.chunks(size.columns).zip(grad.values.chunks(size.columns)) {
            let (normal, r) = normalise(a, x, range);
            let weighted = a.multiply(g, &weight.values);
            let (mean, mean_dot) = (a.mean(&weighted), a.mean(&a.multiply(&weighted, &normal)));
            let through =
                |(g, n): (&f64, &f64)| a.round(r * a.round(a.round(g - mean) - a.round(n * mean_dot)));
            grad_x.extend(weighted.iter().zip(&normal).map(through));
            a.add_row(&mut grad_weight, a.multiply(g, &normal));
            a.add_row(&mut grad_bias, g.iter().copied());
        }
        vec![grad_x, grad_weight, grad_bias]
    })
}

/// x̂ and r of a row.
fn normalise(a: Arithmetic, x: &[f64], range: Range) -> (Vec<f64>, f64) {
    let mean = a.mean(x);
    let centred: Vec<_> = x.iter().map(|x| a.round(x - mean)).collect();
    let r = a.inverse_root(a.mean(&a.multiply(&centred, &centred)), range.eps.into());
    (centred.iter().map(|x| a.round(x * r)).collect(), r)
}
