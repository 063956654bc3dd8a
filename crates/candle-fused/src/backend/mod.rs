//! Where an operation runs: the fused kernels of a device, or the reference where it has none.
//!
//! A [`Kernel`] says what is computed, for each backend in its terms; nothing outside this module asks which device a
//! tensor is on. A GPU backend joins by running what its kernels launch, and by its name in [`OPS`].

pub(crate) mod cpu;

use candle_core::{Device, Result, Tensor, bail};

use crate::telemetry::{self, Path};

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeviceKind {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Apple GPU.
    Metal,
}

impl DeviceKind {
    /// The kind of `device`.
    #[must_use]
    pub fn of(device: &Device) -> Self {
        match device {
            Device::Cpu => Self::Cpu,
            Device::Cuda(_) => Self::Cuda,
            Device::Metal(_) => Self::Metal,
        }
    }

    /// `cpu`, `cuda` or `metal`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
        }
    }
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Every operation, and where it has something fused. The linear ones are Candle's matrix products with a backward of
/// their own, on every device.
const OPS: [(&str, &[DeviceKind]); 9] = {
    use DeviceKind::{Cpu, Cuda, Metal};
    [
        ("softmax", &[Cpu]),
        ("rms_norm", &[Cpu]),
        ("layer_norm", &[Cpu]),
        ("rope", &[Cpu]),
        ("silu_mul", &[Cpu]),
        ("cross_entropy", &[Cpu]),
        ("lora_delta", &[Cpu, Cuda, Metal]),
        ("lora_linear", &[Cpu, Cuda, Metal]),
        ("frozen_linear", &[Cpu, Cuda, Metal]),
    ]
};

/// The operations that run fused on this kind of device; the others run their reference there.
pub fn fused_ops(kind: DeviceKind) -> impl Iterator<Item = &'static str> {
    OPS.iter().filter(move |(_, kinds)| kinds.contains(&kind)).map(|&(op, _)| op)
}

/// Fresh tensors from others, computed where these are.
pub(crate) trait Kernel {
    /// The tensors computed.
    type Output;

    /// On the processor.
    fn cpu(&self) -> Result<Self::Output>;

    /// In Candle operations, for the kernels of an operation that needs no others on a GPU.
    fn composed(&self) -> Result<Self::Output> {
        bail!("this device has no kernel for the operation")
    }
}

/// Runs a kernel on the device of its tensors.
pub(crate) fn run<K: Kernel>(device: &Device, kernel: &K) -> Result<K::Output> {
    match device {
        Device::Cpu => kernel.cpu(),
        Device::Cuda(_) | Device::Metal(_) => kernel.composed(),
    }
}

/// Runs `fused` where `x` lives if there are kernels for it, else `reference`, and counts which.
pub(crate) fn dispatch(
    op: &'static str,
    x: &Tensor,
    fused: impl FnOnce() -> Result<Tensor>,
    reference: impl FnOnce() -> Result<Tensor>,
) -> Result<Tensor> {
    let kind = DeviceKind::of(x.device());
    if fused_ops(kind).any(|name| name == op) {
        telemetry::count(op, kind, x.dtype(), Path::Fused);
        fused()
    } else {
        telemetry::count(op, kind, x.dtype(), Path::Fallback { reason: "no kernel for this device" });
        reference()
    }
}
