//! Mean negative log-likelihood of targets under logits: over the counted rows `i`,
//! `loss = mean(lse_i − x_{i,target_i})` with `lse_i = log Σ_j exp(x_ij)`.
//!
//! The forward saves `lse` alone, in two parts for each row: the maximum, and the total of `exp(x_ij − max)`; in one
//! float a large maximum would swallow the logarithm of the total. A processor saves the least logit beside them, which tells how
//! far a row's exponentials lie apart. Backward, over `n` counted rows:
//! `dx_ij = g/n·(exp(x_ij − lse_i) − [j = target_i])`, and 0 in the rows that do not count. It allocates nothing but
//! the gradient.

use candle_core::{D, DType, Result, Shape, Tensor, bail};
use candlewick_kernels::Element;
use candlewick_kernels::cross_entropy::CrossEntropy as Plans;

use crate::backend::cpu::{map_row, map_row_over, map_rows, to_vec};
use crate::backend::{self, Attempt, Kernel, gpu};
use crate::check;
use crate::cpu::cross_entropy as row;
use crate::graph::{self, Backward, tracked};

const OP: &str = "cross_entropy";

/// The mean cross-entropy of `logits [n, v]` (f32, f16 or bf16) and `targets [n]` (i64 or u32), an f32 scalar.
/// Rows whose target is `ignore_index` do not count; where no row counts, the loss and its gradient are 0.
///
/// # Errors
/// Other shapes or dtypes, and a target outside `0..v` that is not `ignore_index`: the row and the value are named. On
/// a GPU, which would have to be waited for to know, such a target makes the loss NaN instead.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Result<Tensor> {
    check(logits, targets)?;
    let fused = || fused(logits, targets, ignore_index);
    backend::dispatch(OP, logits, fused, || reference(logits, targets, ignore_index))
}

fn check(logits: &Tensor, targets: &Tensor) -> Result<()> {
    check::float(OP, "logits", logits)?;
    check::rank(OP, "logits", logits, 2)?;
    check::shape(OP, "targets", targets, &[logits.dim(0)?])?;
    check::device(OP, "targets", targets, logits.device())?;
    check_targets(OP, targets)
}

/// Targets are of a dtype that is understood.
pub(super) fn check_targets(op: &str, targets: &Tensor) -> Result<()> {
    if !matches!(targets.dtype(), DType::I64 | DType::U32) {
        bail!("{op}: targets must be i64 or u32, got {}", targets.dtype().as_str());
    }
    Ok(())
}

/// The column each row is to predict among `v`, `None` where the row does not count.
pub(super) fn columns(
    op: &str,
    targets: &Tensor,
    v: usize,
    ignore_index: Option<i64>,
) -> Result<Vec<Option<usize>>> {
    let column = |(row, target): (usize, i64)| match usize::try_from(target) {
        _ if Some(target) == ignore_index => Ok(None),
        Ok(column) if column < v => Ok(Some(column)),
        _ => bail!("{op}: the target of row {row} must be in 0..{v}, got {target}"),
    };
    targets.to_dtype(DType::I64)?.to_vec1::<i64>()?.into_iter().enumerate().map(column).collect()
}

