//! The mean negative log-likelihood of targets under the logits `x·Wᵀ`, without ever holding the logits of all rows:
//! `loss = mean(lse_i − z_{i,target_i})` over the counted rows, `z = x·Wᵀ` with `W` frozen.
//!
//! Rows are taken in blocks. A block's logits give its loss and, where `x` is tracked, at once its part of the gradient,
//! `dx_i = (softmax(z_i) − onehot(target_i))/n · W`, before the next block's take their place (as Liger Kernel does, Hsu
//! et al., 2024). The backward multiplies what was saved by the gradient of the loss. Nothing is computed twice: the cost
//! is that of the two products. The gradient of rows that do not count is 0.
//!
//! On the processor rows that do not count are left out of the products. A GPU is not waited for to know them: all rows
//! take part, and how many count is a number on the device.

use candle_core::{DType, Result, Tensor};

use super::cross_entropy::{self, CrossEntropy};
use super::low_rank::{self, Base, rows};
use crate::backend::{self, Attempt, Kernel};
use crate::check;
use crate::graph::{self, Backward, tracked};

const OP: &str = "linear_cross_entropy";

/// Logits in a block, if that is more than `MIN_ROWS` rows: for the processor's caches, and to fill a GPU.
const BLOCK: usize = 1 << 24;
const GPU_BLOCK: usize = 1 << 27;
/// A GPU's blocks are multiples of it, as the tiles of its products are.
const MIN_ROWS: usize = 128;

/// [`cross_entropy`](crate::cross_entropy) of the logits `x·Wᵀ`, for `x [..., d]` (f32, f16 or bf16), a frozen
/// `weight [v, d]` of its dtype (or of 16 bits beside f32, as for [`frozen_linear`](crate::frozen_linear)) and as many
/// `targets` (i64 or u32) as `x` has rows; an f32 scalar. Logits are rounded to `x`'s dtype, as a layer of their own would.
///
/// # Errors
/// Other shapes, dtypes or devices; a target outside `0..v` that is not `ignore_index`: on a GPU, which would have to be
/// waited for to know, such a target makes the loss NaN instead.
pub fn linear_cross_entropy(
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    ignore_index: Option<i64>,
) -> Result<Tensor> {
    check(x, weight, targets)?;
    let reference = || reference(x, weight, targets, ignore_index);
    backend::dispatch(OP, x, || fused(x, weight, targets, ignore_index), reference)
}

