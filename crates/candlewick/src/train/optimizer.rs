//! Adam and AdamW, with torch's arithmetic.
//!
//! With gradient g, step t (from one), learning rate η, decay λ:
//!
//! ```text
//! Adam   g ← g + λ θ
//! AdamW  θ ← (1 − η λ) θ
//! m ← m + (1 − β₁)(g − m)          v ← β₂ v + (1 − β₂) g²
//! θ ← θ − η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! The order of operations is that of `torch.optim.AdamW`; [`candle_fused::adam`] has the sources. As in Hugging Face's `Trainer`, decay leaves out biases and norm
//! weights: it applies to tensors of two or more dimensions.
//!
//! All arithmetic and state is f32. A parameter of a 16-bit type has an f32 master copy among the state, since
//! updates far below its own precision must add up; the parameter itself is that copy, rounded.

#![expect(clippy::cast_precision_loss, reason = "steps are far below 2^53")]

use std::collections::HashMap;

use candle_core::{DType, Tensor, Var};
use candle_fused::AdamStep;

use super::{Gradients, Parameter};
use crate::{Error, Result};

/// Which optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptimizerKind {
    /// Weight decay as part of the gradient (L2).
    Adam,
    /// Decoupled weight decay.
    AdamW,
}

impl OptimizerKind {
    /// The name that flags and files use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Adam => "adam",
            Self::AdamW => "adamw",
        }
    }
}

/// The optimizer's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// Which optimizer.
    pub kind: OptimizerKind,
    /// β₁
    pub beta1: f64,
    /// β₂
    pub beta2: f64,
    /// ε
    pub eps: f64,
    /// λ
    pub weight_decay: f64,
}

impl Default for OptimizerConfig {
    /// torch's AdamW.
    fn default() -> Self {
        Self { kind: OptimizerKind::AdamW, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl OptimizerConfig {
    /// Refuses settings outside their ranges.
    pub(super) fn check(&self) -> Result<()> {
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::Config(format!("{name} must be in 0..1, got {beta}")));
            }
        }
        for (name, value) in [("eps", self.eps), ("weight-decay", self.weight_decay)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::Config(format!("{name} must be 0 or above, got {value}")));
            }
        }
        Ok(())
    }
}

/// What the optimizer remembers of a parameter, in its shape and in f32.
#[derive(Clone, Debug)]
struct Moments {
    first: Tensor,
    second: Tensor,
    /// The parameter in f32, where it is stored in 16 bits.
    master: Option<Var>,
}

/// Adam or AdamW over a fixed list of parameters.
#[derive(Clone, Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    steps: usize,
    moments: Vec<Moments>,
}

impl Optimizer {
    /// Fresh state for these parameters. Fails on dtypes other than f32, f16 and bf16.
    pub fn new(config: OptimizerConfig, parameters: &[Parameter]) -> Result<Self> {
        let moments = parameters.iter().map(Moments::new).collect::<Result<_>>()?;
        Ok(Self { config, steps: 0, moments })
    }

    /// Steps taken.
    #[must_use]
    pub const fn steps(&self) -> usize {
        self.steps
    }

    /// One update of every parameter that has a gradient. `parameters` are those of [`Optimizer::new`].
    pub fn step(
        &mut self,
        parameters: &[Parameter],
        gradients: &Gradients,
        learning_rate: f64,
    ) -> Result<()> {
        if parameters.len() != self.moments.len() {
            let (expected, got) = (self.moments.len(), parameters.len());
            return Err(Error::Config(format!("optimizer: expected {expected} parameters, got {got}")));
        }
        self.steps += 1;
        let steps = self.steps as f64;
        let OptimizerConfig { kind, beta1, beta2, eps, weight_decay } = self.config;
        let rate = learning_rate / (1.0 - beta1.powf(steps));
        let root = (1.0 - beta2.powf(steps)).sqrt();
        for ((parameter, moments), gradient) in
            parameters.iter().zip(&mut self.moments).zip(gradients.tensors())
        {
            let Some(gradient) = gradient else { continue };
            let decay = if decays(parameter) { weight_decay } else { 0.0 };
            let (shrink, l2) = match kind {
                OptimizerKind::Adam => (1.0, decay),
                OptimizerKind::AdamW => (1.0 - learning_rate * decay, 0.0),
            };
            let step = AdamStep { beta1, beta2, eps, rate, root, shrink, l2 };
            let value = moments.master.as_ref().unwrap_or(&parameter.var);
            let [first, second] = candle_fused::adam(value, &moments.first, &moments.second, gradient, step)?;
            if let Some(master) = &moments.master {
                parameter.var.set(&master.as_detached_tensor().to_dtype(parameter.var.dtype())?)?;
            }
            (moments.first, moments.second) = (first, second);
        }
        Ok(())
    }

