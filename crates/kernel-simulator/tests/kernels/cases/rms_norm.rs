//! `y = x · r · w`, `r = 1 / √(mean(x²) + eps)`.

use crate::case::{Case, Size};
use crate::oracle::Arithmetic;
use candlewick_kernels::rms_norm::{RmsNorm, RmsNormGradients};

const EPS: f32 = 1e-5;

pub fn cases(size: Size) -> Vec<Case> {
    let mut cases = vec![forward(size), backward(size, true, true)];
    if size.columns == 33 {
        cases.extend([backward(size, true, false), backward(size, false, true)]);
    }
    cases
}

fn op(size: Size) -> RmsNorm {
    RmsNorm { rows: size.rows, columns: size.columns, storage: size.storage, weight: true, eps: EPS }
}

pub fn forward(size: Size) -> Case {
    let (x, weight) = (size.matrix(1, 2.0), size.vector(2, 1.5));
    let plan = op(size).forward(size.tuning).unwrap();
    Case::new("rms_norm forward", size, plan, &[&x.clone(), &weight.clone()], move |a| {
        let row = |x: &[f64]| {
            let normal = normal(a, x, inverse_rms(a, x));
            a.multiply(&normal, &weight.values)
        };
        vec![x.values.chunks(size.columns).flat_map(row).collect()]
    })
}

pub fn backward(size: Size, input: bool, of_weight: bool) -> Case {
    let (x, weight, grad) = (size.matrix(1, 2.0), size.vector(2, 1.5), size.matrix(3, 1.0));
    let plan = op(size).backward(RmsNormGradients { x: input, weight: of_weight }, size.tuning).unwrap();
    let inputs = [&x.clone(), &grad.clone(), &weight.clone()];
    Case::new("rms_norm backward", size, plan, &inputs, move |a| {
        let (mut grad_x, mut grad_weight) = (Vec::new(), vec![0.0; size.columns]);
        for (x, g) in x.values.chunks(size.columns).zip(grad.values.chunks(size.columns)) {
            let r = inverse_rms(a, x);
            let normal = normal(a, x, r);
            let weighted = a.multiply(g, &weight.values);
            let mean = a.mean(&a.multiply(&normal, &weighted));
            let through = |(g, n): (&f64, &f64)| a.round(r * a.round(g - a.round(n * mean)));
            grad_x.extend(weighted.iter().zip(&normal).map(through));
            a.add_row(&mut grad_weight, a.multiply(g, &normal));
        }
        [(input, grad_x), (of_weight, grad_weight)]
            .into_iter()
            .filter_map(|(wanted, grad)| wanted.then_some(grad))
            .collect()
    })
}

fn inverse_rms(a: Arithmetic, x: &[f64]) -> f64 {
    a.inverse_root(a.mean(&a.multiply(x, x)), EPS.into())
}

fn normal(a: Arithmetic, x: &[f64], r: f64) -> Vec<f64> {
    x.iter().map(|x| a.round(x * r)).collect()
}