fn check(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<()> {
    low_rank::check_base(OP, x, weight, None)?;
    let count = x.dims().iter().rev().skip(1).product();
    check::shape(OP, "targets", targets, &[count])?;
    check::device(OP, "targets", targets, x.device())?;
    cross_entropy::check_targets(OP, targets)
}

/// [`linear_cross_entropy`] in plain Candle operations, which hold all logits.
pub fn reference(x: &Tensor, weight: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Result<Tensor> {
    check(x, weight, targets)?;
    cross_entropy::columns(OP, targets, weight.dim(0)?, ignore_index)?;
    let logits = low_rank::reference_base(&rows(x)?, weight, None)?;
    cross_entropy::reference(&logits, targets, ignore_index)
}

fn fused(x: &Tensor, weight: &Tensor, targets: &Tensor, ignore_index: Option<i64>) -> Attempt<Tensor> {
    let (rows, weight) = (rows(&x.detach())?, weight.detach());
    let forward = Forward { x: &rows, weight: &weight, targets, ignore_index, with_gradient: x.track_op() };
    let (loss, gradient) = backend::run(x.device(), &forward)?;
    Ok(graph::record1(x, loss, LinearCrossEntropy { gradient })?)
}

struct Forward<'a> {
    /// `[n, d]`
    x: &'a Tensor,
    weight: &'a Tensor,
    targets: &'a Tensor,
    ignore_index: Option<i64>,
    with_gradient: bool,
}

/// What a block leaves.
struct Block {
    /// Its rows' mean.
    loss: Tensor,
    /// How many of its rows count, `[1]` in f32.
    counted: Tensor,
    /// That of its rows of `x`.
    gradient: Option<Tensor>,
}

impl Forward<'_> {
    /// Some rows of `x`, with as many targets. The gradient is that of a loss of which these rows are `g`, divided by
    /// `total` if that is given, and else by their own count.
    fn block(
        &self,
        x: &Tensor,
        targets: &Tensor,
        ignore_index: Option<i64>,
        g: &Tensor,
        total: Option<&Tensor>,
    ) -> Attempt<Block> {
        let base = Base { left: x, right: &self.weight.t()?, bias: None };
        let logits = backend::run(x.device(), &base)?;
        let forward = cross_entropy::Forward { logits: &logits, targets, ignore_index };
        let [loss, lse, counted] = backend::run(x.device(), &forward)?;
        if !self.with_gradient {
            return Ok(Block { loss, counted, gradient: None });
        }
        let divisor = total.unwrap_or(&counted).clone();
        let saved = CrossEntropy { targets: targets.clone(), ignore_index, lse, counted: divisor };
        let gradient = cross_entropy::Gradient { logits: &logits, saved: &saved, g, over: true };
        let gradient = backend::run(x.device(), &gradient)?;
        drop(logits);
        let base = Base { left: &gradient, right: self.weight, bias: None };
        let gradient = Some(backend::run(x.device(), &base)?);
        Ok(Block { loss, counted, gradient })
    }

    /// How many targets count, at least 1, as `[1]` in f32.
    fn counted(&self) -> Result<Tensor> {
        let device = self.targets.device();
        let ignored = match (self.ignore_index, self.targets.dtype()) {
            (Some(ignored), DType::I64) => Some(Tensor::full(ignored, 1, device)?),
            (Some(ignored), _) => {
                u32::try_from(ignored).ok().map(|ignored| Tensor::full(ignored, 1, device)).transpose()?
            }
            (None, _) => None,
        };
        match ignored {
            Some(ignored) => {
                let counts = self.targets.broadcast_ne(&ignored)?.to_dtype(DType::F32)?;
                counts.sum_all()?.maximum(1f64)?.reshape(1)
            }
            None => Tensor::ones(1, DType::F32, device)? * share(self.targets.elem_count(), 1),
        }
    }

    /// The output of [`Kernel::gpu`], from blocks of so many rows.
    fn in_blocks(&self, size: usize) -> Attempt<(Tensor, Option<Tensor>)> {
        let (n, device) = (self.x.dim(0)?, self.x.device());
        if n == 0 {
            return Ok((Tensor::zeros((), DType::F32, device)?, None));
        }
        let total = self.counted()?;
        let one = Tensor::ones((), DType::F32, device)?;
        let (mut losses, mut counts, mut gradients) = (Vec::new(), Vec::new(), Vec::new());
        for first in (0..n).step_by(size) {
            let rows = size.min(n - first);
            let (x, targets) = (self.x.narrow(0, first, rows)?, self.targets.narrow(0, first, rows)?);
            let block = self.block(&x, &targets, self.ignore_index, &one, Some(&total))?;
            losses.push(block.loss.reshape(1)?);
            counts.push(block.counted);
            gradients.extend(block.gradient);
        }
        let shares = Tensor::cat(&counts, 0)?.broadcast_div(&total)?;
        let loss = (Tensor::cat(&losses, 0)? * shares)?.sum_all()?;
        let gradient = self.with_gradient.then(|| Tensor::cat(&gradients, 0));
        Ok((loss, gradient.transpose()?))
    }
}

impl Kernel for Forward<'_> {
    /// The loss, and the gradient of the rows of `x` for a loss whose own gradient is 1; `None` if it is not wanted or 0.
    type Output = (Tensor, Option<Tensor>);

    fn cpu(&self) -> Result<Self::Output> {
        let columns = cross_entropy::columns(OP, self.targets, self.weight.dim(0)?, self.ignore_index)?;
        let device = self.x.device();
        let Some(counted) = Counted::of(self.x, self.targets, &columns)? else {
            return Ok((Tensor::new(0f32, device)?, None));
        };
        let count = counted.x.dim(0)?;
        let size = (BLOCK / self.weight.dim(0)?.max(1)).max(MIN_ROWS);
        let (mut losses, mut gradients) = (Vec::new(), Vec::new());
        for first in (0..count).step_by(size) {
            let rows = size.min(count - first);
            let (x, targets) = (counted.x.narrow(0, first, rows)?, counted.targets.narrow(0, first, rows)?);
            // The part of the mean that is this block's; exactly 1 if that is all.
            let share = share(rows, count);
            let g = Tensor::full(share, (), device)?.to_dtype(DType::F32)?;
            let block = self.block(&x, &targets, None, &g, None)?;
            losses.push((block.loss * share)?);
            gradients.extend(block.gradient);
        }
        let loss = Tensor::stack(&losses, 0)?.sum_all()?;
        let gradient = self.with_gradient.then(|| counted.scatter(Tensor::cat(&gradients, 0)?));
        Ok((loss, gradient.transpose()?))
    }

    fn gpu(&self) -> Attempt<Self::Output> {
        let size = (GPU_BLOCK / self.weight.dim(0)?.max(1) / MIN_ROWS).max(1) * MIN_ROWS;
        self.in_blocks(size)
    }
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
    /// As [`Forward`] leaves it.
    gradient: Option<Tensor>,
}

