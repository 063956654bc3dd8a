//! `y = exp(s·x − max) / Σ exp(s·x − max)` over the columns a row sees.

use crate::case::{Case, Size};
use crate::data::Tensor;
use candlewick_kernels::softmax::Softmax;

const SCALE: f32 = 0.75;

pub fn cases(size: Size) -> Vec<Case> {
    let mut cases = vec![forward(size, false), backward(size)];
    if size.columns >= size.rows {
        cases.push(forward(size, true));
    }
    cases
}

fn op(size: Size, causal: bool) -> Softmax {
    let Size { storage, rows, columns, .. } = size;
    Softmax { rows, columns, storage, scale: SCALE, causal_queries: causal.then_some(rows) }
}

pub fn forward(size: Size, causal: bool) -> Case {
    let x = size.matrix(1, 6.0);
    let plan = op(size, causal).forward(size.tuning).unwrap();
    let name = if causal { "causal softmax forward" } else { "softmax forward" };
    Case::new(name, size, plan, &[&x.clone()], move |a| {
        let row = |(row, x): (usize, &[f64])| {
            let visible = if causal { row + 1 + size.columns - size.rows } else { size.columns };
            let scores: Vec<_> = x[..visible].iter().map(|x| a.round(x * f64::from(SCALE))).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<_> = scores.iter().map(|score| a.exp(score - largest)).collect();
            let sum = a.sum(powers.iter().copied());
            let mut y: Vec<_> = powers.iter().map(|power| a.round(power / sum)).collect();
            y.resize(size.columns, 0.0);
            y
        };
        vec![x.values.chunks(size.columns).enumerate().flat_map(row).collect()]
    })
}

pub fn backward(size: Size) -> Case {
    let grad = size.matrix(2, 1.0);
    // Any probabilities will do: they need not come from a forward.
    let y = size.matrix(1, 2.0 / size.columns as f64);
    let y = Tensor::new(y.values.iter().map(|y| y.abs()), size.storage.element());
    let plan = op(size, false).backward(size.tuning).unwrap();
    Case::new("softmax backward", size, plan, &[&y.clone(), &grad.clone()], move |a| {
        let rows = y.values.chunks(size.columns).zip(grad.values.chunks(size.columns));
        let row = |(y, g): (&[f64], &[f64])| {
            let dot = a.dot(y, g);
            let through = |(y, g): (&f64, &f64)| a.round(a.round(y * a.round(g - dot)) * f64::from(SCALE));
            y.iter().zip(g).map(through).collect::<Vec<_>>()
        };
        vec![rows.flat_map(row).collect()]
    })
}
