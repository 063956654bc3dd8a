//! `y = x̂ · w + b`, `x̂ = (x − mean) · r`, `r = 1 / √(variance + eps)`.

use crate::case::{Case, Size, wanted_only};
use crate::data::Tensor;
use crate::oracle::Arithmetic;
use candlewick_kernels::Storage;
use candlewick_kernels::layer_norm::{LayerNorm, LayerNormGradients};

/// What the values of x are like, and which tensors and gradients there are.
#[derive(Clone, Copy)]
pub struct Form {
    magnitude: f64,
    /// Added to the values of every second row.
    offset: f64,
    eps: f32,
    weight: bool,
    bias: bool,
    /// Whether backward gives x's gradient; the others it gives where the tensors are there.
    input: bool,
}

const USUAL: Form = Form { magnitude: 2.0, offset: 0.0, eps: 1e-5, weight: true, bias: true, input: true };
/// Values whose squares f32 cannot hold.
const HUGE: Form = Form { magnitude: 1e25, ..USUAL };
const TINY: Form = Form { magnitude: 1e-25, eps: 0.0, ..USUAL };
/// A mean of 0.65 deviations.
const ASIDE: Form = Form { offset: 0.75, ..USUAL };
/// Of 2.5: in f32 Σ x² alone has lost digits of the variance.
const FURTHER: Form = Form { offset: 2.9, ..USUAL };
/// Of 260: in 16 bits, too.
const FAR: Form = Form { offset: 300.0, ..USUAL };

pub fn cases(size: Size) -> Vec<Case> {
    let mut forms = vec![USUAL];
    if size.storage != Storage::F16 && [257, 8192].contains(&size.columns) {
        forms.extend([HUGE, TINY]);
    }
    if [257, 1000, 8192].contains(&size.columns) {
        forms.extend([ASIDE, FURTHER, FAR]);
    }
    if size.columns == 33 {
        forms.push(Form { input: false, ..USUAL });
        forms.push(Form { bias: false, ..USUAL });
        forms.push(Form { weight: false, bias: false, ..USUAL });
    }
    forms.into_iter().flat_map(|form| [forward_of(size, form), backward_of(size, form)]).collect()
}

pub fn forward(size: Size) -> Case {
    forward_of(size, USUAL)
}

pub fn backward(size: Size) -> Case {
    backward_of(size, USUAL)
}

fn op(size: Size, form: Form) -> LayerNorm {
    let Size { storage, rows, columns, .. } = size;
    LayerNorm { rows, columns, storage, weight: form.weight, bias: form.bias, eps: form.eps }
}

fn matrix(size: Size, form: Form) -> Tensor {
    let values = size.matrix(1, form.magnitude).values;
    let offset = |at: usize| if at / size.columns % 2 == 1 { form.offset } else { 0.0 };
    let values = values.into_iter().enumerate().map(|(at, value)| value + offset(at));
    Tensor::new(values, size.storage.element())
}

fn forward_of(size: Size, form: Form) -> Case {
    let (x, weight, bias) = (matrix(size, form), size.vector(2, 1.5), size.vector(3, 1.0));
    let plan = op(size, form).forward(size.tuning).unwrap();
    let mut inputs = vec![x.clone()];
    inputs.extend(form.weight.then(|| weight.clone()));
    inputs.extend(form.bias.then(|| bias.clone()));
    let inputs: Vec<_> = inputs.iter().collect();
    Case::new("layer_norm forward", size, plan, &inputs, move |a| {
        let row = |x: &[f64]| {
            let (mut y, _) = normalise(a, x, form);
            if form.weight {
                y = a.multiply(&y, &weight.values);
            }
            if form.bias {
                a.add_row(&mut y, bias.values.iter().copied());
            }
            y
        };
        vec![x.values.chunks(size.columns).flat_map(row).collect()]
    })
}

fn backward_of(size: Size, form: Form) -> Case {
    let (x, weight, grad) = (matrix(size, form), size.vector(2, 1.5), size.matrix(3, 1.0));
    let wanted = LayerNormGradients { x: form.input, weight: form.weight, bias: form.bias };
    let plan = op(size, form).backward(wanted, size.tuning).unwrap();
    let mut inputs = vec![x.clone(), grad.clone()];
    inputs.extend(form.weight.then(|| weight.clone()));
    let inputs: Vec<_> = inputs.iter().collect();
    Case::new("layer_norm backward", size, plan, &inputs, move |a| {
        let mut grad_x = Vec::new();
        let (mut grad_weight, mut grad_bias) = (vec![0.0; size.columns], vec![0.0; size.columns]);
        for (x, g) in x.values.chunks(size.columns).zip(grad.values.chunks(size.columns)) {
            let (normal, r) = normalise(a, x, form);
            let weighted = if form.weight { a.multiply(g, &weight.values) } else { g.to_vec() };
            let (mean, mean_dot) = (a.mean(&weighted), a.mean(&a.multiply(&weighted, &normal)));
            let through =
                |(g, n): (&f64, &f64)| a.round(r * a.round(a.round(g - mean) - a.round(n * mean_dot)));
            grad_x.extend(weighted.iter().zip(&normal).map(through));
            a.add_row(&mut grad_weight, a.multiply(g, &normal));
            a.add_row(&mut grad_bias, g.iter().copied());
        }
        wanted_only([(form.input, grad_x), (form.weight, grad_weight), (form.bias, grad_bias)])
    })
}

/// x̂ and r of a row.
fn normalise(a: Arithmetic, x: &[f64], form: Form) -> (Vec<f64>, f64) {
    let mean = a.mean(x);
    let centred: Vec<_> = x.iter().map(|x| a.round(x - mean)).collect();
    let r = a.inverse_root(a.mean(&a.multiply(&centred, &centred)), form.eps.into());
    (centred.iter().map(|x| a.round(x * r)).collect(), r)
}
