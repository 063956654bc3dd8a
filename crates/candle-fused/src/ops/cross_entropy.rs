//! Mean negative log-likelihood of targets under logits: over the counted rows `i`,
//! `loss = mean(lse_i − x_{i,target_i})` with `lse_i = log Σ_j exp(x_ij)`.
//!
//! The forward saves `lse` alone, in two parts for each row: the maximum, and the total of `exp(x_ij − max)`; in one
//! float a large maximum would swallow the logarithm of the total. Backward, over `n` counted rows:
//! `dx_ij = g/n·(exp(x_ij − lse_i) − [j = target_i])`, and 0 in the rows that do not count. It allocates nothing but
//! the gradient.

use candle_core::{D, DType, Result, Tensor, bail};

use crate::backend::cpu::{each_row, map_rows, to_vec};
use crate::backend::{self, Kernel};
use crate::check;
use crate::cpu::cross_entropy as row;
use crate::graph::{self, Backward, tracked};

const OP: &str = "cross_entropy";

/// The mean cross-entropy of `logits [n, v]` (f32, f16 or bf16) and `targets [n]` (i64 or u32), an f32 scalar.
/// Rows whose target is `ignore_index` do not count; where no row counts, the loss and its gradient are 0.
///
/// # Errors
/// Other shapes or dtypes, and a target outside `0..v` that is not `ignore_index`: the row and the value are named.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Result<Tensor> {
    let columns = check(logits, targets, ignore_index)?;
    backend::dispatch(OP, logits, || fused(logits, columns), || reference(logits, targets, ignore_index))
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

fn fused(logits: &Tensor, columns: Vec<Option<usize>>) -> Result<Tensor> {
    let (loss, lse) = backend::run(logits.device(), &Forward { logits, columns: &columns })?;
    graph::record1(logits, loss, CrossEntropy { columns, lse })
}

struct CrossEntropy {
    columns: Vec<Option<usize>>,
    /// `[n, 2]` in f32.
    lse: Tensor,
}

impl Backward<1> for CrossEntropy {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [logits]: [&Tensor; 1], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let gradient = Gradient { logits, columns: &self.columns, lse: &self.lse, g };
        Ok([tracked(logits, || backend::run(logits.device(), &gradient))?])
    }
}

/// How many rows count, and at least 1.
#[expect(clippy::cast_precision_loss, reason = "a number of rows is far below 2^52")]
fn divisor(columns: &[Option<usize>]) -> f64 {
    columns.iter().flatten().count().max(1) as f64
}

struct Forward<'a> {
    logits: &'a Tensor,
    columns: &'a [Option<usize>],
}

impl Kernel for Forward<'_> {
    /// The loss and the log-sum-exps.
    type Output = (Tensor, Tensor);

    #[expect(clippy::cast_possible_truncation, reason = "the final rounding to f32")]
    fn cpu(&self) -> Result<(Tensor, Tensor)> {
        let rows = each_row([self.logits], |i, [x]| match self.columns[i] {
            Some(column) => {
                let lse = row::log_sum_exp(x);
                (lse, row::loss(lse, x[column]))
            }
            None => Default::default(),
        })?;
        let (lse, losses): (Vec<[f32; 2]>, Vec<f32>) = rows.into_iter().unzip();
        let total: f64 = losses.into_iter().map(f64::from).sum();
        let loss = (total / divisor(self.columns)) as f32;
        let device = self.logits.device();
        let lse = Tensor::from_vec(lse.into_flattened(), (self.columns.len(), 2), device)?;
        Ok((Tensor::new(loss, device)?, lse))
    }
}

struct Gradient<'a> {
    logits: &'a Tensor,
    columns: &'a [Option<usize>],
    lse: &'a Tensor,
    g: &'a Tensor,
}

impl Kernel for Gradient<'_> {
    type Output = Tensor;

    #[expect(clippy::cast_possible_truncation, reason = "the final rounding to f32")]
    fn cpu(&self) -> Result<Tensor> {
        let lse = to_vec(self.lse)?;
        let (lse, _) = lse.as_chunks::<2>();
        let g = (f64::from(self.g.to_scalar::<f32>()?) / divisor(self.columns)) as f32;
        let ([dx], _) = map_rows([self.logits], self.logits.dtype(), |i, [x], [dx]| match self.columns[i] {
            Some(column) => row::backward(x, lse[i], column, g, dx),
            None => dx.fill(0.0),
        })?;
        Ok(dx)
    }
}
