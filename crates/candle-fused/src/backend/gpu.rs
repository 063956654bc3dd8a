//! Runs plans of `candlewick-kernels` on the tensors of a GPU.
//!
//! What a plan binds, and how it is cut to what a device allows, is decided here, the same for every API: an
//! [`Executor`] compiles a launch and dispatches it, and knows nothing else. In the tests of this crate the kernel
//! simulator takes the place of a device.

#![cfg_attr(
    not(any(test, feature = "cuda", all(target_os = "macos", feature = "custom-metal"))),
    expect(dead_code, reason = "a build without a GPU has no executor")
)]

use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candlewick_kernels::rope::Rope;
use candlewick_kernels::{Buffer, Element, Launch, Plan, Role, Storage, Tuning, launch::VECTOR_BYTES};

pub(crate) use super::pipelines::kept;
use super::pipelines::{Prepared, Recipe};
use super::{Attempt, DeviceKind, Failure, has_kernels};
use crate::{DeviceError, telemetry};

/// Compiles and dispatches launches on one device.
pub(super) trait Executor {
    /// A compiled kernel.
    type Pipeline;

    /// The kernel of a launch, compiled before or now.
    fn pipeline(&self, launch: &Launch) -> std::result::Result<Self::Pipeline, DeviceError>;

    /// The most threads that a threadgroup of this kernel may have here.
    fn max_threads(pipeline: &Self::Pipeline) -> u32;

    /// The plans that were prepared for this device.
    fn prepared(&self) -> &Prepared<Ready<Self::Pipeline>>;

    /// Dispatches launches in their order, after all that was dispatched before. Their arguments are indices into these.
    fn dispatch(&self, launches: &[(Launch, Self::Pipeline)], buffers: &[Argument]) -> Result<()>;
}

/// A plan cut to a device, with its compiled kernels.
pub(super) struct Ready<P> {
    buffers: Vec<Buffer>,
    launches: Vec<(Launch, P)>,
    scratch: Scratch,
}

/// One allocation for all of a plan's scratch.
struct Scratch {
    bytes: usize,
    /// Where each scratch buffer begins, in the plan's order.
    offsets: Vec<usize>,
}

/// As an allocation of its own would be aligned.
const SCRATCH_ALIGNMENT: usize = 256;

impl Scratch {
    fn of(buffers: &[Buffer]) -> Self {
        let (mut bytes, mut offsets) = (0, Vec::new());
        for buffer in buffers.iter().filter(|buffer| buffer.role == Role::Scratch) {
            offsets.push(bytes);
            bytes += buffer.bytes().next_multiple_of(SCRATCH_ALIGNMENT);
        }
        Self { bytes, offsets }
    }
}

/// What one buffer of a plan is bound to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Argument<'a> {
    pub(super) tensor: &'a Tensor,
    /// Where the buffer begins in the tensor's storage, in bytes.
    pub(super) offset: usize,
    /// Whether the kernels write it.
    #[cfg_attr(
        all(feature = "cuda", not(any(test, all(target_os = "macos", feature = "custom-metal")))),
        expect(dead_code, reason = "Metal alone orders launches by it")
    )]
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
    if tensor.elem_count() == 0 || tensor.is_contiguous() {
        return Ok(tensor.clone());
    }
    let Some(rows) = Rows::of(tensor)? else { return tensor.contiguous() };
    let kind = DeviceKind::of(tensor.device());
    // No table is read where no column turns.
    match run(&[tensor; 3], &[tensor.shape()], kept(rows.0, Rope::forward)) {
        Ok(mut outputs) => outputs.take(),
        Err(Failure::Device(error)) => {
            if has_kernels(kind) {
                telemetry::warn_once("contiguous", kind, &error);
            }
            tensor.contiguous()
        }
        Err(Failure::Tensor(error)) => Err(error),
    }
}

/// `tensor`, or a copy of it, in which every row of the last dimension begins at a multiple of 16 bytes, if rows are such
/// multiples.
pub(crate) fn vector_rows(tensor: &Tensor) -> Result<Tensor> {
    let vector = storage(tensor)?.vector();
    let strides_fit = match tensor.stride() {
        [outer @ .., 1] => outer.iter().all(|stride| stride.is_multiple_of(vector)),
        _ => false,
    };
    if strides_fit && offset(tensor).is_multiple_of(VECTOR_BYTES) {
        return Ok(tensor.clone());
    }
    // A contiguous tensor is its own copy, wherever it begins.
    if tensor.is_contiguous() { tensor.force_contiguous() } else { contiguous(tensor) }
}