impl Backward<1> for LinearCrossEntropy {
    fn op(&self) -> &'static str {
        OP
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let gradient = || match &self.gradient {
            None => x.zeros_like(),
            Some(gradient) => Ok(backend::run(x.device(), &Scaled { gradient, g })?.reshape(x.shape())?),
        };
        Ok([tracked(x, gradient)?])
    }
}

/// `g · gradient` for a scalar `g`.
struct Scaled<'a> {
    gradient: &'a Tensor,
    g: &'a Tensor,
}

impl Kernel for Scaled<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        let g = f64::from(self.g.to_scalar::<f32>()?);
        // The loss that is trained is this one, as a rule.
        if g.to_bits() == 1f64.to_bits() { Ok(self.gradient.clone()) } else { self.gradient * g }
    }

    /// The device is not waited for to know `g`.
    fn gpu(&self) -> Attempt<Tensor> {
        Ok(self.gradient.broadcast_mul(&self.g.to_dtype(self.gradient.dtype())?)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use candle_core::Device;

    use super::*;
    use crate::backend::simulate;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The blocks of a GPU, none of whose sizes divides the rows, against the processor's way.
    #[test]
    fn blocks_are_parts_of_one_mean() {
        let random = |dims: (usize, usize)| Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap();
        let (x, weight) = (random((9, 5)), random((7, 5)));
        let targets = Tensor::new(&[1u32, 2, 6, 2, 2, 0, 5, 2, 3], &Device::Cpu).unwrap();
        let wide = targets.to_dtype(DType::I64).unwrap();
        let all_ignored = wide.zeros_like().unwrap();
        for (targets, ignore_index) in [
            (&targets, Some(2)),
            (&targets, Some(-100)),
            (&targets, None),
            (&wide, Some(2)),
            (&wide, Some(-100)),
            (&wide, None),
            (&all_ignored, Some(0)),
        ] {
            let forward = Forward { x: &x, weight: &weight, targets, ignore_index, with_gradient: true };
            let (expected, gradient) = forward.cpu().unwrap();
            let gradient = gradient.unwrap_or_else(|| x.zeros_like().unwrap());
            for size in [2, 4, 9, 100] {
                let (loss, own) = simulate(|| forward.in_blocks(size)).unwrap();
                let pairs = values(&loss).into_iter().zip(values(&expected));
                for (got, expected) in pairs.chain(values(&own.unwrap()).into_iter().zip(values(&gradient))) {
                    assert!((got - expected).abs() < 1e-5, "{got} {expected} {ignore_index:?} {size}");
                }
            }
        }
    }

    /// Nothing is read back: on a GPU a target out of range shows in the loss alone.
    #[test]
    fn a_target_out_of_range_makes_the_loss_nan() {
        let x = Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
        let weight = Tensor::ones((4, 2), DType::F32, &Device::Cpu).unwrap();
        let targets = Tensor::new(&[1i64, 4, -100], &Device::Cpu).unwrap();
        let loss = |targets| linear_cross_entropy(&x, &weight, targets, Some(-100));
        assert!(simulate(|| loss(&targets)).unwrap().to_scalar::<f32>().unwrap().is_nan());
        let error = loss(&targets).unwrap_err().to_string();
        assert!(error.contains("the target of row 1 must be in 0..4, got 4"), "{error}");
    }

    #[test]
    fn the_gradient_is_scaled_by_that_of_the_loss() {
        let gradient = Tensor::new(&[1f32, -2.0], &Device::Cpu).unwrap();
        for g in [1f32, 0.5] {
            let scaled = Scaled { gradient: &gradient, g: &Tensor::new(g, &Device::Cpu).unwrap() };
            let expected = vec![g, -2.0 * g];
            assert_eq!(values(&scaled.cpu().unwrap()), expected);
            assert_eq!(values(&scaled.gpu().unwrap()), expected);
        }
    }
}
