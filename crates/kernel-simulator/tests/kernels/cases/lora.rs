//! `y = scaling · drop(x) · Aᵀ · B (+ base)`, with A as `[rank, inputs]` and B as `[rank, outputs]`.

use crate::case::{Case, Size, wanted_only};
use crate::data::Tensor;
use crate::oracle::Arithmetic;
use candlewick_kernels::Storage;
use candlewick_kernels::lora::{Dropout, FactorStrides, Lora, LoraGradients};

/// Both layouts of the factors, without base and dropout.
pub fn delta_cases(size: Size) -> Vec<Case> {
    let layouts = [peft(size, size.columns), seed(size, size.columns / 2 + 1)];
    layouts.into_iter().flat_map(|op| [forward(size, op), backward(size, op)]).collect()
}

/// With a base product, dropout, and factors in f32 beside any x.
pub fn linear_cases(size: Size) -> Vec<Case> {
    let op = Lora { adapter: Storage::F32, base: true, ..with_dropout(peft(size, size.columns)) };
    let mut cases = vec![forward(size, op), backward(size, op), mask(size, op)];
    if size.columns == 257 {
        let only = [(true, false, false), (false, true, false), (false, false, true), (false, true, true)];
        cases.extend(only.map(|(x, a, b)| backward_of(size, op, LoraGradients { x, a, b })));
    }
    cases
}

pub fn with_dropout(op: Lora) -> Lora {
    Lora { dropout: Some(Dropout { p: 0.25, seed: 0x0123_4567_89ab_cdef }), ..op }
}

/// A `[rank, inputs]`, B `[outputs, rank]`.
pub fn peft(size: Size, outputs: usize) -> Lora {
    let rank = if size.columns.is_multiple_of(2) { 8 } else { 5 };
    Lora {
        rows: size.rows,
        inputs: size.columns,
        outputs,
        rank,
        storage: size.storage,
        adapter: size.storage,
        a: FactorStrides::rank_major(size.columns),
        b: FactorStrides::column_major(rank),
        scaling: 2.0,
        dropout: None,
        base: false,
    }
}

/// A `[inputs, rank]`, B `[rank, outputs]`.
fn seed(size: Size, outputs: usize) -> Lora {
    let op = peft(size, outputs);
    Lora { a: FactorStrides::column_major(op.rank), b: FactorStrides::rank_major(outputs), ..op }
}

/// The tensors of an op, and its formulas over them.
#[derive(Clone)]
struct Data {
    op: Lora,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    grad: Tensor,
    base: Tensor,
}

impl Data {
    /// `base_columns`: of what is added, to y or to x's gradient.
    fn new(op: Lora, base_columns: usize) -> Self {
        let magnitude = 1.0 / (op.inputs as f64).sqrt();
        Self {
            op,
            x: Tensor::random(1, op.rows * op.inputs, 1.0, op.storage),
            a: Tensor::random(2, op.rank * op.inputs, magnitude, op.adapter),
            b: Tensor::random(3, op.rank * op.outputs, 1.0, op.adapter),
            grad: Tensor::random(4, op.rows * op.outputs, 1.0, op.storage),
            base: Tensor::random(5, op.rows * base_columns, 1.0, op.storage),
        }
    }

    fn a(&self, rank: usize, input: usize) -> f64 {
        self.a.values[rank * self.op.a.rank + input * self.op.a.column]
    }

    fn b(&self, rank: usize, output: usize) -> f64 {
        self.b.values[rank * self.op.b.rank + output * self.op.b.column]
    }

    fn base(&self, index: usize) -> f64 {
        if self.op.base { self.base.values[index] } else { 0.0 }
    }

    /// What dropout makes of a value at `index` of x.
    fn drop(&self, a: Arithmetic, index: usize, value: f64) -> f64 {
        let Some(Dropout { p, seed }) = self.op.dropout else { return value };
        let threshold = (f64::from(p) * 2_f64.powi(32)).round() as u32;
        let kept = philox(index as u64 / 4, seed)[index % 4] >= threshold;
        if kept { a.round(value * f64::from(1.0 / (1.0 - p))) } else { 0.0 }
    }

    fn dropped_x(&self, a: Arithmetic) -> Vec<f64> {
        self.x.values.iter().enumerate().map(|(index, &x)| self.drop(a, index, x)).collect()
    }

    /// `scaling · rows · factorᵀ`, `[rows, rank]`, for rows of `columns`.
    fn project(
        &self,
        a: Arithmetic,
        rows: &[f64],
        columns: usize,
        factor: impl Fn(usize, usize) -> f64,
    ) -> Vec<f64> {
        let mut projected = Vec::new();
        for row in rows.chunks(columns) {
            for rank in 0..self.op.rank {
                let sum = a.sum(row.iter().enumerate().map(|(column, x)| x * factor(rank, column)));
                projected.push(a.round(sum * f64::from(self.op.scaling)));
            }
        }
        projected
    }

