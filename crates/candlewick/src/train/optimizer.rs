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
//! On a GPU parameters are updated together, end to end: the same arithmetic in few launches.
//!
//! All arithmetic and state is f32. A parameter of a 16-bit type has an f32 master copy among the state, since
//! updates far below its own precision must add up; the parameter itself is that copy, rounded.

#![expect(clippy::cast_precision_loss, reason = "steps are far below 2^53")]

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use candle_fused::AdamStep;

use super::gradients::{Parts, join};
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

/// What the optimizer remembers of some parameters, all in f32: of one, in its shape; of several, of the same dtype and
/// with the same decay, end to end.
#[derive(Clone, Debug)]
struct Moments {
    /// The parameters' numbers.
    of: Vec<usize>,
    first: Tensor,
    second: Tensor,
    /// The parameters in f32, where they are stored in 16 bits.
    master: Option<Tensor>,
}

/// Adam or AdamW over a fixed list of parameters.
#[derive(Clone, Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    /// Of parameters.
    count: usize,
    steps: usize,
    moments: Vec<Moments>,
}

impl Optimizer {
    /// Fresh state for these parameters. Fails on dtypes other than f32, f16 and bf16.
    pub fn new(config: OptimizerConfig, parameters: &[Parameter]) -> Result<Self> {
        // On a GPU a step's cost is its launches.
        let together = parameters.iter().all(|parameter| !parameter.var.device().is_cpu());
        Self::grouped(config, parameters, together)
    }

