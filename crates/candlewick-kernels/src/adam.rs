//! The plan of a step of Adam; the mathematics is at the head of `kernels/adam.metal`.

use crate::flat::Elementwise;
use crate::launch::{KernelFile, Launch, Plan, PlanError, Storage};
use crate::params::{Buffers, Params, Tuning};

/// One step for a parameter of so many elements, all in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Elements of the parameter.
    pub elements: usize,
    /// 1 − β₁
    pub new1: f32,
    /// β₂
    pub old2: f32,
    /// 1 − β₂
    pub new2: f32,
    /// ε
    pub eps: f32,
    /// The learning rate over 1 − β₁ᵗ.
    pub rate: f32,
    /// 1 / √(1 − β₂ᵗ)
    pub part: f32,
    /// 1 − the learning rate times λ in `AdamW`, else 1.
    pub shrink: f32,
    /// λ in Adam, else 0.
    pub l2: f32,
}

impl Adam {
    /// Inputs first, second (the moments), gradient, value; outputs the next value, which may take the place of value, and the
    /// next moments.
    pub fn step(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let (storage, mut buffers) = (Storage::F32, Buffers::default());
        let inputs = ["first", "second", "gradient", "value"];
        let inputs = inputs.map(|name| buffers.input(name, storage.element(), self.elements));
        let outputs = ["next_value", "next_first", "next_second"];
        let outputs = outputs.map(|name| buffers.output(name, storage.element(), self.elements));
        if self.elements == 0 {
            return Ok(buffers.plan(Vec::new()));
        }
        let flat = Elementwise::over("adam", self.elements, storage, tuning)?;
        let constants =
            [self.new1, self.old2, self.new2, self.eps, self.rate, self.part, self.shrink, self.l2];
        let constants = constants.into_iter().fold(Params::default(), Params::f32).bytes();
        Ok(buffers.plan(vec![Launch {
            kernel: "adam",
            file: KernelFile::Adam,
            storage,
            defines: vec![flat.width],
            threadgroups: flat.grid.threadgroups,
            threads: flat.grid.threads,
            threadgroup_bytes: 0,
            arguments: inputs.into_iter().chain(outputs).collect(),
            params: [flat.params, constants].concat(),
        }]))
    }
}
