//! Attention of one head, by blocks of queries: scores and weights exist for one block at a time.
//!
//! Keys and values are packed once for all queries. Where the processor multiplies bf16 in pairs, bf16 heads are; then the
//! weights and the gradient of the scores are rounded to bf16 for their products, as a GPU's tiles round them. Sums are f32.

use std::mem::MaybeUninit;

use candle_core::DType;
use half::bf16;

use super::gemm::{self, Columns, Data, Matrix, Product, Right, add_products};
use super::lanes::Element;
use super::softmax as row;
use super::spread::Kept;

/// Queries in a block.
pub(crate) const QUERIES: usize = 64;

/// How the scores of one head become weights.
#[derive(Clone, Copy)]
pub(crate) struct Weighing {
    /// Queries of the head.
    pub(crate) queries: usize,
    /// Keys of the head.
    pub(crate) keys: usize,
    pub(crate) scale: f32,
    /// Key `j` is visible to query `i` iff `j <= i + (keys − queries)`; else all are.
    pub(crate) causal: bool,
}

impl Weighing {
    /// How many keys the query sees.
    fn visible(&self, query: usize) -> usize {
        if self.causal { query + 1 + self.keys - self.queries } else { self.keys }
    }

    /// Exponentials of the scores of queries from `first` on, in rows `stride` apart, 0 for what is hidden and beyond, and the
    /// reciprocals of their sums.
    fn weigh<T: Element>(&self, first: usize, scores: &mut [f32], stride: usize, factors: &mut Vec<f32>) {
        factors.clear();
        for (query, scores) in (first..).zip(scores.chunks_exact_mut(stride)) {
            let (visible, hidden) = scores.split_at_mut(self.visible(query));
            factors.push(row::exponentials_in_place::<T>(self.scale, visible));
            hidden.fill(0.0);
        }
    }
}

/// Whether heads of this type, whose rows are in one piece each, are multiplied in pairs.
fn in_pairs<T: Element>() -> bool {
    T::DTYPE == DType::BF16 && gemm::multiplies_pairs()
}

/// What a thread uses for one block after the other.
#[derive(Default)]
pub(crate) struct Scratch {
    scores: Vec<f32>,
    of_weights: Vec<f32>,
    factors: Vec<f32>,
    rounded: Vec<bf16>,
    right: Right,
    rows: Vec<f32>,
}

impl Kept for Scratch {
    fn bytes(&self) -> usize {
        let floats = [&self.scores, &self.of_weights, &self.factors, &self.rows];
        floats.map(Kept::bytes).into_iter().sum::<usize>() + self.rounded.bytes() + self.right.bytes()
    }
}

/// A left matrix of f32 rows, `stride` apart, as a product with [`Right`] reads it.
fn left<'a>(
    (rows, stride): (&'a [f32], usize),
    dims: [usize; 2],
    in_pairs: bool,
    rounded: &'a mut Vec<bf16>,
) -> Option<Matrix<'a>> {
    let data = if in_pairs {
        gemm::store(rows, rounded);
        Data::BF16(rounded)
    } else {
        Data::F32(rows)
    };
    Matrix::new(data, 0, dims, [stride, 1])
}

/// A head's keys and values `[s, d]`, for its results.
pub(crate) struct Keys<'a> {
    k: Matrix<'a>,
    /// `kᵀ`, unless the queries are so few that products read the keys as they lie.
    turned: Option<Right>,
    v: Right,
    width: usize,
}

impl<'a> Keys<'a> {
    pub(crate) fn new<T: Element>(k: Matrix<'a>, v: Matrix<'a>, queries: usize) -> Self {
        let pack = |matrix: Matrix| Right::of(&matrix, in_pairs::<T>());
        Self { k, turned: (queries > gemm::FEW).then(|| pack(k.t())), v: pack(v), width: v.columns }
    }

