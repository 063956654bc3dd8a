//! `loss = Σ (log Σ exp(x) − x[target]) / counted` over the rows that count.

use crate::case::{Case, Size};
use crate::data::Tensor;
use crate::oracle::Arithmetic;
use candlewick_kernels::cross_entropy::{CrossEntropy, NO_ROW};
use candlewick_kernels::{Element, Storage};

const IGNORED: i64 = -100;

pub fn cases(size: Size) -> Vec<Case> {
    let mut cases = vec![forward(size, Element::I64, false), backward(size, Element::I64)];
    if size.columns == 257 {
        cases.extend([forward(size, Element::U32, false), forward(size, Element::I64, true)]);
        cases.push(backward(size, Element::U32));
    }
    cases
}

fn op(size: Size, targets: Element) -> CrossEntropy {
    let Size { storage, rows, columns, .. } = size;
    // A class that is ignored suits targets without a sign.
    let ignored = if targets == Element::I64 { IGNORED } else { 0 };
    CrossEntropy { rows, columns, storage, targets, ignore_index: Some(ignored) }
}

/// A target for each row: the second is ignored, and the third is no class if `wrong`.
fn targets(size: Size, op: &CrossEntropy, wrong: bool) -> Tensor {
    let ignored = op.ignore_index.unwrap() as f64;
    let target = |row: usize| match row {
        1 => ignored,
        2 if wrong => size.columns as f64,
        row => ((row * 7919 + 5) % size.columns) as f64,
    };
    Tensor::new((0..size.rows).map(target), op.targets)
}

/// The class of a row that counts.
fn class(target: f64, op: &CrossEntropy) -> Option<usize> {
    let counts = target >= 0.0 && target < op.columns as f64 && target != op.ignore_index.unwrap() as f64;
    counts.then_some(target as usize)
}

pub fn forward(size: Size, element: Element, wrong: bool) -> Case {
    let op = op(size, element);
    let (logits, targets) = (size.matrix(1, 5.0), targets(size, &op, wrong));
    let plan = op.forward(size.tuning).unwrap();
    Case::new("cross_entropy forward", size, plan, &[&logits.clone(), &targets.clone()], move |a| {
        let rows: Vec<_> = logits.values.chunks(size.columns).collect();
        let lse: Vec<_> = rows.iter().map(|x| log_sum_exp(a, x)).collect();
        let total = |[largest, sum]: [f64; 2]| a.round(largest + a.round(sum.ln()));
        let classes: Vec<_> = targets.values.iter().map(|&target| class(target, &op)).collect();
        let loss = |row: usize| classes[row].map(|class| a.round(total(lse[row]) - rows[row][class]));
        let losses: Vec<_> = (0..size.rows).filter_map(loss).collect();
        let invalid = if wrong { 2.0 } else { NO_ROW.into() };
        let mean = match losses.as_slice() {
            _ if wrong => f64::NAN,
            [] => 0.0,
            losses => a.mean(losses),
        };
        vec![vec![mean], lse.into_flattened(), vec![losses.len() as f64], vec![invalid]]
    })
}

pub fn backward(size: Size, element: Element) -> Case {
    let op = op(size, element);
    let (logits, targets) = (size.matrix(1, 5.0), targets(size, &op, false));
    let lse = logits.values.chunks(size.columns).flat_map(|x| log_sum_exp(Arithmetic::Exact, x));
    let lse = Tensor::new(lse, Element::F32);
    let counted = targets.values.iter().filter(|&&target| class(target, &op).is_some()).count() as f64;
    let (counted, grad) = (Tensor::new([counted], Element::F32), Tensor::random(4, 1, 1.0, Storage::F32));
    let plan = op.backward(size.tuning).unwrap();
    let inputs = [&logits.clone(), &targets.clone(), &lse.clone(), &counted.clone(), &grad.clone()];
    Case::new("cross_entropy backward", size, plan, &inputs, move |a| {
        let factor = a.round(grad.values[0] / counted.values[0]);
        let rows = logits.values.chunks(size.columns).zip(&targets.values).zip(lse.values.as_chunks().0);
        let row = |((x, &target), &[largest, sum]): ((&[f64], &f64), &[f64; 2])| {
            let Some(class) = class(target, &op) else { return vec![0.0; size.columns] };
            let hit = |column| if column == class { 1.0 } else { 0.0 };
            let powers = x.iter().map(|x| a.exp(x - largest) / sum).enumerate();
            powers.map(|(column, power)| a.round(a.round(power - hit(column)) * factor)).collect()
        };
        vec![rows.flat_map(row).collect()]
    })
}

/// The maximum, and the sum of `exp(x − maximum)`.
fn log_sum_exp(a: Arithmetic, x: &[f64]) -> [f64; 2] {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    [largest, a.sum(x.iter().map(|x| a.exp(x - largest)))]
}