/// Rows that are contiguous themselves, wherever they lie. The rotary embedding reads such rows and leaves them in order;
/// one that turns no column is their copy, in vectors and at the memory's speed, which Candle's element by element is not.
struct Rows(Rope);

impl Rows {
    fn of(tensor: &Tensor) -> Result<Option<Self>> {
        let is_float = matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16);
        let rank = tensor.rank();
        if !is_float || !(2..=4).contains(&rank) || u32::try_from(tensor.elem_count()).is_err() {
            return Ok(None);
        }
        let (mut dims, mut strides) = ([1; 4], [0; 4]);
        dims[4 - rank..].copy_from_slice(tensor.dims());
        strides[4 - rank..].copy_from_slice(tensor.stride());
        let ([batch, heads, positions, columns], [a, b, c, 1]) = (dims, strides) else { return Ok(None) };
        Ok(Some(Self(Rope {
            batch,
            heads,
            positions,
            columns,
            rotary: 0,
            strides: [a, b, c],
            batched_table: false,
            interleaved: false,
            storage: storage(tensor)?,
            table: storage(tensor)?,
        })))
    }
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
#[expect(clippy::needless_pass_by_value, reason = "as closures are passed")]
pub(crate) fn run(inputs: &[&Tensor], shapes: &[&Shape], recipe: impl Recipe) -> Attempt<Outputs> {
    Work { inputs, replaced: None, shapes, recipe: &recipe }.run()
}

/// As [`run`]; the first result takes the place of the last input: a fresh tensor that nobody else has, or a variable that
/// is set.
#[expect(clippy::needless_pass_by_value, reason = "as closures are passed")]
pub(crate) fn run_in_place(inputs: &[&Tensor], shapes: &[&Shape], recipe: impl Recipe) -> Attempt<Outputs> {
    Work { inputs, replaced: inputs.last().copied(), shapes, recipe: &recipe }.run()
}

