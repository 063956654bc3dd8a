//! What the gated products share: `y = f(gate)·up` for a gate `f` of one argument.
//!
//! Backward, with `f` and its slope recomputed from the gate: `d_gate = g·up·f′(gate)`, `d_up = g·f(gate)`.

use candle_core::{Result, Shape, Tensor};
pub(super) use candlewick_kernels::gated::Gate;
use candlewick_kernels::gated::{GatedGradients, GatedMul};

use crate::backend::cpu::{map_element, map_elements};
use crate::backend::{self, Attempt, Kernel, gpu};
use crate::check;
use crate::cpu::gated as row;
use crate::graph::{self, Backward};

pub(super) fn check(f: Gate, gate: &Tensor, up: &Tensor) -> Result<()> {
    check::float(f.op(), "gate", gate)?;
    check::like(f.op(), "up", up, gate, gate.dims())
}

/// `f(gate)·up`, after the checks.
pub(super) fn mul(
    f: Gate,
    gate: &Tensor,
    up: &Tensor,
    reference: fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let fused = || {
        let y = backend::run(gate.device(), &Forward { f, gate, up })?;
        Ok(graph::record2(gate, up, y, Gated { f })?)
    };
    backend::dispatch(f.op(), gate, fused, || reference(gate, up))
}

struct Gated {
    f: Gate,
}

impl Backward<2> for Gated {
    fn op(&self) -> &'static str {
        self.f.op()
    }

    fn reads_output(&self) -> bool {
        false
    }

    fn is_repeatable(&self) -> bool {
        true
    }

    fn again(&self, [gate, up]: [&Tensor; 2]) -> Result<Tensor> {
        Ok(backend::run(gate.device(), &Forward { f: self.f, gate: &gate.detach(), up: &up.detach() })?)
    }

    fn backward(&self, [gate, up]: [&Tensor; 2], _: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let wanted = [gate.track_op(), up.track_op()];
        Ok(backend::run(gate.device(), &Gradients { f: self.f, gate, up, g, wanted })?)
    }
}

struct Forward<'a> {
    f: Gate,
    gate: &'a Tensor,
    up: &'a Tensor,
}

impl Kernel for Forward<'_> {
    type Output = Tensor;

    fn cpu(&self) -> Result<Tensor> {
        map_element([self.gate, self.up], &row::Forward(self.f))
    }

    fn gpu(&self) -> Attempt<Tensor> {
        let (gate, up) = (gpu::contiguous(self.gate)?, gpu::contiguous(self.up)?);
        let (elements, storage) = (gate.elem_count(), gpu::storage(&gate)?);
        let plans = GatedMul { f: self.f, elements, storage };
        Ok(gpu::run(&[&gate, &up], &[gate.shape()], gpu::kept(plans, GatedMul::forward))?.take()?)
    }
}

struct Gradients<'a> {
    f: Gate,
    gate: &'a Tensor,
    up: &'a Tensor,
    g: &'a Tensor,
    /// The gate's and up's.
    wanted: [bool; 2],
}

impl Kernel for Gradients<'_> {
    /// Those of the gate and of up that are wanted.
    type Output = [Option<Tensor>; 2];

    fn cpu(&self) -> Result<Self::Output> {
        map_elements([self.gate, self.up, self.g], self.wanted, &row::Backward(self.f))
    }

    fn gpu(&self) -> Attempt<Self::Output> {
        let (gate, up, g) =
            (gpu::contiguous(self.gate)?, gpu::contiguous(self.up)?, gpu::contiguous(self.g)?);
        let plans = GatedMul { f: self.f, elements: gate.elem_count(), storage: gpu::storage(&gate)? };
        let wanted = GatedGradients { gate: self.wanted[0], up: self.wanted[1] };
        let shapes: Vec<&Shape> =
            self.wanted.iter().filter(|wanted| **wanted).map(|_| gate.shape()).collect();
        let recipe = gpu::kept((plans, wanted), |(plans, wanted), tuning| plans.backward(*wanted, tuning));
        let mut outputs = gpu::run(&[&gate, &up, &g], &shapes, recipe)?;
        Ok([outputs.take_if(wanted.gate)?, outputs.take_if(wanted.up)?])
    }
}
