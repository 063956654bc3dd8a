//! Gradients of one optimizer step: accumulated over micro-batches, measured, clipped.

#![expect(clippy::cast_precision_loss, reason = "token counts are far below 2^53")]

use candle_core::{D, DType, Shape, Tensor};

use super::{Batch, Parameter, Pass, Trainable};
use crate::{Error, Result};

/// One gradient per parameter, in the parameters' order; f32 whatever the parameter is.
#[derive(Clone, Debug)]
pub struct Gradients {
    tensors: Vec<Option<Tensor>>,
    /// On a GPU, where what is done to each costs a launch: all of them end to end, and `tensors` are its parts. Only if
    /// none is absent.
    joined: Option<Tensor>,
}

impl Gradients {
    fn new(tensors: Vec<Option<Tensor>>) -> Result<Self> {
        let all: Option<Vec<&Tensor>> = tensors.iter().map(Option::as_ref).collect();
        match all {
            Some(all) if all.len() > 1 && all.iter().all(|tensor| !tensor.device().is_cpu()) => {
                let joined = join(all)?;
                let mut parts = Parts::of(&joined);
                let part = |tensor: &Option<Tensor>| {
                    tensor.as_ref().map(|tensor| parts.next(tensor.shape())).transpose()
                };
                Ok(Self { tensors: tensors.iter().map(part).collect::<Result<_>>()?, joined: Some(joined) })
            }
            _ => Ok(Self { tensors, joined: None }),
        }
    }

    /// Each by itself.
    pub(super) const fn of(tensors: Vec<Option<Tensor>>) -> Self {
        Self { tensors, joined: None }
    }

    /// `None` where no micro-batch gave a gradient.
    #[must_use]
    pub fn tensors(&self) -> &[Option<Tensor>] {
        &self.tensors
    }

    /// The Euclidean norm of each gradient.
    pub fn norms(&self) -> Result<Vec<Option<f64>>> {
        let sums = match &self.joined {
            Some(joined) => sums_of_joined(joined, &self.tensors)?,
            None => None,
        };
        let sums = match sums {
            Some(sums) => sums,
            None => sums_apart(&self.tensors)?,
        };
        let mut sums = sums.into_iter();
        let mut norm = |tensor: &Tensor| norm(tensor, sums.next().unwrap_or(f64::NAN));
        self.tensors.iter().map(|tensor| tensor.as_ref().map(&mut norm).transpose()).collect()
    }

    /// Scales all gradients so that their common norm is at most `limit`, as `torch.nn.utils.clip_grad_norm_` does.
    pub fn clip(&mut self, norms: &[Option<f64>], limit: f64) -> Result<()> {
        let scale = limit / (total_norm(norms) + 1e-6);
        if scale < 1.0 {
            let joined = self.joined.as_ref().map(|joined| joined.affine(scale, 0.0)).transpose()?;
            let mut parts = joined.as_ref().map(Parts::of);
            for tensor in self.tensors.iter_mut().flatten() {
                *tensor = match &mut parts {
                    Some(parts) => parts.next(tensor.shape())?,
                    None => tensor.affine(scale, 0.0)?,
                };
            }
            self.joined = joined;
        }
        Ok(())
    }
}

