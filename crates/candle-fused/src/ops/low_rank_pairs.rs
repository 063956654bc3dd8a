//! LoRA on a processor's matrix unit, in pairs of bf16 (`cpu/low_rank_pairs.rs`): the update is added up with its base, if there
//! is one. f32 and f16 rows go the way of other processors, but for their update.

use candle_core::{DType, Device, Result, Tensor};
use candlewick_kernels::lora::LoraGradients;

use super::low_rank::{LowRank, is_empty, with_update};
use crate::backend::cpu::to_vec;
use crate::backend::products::{product, with_matrices};
use crate::cpu::gemm::{self, Matrix, Product, Start, multiplies_parts, takes_parts};
use crate::cpu::low_rank_pairs::{Contraction, Expansion, Update, outer};
use crate::cpu::mask::Mask;

/// What makes the update of a result beside this base of f32 rows from a factor `[r, out]`, where both are a sum of pairs.
pub(super) fn beside(base: Option<&Product>, factor: Matrix) -> Option<Expansion> {
    /// Six parts of each are more for the matrix unit than they are worth beyond.
    const RANKS: usize = 32;
    let serves = base.is_some_and(takes_parts) && (1..=RANKS).contains(&factor.rows);
    serves.then(|| Expansion::new(factor, DType::F32))
}

/// The result `[n, out]` and `h [n, r]` for `x [n, in]` and what a dropout keeps of it, `a [r, in]` and `b [out, r]`, where this
/// is the way.
pub(super) fn forward(
    call: &LowRank,
    [x, masked, a, b]: [&Tensor; 4],
    bias: Option<&Tensor>,
) -> Result<Option<(Tensor, Tensor)>> {
    if is_empty(x, b) {
        return Ok(None);
    }
    let weight = call.weight.as_ref();
    with_matrices([x, masked, a, b, weight.unwrap_or(b)], |[x, masked, a, b, weight_matrix]| {
        if !multiplies_parts(&x) {
            return Ok(None);
        }
        let (n, rank, outputs) = (x.rows, a.rows, b.rows);
        let h = Contraction::new(a)?.contract(&masked, call.factor());
        let b = Expansion::new(b.t(), DType::BF16);
        let update = Update::of(&h, &b);
        let bias = bias.map(to_vec).transpose()?;
        let start = bias.as_deref().map_or(Start::Zero, Start::Row);
        let base = weight.map(|_| Product { left: x, right: weight_matrix.t() });
        let products: Vec<_> = base.into_iter().chain([update.product()?]).collect();
        let y = product(DType::BF16, [n, outputs], start, &products)?;
        Ok(Some((y, Tensor::from_vec(h, (n, rank), &Device::Cpu)?)))
    })
}

/// The gradients of `x`, `a` and `b` that are wanted, for what a dropout kept of `x`, where `a`'s is, for the saved `h` and the
/// gradient `[n, out]`, where this is the way.
pub(super) fn gradients(
    call: &LowRank,
    mask: Option<&Mask>,
    [x, a, b]: [&Tensor; 3],
    [h, grad]: [&Tensor; 2],
    wanted: LoraGradients,
) -> Result<Option<[Option<Tensor>; 3]>> {
    if is_empty(x, b) {
        return Ok(None);
    }
    let (of_a, of_b) = (wanted.a.then_some(a.dtype()), wanted.b.then_some(b.dtype()));
    let weight = call.weight.as_ref();
    with_matrices([x, a, b, h, grad, weight.unwrap_or(b)], |[x, a, b, h, grad, weight_matrix]| {
        if !(multiplies_parts(&x) && multiplies_parts(&grad)) {
            return Ok(None);
        }
        let (rank, h) = (h.columns, h.rows_f32());
        let stored = |sums: Vec<f32>, dims: (usize, usize), dtype: DType| {
            Tensor::from_vec(sums, dims, &Device::Cpu)?.to_dtype(dtype)
        };
        let mut gradients = [None, None, None];
        if let Some(dtype) = of_b {
            let turned = outer(&h, rank, &grad, dtype)?;
            let mut db = vec![0f32; turned.len()];
            gemm::transpose(&turned, grad.columns, [rank, grad.columns], &mut db);
            gradients[2] = Some(stored(db, (grad.columns, rank), dtype)?);
        }
        if !wanted.x && of_a.is_none() {
            return Ok(Some(gradients));
        }
        let e = Contraction::new(b.t())?.contract(&grad, call.factor());
        if let Some(dtype) = of_a {
            gradients[1] = Some(stored(outer(&e, rank, &x, dtype)?, (rank, x.columns), dtype)?);
        }
        if wanted.x {
            let factor = Expansion::new(a, DType::BF16);
            let update = Update::of(&e, &factor);
            let base = weight.map(|_| Product { left: grad, right: weight_matrix });
            let dims = [x.rows, x.columns];
            gradients[0] = Some(with_update(DType::BF16, dims, base, update.product()?, mask)?);
        }
        Ok(Some(gradients))
    })
}