    /// The results `[count, d]` of the queries `q [count, d]`, which begin with the `first`; all dimensions at least 1.
    pub(crate) fn attend<'b, T: Element>(
        &self,
        weighing: Weighing,
        q: &Matrix,
        first: usize,
        scratch: &'b mut Scratch,
    ) -> &'b [f32] {
        let (count, width) = (q.rows, self.width);
        let keys = weighing.visible(first + count - 1);
        let stride = if self.turned.is_some() { gemm::whole(keys) } else { keys };
        let Scratch { scores, factors, rounded, rows, .. } = scratch;
        let (scores, rows) = (gemm::room(scores, count * stride), gemm::room(rows, count * width));
        if let Some(turned) = &self.turned {
            turned.multiply(q, stride, (&mut *scores, stride), false);
        } else {
            scores.fill(0.0);
            let product = Product { left: *q, right: self.k.some_rows(0, keys).t() };
            add_products([count, keys], &[product], scores);
        }
        weighing.weigh::<T>(first, scores, stride, factors);
        if let Some(weights) = left((scores, stride), [count, keys], in_pairs::<T>(), rounded) {
            self.v.multiply(&weights, width, (&mut *rows, width), false);
        }
        for (row, factor) in rows.chunks_exact_mut(width).zip(factors) {
            for x in row {
                *x *= *factor;
            }
        }
        rows
    }
}

/// A head's keys and values `[s, d]`, for its gradients.
pub(crate) struct BackwardKeys {
    /// `kᵀ`, `vᵀ` and `k`.
    packed: [Right; 3],
    width: usize,
}

impl BackwardKeys {
    pub(crate) fn new<T: Element>(k: Matrix, v: Matrix) -> Self {
        let packed = [k.t(), v.t(), k].map(|matrix| Right::of(&matrix, in_pairs::<T>()));
        Self { packed, width: k.columns }
    }

    /// Writes the gradient of the queries `q [t, d]` to `dq [t, d]`, and adds those of keys and values, transposed, to `dk` and
    /// `dv`, `[d, s]` in rows of [`gemm::whole`]; `grad [t, d]` is that of the result; all dimensions at least 1. With the
    /// weights `P` computed again:
    /// `dV = Pᵀ·g`, `dS = scale·P∘(g·Vᵀ − Σ_k P∘(g·Vᵀ))`, `dQ = dS·K`, `dK = dSᵀ·Q`.
    pub(crate) fn gradients<T: Element>(
        &self,
        weighing: Weighing,
        [q, grad]: [Matrix; 2],
        scratch: &mut Scratch,
        dq: &mut [MaybeUninit<T>],
        [dk, dv]: [&mut [f32]; 2],
    ) {
        let (width, in_pairs) = (self.width, in_pairs::<T>());
        let [turned_keys, turned_values, keys_right] = &self.packed;
        let [turned_q, turned_grad] = [q, grad].map(|matrix| Columns::of(matrix, in_pairs));
        let Scratch { scores, of_weights, factors, rounded, right, rows } = scratch;
        for (block, dq) in dq.chunks_mut(QUERIES * width).enumerate() {
            let first = block * QUERIES;
            let count = QUERIES.min(weighing.queries - first);
            let keys = weighing.visible(first + count - 1);
            let stride = gemm::whole(keys);
            let (weights, of_scores) =
                (gemm::room(scores, count * stride), gemm::room(of_weights, count * stride));
            let rows = gemm::room(rows, count * width);
            turned_keys.multiply(&q.some_rows(first, count), stride, (&mut *weights, stride), false);
            weighing.weigh::<T>(first, weights, stride, factors);
            turned_values.multiply(&grad.some_rows(first, count), stride, (&mut *of_scores, stride), false);
            let both = weights.chunks_exact_mut(stride).zip(of_scores.chunks_exact_mut(stride));
            for (i, ((weights, of_scores), factor)) in both.zip(&*factors).enumerate() {
                let visible = weighing.visible(first + i);
                let (of_scores, hidden) = of_scores.split_at_mut(visible);
                row::backward_in_place(weighing.scale, *factor, &mut weights[..visible], of_scores);
                hidden.fill(0.0);
            }
            for (turned, factors, to) in
                [(&turned_grad, &*weights, &mut *dv), (&turned_q, &*of_scores, &mut *dk)]
            {
                if let (Some(turned), Ok(factors)) =
                    (turned.some(first, count), Matrix::of_rows(factors, [count, stride]))
                {
                    right.pack(&factors, in_pairs);
                    right.multiply(&turned, stride, (to, gemm::whole(weighing.keys)), true);
                }
            }
            if let Some(of_scores) = left((of_scores, stride), [count, keys], in_pairs, rounded) {
                keys_right.multiply(&of_scores, width, (&mut *rows, width), false);
            }
            gemm::round(rows, dq);
        }
    }
}
