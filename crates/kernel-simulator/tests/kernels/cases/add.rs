//! `y = a + b`.

use crate::case::{Case, Size};
use candlewick_kernels::add::Add;

pub fn cases(size: Size) -> Vec<Case> {
    vec![forward(size)]
}

pub fn forward(size: Size) -> Case {
    let (a, b) = (size.matrix(1, 8.0), size.matrix(2, 2.0));
    let op = Add { elements: size.elements(), storage: size.storage };
    let plan = op.forward(size.tuning).unwrap();
    Case::new("add", size, plan, &[&a.clone(), &b.clone()], move |arithmetic| {
        vec![a.values.iter().zip(&b.values).map(|(a, b)| arithmetic.round(a + b)).collect()]
    })
}
