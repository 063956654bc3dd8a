//! Runs plans of `candlewick-kernels` on the tensors of a GPU.
//!
//! What a plan binds, and how it is cut to what a device allows, is decided here, the same for every API: an
//! [`Executor`] compiles a launch and dispatches it, and knows nothing else. In the tests of this crate the kernel
//! simulator takes the place of a device.

#![cfg_attr(
    not(any(test, feature = "cuda", all(target_os = "macos", feature = "custom-metal"))),
    expect(dead_code, reason = "a build without a GPU has no executor")
)]

use std::borrow::Cow;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candlewick_kernels::{Element, Launch, Plan, PlanError, Role, Storage, Tuning, launch::VECTOR_BYTES};

use super::Attempt;
use crate::DeviceError;

/// Compiles and dispatches launches on one device.
pub(super) trait Executor {
    /// A compiled kernel.
    type Pipeline;

    /// The kernel of a launch, compiled before or now.
    fn pipeline(&self, launch: &Launch) -> std::result::Result<Self::Pipeline, DeviceError>;

    /// The most threads that a threadgroup of this kernel may have here.
    fn max_threads(pipeline: &Self::Pipeline) -> u32;

    /// Dispatches a launch on its arguments, after all that was dispatched before.
    fn dispatch(&self, launch: &Launch, pipeline: &Self::Pipeline, arguments: &[Argument]) -> Result<()>;
}

/// What one argument of a kernel is bound to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Argument<'a> {
    pub(super) tensor: &'a Tensor,
    /// Where the tensor begins in its storage, in bytes.
    pub(super) offset: usize,
    /// Whether the kernel writes it.
    pub(super) writes: bool,
}

/// The kernels' storage type of a tensor of f32, f16 or bf16.
pub(crate) fn storage(tensor: &Tensor) -> Result<Storage> {
    match tensor.dtype() {
        DType::F32 => Ok(Storage::F32),
        DType::F16 => Ok(Storage::F16),
        DType::BF16 => Ok(Storage::BF16),
        other => bail!("the kernels store f32, f16 or bf16, got {}", other.as_str()),
    }
}

/// The product of all dimensions but the last, and the last.
pub(crate) fn matrix(tensor: &Tensor) -> (usize, usize) {
    match tensor.dims() {
        [outer @ .., columns] => (outer.iter().product(), *columns),
        [] => (1, 1),
    }
}

/// `tensor`, or a contiguous copy of it. Its offset is no reason to copy.
pub(crate) fn contiguous(tensor: &Tensor) -> Result<Tensor> {
    if tensor.elem_count() == 0 { Ok(tensor.clone()) } else { tensor.contiguous() }
}

pub(super) const fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::F16 => DType::F16,
        Element::BF16 => DType::BF16,
        Element::U32 => DType::U32,
        Element::I64 => DType::I64,
    }
}

/// The results of a plan, in its order; those that were not wanted are absent from both.
pub(crate) struct Outputs(std::vec::IntoIter<Tensor>);

impl Outputs {
    pub(super) fn new(tensors: Vec<Tensor>) -> Self {
        Self(tensors.into_iter())
    }

    /// The next result.
    pub(crate) fn take(&mut self) -> Result<Tensor> {
        match self.0.next() {
            Some(tensor) => Ok(tensor),
            None => bail!("the plan has fewer outputs"),
        }
    }

    /// The next result, if it was wanted.
    pub(crate) fn take_if(&mut self, wanted: bool) -> Result<Option<Tensor>> {
        if wanted { self.take().map(Some) } else { Ok(None) }
    }
}

/// Runs a plan: `inputs` are what it reads, in its order, `shapes` those of what it leaves.
///
/// An input is read from its first element on, as the plan says: contiguous, unless the plan knows strides.
pub(crate) fn run(
    inputs: &[&Tensor],
    shapes: &[&Shape],
    plan: impl Fn(Tuning) -> std::result::Result<Plan, PlanError>,
) -> Attempt<Outputs> {
    Work { inputs, replaced: None, shapes, plan: &plan }.run()
}

/// As [`run`]; the first result takes the place of the last input, a fresh tensor that nobody else has.
pub(crate) fn run_in_place(
    inputs: &[&Tensor],
    shapes: &[&Shape],
    plan: impl Fn(Tuning) -> std::result::Result<Plan, PlanError>,
) -> Attempt<Outputs> {
    Work { inputs, replaced: inputs.last().copied(), shapes, plan: &plan }.run()
}

/// A plan, not yet cut to a device, and its tensors.
struct Work<'a> {
    inputs: &'a [&'a Tensor],
    replaced: Option<&'a Tensor>,
    shapes: &'a [&'a Shape],
    plan: &'a dyn Fn(Tuning) -> std::result::Result<Plan, PlanError>,
}

