//! The plan of a sum; the kernel is in `kernels/add.metal`.

use crate::flat::Elementwise;
use crate::launch::{KernelFile, Launch, Plan, PlanError, Storage};
use crate::params::{Buffers, Tuning};

/// `a + b`, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Add {
    /// Elements of a, and of b.
    pub elements: usize,
    /// The type of all tensors.
    pub storage: Storage,
}

impl Add {
    /// Inputs a, b; output y. Its gradients are that of y.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let element = self.storage.element();
        let mut buffers = Buffers::default();
        let a = buffers.input("a", element, self.elements);
        let b = buffers.input("b", element, self.elements);
        let y = buffers.output("y", element, self.elements);
        if self.elements == 0 {
            return Ok(buffers.plan(Vec::new()));
        }
        let flat = Elementwise::over("add", self.elements, self.storage, tuning)?;
        Ok(buffers.plan(vec![Launch {
            kernel: "add",
            file: KernelFile::Add,
            storage: self.storage,
            defines: vec![flat.width],
            threadgroups: flat.grid.threadgroups,
            threads: flat.grid.threads,
            threadgroup_bytes: 0,
            arguments: vec![a, b, y],
            params: flat.params,
        }]))
    }
}
