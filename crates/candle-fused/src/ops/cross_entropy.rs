//! Mean negative log-likelihood of targets under logits: over the counted rows `i`,
//! `loss = mean(lse_i − x_{i,target_i})` with `lse_i = log Σ_j exp(x_ij)`.
//!
//! The forward saves `lse`, one f32 for each row. Backward, over `n` counted rows:
//! `dx_ij = g/n·(exp(x_ij − lse_i) − [j = target_i])`, and 0 in the rows that do not count. It allocates nothing but
//! the gradient.

use candle_core::{D, DType, Result, Tensor, bail};

use crate::{backend, check};

const OP: &str = "cross_entropy";

/// The mean cross-entropy of `logits [n, v]` (f32, f16 or bf16) and `targets [n]` (i64 or u32), an f32 scalar.
/// Rows whose target is `ignore_index` do not count; where no row counts, the loss and its gradient are 0.
///
/// # Errors
/// Other shapes or dtypes, and a target outside `0..v` that is not `ignore_index`: the row and the value are named.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Result<Tensor> {
    check(logits, targets, ignore_index)?;
    backend::dispatch(
        OP,
        logits,
        || reference(logits, targets, ignore_index),
        || reference(logits, targets, ignore_index),
    )
}

/// The column each row is to predict, `None` where the row does not count.
fn check(logits: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Result<Vec<Option<usize>>> {
    check::float(OP, "logits", logits)?;
    check::rank(OP, "logits", logits, 2)?;
    let (n, v) = logits.dims2()?;
    check::shape(OP, "targets", targets, &[n])?;
    check::device(OP, "targets", targets, logits.device())?;
    if !matches!(targets.dtype(), DType::I64 | DType::U32) {
        bail!("{OP}: targets must be i64 or u32, got {}", targets.dtype().as_str());
    }
    let column = |(row, target): (usize, i64)| match usize::try_from(target) {
        _ if Some(target) == ignore_index => Ok(None),
        Ok(column) if column < v => Ok(Some(column)),
        _ => bail!("{OP}: the target of row {row} must be in 0..{v}, got {target}"),
    };
    targets.to_dtype(DType::I64)?.to_vec1::<i64>()?.into_iter().enumerate().map(column).collect()
}

/// [`cross_entropy`] in plain Candle operations.
pub fn reference(logits: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Result<Tensor> {
    let columns = check(logits, targets, ignore_index)?;
    let counted: Vec<(usize, usize)> =
        columns.into_iter().enumerate().filter_map(|(row, column)| Some((row, column?))).collect();
    if counted.is_empty() {
        // On the graph, with a gradient of zeros.
        return logits.flatten_all()?.narrow(0, 0, 0)?.to_dtype(DType::F32)?.sum_all();
    }
    let index = |values: Vec<usize>| {
        let values = values.into_iter().map(u32::try_from).collect::<std::result::Result<Vec<_>, _>>()?;
        Tensor::new(values, logits.device())
    };
    let (rows, columns) = counted.into_iter().unzip();
    let wide = logits.to_dtype(DType::F32)?.index_select(&index(rows)?, 0)?;
    let max = wide.max_keepdim(D::Minus1)?.detach();
    let shifted = wide.broadcast_sub(&max)?;
    let lse = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let picked = shifted.gather(&index(columns)?.unsqueeze(1)?, D::Minus1)?;
    (lse - picked)?.mean_all()
}