    fn grouped(config: OptimizerConfig, parameters: &[Parameter], together: bool) -> Result<Self> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let kind =
            |index: usize| parameters.get(index).map(|parameter| (decays(parameter), parameter.var.dtype()));
        for index in 0..parameters.len() {
            let like = |group: &&mut Vec<usize>| group.first().map(|&first| kind(first)) == Some(kind(index));
            match groups.iter_mut().find(like).filter(|_| together) {
                Some(group) => group.push(index),
                None => groups.push(vec![index]),
            }
        }
        let moments = groups.into_iter().map(|of| Moments::new(of, parameters)).collect::<Result<_>>()?;
        Ok(Self { config, count: parameters.len(), steps: 0, moments })
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
        if parameters.len() != self.count {
            let (expected, got) = (self.count, parameters.len());
            return Err(Error::Config(format!("optimizer: expected {expected} parameters, got {got}")));
        }
        let has = |index: &usize| gradients.tensors().get(*index).is_some_and(Option::is_some);
        if self.moments.iter().any(|moments| moments.of.iter().any(has) && !moments.of.iter().all(has)) {
            let apart = self.moments.iter().map(|moments| moments.apart(parameters));
            self.moments = apart.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        }
        self.steps += 1;
        let steps = self.steps as f64;
        let OptimizerConfig { kind, beta1, beta2, eps, weight_decay } = self.config;
        let rate = learning_rate / (1.0 - beta1.powf(steps));
        let root = (1.0 - beta2.powf(steps)).sqrt();
        for moments in self.moments.iter_mut().filter(|moments| moments.of.iter().all(has)) {
            let members = || moments.of.iter().filter_map(|&index| parameters.get(index));
            let decay = if members().any(decays) { weight_decay } else { 0.0 };
            let (shrink, l2) = match kind {
                OptimizerKind::Adam => (1.0, decay),
                OptimizerKind::AdamW => (1.0 - learning_rate * decay, 0.0),
            };
            let step = AdamStep { beta1, beta2, eps, rate, root, shrink, l2 };
            let value = match &moments.master {
                Some(master) => master.clone(),
                None => together(members().map(|parameter| parameter.var.as_detached_tensor()))?,
            };
            let gradient = match gradients.joined().filter(|_| moments.of.len() == self.count) {
                Some(joined) => joined.clone(),
                None => {
                    together(moments.of.iter().filter_map(|&index| gradients.tensors().get(index)?.clone()))?
                }
            };
            let [value, first, second] =
                candle_fused::adam(&value, &moments.first, &moments.second, &gradient, step)?;
            for (parameter, value) in members().zip(moments.parts(&value, parameters)?) {
                parameter.var.set(&value.to_dtype(parameter.var.dtype())?)?;
            }
            (moments.first, moments.second) = (first, second);
            if let Some(master) = &mut moments.master {
                *master = value;
            }
        }
        Ok(())
    }

    /// The state as named tensors, all f32.
    #[must_use]
    pub fn state(&self, parameters: &[Parameter]) -> Vec<(String, Tensor)> {
        let mut named = Vec::new();
        for moments in self.moments.iter().flat_map(|moments| moments.apart(parameters)).flatten() {
            for parameter in moments.of.iter().filter_map(|&index| parameters.get(index)) {
                let master = moments.master.clone().map(|master| ("master", master));
                let kinds = [("first", moments.first.clone()), ("second", moments.second.clone())];
                named.extend(
                    kinds.into_iter().chain(master).map(|(kind, x)| (state_name(kind, &parameter.name), x)),
                );
            }
        }
        named
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
        let mut restored = self.moments.clone();
        for moments in &mut restored {
            let apart = moments.apart(parameters).map_err(|error| error.to_string())?;
            let (mut first, mut second, mut master) = (Vec::new(), Vec::new(), Vec::new());
            for one in &apart {
                let Some(parameter) = one.of.first().and_then(|&index| parameters.get(index)) else {
                    continue;
                };
                first.push(take("first", &one.first, parameter)?);
                second.push(take("second", &one.second, parameter)?);
                if let Some(like) = &one.master {
                    master.push(take("master", like, parameter)?);
                }
            }
            let join = |tensors: Vec<Tensor>| together(tensors).map_err(|error| error.to_string());
            (moments.first, moments.second) = (join(first)?, join(second)?);
            moments.master = if master.is_empty() { None } else { Some(join(master)?) };
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

/// One tensor as it is, several end to end.
fn together(tensors: impl IntoIterator<Item = Tensor>) -> Result<Tensor> {
    let mut tensors: Vec<Tensor> = tensors.into_iter().collect();
    match tensors.pop() {
        Some(one) if tensors.is_empty() => Ok(one),
        last => join(tensors.into_iter().chain(last)),
    }
}

impl Moments {
    fn new(of: Vec<usize>, parameters: &[Parameter]) -> Result<Self> {
        let mut masters = Vec::with_capacity(of.len());
        let mut is_short = false;
        for parameter in of.iter().filter_map(|&index| parameters.get(index)) {
            let var = parameter.var.as_detached_tensor();
            match var.dtype() {
                DType::F32 => {}
                DType::F16 | DType::BF16 => is_short = true,
                other => {
                    let name = &parameter.name;
                    return Err(Error::Config(format!(
                        "parameter `{name}` must be f32, f16 or bf16, got {}",
                        other.as_str()
                    )));
                }
            }
            masters.push(var.to_dtype(DType::F32)?);
        }
        let value = together(masters)?;
        let zeros = Tensor::zeros(value.shape(), DType::F32, value.device())?;
        Ok(Self { of, first: zeros.clone(), second: zeros, master: is_short.then_some(value) })
    }

    /// The part of each parameter in what is kept together, in its shape.
    fn parts(&self, tensor: &Tensor, parameters: &[Parameter]) -> Result<Vec<Tensor>> {
        if self.of.len() == 1 {
            return Ok(vec![tensor.clone()]);
        }
        let mut parts = Parts::of(tensor);
        let members = self.of.iter().filter_map(|&index| parameters.get(index));
        members.map(|parameter| parts.next(parameter.var.shape())).collect()
    }

    /// What is remembered of each parameter.
    fn apart(&self, parameters: &[Parameter]) -> Result<Vec<Self>> {
        let parts = |tensor: &Tensor| self.parts(tensor, parameters);
        let masters = self.master.as_ref().map(parts).transpose()?;
        let moments = self.of.iter().zip(parts(&self.first)?).zip(parts(&self.second)?).enumerate();
        let one = |(at, ((&index, first), second))| Self {
            of: vec![index],
            first,
            second,
            master: masters.as_ref().and_then(|masters| masters.get(at)).cloned(),
        };
        Ok(moments.map(one).collect())
    }
}

fn state_name(kind: &str, parameter: &str) -> String {
    format!("optimizer.{kind}.{parameter}")
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Parameters of every kind, updated one by one and together, with a step in which one of them has no gradient.
    #[test]
    fn together_is_what_they_are_apart() {
        let random = |dims: &[usize]| Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap();
        let kinds: [(&[usize], DType); 6] = [
            (&[3, 4], DType::F32),
            (&[5], DType::F32),
            (&[2, 2], DType::BF16),
            (&[1, 7], DType::F32),
            (&[4, 2], DType::BF16),
            (&[6], DType::F32),
        ];
        let start = kinds.map(|(dims, dtype)| random(dims).to_dtype(dtype).unwrap());
        let gradients: Vec<Vec<Tensor>> =
            (0..4).map(|_| kinds.iter().map(|(dims, _)| random(dims)).collect()).collect();
        let run = |together: bool| {
            let parameter = |(index, tensor): (usize, &Tensor)| Parameter {
                name: format!("p{index}"),
                var: Var::from_tensor(tensor).unwrap(),
                zero_first_gradient: false,
            };
            let parameters: Vec<_> = start.iter().enumerate().map(parameter).collect();
            let config = OptimizerConfig::default();
            let mut optimizer = Optimizer::grouped(config, &parameters, together).unwrap();
            assert_eq!(optimizer.moments.len(), if together { 3 } else { 6 });
            let mut states = Vec::new();
            for (step, gradients) in gradients.iter().enumerate() {
                let absent = |index: usize| step == 2 && index == 3;
                let tensors =
                    gradients.iter().enumerate().map(|(index, g)| (!absent(index)).then(|| g.clone()));
                let gradients = Gradients::of(tensors.collect());
                optimizer.step(&parameters, &gradients, 0.1).unwrap();
                let mut state = optimizer.state(&parameters);
                state.sort_by(|a, b| a.0.cmp(&b.0));
                let mut taken: HashMap<String, Tensor> = state.iter().cloned().collect();
                optimizer.restore(&parameters, step + 1, &mut taken).unwrap();
                assert!(taken.is_empty());
                states.push(
                    state
                        .into_iter()
                        .map(|(name, x)| (name, x.dims().to_vec(), values(&x)))
                        .collect::<Vec<_>>(),
                );
            }
            (states, parameters.iter().map(|parameter| values(&parameter.var)).collect::<Vec<_>>())
        };
        assert_eq!(run(true), run(false));
    }
}
