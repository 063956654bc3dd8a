//! One step of Adam or AdamW for one tensor, in one pass, with torch's arithmetic and order:
//!
//! ```text
//! θ ← shrink·θ          g ← g + l2·θ
//! m ← m + (1 − β₁)(g − m)          v ← β₂ v + (1 − β₂) g²
//! θ ← θ − rate · m / (√v / root + ε)
//! ```
//!
//! Kingma & Ba, "Adam" (2015); Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019). It is a step of an
//! optimizer, and has no gradient.

use candle_core::{DType, Result, Tensor, bail};

use crate::backend::cpu::map_elements;
use crate::backend::{self, Attempt, Kernel};
use crate::check;
use crate::cpu::elements as row;

const OP: &str = "adam";

/// The constants of a step, with learning rate η, decay λ, and t steps taken, this one included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// β₁
    pub beta1: f64,
    /// β₂
    pub beta2: f64,
    /// ε
    pub eps: f64,
    /// η/(1 − β₁ᵗ)
    pub rate: f64,
    /// √(1 − β₂ᵗ)
    pub root: f64,
    /// 1 − η·λ in AdamW, else 1.
    pub shrink: f64,
    /// λ in Adam with L2 decay, else 0.
    pub l2: f64,
}

/// The next parameter θ and moments m and v, from these and the gradient: f32 tensors of one shape.
///
/// # Errors
/// Another dtype, or tensors of different shapes or devices.
pub fn adam(
    value: &Tensor,
    first: &Tensor,
    second: &Tensor,
    gradient: &Tensor,
    step: AdamStep,
) -> Result<[Tensor; 3]> {
    check::dtype(OP, "value", value, DType::F32)?;
    for (name, tensor) in [("first", first), ("second", second), ("gradient", gradient)] {
        check::like(OP, name, tensor, value, value.dims())?;
    }
    Ok(backend::run(value.device(), &Step { value, first, second, gradient, constants: step })?)
}

struct Step<'a> {
    value: &'a Tensor,
    first: &'a Tensor,
    second: &'a Tensor,
    gradient: &'a Tensor,
    constants: AdamStep,
}

impl Step<'_> {
    fn composed(&self) -> Result<[Tensor; 3]> {
        let AdamStep { beta1, beta2, eps, rate, root, shrink, l2 } = self.constants;
        let [value, first, second, gradient] =
            [self.value, self.first, self.second, self.gradient].map(Tensor::detach);
        let gradient = if l2 == 0.0 { gradient } else { (gradient + (&value * l2)?)? };
        let first = (&first + ((&gradient - &first)? * (1.0 - beta1))?)?;
        let second = ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let denominator = second.sqrt()?.affine(1.0 / root, eps)?;
        let value = ((value * shrink)? - ((&first / denominator)? * rate)?)?;
        Ok([value, first, second])
    }
}

impl Kernel for Step<'_> {
    type Output = [Tensor; 3];

    #[expect(clippy::cast_possible_truncation, reason = "the arithmetic is f32's")]
    fn cpu(&self) -> Result<[Tensor; 3]> {
        let AdamStep { beta1, beta2, eps, rate, root, shrink, l2 } = self.constants;
        let [new1, old2, new2] = [1.0 - beta1, beta2, 1.0 - beta2].map(|x| x as f32);
        let [eps, rate, part, shrink, l2] = [eps, rate, 1.0 / root, shrink, l2].map(|x| x as f32);
        let inputs = [self.value, self.first, self.second, self.gradient].map(Tensor::detach);
        let step = row::Adam { new1, old2, new2, eps, rate, part, shrink, l2 };
        match map_elements(inputs.each_ref(), [true; 3], &step)? {
            [Some(value), Some(first), Some(second)] => Ok([value, first, second]),
            _ => bail!("{OP}: the loop left no result"),
        }
    }

    /// Candle's operations, one after the other.
    fn gpu(&self) -> Attempt<[Tensor; 3]> {
        Ok(self.composed()?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use candle_core::{D, Device};

    use super::*;

    /// The fused pass against the composition, and both decays.
    #[test]
    fn the_pass_is_the_composition() {
        for n in [0usize, 1, 33, 5000] {
            let tensor = || Tensor::randn(0f32, 1.0, (3, n), &Device::Cpu).unwrap();
            let [value, first, gradient] = [tensor(), tensor(), tensor()];
            let second = tensor().sqr().unwrap();
            for (shrink, l2) in [(1.0, 0.0), (0.99, 0.0), (1.0, 0.1)] {
                let step =
                    AdamStep { beta1: 0.9, beta2: 0.999, eps: 1e-8, rate: 2e-3, root: 0.3, shrink, l2 };
                let got = adam(&value, &first, &second, &gradient, step).unwrap();
                let (value, first, second, gradient) = (&value, &first, &second, &gradient);
                let expected = Step { value, first, second, gradient, constants: step }.composed().unwrap();
                for (got, expected) in got.iter().zip(&expected) {
                    assert_eq!(got.dims(), [3, n]);
                    if n > 0 {
                        let difference = (got - expected).unwrap().abs().unwrap();
                        let greatest = difference.flatten_all().unwrap().max(D::Minus1).unwrap();
                        assert!(greatest.to_scalar::<f32>().unwrap() <= 1e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn bad_input_is_an_error() {
        let t = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
        let step = AdamStep { beta1: 0.9, beta2: 0.9, eps: 1e-8, rate: 1.0, root: 1.0, shrink: 1.0, l2: 0.0 };
        let error = adam(&t(&[2]), &t(&[2]), &t(&[3]), &t(&[2]), step).unwrap_err().to_string();
        assert_eq!(error.lines().next(), Some("adam: second must be [2], got [3]"));
    }
}
