//! Plans of `silu(gate) · up`; the mathematics is at the head of `kernels/silu_mul.metal`.

use crate::flat::Elementwise;
use crate::launch::{KernelFile, Launch, Plan, PlanError, Storage};
use crate::params::{Buffers, Tuning, flag};

const OP: &str = "silu_mul";

/// `silu(gate) · up`, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiluMul {
    /// Elements of gate, and of up.
    pub elements: usize,
    /// The type of all tensors.
    pub storage: Storage,
}

/// Which gradients a backward computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiluMulGradients {
    /// The gate's.
    pub gate: bool,
    /// up's.
    pub up: bool,
}

impl SiluMul {
    /// Inputs gate, up; output y.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let element = self.storage.element();
        let mut buffers = Buffers::default();
        let gate = buffers.input("gate", element, self.elements);
        let up = buffers.input("up", element, self.elements);
        let y = buffers.output("y", element, self.elements);
        let none = SiluMulGradients { gate: false, up: false };
        let launch = self.launch("silu_mul", none, vec![gate, up, y], tuning)?;
        Ok(buffers.plan(launch.into_iter().collect()))
    }

    /// Inputs gate, up, grad; outputs `grad_gate`, `grad_up`, those wanted.
    pub fn backward(&self, wanted: SiluMulGradients, tuning: Tuning) -> Result<Plan, PlanError> {
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
        let launch = self.launch("silu_mul_backward", wanted, arguments, tuning)?;
        Ok(buffers.plan(launch.into_iter().collect()))
    }

    fn launch(
        &self,
        kernel: &'static str,
        grads: SiluMulGradients,
        arguments: Vec<usize>,
        tuning: Tuning,
    ) -> Result<Option<Launch>, PlanError> {
        if self.elements == 0 {
            return Ok(None);
        }
        let flat = Elementwise::over(OP, self.elements, self.storage, tuning)?;
        Ok(Some(Launch {
            kernel,
            file: KernelFile::SiluMul,
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
        let op = SiluMul { elements: 1003, storage: Storage::F16 };
        for (gate, up) in [(true, true), (true, false), (false, true), (false, false)] {
            let plan = op.backward(SiluMulGradients { gate, up }, Tuning::default()).unwrap();
            plan.check().unwrap();
            assert_eq!(plan.with_role(Role::Output).count(), usize::from(gate) + usize::from(up));
            assert_eq!(plan.launches.len(), usize::from(gate || up));
        }
        let empty = SiluMul { elements: 0, ..op };
        assert!(empty.forward(Tuning::default()).unwrap().launches.is_empty());
    }
}
