//! `y = x · r · w`, `r = 1 / √(mean(x²) + eps)`.

use crate::case::{Case, Size, wanted_only};
use crate::oracle::Arithmetic;
use candlewick_kernels::Storage;
use candlewick_kernels::rms_norm::{RmsNorm, RmsNormGradients};

/// What the values of x are like, whether there is a weight, and which gradients are wanted.
#[derive(Clone, Copy)]
pub struct Form {
    magnitude: f64,
    eps: f32,
    weight: bool,
    of_input: bool,
    of_weight: bool,
}

const USUAL: Form = Form { magnitude: 2.0, eps: 1e-5, weight: true, of_input: true, of_weight: true };
/// Values whose squares f32 cannot hold.
const HUGE: Form = Form { magnitude: 1e25, ..USUAL };
const TINY: Form = Form { magnitude: 1e-25, eps: 0.0, ..USUAL };

pub fn cases(size: Size) -> Vec<Case> {
    let mut forms = vec![USUAL];
    if size.storage != Storage::F16 && [257, 8192].contains(&size.columns) {
        forms.extend([HUGE, TINY]);
    }
    if size.columns == 33 {
        forms.push(Form { of_weight: false, ..USUAL });
        forms.push(Form { of_input: false, ..USUAL });
        forms.push(Form { weight: false, of_weight: false, ..USUAL });
    }
    forms.into_iter().flat_map(|form| [forward_of(size, form), backward_of(size, form)]).collect()
}

pub fn forward(size: Size) -> Case {
    forward_of(size, USUAL)
}

pub fn backward(size: Size) -> Case {
    backward_of(size, USUAL)
}

fn op(size: Size, form: Form) -> RmsNorm {
    let Size { storage, rows, columns, .. } = size;
    RmsNorm { rows, columns, storage, weight: form.weight, eps: form.eps }
}

fn forward_of(size: Size, form: Form) -> Case {
    let (x, weight) = (size.matrix(1, form.magnitude), size.vector(2, 1.5));
    let plan = op(size, form).forward(size.tuning).unwrap();
    let mut inputs = vec![x.clone()];
    inputs.extend(form.weight.then(|| weight.clone()));
    let inputs: Vec<_> = inputs.iter().collect();
    Case::new("rms_norm forward", size, plan, &inputs, move |a| {
        let row = |x: &[f64]| {
            let normal = normal(a, x, inverse_rms(a, x, form));
            if form.weight { a.multiply(&normal, &weight.values) } else { normal }
        };
        vec![x.values.chunks(size.columns).flat_map(row).collect()]
    })
}

fn backward_of(size: Size, form: Form) -> Case {
    let (x, weight, grad) = (size.matrix(1, form.magnitude), size.vector(2, 1.5), size.matrix(3, 1.0));
    let wanted = RmsNormGradients { x: form.of_input, weight: form.of_weight };
    let plan = op(size, form).backward(wanted, size.tuning).unwrap();
    let mut inputs = vec![x.clone(), grad.clone()];
    inputs.extend(form.weight.then(|| weight.clone()));
    let inputs: Vec<_> = inputs.iter().collect();
    Case::new("rms_norm backward", size, plan, &inputs, move |a| {
        let (mut grad_x, mut grad_weight) = (Vec::new(), vec![0.0; size.columns]);
        for (x, g) in x.values.chunks(size.columns).zip(grad.values.chunks(size.columns)) {
            let r = inverse_rms(a, x, form);
            let normal = normal(a, x, r);
            let weighted = if form.weight { a.multiply(g, &weight.values) } else { g.to_vec() };
            let mean = a.mean(&a.multiply(&normal, &weighted));
            let through = |(g, n): (&f64, &f64)| a.round(r * a.round(g - a.round(n * mean)));
            grad_x.extend(weighted.iter().zip(&normal).map(through));
            a.add_row(&mut grad_weight, a.multiply(g, &normal));
        }
        wanted_only([(form.of_input, grad_x), (form.of_weight, grad_weight)])
    })
}

fn inverse_rms(a: Arithmetic, x: &[f64], form: Form) -> f64 {
    a.inverse_root(a.mean(&a.multiply(x, x)), form.eps.into())
}

fn normal(a: Arithmetic, x: &[f64], r: f64) -> Vec<f64> {
    x.iter().map(|x| a.round(x * r)).collect()
}