/// A recipe, and the tensors of its plan.
struct Work<'a> {
    inputs: &'a [&'a Tensor],
    replaced: Option<&'a Tensor>,
    shapes: &'a [&'a Shape],
    recipe: &'a dyn Recipe,
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
                let plan = self.plan(Tuning { aligned: self.aligned(), ..Tuning::default() })?;
                self.check(&plan.buffers)?;
                super::simulated::run(&plan, self.inputs, self.shapes, self.replaced)
            }
            other => Err(DeviceError::Unsupported { what: format!("{:?}", other.location()) }.into()),
        }
    }

    fn plan(&self, tuning: Tuning) -> Result<Plan> {
        let plan = self.recipe.plan(tuning).map_err(candle_core::Error::wrap)?;
        plan.check().map_err(candle_core::Error::wrap)?;
        Ok(plan)
    }

    /// Whether every input allows vector accesses. Allocations are aligned beyond these on every device; offsets decide.
    fn aligned(&self) -> bool {
        self.inputs.iter().all(|input| offset(input).is_multiple_of(VECTOR_BYTES))
    }

    fn on<E: Executor>(&self, executor: &E) -> Attempt<Outputs> {
        let aligned = self.aligned();
        let ready = match self.recipe.key() {
            Some(key) => {
                let elements = self.inputs.first().map_or(0, |input| input.elem_count());
                executor.prepared().get(key, elements, aligned, || self.prepare(executor, aligned))?
            }
            None => Arc::new(self.prepare(executor, aligned)?),
        };
        self.check(&ready.buffers)?;
        let outputs = self.outputs(&ready.buffers)?;
        let scratch = self.scratch(&ready.scratch)?;
        let arguments = self.bind(&ready, &outputs, scratch.as_ref())?;
        executor.dispatch(&ready.launches, &arguments)?;
        Ok(Outputs::new(outputs))
    }

    /// The plan, cut to what its kernels allow on this device.
    fn prepare<E: Executor>(&self, executor: &E, aligned: bool) -> Attempt<Ready<E::Pipeline>> {
        let mut tuning = Tuning { aligned, ..Tuning::default() };
        loop {
            let Plan { buffers, launches } = self.plan(tuning)?;
            let pipelines: Vec<E::Pipeline> = launches
                .iter()
                .map(|launch| executor.pipeline(launch))
                .collect::<std::result::Result<_, _>>()?;
            // An oversized dispatch does nothing, silently, on Metal.
            let limits =
                launches.iter().zip(&pipelines).map(|(launch, pipeline)| (launch, E::max_threads(pipeline)));
            match limits.filter(|&(launch, limit)| launch.threads > limit).map(|(_, limit)| limit).min() {
                None => {
                    let launches = launches.into_iter().zip(pipelines).collect();
                    return Ok(Ready { scratch: Scratch::of(&buffers), buffers, launches });
                }
                Some(limit) if limit < tuning.max_threads => tuning.max_threads = limit,
                Some(limit) => {
                    let what = format!("a threadgroup of the {limit} threads that the kernel allows");
                    return Err(DeviceError::Unsupported { what }.into());
                }
            }
        }
    }

    /// The tensors and shapes are the plan's, whose buffers are inputs, then outputs, then scratch.
    fn check(&self, buffers: &[Buffer]) -> Result<()> {
        self.device()?;
        let (mut inputs, mut shapes) = (self.inputs.iter(), self.shapes.iter());
        for buffer in buffers {
            let dtype = dtype(buffer.element);
            match buffer.role {
                Role::Input => match inputs.next() {
                    Some(input) if input.dtype() == dtype && reach(input) >= buffer.len => {}
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
                    if shapes.next().is_none_or(|shape| shape.elem_count() != buffer.len) {
                        bail!("{} has no shape of {} elements", buffer.name, buffer.len);
                    }
                }
                Role::Scratch => {}
            }
        }
        if inputs.next().is_some() || shapes.next().is_some() {
            bail!("the plan has {} buffers, fewer than its tensors", buffers.len());
        }
        Ok(())
    }

    fn device(&self) -> Result<&Device> {
        match self.inputs.first() {
            Some(input) => Ok(input.device()),
            None => bail!("a plan has at least one input"),
        }
    }

    /// The results, to be written.
    fn outputs(&self, buffers: &[Buffer]) -> Result<Vec<Tensor>> {
        let device = self.device()?;
        let outputs = buffers.iter().filter(|buffer| buffer.role == Role::Output);
        let output = |(index, (buffer, &shape)): (usize, (&Buffer, &&Shape))| match self.replaced {
            Some(replaced) if index == 0 => replaced.reshape(shape),
            _ => uninitialised(shape, dtype(buffer.element), device),
        };
        outputs.zip(self.shapes).enumerate().map(output).collect()
    }

    fn scratch(&self, scratch: &Scratch) -> Result<Option<Tensor>> {
        if scratch.bytes == 0 {
            return Ok(None);
        }
        uninitialised(&Shape::from(scratch.bytes), DType::U8, self.device()?).map(Some)
    }

    /// What each buffer is bound to.
    fn bind<'t, P>(
        &'t self,
        ready: &Ready<P>,
        outputs: &'t [Tensor],
        scratch: Option<&'t Tensor>,
    ) -> Result<Vec<Argument<'t>>> {
        let whole = |tensor, writes| Argument { tensor, offset: offset(tensor), writes };
        let mut inputs = self.inputs.iter().map(|&input| whole(input, false));
        let mut outputs = outputs.iter().map(|output| whole(output, true));
        let parts = scratch.into_iter().flat_map(|tensor| {
            ready.scratch.offsets.iter().map(move |&offset| Argument { tensor, offset, writes: true })
        });
        let mut parts = parts.into_iter();
        let argument = |buffer: &Buffer| {
            let bound = match buffer.role {
                Role::Input => inputs.next(),
                Role::Output => outputs.next(),
                Role::Scratch => parts.next(),
            };
            match bound {
                Some(bound) => Ok(bound),
                None => bail!("{} has no tensor", buffer.name),
            }
        };
        ready.buffers.iter().map(argument).collect()
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