impl Work<'_> {
    fn run(&self) -> Attempt<Outputs> {
        let Some(device) = self.inputs.first().map(|input| input.device()) else {
            return Err(DeviceError::Unsupported { what: "a plan without inputs".into() }.into());
        };
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => self.on(&super::cuda::Cuda::of(device)?),
            #[cfg(all(target_os = "macos", feature = "custom-metal"))]
            Device::Metal(device) => self.on(&super::metal::Metal::of(device)?),
            #[cfg(test)]
            Device::Cpu => {
                let plan = self.plan(self.tuning(Tuning::default().max_threads))?;
                // Checks the tensors against the plan.
                self.bind(&plan)?;
                super::simulated::run(&plan, self.inputs, self.shapes)
            }
            other => Err(DeviceError::Unsupported { what: format!("{:?}", other.location()) }.into()),
        }
    }

    fn plan(&self, tuning: Tuning) -> Result<Plan> {
        let plan = (self.plan)(tuning).map_err(candle_core::Error::wrap)?;
        plan.check().map_err(candle_core::Error::wrap)?;
        Ok(plan)
    }

    /// The tuning for these tensors where threadgroups may have `max_threads`.
    fn tuning(&self, max_threads: u32) -> Tuning {
        // Allocations are aligned beyond a vector access on every device; offsets decide.
        let aligned = self.inputs.iter().all(|input| offset(input).is_multiple_of(VECTOR_BYTES));
        Tuning { aligned, max_threads }
    }

    fn on<E: Executor>(&self, executor: &E) -> Attempt<Outputs> {
        let mut tuning = self.tuning(Tuning::default().max_threads);
        let (plan, pipelines) = loop {
            let plan = self.plan(tuning)?;
            let pipelines: Vec<E::Pipeline> = plan
                .launches
                .iter()
                .map(|launch| executor.pipeline(launch))
                .collect::<std::result::Result<_, _>>()?;
            // An oversized dispatch does nothing, silently, on Metal.
            let limits = plan
                .launches
                .iter()
                .zip(&pipelines)
                .map(|(launch, pipeline)| (launch, E::max_threads(pipeline)));
            match limits.filter(|&(launch, limit)| launch.threads > limit).map(|(_, limit)| limit).min() {
                None => break (plan, pipelines),
                Some(limit) if limit < tuning.max_threads => tuning.max_threads = limit,
                Some(limit) => {
                    let what = format!("a threadgroup of the {limit} threads that the kernel allows");
                    return Err(DeviceError::Unsupported { what }.into());
                }
            }
        };
        let (tensors, outputs) = self.bind(&plan)?;
        let arguments: Vec<Argument> = (plan.buffers.iter().zip(&tensors))
            .map(|(buffer, tensor)| Argument {
                tensor,
                offset: offset(tensor),
                writes: buffer.role != Role::Input,
            })
            .collect();
        for (launch, pipeline) in plan.launches.iter().zip(&pipelines) {
            let bound: Vec<Argument> = launch.arguments.iter().map(|&index| arguments[index]).collect();
            executor.dispatch(launch, pipeline, &bound)?;
        }
        Ok(Outputs::new(outputs))
    }

    /// The tensor of each of the plan's buffers, and the results among them.
    fn bind(&self, plan: &Plan) -> Result<(Vec<Cow<'_, Tensor>>, Vec<Tensor>)> {
        let Some(device) = self.inputs.first().map(|input| input.device()) else {
            bail!("a plan has at least one input");
        };
        let mut inputs = self.inputs.iter();
        let mut shapes = self.shapes.iter();
        let mut outputs: Vec<Tensor> = Vec::with_capacity(self.shapes.len());
        let mut tensors = Vec::with_capacity(plan.buffers.len());
        for buffer in &plan.buffers {
            let dtype = dtype(buffer.element);
            let tensor = match buffer.role {
                Role::Input => match inputs.next() {
                    Some(input) if input.dtype() == dtype && reach(input) >= buffer.len => {
                        Cow::Borrowed(*input)
                    }
                    Some(input) => bail!(
                        "{} must hold {} elements of {}, got {} of {}",
                        buffer.name,
                        buffer.len,
                        dtype.as_str(),
                        reach(input),
                        input.dtype().as_str()
                    ),
                    None => bail!("{} has no tensor", buffer.name),
                },
                Role::Output => {
                    let Some(&shape) = shapes.next().filter(|shape| shape.elem_count() == buffer.len) else {
                        bail!("{} has no shape of {} elements", buffer.name, buffer.len);
                    };
                    let tensor = match self.replaced.filter(|_| outputs.is_empty()) {
                        Some(replaced) => replaced.reshape(shape)?,
                        None => uninitialised(shape, dtype, device)?,
                    };
                    outputs.push(tensor.clone());
                    Cow::Owned(tensor)
                }
                Role::Scratch => Cow::Owned(uninitialised(&Shape::from(buffer.len), dtype, device)?),
            };
            tensors.push(tensor);
        }
        if inputs.next().is_some() || shapes.next().is_some() {
            bail!("the plan has {} buffers, fewer than its tensors", plan.buffers.len());
        }
        Ok((tensors, outputs))
    }
}

/// Where a tensor begins in its storage, in bytes.
fn offset(tensor: &Tensor) -> usize {
    tensor.layout().start_offset() * tensor.dtype().size_in_bytes()
}

/// From a tensor's first element to its last, inclusive.
fn reach(tensor: &Tensor) -> usize {
    if tensor.elem_count() == 0 {
        return 0;
    }
    tensor.dims().iter().zip(tensor.stride()).map(|(&dim, &stride)| (dim - 1) * stride).sum::<usize>() + 1
}

fn uninitialised(shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
    if shape.elem_count() == 0 {
        return Tensor::zeros(shape, dtype, device);
    }
    // SAFETY: only outputs and scratch of a plan are made here, and a plan writes every element of an output, and of
    // its scratch what it reads: the simulator tests check it for every op.
    unsafe { Tensor::empty(shape, dtype, device) }
}

#[cfg(test)]
mod tests;
