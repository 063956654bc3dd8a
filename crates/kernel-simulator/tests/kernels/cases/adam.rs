//! A step of Adam, with every constant at work.

use crate::case::{Case, Size};
use candlewick_kernels::Storage;
use candlewick_kernels::adam::Adam;

/// In f32 alone.
pub fn cases(size: Size) -> Vec<Case> {
    if size.storage == Storage::F32 { vec![step(size)] } else { Vec::new() }
}

pub fn step(size: Size) -> Case {
    let op = Adam {
        elements: size.elements(),
        new1: 0.1,
        old2: 0.9,
        new2: 0.1,
        eps: 1e-3,
        rate: 0.02,
        part: 3.0,
        shrink: 0.99,
        l2: 0.05,
    };
    let [first, gradient, value] = [1, 2, 3].map(|seed| size.matrix(seed, 1.0));
    let squares = size.matrix(4, 1.0);
    let second = crate::data::Tensor::new(squares.values.iter().map(|x| x * x), size.storage.element());
    let inputs = [&first.clone(), &second.clone(), &gradient.clone(), &value.clone()];
    Case::new("adam", size, op.step(size.tuning).unwrap(), &inputs, move |a| {
        let [new1, old2, new2, eps, rate, part, shrink, l2] =
            [op.new1, op.old2, op.new2, op.eps, op.rate, op.part, op.shrink, op.l2].map(f64::from);
        let mut next = [const { Vec::new() }; 3];
        for i in 0..op.elements {
            let (m, v, x) = (first.values[i], second.values[i], value.values[i]);
            let g = a.round(gradient.values[i] + a.round(x * l2));
            let m = a.round(m + a.round(a.round(g - m) * new1));
            let v = a.round(a.round(v * old2) + a.round(a.round(g * g) * new2));
            let change = a.round(m / a.round(a.round(a.round(v.sqrt()) * part) + eps));
            next[0].push(a.round(a.round(x * shrink) - a.round(change * rate)));
            next[1].push(m);
            next[2].push(v);
        }
        next.to_vec()
    })
}
