//! Where an operation runs: the fused kernels of a device, or the reference where it has none.
//!
//! A [`Kernel`] says what is computed: on the processor by loops over rows ([`cpu`]), on a GPU by plans of
//! `candlewick-kernels` ([`gpu`]), which an executor of its API runs. Nothing outside this module asks which device a
//! tensor is on.

pub(crate) mod attention;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "cuda"))]
mod disk_cache;
pub(crate) mod gpu;
#[cfg(feature = "cuda")]
mod hopper;
#[cfg(all(target_os = "macos", feature = "custom-metal"))]
mod metal;
#[cfg(feature = "cuda")]
mod nvrtc;
mod pipelines;
pub(crate) mod products;
#[cfg(test)]
mod simulated;

use candle_core::{DType, Device, Error, Result, Tensor};
use candlewick_kernels::attention::Attention;

#[cfg(test)]
pub(crate) use simulated::simulate;

#[cfg(all(target_os = "macos", feature = "custom-metal"))]
pub use metal::MetalKernelCompiler;

use crate::DeviceError;
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

    /// Whether this build and this machine have such a device.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Cpu => true,
            Self::Cuda => candle_core::utils::cuda_is_available(),
            // Candle asks the build alone, and panics where a Mac has no GPU.
            #[cfg(target_os = "macos")]
            Self::Metal => !candle_metal_kernels::metal::Device::all().is_empty(),
            #[cfg(not(target_os = "macos"))]
            Self::Metal => false,
        }
    }
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What an operation needs to run fused.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Nothing but Candle's products, with a backward of ours.
    Candle,
    /// Kernels of its own.
    Kernels,
}

/// Every operation.
const OPS: [(&str, Needs); 13] = [
    ("softmax", Needs::Kernels),
    ("rms_norm", Needs::Kernels),
    ("layer_norm", Needs::Kernels),
    ("rope", Needs::Kernels),
    ("silu_mul", Needs::Kernels),
    ("gelu_mul", Needs::Kernels),
    ("cross_entropy", Needs::Kernels),
    ("linear_cross_entropy", Needs::Kernels),
    ("attention", Needs::Kernels),
    ("lora_delta", Needs::Kernels),
    ("lora_linear", Needs::Kernels),
    ("frozen_linear", Needs::Candle),
    ("add", Needs::Kernels),
];

/// Whether this build has kernels for a kind of device.
const fn has_kernels(kind: DeviceKind) -> bool {
    match kind {
        DeviceKind::Cpu => true,
        DeviceKind::Cuda => cfg!(feature = "cuda"),
        DeviceKind::Metal => cfg!(all(target_os = "macos", feature = "custom-metal")),
    }
}

/// The operations that run fused on this kind of device; the others run their reference there.
pub fn fused_ops(kind: DeviceKind) -> impl Iterator<Item = &'static str> {
    let runs = move |needs| match needs {
        Needs::Candle => true,
        Needs::Kernels => has_kernels(kind),
    };
    OPS.iter().filter(move |&&(_, needs)| runs(needs)).map(|&(op, _)| op)
}

/// The most memory that tensors took on a device at once, in bytes, since the start or [`reset_peak_memory`]. `None` for
/// the processor, whose memory the system counts, and where the device does not tell: Metal.
///
/// # Errors
/// The driver does not answer.
pub fn peak_memory(device: &Device) -> Result<Option<u64>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::peak_memory(device),
        _ => Ok(None),
    }
}

/// Makes [`peak_memory`] count anew, from what is allocated now.
///
/// # Errors
/// The driver does not answer.
pub fn reset_peak_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::reset_peak_memory(device),
        _ => Ok(()),
    }
}

/// Why a fused operation did not run.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The device cannot run a kernel; the reference still can.
    Device(DeviceError),
    /// A tensor operation failed.
    Tensor(Error),
}

/// What a fused operation leaves.
pub(crate) type Attempt<T> = std::result::Result<T, Failure>;

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Tensor(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Device(error) => Self::wrap(error),
            Failure::Tensor(error) => error,
        }
    }
}

/// Fresh tensors from others, computed where these are.
pub(crate) trait Kernel {
    /// The tensors computed.
    type Output;

    /// On the processor.
    fn cpu(&self) -> Result<Self::Output>;