    /// The state as named tensors, all f32, which later steps do not change.
    pub fn state(&self, parameters: &[Parameter]) -> Result<Vec<(String, Tensor)>> {
        let mut named = Vec::new();
        for (parameter, Moments { first, second, master }) in parameters.iter().zip(&self.moments) {
            let master = master.as_ref().map(|master| master.copy()).transpose()?.map(|x| ("master", x));
            let kinds = [("first", first.clone()), ("second", second.clone())];
            let of_parameter = kinds.into_iter().chain(master);
            named.extend(of_parameter.map(|(kind, x)| (state_name(kind, &parameter.name), x)));
        }
        Ok(named)
    }

    /// Takes back what [`Optimizer::state`] gave after `steps` steps. Changes nothing when a tensor is missing or of
    /// another shape or type; the error names it.
    pub fn restore(
        &mut self,
        parameters: &[Parameter],
        steps: usize,
        tensors: &mut HashMap<String, Tensor>,
    ) -> std::result::Result<(), String> {
        let mut take = |kind, like: &Tensor, parameter: &Parameter| {
            let name = state_name(kind, &parameter.name);
            let tensor = tensors.remove(&name).ok_or_else(|| format!("has no tensor `{name}`"))?;
            if tensor.shape() == like.shape() && tensor.dtype() == like.dtype() {
                Ok(tensor)
            } else {
                let (expected, got) = ((like.dims(), like.dtype()), (tensor.dims(), tensor.dtype()));
                Err(format!("tensor `{name}` must be {expected:?}, got {got:?}"))
            }
        };
        let mut restored = Vec::with_capacity(self.moments.len());
        for (parameter, moments) in parameters.iter().zip(&self.moments) {
            let first = take("first", &moments.first, parameter)?;
            let second = take("second", &moments.second, parameter)?;
            let master = moments.master.as_ref().map(|like| {
                let master = take("master", like.as_tensor(), parameter)?;
                // A copy: a step writes it in its place.
                Var::from_tensor(&master).map_err(|error| error.to_string())
            });
            restored.push(Moments { first, second, master: master.transpose()? });
        }
        self.moments = restored;
        self.steps = steps;
        Ok(())
    }
}

/// As in Hugging Face's `Trainer`, decay is for tensors of two or more dimensions.
fn decays(parameter: &Parameter) -> bool {
    parameter.var.rank() >= 2
}

impl Moments {
    fn new(parameter: &Parameter) -> Result<Self> {
        let value = parameter.var.as_detached_tensor();
        let master = match value.dtype() {
            DType::F32 => None,
            DType::F16 | DType::BF16 => Some(Var::from_tensor(&value.to_dtype(DType::F32)?)?),
            other => {
                let (name, other) = (&parameter.name, other.as_str());
                return Err(Error::Config(format!(
                    "parameter `{name}` must be f32, f16 or bf16, got {other}"
                )));
            }
        };
        let zeros = Tensor::zeros(value.shape(), DType::F32, value.device())?;
        Ok(Self { first: zeros.clone(), second: zeros, master })
    }
}

fn state_name(kind: &str, parameter: &str) -> String {
    format!("optimizer.{kind}.{parameter}")
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// In f32 and with an f32 copy of 16 bits: without a gradient nothing moves, and what `state` gave does not move at all.
    #[test]
    fn what_has_no_gradient_stays() {
        let values = |tensor: &Tensor| {
            tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let random = || Tensor::randn(0f32, 1.0, (3, 5), &Device::Cpu).unwrap();
        let parameters: Vec<Parameter> = [DType::F32, DType::BF16]
            .map(|dtype| Parameter {
                name: dtype.as_str().to_owned(),
                var: Var::from_tensor(&random().to_dtype(dtype).unwrap()).unwrap(),
                zero_first_gradient: false,
            })
            .into();
        let mut optimizer = Optimizer::new(OptimizerConfig::default(), &parameters).unwrap();
        let mut step = |has: [bool; 2]| {
            let before = optimizer.state(&parameters).unwrap();
            let kept: Vec<_> = before.iter().map(|(_, tensor)| values(tensor)).collect();
            let weights = parameters.iter().map(|p| values(&p.var)).collect::<Vec<_>>();
            let gradients = Gradients::of(has.map(|has| has.then(random)).into());
            optimizer.step(&parameters, &gradients, 0.1).unwrap();
            for ((name, tensor), kept) in before.iter().zip(&kept) {
                assert_eq!(&values(tensor), kept, "{name} was given, and changed");
            }
            for ((name, tensor), kept) in optimizer.state(&parameters).unwrap().iter().zip(&kept) {
                let moves = has[usize::from(name.ends_with("bf16"))];
                assert_eq!(values(tensor) != *kept, moves, "{name}");
            }
            for ((parameter, weights), moves) in parameters.iter().zip(&weights).zip(has) {
                assert_eq!(values(&parameter.var) != *weights, moves, "{}", parameter.name);
            }
        };
        for has in [[true, true], [true, false], [false, true]] {
            step(has);
        }
    }
}
