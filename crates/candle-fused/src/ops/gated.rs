//! What the gated products share: `y = f(gate)·up` for a gate `f` of one argument.
//!
//! Backward, with `f` and its slope recomputed from the gate: `d_gate = g·up·f′(gate)`, `d_up = g·f(gate)`.

use candle_core::{Result, Shape, Tensor};
use candlewick_kernels::gelu_mul::{GeluMul, GeluMulGradients};
use candlewick_kernels::silu_mul::{SiluMul, SiluMulGradients};

use crate::backend::cpu::map_elements;
use crate::backend::{self, Attempt, Kernel, gpu};
use crate::check;
use crate::cpu::gated as row;
use crate::graph::{self, Backward};

/// The gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    Silu,
    /// With a tanh.
    Gelu,
}

impl Gate {
    const fn op(self) -> &'static str {
        match self {
            Self::Silu => "silu_mul",
            Self::Gelu => "gelu_mul",
        }
    }

    pub(super) fn check(self, gate: &Tensor, up: &Tensor) -> Result<()> {
        check::float(self.op(), "gate", gate)?;
        check::like(self.op(), "up", up, gate, gate.dims())
    }

    /// `f(gate)·up`, after the checks.
    pub(super) fn mul(
        self,
        gate: &Tensor,
        up: &Tensor,
        reference: fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        backend::dispatch(self.op(), gate, || self.fused(gate, up), || reference(gate, up))
    }

    fn fused(self, gate: &Tensor, up: &Tensor) -> Attempt<Tensor> {
        let y = backend::run(gate.device(), &Forward { f: self, gate, up })?;
        Ok(graph::record2(gate, up, y, Gated { f: self })?)
    }
}

struct Gated {
    f: Gate,
}

impl Backward<2> for Gated {
    fn op(&self) -> &'static str {
        self.f.op()
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
        let [y] = match self.f {
            Gate::Silu => map_elements([self.gate, self.up], self.gate.dtype(), |_, [gate, up], [y]| {
                row::forward(row::silu, gate, up, y);
            }),
            Gate::Gelu => map_elements([self.gate, self.up], self.gate.dtype(), |_, [gate, up], [y]| {
                row::forward(row::gelu, gate, up, y);
            }),
        }?;
        Ok(y)
    }

    fn gpu(&self) -> Attempt<Tensor> {
        let (gate, up) = (gpu::contiguous(self.gate)?, gpu::contiguous(self.up)?);
        let (elements, storage) = (gate.elem_count(), gpu::storage(&gate)?);
        let mut outputs = gpu::run(&[&gate, &up], &[gate.shape()], |tuning| match self.f {
            Gate::Silu => SiluMul { elements, storage }.forward(tuning),
            Gate::Gelu => GeluMul { elements, storage }.forward(tuning),
        })?;
        Ok(outputs.take()?)
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

impl Gradients<'_> {
    fn loops(&self, f: impl Fn(f32) -> [f32; 2] + Sync + Copy) -> Result<[Option<Tensor>; 2]> {
        let dtype = self.gate.dtype();
        let d_gate = || -> Result<Tensor> {
            let inputs = [self.gate, self.up, self.g];
            let [d] =
                map_elements(inputs, dtype, |_, [gate, up, g], [d]| row::backward_gate(f, gate, up, g, d))?;
            Ok(d)
        };
        let d_up = || -> Result<Tensor> {
            let [d] = map_elements([self.gate, self.g], dtype, |_, [gate, g], [d]| {
                row::backward_up(f, gate, g, d);
            })?;
            Ok(d)
        };
        let [gate, up] = self.wanted;
        Ok([gate.then(d_gate).transpose()?, up.then(d_up).transpose()?])
    }
}

impl Kernel for Gradients<'_> {
    /// Those of the gate and of up that are wanted.
    type Output = [Option<Tensor>; 2];

    fn cpu(&self) -> Result<Self::Output> {
        match self.f {
            Gate::Silu => self.loops(row::silu),
            Gate::Gelu => self.loops(row::gelu),
        }
    }

    fn gpu(&self) -> Attempt<Self::Output> {
        let [gate_wanted, up_wanted] = self.wanted;
        let (gate, up, g) =
            (gpu::contiguous(self.gate)?, gpu::contiguous(self.up)?, gpu::contiguous(self.g)?);
        let (elements, storage) = (gate.elem_count(), gpu::storage(&gate)?);
        let shapes: Vec<&Shape> =
            self.wanted.iter().filter(|wanted| **wanted).map(|_| gate.shape()).collect();
        let mut outputs = gpu::run(&[&gate, &up, &g], &shapes, |tuning| match self.f {
            Gate::Silu => {
                let wanted = SiluMulGradients { gate: gate_wanted, up: up_wanted };
                SiluMul { elements, storage }.backward(wanted, tuning)
            }
            Gate::Gelu => {
                let wanted = GeluMulGradients { gate: gate_wanted, up: up_wanted };
                GeluMul { elements, storage }.backward(wanted, tuning)
            }
        })?;
        Ok([outputs.take_if(gate_wanted)?, outputs.take_if(up_wanted)?])
    }
}