    /// On a GPU, by the kernels of `candlewick-kernels`.
    fn gpu(&self) -> Attempt<Self::Output>;
}

/// Runs a kernel on the device of its tensors.
pub(crate) fn run<K: Kernel>(device: &Device, kernel: &K) -> Attempt<K::Output> {
    match device {
        #[cfg(test)]
        Device::Cpu if simulated::is_on() => kernel.gpu(),
        Device::Cpu => Ok(kernel.cpu()?),
        Device::Cuda(_) | Device::Metal(_) => kernel.gpu(),
    }
}

/// `tensor`, or a contiguous copy of it.
pub(crate) fn contiguous(tensor: &Tensor) -> Result<Tensor> {
    match tensor.device() {
        Device::Cpu => tensor.contiguous(),
        Device::Cuda(_) | Device::Metal(_) => gpu::contiguous(tensor),
    }
}

/// Runs `fused` where `x` lives if there are kernels for it, else `reference`, and counts which.
///
/// A kernel that the device rejects is worth a warning with what its compiler said, and the reference in its place.
pub(crate) fn dispatch(
    op: &'static str,
    x: &Tensor,
    fused: impl FnOnce() -> Attempt<Tensor>,
    reference: impl FnOnce() -> Result<Tensor>,
) -> Result<Tensor> {
    let kind = DeviceKind::of(x.device());
    let fall_back = |reason| {
        telemetry::count(op, kind, x.dtype(), Path::Fallback { reason });
        reference()
    };
    if !fused_ops(kind).any(|name| name == op) {
        return fall_back("no kernel for this device");
    }
    match fused() {
        Ok(output) => {
            telemetry::count(op, kind, x.dtype(), Path::Fused);
            Ok(output)
        }
        Err(Failure::Tensor(error)) => Err(error),
        Err(Failure::Device(error)) => {
            telemetry::warn_once(op, kind, &error);
            fall_back("the device rejects the kernel")
        }
    }
}

/// From how many multiplications on a device's own products serve thin matrices better than kernels of ours. None
/// where its products cannot add to what is there: see [`product_onto`].
pub(crate) fn fewest_for_products(device: &Device) -> Option<usize> {
    match device {
        #[cfg(test)]
        Device::Cpu => simulated::adds_products().then_some(1),
        // On an H100 the forwards are as fast there, the backward three times as fast as a kernel of ours.
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => Some(1 << 22),
        _ => None,
    }
}

/// Where a product goes.
#[cfg_attr(
    not(any(test, feature = "cuda")),
    expect(dead_code, reason = "a build without such products reads none")
)]
pub(crate) enum Place {
    /// A tensor of its own, of the factors' dtype or f32.
    Fresh(DType),
    /// It is added to this tensor, which nobody else has.
    Onto(Tensor),
}

impl Place {
    /// Onto the bias in each of `n` rows, or a tensor of its own in this dtype.
    pub(crate) fn of_rows(n: usize, bias: Option<&Tensor>, dtype: DType) -> Result<Self> {
        match bias {
            Some(bias) => Ok(Self::Onto(bias.detach().broadcast_left(n)?.force_contiguous()?)),
            None => Ok(Self::Fresh(dtype)),
        }
    }
}

/// `scale·left·right` of matrices of one dtype, and what is in its place, rounded once, where [`fewest_for_products`]
/// has an answer.
pub(crate) fn product_onto(left: &Tensor, right: &Tensor, scale: f32, place: Place) -> Result<Tensor> {
    match left.device() {
        #[cfg(test)]
        Device::Cpu => simulated::product_onto(left, right, scale, place),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cublas::product(device, left, right, scale, place),
        other => {
            drop((right, scale, place));
            candle_core::bail!("{:?} has no products that add", other.location())
        }
    }
}

/// `left·right + l·r + bias` for `left [n, in]`, `right [in, out]`, `l [n, r]` and `r [r, out]` of one dtype, where
/// [`fewest_for_products`] has an answer: by one kernel that rounds once, where the device has one that serves.
pub(crate) fn sum_of_products(
    [left, right]: [&Tensor; 2],
    [l, r]: [&Tensor; 2],
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = left.device()
        && let Some(sum) = hopper::lora::sum_of_products(device, [left, right], [l, r], bias)?
    {
        return Ok(sum);
    }
    let low = product_onto(l, r, 1.0, Place::of_rows(left.dim(0)?, bias, left.dtype())?)?;
    product_onto(left, right, 1.0, Place::Onto(low))
}

