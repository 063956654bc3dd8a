//! The mean negative log-likelihood of targets under the logits `x·Wᵀ`, without ever holding the logits of all rows:
//! `loss = mean(lse_i − z_{i,target_i})` over the counted rows, `z = x·Wᵀ` with `W` frozen.
//!
//! Rows are taken in blocks. A block's logits give its loss and, where `x` is tracked, at once its part of the gradient,
//! `dx_i = (softmax(z_i) − onehot(target_i))/n · W`, before the next block's take their place (as Liger Kernel does, Hsu
//! et al., 2024). The backward multiplies what was saved by the gradient of the loss. Nothing is computed twice: the cost
//! is that of the two products. Rows that do not count are left out of them, and their gradient is 0.

use candle_core::{Result, Tensor};

use super::cross_entropy::{self, CrossEntropy};
use super::low_rank::{self, Base, rows};
use crate::backend::{self, Attempt};
use crate::check;
use crate::graph::{self, Backward, tracked};

const OP: &str = "linear_cross_entropy";

/// Logits in a block, if that is more than `MIN_ROWS` rows.
const BLOCK: usize = 1 << 24;
const MIN_ROWS: usize = 128;

/// [`cross_entropy`](crate::cross_entropy) of the logits `x·Wᵀ`, for `x [..., d]` (f32, f16 or bf16), a frozen
/// `weight [v, d]` of its dtype and as many `targets` (i64 or u32) as `x` has rows; an f32 scalar. Logits are rounded to
/// `x`'s dtype, as a layer of their own would.
///
/// # Errors
/// Other shapes, dtypes or devices; a target outside `0..v` that is not `ignore_index`.
pub fn linear_cross_entropy(
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    ignore_index: Option<i64>,
) -> Result<Tensor> {
    let columns = check(x, weight, targets, ignore_index)?;
    let reference = || reference(x, weight, targets, ignore_index);
    backend::dispatch(OP, x, || fused(x, weight, targets, &columns), reference)
}

fn check(
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    ignore_index: Option<i64>,
) -> Result<Vec<Option<usize>>> {
    low_rank::check_base(OP, x, weight, None)?;
    let count = x.dims().iter().rev().skip(1).product();
    check::shape(OP, "targets", targets, &[count])?;
    check::device(OP, "targets", targets, x.device())?;
    cross_entropy::check_targets(OP, targets)?;
    cross_entropy::columns(OP, targets, weight.dim(0)?, ignore_index)
}

/// [`linear_cross_entropy`] in plain Candle operations, which hold all logits.
pub fn reference(x: &Tensor, weight: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Result<Tensor> {
    check(x, weight, targets, ignore_index)?;
    let logits = low_rank::reference_base(&rows(x)?, weight, None)?;
    cross_entropy::reference(&logits, targets, ignore_index)
}

fn fused(x: &Tensor, weight: &Tensor, targets: &Tensor, columns: &[Option<usize>]) -> Attempt<Tensor> {
    let weight = weight.detach();
    let counted = Counted::of(&rows(&x.detach())?, targets, columns)?;
    let Some(Counted { x: counted_x, targets, .. }) = &counted else {
        let saved = LinearCrossEntropy { gradient: None };
        return Ok(graph::record1(x, Tensor::new(0f32, x.device())?, saved)?);
    };
    let (count, vocabulary) = (counted_x.dim(0)?, weight.dim(0)?);
    let size = (BLOCK / vocabulary.max(1)).max(MIN_ROWS);
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for first in (0..count).step_by(size) {
        let rows = size.min(count - first);
        let x_block = counted_x.narrow(0, first, rows)?;
        let base = Base { left: &x_block, right: &weight.t()?, bias: None };
        let logits = backend::run(x.device(), &base)?;
        let targets = targets.narrow(0, first, rows)?;
        let forward = cross_entropy::Forward { logits: &logits, targets: &targets, ignore_index: None };
        let [loss, lse, block_counted] = backend::run(x.device(), &forward)?;
        // The part of the mean that is this block's; exactly 1 if that is all.
        let share = share(rows, count);
        losses.push((loss * share)?);
        if x.track_op() {
            let saved = CrossEntropy { targets, ignore_index: None, lse, counted: block_counted };
            let g = &Tensor::full(share, (), x.device())?.to_dtype(losses[0].dtype())?;
            let gradient = cross_entropy::Gradient { logits: &logits, saved: &saved, g };
            let gradient = backend::run(x.device(), &gradient)?;
            drop(logits);
            let base = Base { left: &gradient, right: &weight, bias: None };
            gradients.push(backend::run(x.device(), &base)?);
        }
    }
    let loss = Tensor::stack(&losses, 0)?.sum_all()?;
    let gradient = match counted {
        Some(counted) if x.track_op() => Some(counted.scatter(Tensor::cat(&gradients, 0)?)?),
        _ => None,
    };
    Ok(graph::record1(x, loss, LinearCrossEntropy { gradient })?)
}

#[expect(clippy::cast_precision_loss, reason = "numbers of rows are far below 2^52")]
fn share(rows: usize, count: usize) -> f64 {
    rows as f64 / count as f64
}

/// The rows that count.
struct Counted {
    x: Tensor,
    targets: Tensor,
    /// Which rows of how many, if they are not all.
    indices: Option<(Tensor, usize)>,
}

impl Counted {
    /// `None` if no row counts.
    fn of(x: &Tensor, targets: &Tensor, columns: &[Option<usize>]) -> Result<Option<Self>> {
        let indices =
            (0u32..).zip(columns).filter_map(|(row, column)| column.map(|_| row)).collect::<Vec<_>>();
        if indices.is_empty() {
            return Ok(None);
        }
        if indices.len() == columns.len() {
            return Ok(Some(Self { x: x.clone(), targets: targets.clone(), indices: None }));
        }
        let indices = Tensor::new(indices, x.device())?;
        let (counted, targets) =
            (x.contiguous()?.index_select(&indices, 0)?, targets.contiguous()?.index_select(&indices, 0)?);
        Ok(Some(Self { x: counted, targets, indices: Some((indices, columns.len())) }))
    }

    /// The gradient of all rows from that of the counted ones.
    fn scatter(&self, gradient: Tensor) -> Result<Tensor> {
        match &self.indices {
            None => Ok(gradient),
            Some((indices, rows)) => {
                let all = Tensor::zeros((*rows, gradient.dim(1)?), gradient.dtype(), gradient.device())?;
                all.index_add(indices, &gradient, 0)
            }
        }
    }
}

struct LinearCrossEntropy {
    /// That of the rows of `x` for a loss whose own gradient is 1; `None` if it is 0.
    gradient: Option<Tensor>,
}

impl Backward<1> for LinearCrossEntropy {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let gradient = || match &self.gradient {
            None => x.zeros_like(),
            Some(gradient) => {
                let g = f64::from(g.to_scalar::<f32>()?);
                let gradient = gradient.reshape(x.shape())?;
                // The loss that is trained is this one, as a rule.
                if g.to_bits() == 1f64.to_bits() { Ok(gradient) } else { gradient * g }
            }
        };
        Ok([tracked(x, gradient)?])
    }
}
