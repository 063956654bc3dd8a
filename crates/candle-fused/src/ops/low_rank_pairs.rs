//! LoRA beside a base that a processor's matrix unit multiplies, in pairs of bf16 (`cpu/low_rank_pairs.rs`): the update is added
//! up with its base. Dropout's input, which is f32, and a product without a base go the way of other processors; so do f32 and f16
//! rows, but for their update.

use candle_core::{DType, Device, Result, Tensor};
use candlewick_kernels::lora::LoraGradients;

use super::low_rank::{LowRank, is_empty};
use crate::backend::cpu::to_vec;
use crate::backend::products::{product, with_matrices};
use crate::cpu::gemm::{self, Matrix, Product, Start, multiplies_parts, takes_parts};
use crate::cpu::low_rank_pairs::{Contraction, Expansion, Update, outer};

/// The base's weight, if there may be a product to compute so.
fn weight<'a>(call: &'a LowRank, x: &Tensor, b: &Tensor) -> Option<&'a Tensor> {
    call.weight.as_ref().filter(|_| call.dropout.is_none() && !is_empty(x, b))
}

/// What makes the update of a result beside this base of f32 rows from a factor `[r, out]`, where both are a sum of pairs.
pub(super) fn beside(base: Option<&Product>, factor: Matrix) -> Option<Expansion> {
    /// Six parts of each are more for the matrix unit than they are worth beyond.
    const RANKS: usize = 32;
    let serves = base.is_some_and(takes_parts) && (1..=RANKS).contains(&factor.rows);
    serves.then(|| Expansion::new(factor, DType::F32))
}

/// The result `[n, out]` and `h [n, r]` for `x [n, in]`, `a [r, in]` and `b [out, r]`, where this is the way.
pub(super) fn forward(
    call: &LowRank,
    [x, a, b]: [&Tensor; 3],
    bias: Option<&Tensor>,
) -> Result<Option<(Tensor, Tensor)>> {
    let Some(weight) = weight(call, x, b) else { return Ok(None) };
    with_matrices([x, a, b, weight], |[x, a, b, weight]| {
        if !multiplies_parts(&x) {
            return Ok(None);
        }
        let (n, rank, outputs) = (x.rows, a.rows, b.rows);
        let (h, b) = (Contraction::new(a)?.contract(&x, call.scaling), Expansion::new(b.t(), DType::BF16));
        let update = Update::of(&h, &b);
        let bias = bias.map(to_vec).transpose()?;
        let start = bias.as_deref().map_or(Start::Zero, Start::Row);
        let products = [Product { left: x, right: weight.t() }, update.product()?];
        let y = product(DType::BF16, [n, outputs], start, &products)?;
        Ok(Some((y, Tensor::from_vec(h, (n, rank), &Device::Cpu)?)))
    })
}

/// The gradients of `x`, `a` and `b` that are wanted, for the saved `h` and the gradient `[n, out]`, where this is the way.
pub(super) fn gradients(
    call: &LowRank,
    [x, a, b]: [&Tensor; 3],
    [h, grad]: [&Tensor; 2],
    wanted: LoraGradients,
) -> Result<Option<[Option<Tensor>; 3]>> {
    let Some(weight) = weight(call, x, b) else { return Ok(None) };
    let (of_a, of_b) = (wanted.a.then_some(a.dtype()), wanted.b.then_some(b.dtype()));
    with_matrices([x, a, b, h, grad, weight], |[x, a, b, h, grad, weight]| {
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
        let e = Contraction::new(b.t())?.contract(&grad, call.scaling);
        if let Some(dtype) = of_a {
            gradients[1] = Some(stored(outer(&e, rank, &x, dtype)?, (rank, x.columns), dtype)?);
        }
        if wanted.x {
            let factor = Expansion::new(a, DType::BF16);
            let update = Update::of(&e, &factor);
            let products = [Product { left: grad, right: weight }, update.product()?];
            gradients[0] = Some(product(DType::BF16, [x.rows, x.columns], Start::Zero, &products)?);
        }
        Ok(Some(gradients))
    })
}
