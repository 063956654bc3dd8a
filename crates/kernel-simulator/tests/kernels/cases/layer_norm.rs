//! `y = x̂ · w + b`, `x̂ = (x − mean) · r`, `r = 1 / √(variance + eps)`.

use crate::case::{Case, Size};
use crate::oracle::Arithmetic;
use candlewick_kernels::layer_norm::{LayerNorm, LayerNormGradients};

const EPS: f32 = 1e-5;

pub fn cases(size: Size) -> Vec<Case> {
    vec![forward(size), backward(size)]
}

fn op(size: Size) -> LayerNorm {
    LayerNorm {
        rows: size.rows,
        columns: size.columns,
        storage: size.storage,
        weight: true,
        bias: true,
        eps: EPS,
    }
}

pub fn forward(size: Size) -> Case {
    let (x, weight, bias) = (size.matrix(1, 2.0), size.vector(2, 1.5), size.vector(3, 1.0));
    let plan = op(size).forward(size.tuning).unwrap();
    let inputs = [&x.clone(), &weight.clone(), &bias.clone()];
    Case::new("layer_norm forward", size, plan, &inputs, move |a| {
        let row = |x: &[f64]| {
            let (normal, _) = normalise(a, x);
            let scaled = a.multiply(&normal, &weight.values);
            scaled.iter().zip(&bias.values).map(|(y, b)| a.round(y + b)).collect::<Vec<_>>()
        };
        vec![x.values.chunks(size.columns).flat_map(row).collect()]
    })
}

pub fn backward(size: Size) -> Case {
    let (x, weight, grad) = (size.matrix(1, 2.0), size.vector(2, 1.5), size.matrix(3, 1.0));
    let wanted = LayerNormGradients { x: true, weight: true, bias: true };
    let plan = op(size).backward(wanted, size.tuning).unwrap();
    let inputs = [&x.clone(), &grad.clone(), &weight.clone()];
    Case::new("layer_norm backward", size, plan, &inputs, move |a| {
        let mut grad_x = Vec::new();
        let (mut grad_weight, mut grad_bias) = (vec![0.0; size.columns], vec![0.0; size.columns]);
        for (x, g) in x.values.chunks(size.columns).zip(grad.values.chunks(size.columns)) {
            let (normal, r) = normalise(a, x);
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
fn normalise(a: Arithmetic, x: &[f64]) -> (Vec<f64>, f64) {
    let mean = a.mean(x);
    let centred: Vec<_> = x.iter().map(|x| a.round(x - mean)).collect();
    let r = a.inverse_root(a.mean(&a.multiply(&centred, &centred)), EPS.into());
    (centred.iter().map(|x| a.round(x * r)).collect(), r)
}
