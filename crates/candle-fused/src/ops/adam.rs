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

use candle_core::{DType, Result, Tensor, Var, bail};
use candlewick_kernels::adam::Adam as Plans;

use crate::backend::cpu::map_elements;
use crate::backend::{self, Attempt, DeviceKind, Failure, Kernel, gpu};
use crate::check;
use crate::cpu::elements as row;
use crate::telemetry;

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

/// Takes a step with the parameter θ, in its place, and returns the next moments m and v. All are in f32 and of one shape.
///
/// # Errors
/// Another dtype, or tensors of different shapes or devices.
pub fn adam(
    value: &Var,
    first: &Tensor,
    second: &Tensor,
    gradient: &Tensor,
    step: AdamStep,
) -> Result<[Tensor; 2]> {
    let value_now = value.as_detached_tensor();
    check::dtype(OP, "value", &value_now, DType::F32)?;
    for (name, tensor) in [("first", first), ("second", second), ("gradient", gradient)] {
        check::like(OP, name, tensor, &value_now, value.dims())?;
    }
    let [first, second, gradient] = [first, second, gradient].map(Tensor::detach);
    if value.elem_count() == 0 {
        return Ok([first, second]);
    }
    let step = Step { value, first, second, gradient, constants: step };
    match backend::run(value.device(), &step) {
        Ok(moments) => Ok(moments),
        Err(Failure::Tensor(error)) => Err(error),
        Err(Failure::Device(error)) => {
            telemetry::warn_once(OP, DeviceKind::of(value.device()), &error);
            step.composed()
        }
    }
}

struct Step<'a> {
    value: &'a Var,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    constants: AdamStep,
}

impl Step<'_> {
    /// In plain Candle operations.
    fn composed(&self) -> Result<[Tensor; 2]> {
        let AdamStep { beta1, beta2, eps, rate, root, shrink, l2 } = self.constants;
        let (value, first, second) = (self.value.as_detached_tensor(), &self.first, &self.second);
        let gradient = if l2 == 0.0 { self.gradient.clone() } else { (&self.gradient + (&value * l2)?)? };
        let first = (first + ((&gradient - first)? * (1.0 - beta1))?)?;
        let second = ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
        let denominator = second.sqrt()?.affine(1.0 / root, eps)?;
        self.value.set(&((value * shrink)? - ((&first / denominator)? * rate)?)?)?;
        Ok([first, second])
    }

    #[expect(clippy::cast_possible_truncation, reason = "the arithmetic is f32's")]
    fn plans(&self) -> Plans {
        let AdamStep { beta1, beta2, eps, rate, root, shrink, l2 } = self.constants;
        let [new1, old2, new2] = [1.0 - beta1, beta2, 1.0 - beta2].map(|x| x as f32);
        let [eps, rate, part, shrink, l2] = [eps, rate, 1.0 / root, shrink, l2].map(|x| x as f32);
        Plans { elements: self.value.elem_count(), new1, old2, new2, eps, rate, part, shrink, l2 }
    }
}

impl Kernel for Step<'_> {
    type Output = [Tensor; 2];

    fn cpu(&self) -> Result<[Tensor; 2]> {
        let inputs = [&self.value.as_detached_tensor(), &self.first, &self.second, &self.gradient];
        match map_elements(inputs, [true; 3], &row::Adam(self.plans()))? {
            [Some(value), Some(first), Some(second)] => {
                self.value.set(&value)?;
                Ok([first, second])
            }
            _ => bail!("{OP}: the loop left no result"),
        }
    }

    fn gpu(&self) -> Attempt<[Tensor; 2]> {
        let value = self.value.as_detached_tensor();
        if !value.is_contiguous() {
            return Ok(self.composed()?);
        }
        let [first, second, gradient] = [&self.first, &self.second, &self.gradient].map(gpu::contiguous);
        let (plans, shape) = (self.plans(), value.shape());
        // Each step has its own constants: a plan is not worth keeping.
        let recipe = |tuning| plans.step(tuning);
        let mut outputs = gpu::run_in_place(&[&first?, &second?, &gradient?, &value], &[shape; 3], recipe)?;
        let _in_place = outputs.take()?;
        Ok([outputs.take()?, outputs.take()?])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use candle_core::{D, Device};

    use super::*;
    use crate::backend::simulate;

    /// The fused pass, and a simulated GPU's kernel, against the composition, with both decays.
    #[test]
    fn the_pass_is_the_composition() {
        for n in [0usize, 1, 33, 5000] {
            let tensor = || Tensor::randn(0f32, 1.0, (3, n), &Device::Cpu).unwrap();
            let [start, first, gradient] = [tensor(), tensor(), tensor()];
            let second = tensor().sqr().unwrap();
            for (shrink, l2) in [(1.0, 0.0), (0.99, 0.0), (1.0, 0.1)] {
                let constants =
                    AdamStep { beta1: 0.9, beta2: 0.999, eps: 1e-8, rate: 2e-3, root: 0.3, shrink, l2 };
                let outcome = |step: &dyn Fn(Step) -> [Tensor; 2]| {
                    let value = Var::from_tensor(&start).unwrap();
                    let [first, second, gradient] = [&first, &second, &gradient].map(Tensor::clone);
                    let [first, second] = step(Step { value: &value, first, second, gradient, constants });
                    [value.as_detached_tensor(), first, second]
                };
                let by_adam = |s: Step| adam(s.value, &s.first, &s.second, &s.gradient, s.constants).unwrap();
                let expected = match n {
                    0 => outcome(&|step| [step.first, step.second]),
                    _ => outcome(&|step| step.composed().unwrap()),
                };
                for got in [outcome(&by_adam), simulate(|| outcome(&|step| step.gpu().unwrap()))] {
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
    }

    #[test]
    fn bad_input_is_an_error() {
        let t = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
        let step = AdamStep { beta1: 0.9, beta2: 0.9, eps: 1e-8, rate: 1.0, root: 1.0, shrink: 1.0, l2: 0.0 };
        let value = Var::from_tensor(&t(&[2])).unwrap();
        let error = adam(&value, &t(&[2]), &t(&[3]), &t(&[2]), step).unwrap_err().to_string();
        assert_eq!(error.lines().next(), Some("adam: second must be [2], got [3]"));
    }
}