/// [`cross_entropy`] in plain Candle operations.
pub fn reference(logits: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Result<Tensor> {
    check(logits, targets)?;
    let columns = columns(OP, targets, logits.dim(1)?, ignore_index)?;
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
    let wide = logits.to_dtype(DType::F32)?.contiguous()?.index_select(&index(rows)?, 0)?;
    let max = wide.max_keepdim(D::Minus1)?.detach();
    let shifted = wide.broadcast_sub(&max)?;
    let lse = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let picked = shifted.gather(&index(columns)?.unsqueeze(1)?, D::Minus1)?;
    (lse - picked)?.mean_all()
}

fn fused(logits: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Attempt<Tensor> {
    let forward = Forward { logits, targets, ignore_index };
    let [loss, lse, counted] = backend::run(logits.device(), &forward)?;
    Ok(graph::record1(logits, loss, CrossEntropy { targets: targets.clone(), ignore_index, lse, counted })?)
}

pub(super) struct CrossEntropy {
    pub(super) targets: Tensor,
    pub(super) ignore_index: Option<i64>,
    /// `[n, 2]` in f32; a processor's has each row's least logit, too, `[n, 3]`.
    pub(super) lse: Tensor,
    /// How many rows count, `[1]` in f32.
    pub(super) counted: Tensor,
}

impl Backward<1> for CrossEntropy {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [logits]: [&Tensor; 1], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([tracked(logits, || {
            Ok(backend::run(logits.device(), &Gradient { logits, saved: self, g, over: false })?)
        })?])
    }
}

/// The plans for `logits`.
fn plans(logits: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Result<Plans> {
    let (rows, columns) = logits.dims2()?;
    let element = if targets.dtype() == DType::I64 { Element::I64 } else { Element::U32 };
    Ok(Plans { rows, columns, storage: gpu::storage(logits)?, targets: element, ignore_index })
}

pub(super) struct Forward<'a> {
    pub(super) logits: &'a Tensor,
    pub(super) targets: &'a Tensor,
    pub(super) ignore_index: Option<i64>,
}

impl Kernel for Forward<'_> {
    /// The loss, the log-sum-exps, and how many rows count.
    type Output = [Tensor; 3];

    #[expect(clippy::cast_possible_truncation, reason = "the final rounding to f32")]
    #[expect(clippy::cast_precision_loss, reason = "a number of rows, to f32's precision")]
    fn cpu(&self) -> Result<[Tensor; 3]> {
        let columns = columns(OP, self.targets, self.logits.dim(1)?, self.ignore_index)?;
        let rows = map_rows([self.logits], [], [], &row::Forward { columns: &columns })?;
        let (lse, losses): (Vec<[f32; 3]>, Vec<f32>) = rows.statistics.into_iter().unzip();
        let total: f64 = losses.into_iter().map(f64::from).sum();
        let counted = columns.iter().flatten().count();
        let loss = (total / counted.max(1) as f64) as f32;
        let device = self.logits.device();
        let lse = Tensor::from_vec(lse.into_flattened(), (columns.len(), 3), device)?;
        Ok([Tensor::new(loss, device)?, lse, Tensor::new(&[counted as f32], device)?])
    }

    fn gpu(&self) -> Attempt<[Tensor; 3]> {
        let (logits, targets) = (gpu::contiguous(self.logits)?, gpu::contiguous(self.targets)?);
        let plans = plans(&logits, &targets, self.ignore_index)?;
        let shapes = [Shape::from(()), Shape::from((plans.rows, 2)), Shape::from(1)];
        let [loss, lse, one] = shapes.each_ref();
        let recipe = gpu::kept(plans, Plans::forward);
        let mut outputs = gpu::run(&[&logits, &targets], &[loss, lse, one, one], recipe)?;
        Ok([outputs.take()?, outputs.take()?, outputs.take()?])
    }
}

pub(super) struct Gradient<'a> {
    pub(super) logits: &'a Tensor,
    pub(super) saved: &'a CrossEntropy,
    pub(super) g: &'a Tensor,
    /// Whether it may take the place of the logits, which nobody else has.
    pub(super) over: bool,
}

impl Kernel for Gradient<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let CrossEntropy { targets, ignore_index, lse, counted } = self.saved;
        let columns = columns(OP, targets, self.logits.dim(1)?, *ignore_index)?;
        let (lse, counted) = (to_vec(lse)?, counted.flatten_all()?.get(0)?.to_scalar::<f32>()?);
        let (lse, _) = lse.as_chunks::<3>();
        let g = self.g.to_scalar::<f32>()? / counted.max(1.0);
        let row = row::Backward { columns: &columns, lse, g };
        if self.over { map_row_over(self.logits, &row) } else { map_row([self.logits], &row) }
    }

    fn gpu(&self) -> Attempt<Tensor> {
        let CrossEntropy { targets, ignore_index, lse, counted } = self.saved;
        let (logits, targets) = (gpu::contiguous(self.logits)?, gpu::contiguous(targets)?);
        let (plans, g) = (plans(&logits, &targets, *ignore_index)?, gpu::contiguous(self.g)?);
        let inputs = [&logits, &targets, lse, counted, &g];
        Ok(gpu::run(&inputs, &[logits.shape()], gpu::kept(plans, Plans::backward))?.take()?)
    }
}
