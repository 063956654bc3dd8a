//! Plans of the gated products `f(gate) · up`, `silu_mul` and `gelu_mul`; the mathematics is at the heads of
//! `kernels/silu_mul.metal` and `kernels/gelu_mul.metal`, whose kernels take the same arguments.

use crate::flat::Elementwise;
use crate::launch::{KernelFile, Launch, Plan, PlanError, Storage};
use crate::params::{Buffers, Tuning, flag};

/// The gate's function `f`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `silu(z) = z·σ(z)`: the op `silu_mul`.
    Silu,
    /// The GELU that is made of a tanh: the op `gelu_mul`.
    Gelu,
}

impl Gate {
    /// The op's name, which is its forward kernel's.
    #[must_use]
    pub const fn op(self) -> &'static str {
        match self {
            Self::Silu => "silu_mul",
            Self::Gelu => "gelu_mul",
        }
    }

    const fn backward_kernel(self) -> &'static str {
        match self {
            Self::Silu => "silu_mul_backward",
            Self::Gelu => "gelu_mul_backward",
        }
    }

    const fn file(self) -> KernelFile {
        match self {
            Self::Silu => KernelFile::SiluMul,
            Self::Gelu => KernelFile::GeluMul,
        }
    }
}

/// `f(gate) · up`, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedMul {
    /// What is done to the gate.
    pub f: Gate,
    /// Elements of gate, and of up.
    pub elements: usize,
    /// The type of all tensors.
    pub storage: Storage,
}

/// Which gradients a backward computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedGradients {
    /// The gate's.
    pub gate: bool,
    /// up's.
    pub up: bool,
}

impl GatedMul {
    /// Inputs gate, up; output y.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let element = self.storage.element();
        let mut buffers = Buffers::default();
        let gate = buffers.input("gate", element, self.elements);
        let up = buffers.input("up", element, self.elements);
        let y = buffers.output("y", element, self.elements);
        let none = GatedGradients { gate: false, up: false };
        let launch = self.launch(self.f.op(), none, vec![gate, up, y], tuning)?;
        Ok(buffers.plan(launch.into_iter().collect()))
    }

    /// Inputs gate, up, grad; outputs `grad_gate`, `grad_up`, those wanted.
    pub fn backward(&self, wanted: GatedGradients, tuning: Tuning) -> Result<Plan, PlanError> {
        let element = self.storage.element();
        let mut buffers = Buffers::default();
        let gate = buffers.input("gate", element, self.elements);
        let up = buffers.input("up", element, self.elements);
        let grad = buffers.input("grad", element, self.elements);
        // An output that is not wanted is never touched: the gate stands in its place.
        let grad_gate = if wanted.gate { buffers.output("grad_gate", element, self.elements) } else { gate };
        let grad_up = if wanted.up { buffers.output("grad_up", element, self.elements) } else { gate };
        if !(wanted.gate || wanted.up) {
            return Ok(buffers.plan(Vec::new()));
        }
        let arguments = vec![gate, up, grad, grad_gate, grad_up];
        let launch = self.launch(self.f.backward_kernel(), wanted, arguments, tuning)?;
        Ok(buffers.plan(launch.into_iter().collect()))
    }

    fn launch(
        &self,
        kernel: &'static str,
        grads: GatedGradients,
        arguments: Vec<usize>,
        tuning: Tuning,
    ) -> Result<Option<Launch>, PlanError> {
        if self.elements == 0 {
            return Ok(None);
        }
        let flat = Elementwise::over(self.f.op(), self.elements, self.storage, tuning)?;
        Ok(Some(Launch {
            kernel,
            file: self.f.file(),
            storage: self.storage,
            defines: vec![flat.width, flag("GATE_GRAD", grads.gate), flag("UP_GRAD", grads.up)],
            threadgroups: flat.grid.threadgroups,
            threads: flat.grid.threads,
            threadgroup_bytes: 0,
            arguments,
            params: flat.params,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Role;

    #[test]
    fn outputs_are_those_wanted() {
        let op = GatedMul { f: Gate::Silu, elements: 1003, storage: Storage::F16 };
        for (gate, up) in [(true, true), (true, false), (false, true), (false, false)] {
            let plan = op.backward(GatedGradients { gate, up }, Tuning::default()).unwrap();
            plan.check().unwrap();
            assert_eq!(plan.with_role(Role::Output).count(), usize::from(gate) + usize::from(up));
            assert_eq!(plan.launches.len(), usize::from(gate || up));
        }
        let empty = GatedMul { elements: 0, ..op };
        assert!(empty.forward(Tuning::default()).unwrap().launches.is_empty());
    }
}
