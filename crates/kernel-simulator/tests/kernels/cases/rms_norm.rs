//! `y = x · r · w`, `r = 1 / √(mean(x²) + eps)`.

use crate::case::{Case, Size};
use crate::oracle::Arithmetic;
use candlewick_kernels::Storage;
use candlewick_kernels::rms_norm::{RmsNorm, RmsNormGradients};

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
    let mut cases = vec![forward(size), backward(size, true, true)];
    if size.columns == 33 {
        cases.extend([backward(size, true, false), backward(size, false, true)]);
    }
    if size.storage != Storage::F16 && [257, 8192].contains(&size.columns) {
        cases.extend([HUGE, TINY].map(|range| forward_over(size, range)));
        cases.extend([HUGE, TINY].map(|range| backward_over(size, range, true, true)));
    }
    cases
}

fn op(size: Size, range: Range) -> RmsNorm {
    let Size { storage, rows, columns, .. } = size;
    RmsNorm { rows, columns, storage, weight: true, eps: range.eps }
}

pub fn forward(size: Size) -> Case {
    forward_over(size, USUAL)
}

fn forward_over(size: Size, range: Range) -> Case {
    let (x, weight) = (size.matrix(1, range.magnitude), size.vector(2, 1.5));
    let plan = op(size, range).forward(size.tuning).unwrap();
    Case::new("rms_norm forward", size, plan, &[&x.clone(), &weight.clone()], move |a| {
        let row = |x: &[f64]| {
            let normal = normal(a, x, inverse_rms(a, x, range));
            a.multiply(&normal, &weight.values)
        };
        vec![x.values.chunks(size.columns).flat_map(row).collect()]
    })
}

pub fn backward(size: Size, input: bool, of_weight: bool) -> Case {
    backward_over(size, USUAL, input, of_weight)
}

fn backward_over(size: Size, range: Range, input: bool, of_weight: bool) -> Case {
    let (x, weight, grad) = (size.matrix(1, range.magnitude), size.vector(2, 1.5), size.matrix(3, 1.0));
    let wanted = RmsNormGradients { x: input, weight: of_weight };
    let plan = op(size, range).backward(wanted, size.tuning).unwrap();
    let inputs = [&x.clone(), &grad.clone(), &weight.clone()];
    Case::new("rms_norm backward", size, plan, &inputs, move |a| {
        let (mut grad_x, mut grad_weight) = (Vec::new(), vec![0.0; size.columns]);
        for (x, g) in x.values.chunks(size.columns).zip(grad.values.chunks(size.columns)) {
            let r = inverse_rms(a, x, range);
            let normal = normal(a, x, r);
            let weighted = a.multiply(g, &weight.values);
            let mean = a.mean(&a.multiply(&normal, &weighted));
            let through = |(g, n): (&f64, &f64)| a.round(r * a.round(g - a.round(n * mean)));
            grad_x.extend(weighted.iter().zip(&normal).map(through));
            a.add_row(&mut grad_weight, a.multiply(g, &normal));
        }
        let grads = [(input, grad_x), (of_weight, grad_weight)].into_iter();
        grads.filter_map(|(wanted, grad)| wanted.then_some(grad)).collect()
    })
}

fn inverse_rms(a: Arithmetic, x: &[f64], range: Range) -> f64 {
    a.inverse_root(a.mean(&a.multiply(x, x)), range.eps.into())
}

fn normal(a: Arithmetic, x: &[f64], r: f64) -> Vec<f64> {
    x.iter().map(|x| a.round(x * r)).collect()
}