/// `left·right + h·r + bias` and `h = scale·left·projection` as [`sum_of_products`] and [`product_onto`] give them, by one
/// kernel, where the device has one that serves.
#[cfg_attr(
    not(feature = "cuda"),
    expect(clippy::unnecessary_wraps, reason = "a build without such a device has no kernel that fails")
)]
pub(crate) fn adapted_product(
    [left, right]: [&Tensor; 2],
    [projection, r]: [&Tensor; 2],
    bias: Option<&Tensor>,
    scale: f32,
) -> Result<Option<[Tensor; 2]>> {
    match left.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => hopper::adapted::forward(
            device,
            &hopper::adapted::Product { left, right, projection, r, scale },
            bias,
        ),
        _ => {
            let _ = (right, projection, r, bias, scale);
            Ok(None)
        }
    }
}

/// For a layer's gradient `g [n, out]`, frozen `weight [out, in]`, `a [r, in]`, `b [out, r]`, input `x` and `h`: with
/// `e = scale·g·b`, `g·weight + e·a`, and in `factor` `eᵀ·x` and `gᵀ·h`, where the device has a kernel for all of it.
#[cfg_attr(
    not(feature = "cuda"),
    expect(clippy::unnecessary_wraps, reason = "a build without such a device has no kernel that fails")
)]
pub(crate) fn adapted_gradient(
    [g, weight]: [&Tensor; 2],
    [a, b]: [&Tensor; 2],
    [x, h]: [&Tensor; 2],
    scale: f32,
    factor: DType,
) -> Result<Option<[Tensor; 3]>> {
    match g.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let product = hopper::adapted::Product { left: g, right: weight, projection: b, r: a, scale };
            hopper::adapted::backward(device, &product, [x, h], factor)
        }
        _ => {
            let _ = (weight, a, b, x, h, scale, factor);
            Ok(None)
        }
    }
}

/// `scale·g·b [n, r]` in the dtype of `g`, and `gᵀ·h [out, r]` in `factor`, for `g [n, out]`, `b [out, r]` and `h [n, r]`, where
/// [`fewest_for_products`] has an answer: by one pass over `g`, where the device has a kernel for it that serves.
pub(crate) fn low_rank_gradient([g, b, h]: [&Tensor; 3], scale: f32, factor: DType) -> Result<[Tensor; 2]> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = g.device()
        && let Some(both) = hopper::lora::low_rank_gradient(device, [g, b, h], scale, factor)?
    {
        return Ok(both);
    }
    let e = product_onto(g, b, scale, Place::Fresh(g.dtype()))?;
    // g has just been read: some of it is still in the cache.
    Ok([e, product_onto(&g.t()?, h, 1.0, Place::Fresh(factor))?])
}

/// y and the logarithms of the sums of exponentials, as the plan's forward leaves them, for q, k and v of any strides: where the
/// device has a kernel of its own for such heads.
#[cfg_attr(
    not(feature = "cuda"),
    expect(clippy::unnecessary_wraps, reason = "a build without such a device has no kernel that fails")
)]
pub(crate) fn attention_by_units(tensors: [&Tensor; 3], plan: &Attention) -> Result<Option<[Tensor; 2]>> {
    match tensors[0].device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => hopper::attention::forward(device, tensors, plan),
        _ => {
            let _ = plan;
            Ok(None)
        }
    }
}

/// The gradients of q, k and v, as the plan's backward computes all of them, from the forward's y, y's gradient and the
/// logarithms: where the device has kernels of its own for such heads.
#[cfg_attr(
    not(feature = "cuda"),
    expect(clippy::unnecessary_wraps, reason = "a build without such a device has no kernel that fails")
)]
pub(crate) fn attention_gradients_by_units(
    tensors: [&Tensor; 3],
    results: [&Tensor; 3],
    plan: &Attention,
) -> Result<Option<[Tensor; 3]>> {
    match tensors[0].device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => hopper::attention::backward(device, tensors, results, plan),
        _ => {
            let _ = (results, plan);
            Ok(None)
        }
    }
}