/// Tensors end to end.
fn join(tensors: impl IntoIterator<Item = impl AsRef<Tensor>>) -> Result<Tensor> {
    let flat = tensors.into_iter().map(|tensor| tensor.as_ref().flatten_all());
    Ok(Tensor::cat(&flat.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
}

/// The tensors that were joined, one after the other, as views.
struct Parts<'a> {
    joined: &'a Tensor,
    taken: usize,
}

impl<'a> Parts<'a> {
    fn of(joined: &'a Tensor) -> Self {
        Self { joined, taken: 0 }
    }

    /// The next one, which has this shape.
    fn next(&mut self, shape: &Shape) -> Result<Tensor> {
        let part = self.joined.narrow(0, self.taken, shape.elem_count())?.reshape(shape)?;
        self.taken += shape.elem_count();
        Ok(part)
    }
}

/// The norm over all gradients together.
pub(super) fn total_norm(norms: &[Option<f64>]) -> f64 {
    norms.iter().flatten().map(|norm| norm * norm).sum::<f64>().sqrt()
}

/// The sums of squares of those that are there; the device is asked once for all of them.
fn sums_apart(tensors: &[Option<Tensor>]) -> Result<Vec<f64>> {
    let sums = tensors.iter().flatten().map(sum_of_squares).collect::<Result<Vec<_>>>()?;
    if sums.is_empty() {
        return Ok(Vec::new());
    }
    Ok(Tensor::stack(&sums, 0)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

/// The same of tensors that are joined, in three launches: rows of which each tensor has a whole number are summed there, and
/// the rest here. None where such rows would be short.
fn sums_of_joined(joined: &Tensor, tensors: &[Option<Tensor>]) -> Result<Option<Vec<f64>>> {
    const SHORT: usize = 64;
    let counts = || tensors.iter().flatten().map(Tensor::elem_count);
    let row = counts().fold(0, greatest_divisor);
    if row < SHORT {
        return Ok(None);
    }
    let rows = joined.reshape(((), row))?.sqr()?.sum(D::Minus1)?.to_vec1::<f32>()?;
    let mut rows = rows.into_iter().map(f64::from);
    Ok(Some(counts().map(|count| rows.by_ref().take(count / row).sum()).collect()))
}

/// Of both (Euclid).
const fn greatest_divisor(mut a: usize, mut b: usize) -> usize {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Summed by rows first, which keeps the rounding error of long sums small.
fn sum_of_squares(tensor: &Tensor) -> Result<Tensor> {
    let squares = tensor.sqr()?;
    let rows = if squares.rank() > 1 { squares.sum(D::Minus1)? } else { squares };
    Ok(rows.sum_all()?)
}

/// The norm of one tensor from its sum of squares. Squares can leave the range of f32 although the norm does not;
/// then the tensor is first scaled by its largest magnitude.
fn norm(tensor: &Tensor, sum: f64) -> Result<f64> {
    const PRECISE: std::ops::Range<f64> = 1e-30..f32::MAX as f64;
    if PRECISE.contains(&sum) || sum.is_nan() || tensor.elem_count() == 0 {
        return Ok(sum.sqrt());
    }
    let largest = f64::from(tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?);
    if largest == 0.0 || !largest.is_finite() {
        return Ok(largest);
    }
    let scaled = sum_of_squares(&tensor.affine(1.0 / largest, 0.0)?)?.to_scalar::<f32>()?;
    Ok(f64::from(scaled).sqrt() * largest)
}

/// Loss and gradients over several micro-batches, exactly those of one batch of all their sequences: with nᵢ counted
/// tokens in micro-batch i and N in all, the gradient of Σ (nᵢ/N) · lossᵢ. (The mean of the losses would weigh the
/// tokens of short sequences more.)
///
/// `seeds` gives each micro-batch its dropout seed. Fails, naming the step, on a loss that is not finite.
pub fn accumulate(
    model: &dyn Trainable,
    batches: &[Batch],
    step: usize,
    seeds: impl Fn(usize) -> u64,
) -> Result<(f64, Gradients)> {
    let parameters = model.parameters();
    let total: usize = batches.iter().map(|batch| batch.tokens).sum();
    let mut tensors: Vec<Option<Tensor>> = vec![None; parameters.len()];
    let mut sum = 0.0;
    for (index, batch) in batches.iter().enumerate().filter(|(_, batch)| batch.tokens > 0) {
        let weight = batch.tokens as f64 / total as f64;
        let loss = model.loss(batch, Pass::Train { seed: seeds(index) })?;
        let mut store = candle_fused::backward(&loss, weight)?;
        // A GPU is asked for the loss only when the backward is queued behind it.
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            return Err(Error::NonFinite { step, what: blame_loss(parameters)? });
        }
        sum += weight * value;
        for (parameter, slot) in parameters.iter().zip(&mut tensors) {
            let Some(gradient) = store.remove(parameter.var.as_tensor()) else {
                continue;
            };
            let gradient = gradient.detach().to_dtype(DType::F32)?;
            *slot = Some(match slot.take() {
                Some(before) => (before + gradient)?,
                None => gradient,
            });
        }
    }
    Ok((sum, Gradients::new(tensors)?))
}

/// A loss can be spoiled by the data's numbers or by a parameter that an earlier update spoiled: say which.
fn blame_loss(parameters: &[Parameter]) -> Result<String> {
    for parameter in parameters {
        let value = parameter.var.as_detached_tensor().to_dtype(DType::F32)?;
        if Gradients::of(vec![Some(value)]).norms()?.into_iter().flatten().any(|norm| !norm.is_finite()) {
            return Ok(format!("parameter `{}`, and with it the loss,", parameter.name));
        }
    }
    Ok("the loss".to_owned())
}

/// The first gradient that is not finite, by its parameter's name.
pub(super) fn non_finite<'a>(parameters: &'a [Parameter], norms: &[Option<f64>]) -> Option<&'a str> {
    let broken = |(_, norm): &(&Parameter, &Option<f64>)| norm.is_some_and(|norm| !norm.is_finite());
    parameters.iter().zip(norms).find(broken).map(|(parameter, _)| parameter.name.as_str())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn norm_of(values: &[f32]) -> f64 {
        let tensor = Tensor::new(values, &Device::Cpu).unwrap();
        Gradients::of(vec![Some(tensor)]).norms().unwrap()[0].unwrap()
    }

    #[test]
    fn norms_survive_extreme_magnitudes() {
        for scale in [1e-30_f32, 1e-18, 1.0, 1e18, 1e30] {
            let got = norm_of(&[3.0 * scale, -4.0 * scale]);
            let expected = 5.0 * f64::from(scale);
            assert!((got / expected - 1.0).abs() < 1e-6, "{got} is not {expected}");
        }
        assert_eq!(norm_of(&[0.0, 0.0]).to_bits(), 0.0_f64.to_bits());
        assert_eq!(norm_of(&[]).to_bits(), 0.0_f64.to_bits());
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!norm_of(&[1.0, broken, 2.0]).is_finite());
            assert!(!norm_of(&[broken, 0.0]).is_finite());
            assert!(!norm_of(&[1e30, broken]).is_finite());
        }
    }

    #[test]
    fn clipping_scales_all_gradients_together() {
        let tensor = |values: &[f32]| Some(Tensor::new(values, &Device::Cpu).unwrap());
        let tensors = vec![tensor(&[3.0, 0.0]), None, tensor(&[4.0])];
        let mut gradients = Gradients::of(tensors);
        let norms = gradients.norms().unwrap();
        assert!((total_norm(&norms) - 5.0).abs() < 1e-12);
        gradients.clip(&norms, 10.0).unwrap();
        assert_eq!(gradients.norms().unwrap(), norms);
        gradients.clip(&norms, 1.0).unwrap();
        let clipped = gradients.norms().unwrap();
        assert!((total_norm(&clipped) - 1.0).abs() < 1e-6);
        assert!((clipped[0].unwrap() - 0.6).abs() < 1e-6);
    }

    /// Kept end to end, as on a GPU, they are what they are apart: of any sizes, and of sizes with a large common divisor.
    #[test]
    fn joined_gradients_are_clipped_as_others() {
        for [first, second] in [[4, 1], [192, 320]] {
            let tensor = |count: u32| Tensor::arange(0, count, &Device::Cpu).unwrap().to_dtype(DType::F32);
            let tensors = [tensor(first).unwrap().reshape((2, ())).unwrap(), tensor(second + 1).unwrap()];
            let tensors = [tensors[0].clone(), tensors[1].narrow(0, 1, second as usize).unwrap()];
            let joined = join(&tensors).unwrap();
            let in_rows = sums_of_joined(&joined, &tensors.each_ref().map(|x| Some(x.clone()))).unwrap();
            assert_eq!(in_rows.is_some(), first == 192);
            let mut parts = Parts::of(&joined);
            let views = tensors.each_ref().map(|tensor| Some(parts.next(tensor.shape()).unwrap()));
            let mut kept = Gradients { tensors: views.into(), joined: Some(joined.clone()) };
            let mut apart = Gradients::of(tensors.map(Some).into());
            let norms = apart.norms().unwrap();
            // Squares of whole numbers: every sum of them is exact.
            assert_eq!(kept.norms().unwrap(), norms);
            kept.clip(&norms, 1.0).unwrap();
            apart.clip(&norms, 1.0).unwrap();
            let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (kept, apart) in kept.tensors().iter().flatten().zip(apart.tensors().iter().flatten()) {
                assert_eq!((kept.dims(), values(kept)), (apart.dims(), values(apart)));
            }
            let apart = join(apart.tensors().iter().flatten()).unwrap();
            assert_eq!(values(&kept.joined.unwrap()), values(&apart));
        }
    }
}
