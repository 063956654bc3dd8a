//! Attention of one head, by blocks of queries: scores and weights exist for one block at a time.

use super::gemm::{Matrix, Product, add_products};
use super::softmax as row;

/// Queries in a block.
pub(crate) const QUERIES: usize = 64;

/// One head's queries `[t, d]`, keys and values `[s, d]`, and how the scores become weights.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    pub(crate) q: Matrix<'a>,
    pub(crate) k: Matrix<'a>,
    pub(crate) v: Matrix<'a>,
    pub(crate) scale: f32,
    /// Key `j` is visible to query `i` iff `j <= i + (s − t)`; else all are.
    pub(crate) causal: bool,
}

/// A head's gradients, `[t, d]`, `[s, d]` and `[s, d]`.
pub(crate) struct HeadGradients {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Head<'_> {
    /// How many keys the query sees.
    fn visible(&self, query: usize) -> usize {
        if self.causal { query + 1 + self.k.rows - self.q.rows } else { self.k.rows }
    }

    /// The keys that some query of a block sees, and the block's weights `softmax(scale·q·kᵀ)` over these.
    fn weights(&self, first: usize, count: usize) -> (usize, Vec<f32>) {
        let keys = self.visible(first + count - 1);
        let mut weights = vec![0.0; count * keys];
        let product = Product { left: self.q.some_rows(first, count), right: self.k.some_rows(0, keys).t() };
        add_products([count, keys], &[product], &mut weights);
        if keys > 0 {
            for (i, weights) in weights.chunks_exact_mut(keys).enumerate() {
                let (visible, hidden) = weights.split_at_mut(self.visible(first + i));
                row::forward_in_place(self.scale, visible);
                hidden.fill(0.0);
            }
        }
        (keys, weights)
    }

    /// The results of a block of queries.
    pub(crate) fn forward(&self, first: usize, count: usize) -> Vec<f32> {
        let (keys, weights) = self.weights(first, count);
        let width = self.v.columns;
        let mut y = vec![0.0; count * width];
        if let Ok(weights) = Matrix::of_rows(&weights, [count, keys]) {
            let product = Product { left: weights, right: self.v.some_rows(0, keys) };
            add_products([count, width], &[product], &mut y);
        }
        y
    }

    /// The gradients from that of the result, `grad [t, d]`. With the weights `P` computed again:
    /// `dV = Pᵀ·g`, `dS = scale·P∘(g·Vᵀ − Σ_k P∘(g·Vᵀ))`, `dQ = dS·K`, `dK = dSᵀ·Q`.
    pub(crate) fn backward(&self, grad: Matrix) -> HeadGradients {
        let (queries, width) = (self.q.rows, self.q.columns);
        let mut gradients = HeadGradients {
            q: vec![0.0; queries * width],
            k: vec![0.0; self.k.rows * width],
            v: vec![0.0; self.v.rows * width],
        };
        for first in (0..queries).step_by(QUERIES) {
            let count = QUERIES.min(queries - first);
            self.backward_block(first, count, grad.some_rows(first, count), &mut gradients);
        }
        gradients
    }

    fn backward_block(&self, first: usize, count: usize, grad: Matrix, gradients: &mut HeadGradients) {
        let width = self.q.columns;
        let (keys, weights) = self.weights(first, count);
        if keys == 0 || width == 0 {
            return;
        }
        let mut of_weights = vec![0.0; count * keys];
        let product = Product { left: grad, right: self.v.some_rows(0, keys).t() };
        add_products([count, keys], &[product], &mut of_weights);
        let mut of_scores = vec![0.0; count * keys];
        let rows = weights.chunks_exact(keys).zip(of_weights.chunks_exact(keys));
        for (i, ((weights, g), of_scores)) in rows.zip(of_scores.chunks_exact_mut(keys)).enumerate() {
            let visible = self.visible(first + i);
            row::backward_row(self.scale, &weights[..visible], &g[..visible], &mut of_scores[..visible]);
        }
        let matrices = [&weights, &of_scores].map(|matrix| Matrix::of_rows(matrix, [count, keys]));
        let [Ok(weights), Ok(of_scores)] = matrices else { return };
        let of_v = Product { left: weights.t(), right: grad };
        add_products([keys, width], &[of_v], &mut gradients.v);
        let of_k = Product { left: of_scores.t(), right: self.q.some_rows(first, count) };
        add_products([keys, width], &[of_k], &mut gradients.k);
        let of_q = Product { left: of_scores, right: self.k.some_rows(0, keys) };
        add_products([count, width], &[of_q], &mut gradients.q[first * width..]);
    }
}