    /// `s · factor`, `[rows, columns]`.
    fn expand(
        &self,
        a: Arithmetic,
        s: &[f64],
        columns: usize,
        factor: impl Fn(usize, usize) -> f64,
    ) -> Vec<f64> {
        let element =
            |s: &[f64], column| a.sum(s.iter().enumerate().map(|(rank, s)| s * factor(rank, column)));
        s.chunks(self.op.rank)
            .flat_map(|s| (0..columns).map(move |column| (s, column)))
            .map(|(s, c)| element(s, c))
            .collect()
    }

    /// `Σ_rows s · rows`, laid out as the factor with these strides.
    fn factor_gradient(
        &self,
        a: Arithmetic,
        s: &[f64],
        rows: &[f64],
        columns: usize,
        strides: FactorStrides,
    ) -> Vec<f64> {
        let mut gradient = vec![0.0; self.op.rank * columns];
        for rank in 0..self.op.rank {
            for column in 0..columns {
                let terms =
                    (0..self.op.rows).map(|row| s[row * self.op.rank + rank] * rows[row * columns + column]);
                gradient[rank * strides.rank + column * strides.column] = a.sum(terms);
            }
        }
        gradient
    }
}

pub fn forward(size: Size, op: Lora) -> Case {
    let data = Data::new(op, op.outputs);
    let plan = op.forward(size.tuning).unwrap();
    let mut inputs = vec![data.x.clone(), data.a.clone(), data.b.clone()];
    inputs.extend(op.base.then(|| data.base.clone()));
    let inputs: Vec<_> = inputs.iter().collect();
    Case::new("lora forward", size, plan, &inputs, move |a| {
        let s = data.project(a, &data.dropped_x(a), op.inputs, |rank, input| data.a(rank, input));
        let update = data.expand(a, &s, op.outputs, |rank, output| data.b(rank, output));
        vec![update.iter().enumerate().map(|(index, y)| a.round(y + data.base(index))).collect()]
    })
}

/// What is dropped is 0, and the rest as it was.
pub fn mask(size: Size, op: Lora) -> Case {
    let data = Data::new(op, op.inputs);
    let plan = op.mask(size.tuning).unwrap();
    Case::new("lora mask", size, plan, &[&data.x.clone()], move |a| {
        let kept = |(index, &x): (usize, &f64)| if data.drop(a, index, 1.0) == 0.0 { 0.0 } else { x };
        vec![data.x.values.iter().enumerate().map(kept).collect()]
    })
}

pub fn backward(size: Size, op: Lora) -> Case {
    backward_of(size, op, LoraGradients { x: true, a: true, b: true })
}

fn backward_of(size: Size, op: Lora, wanted: LoraGradients) -> Case {
    let data = Data::new(op, op.inputs);
    let plan = op.backward(wanted, size.tuning).unwrap();
    let mut inputs = vec![data.x.clone(), data.a.clone(), data.b.clone(), data.grad.clone()];
    // What is added belongs to x's gradient alone.
    inputs.extend((op.base && wanted.x).then(|| data.base.clone()));
    let inputs: Vec<_> = inputs.iter().collect();
    Case::new("lora backward", size, plan, &inputs, move |a| {
        let (x, grad) = (data.dropped_x(a), &data.grad.values);
        let s_forward = data.project(a, &x, op.inputs, |rank, input| data.a(rank, input));
        let s_backward = data.project(a, grad, op.outputs, |rank, output| data.b(rank, output));
        let grad_x = data.expand(a, &s_backward, op.inputs, |rank, input| data.a(rank, input));
        let dropped =
            grad_x.iter().enumerate().map(|(index, &g)| a.round(data.drop(a, index, g) + data.base(index)));
        wanted_only([
            (wanted.x, dropped.collect()),
            (wanted.a, data.factor_gradient(a, &s_backward, &x, op.inputs, op.a)),
            (wanted.b, data.factor_gradient(a, &s_forward, grad, op.outputs, op.b)),
        ])
    })
}

/// Philox4x32-10 (Salmon et al., SC'11) of the counter (block, 0) under the key `seed`.
fn philox(block: u64, seed: u64) -> [u32; 4] {
    let mut c = [block as u32, (block >> 32) as u32, 0, 0];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let (m0, m1) = (u64::from(c[0]) * 0xd251_1f53, u64::from(c[2]) * 0xcd9e_8d57);
        c = [(m1 >> 32) as u32 ^ c[1] ^ key[0], m1 as u32, (m0 >> 32) as u32 ^ c[3] ^ key[1], m0 as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    c
}
