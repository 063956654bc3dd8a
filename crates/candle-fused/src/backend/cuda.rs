//! Runs launches on an NVIDIA GPU: texts compiled by NVRTC ([`super::nvrtc`]), launched on Candle's stream.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaStream, DevicePtr, SyncOnDrop, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice, DeviceId};
use candle_core::{CudaDevice, Error, Result, Storage as TensorStorage, Tensor, bail};
use candlewick_kernels::{Launch, Target};

use super::gpu::{Argument, Executor, Ready};
use super::hopper::Hopper;
use super::nvrtc::{self, Code};
use super::pipelines::{Compiler, Pipelines, Prepared};
use crate::DeviceError;

/// A device, with what was compiled for it.
pub(super) struct Cuda {
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
}

/// A compiled kernel.
#[derive(Clone)]
pub(super) struct Function {
    function: CudaFunction,
    max_threads: u32,
}

impl Function {
    pub(super) fn of(
        module: &Arc<CudaModule>,
        kernel: &'static str,
    ) -> std::result::Result<Self, DeviceError> {
        let function = module
            .load_function(kernel)
            .map_err(|_| DeviceError::UnknownKernel { name: kernel.to_owned() })?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        // SAFETY: the function belongs to a module that `function` keeps loaded.
        let max_threads =
            unsafe { result::function::get_function_attribute(function.cu_function(), attribute) }
                .map_err(|error| rejected(kernel, &error))?;
        let max_threads = u32::try_from(max_threads).map_err(|error| rejected(kernel, &error))?;
        Ok(Self { function, max_threads })
    }

    pub(super) fn cu_function(&self) -> sys::CUfunction {
        self.function.cu_function()
    }
}

/// The kernels of one device.
#[derive(Default)]
struct Kernels {
    pipelines: Pipelines<Arc<CudaModule>, Function>,
    prepared: Prepared<Ready<Function>>,
    hopper: Hopper,
}

impl Cuda {
    /// The executor of a device.
    pub(super) fn of(device: &CudaDevice) -> Result<Self> {
        static DEVICES: LazyLock<RwLock<HashMap<DeviceId, Arc<Kernels>>>> = LazyLock::new(RwLock::default);
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().map_err(Error::wrap)?;
        let known = DEVICES.read().unwrap_or_else(PoisonError::into_inner).get(&device.id()).cloned();
        let kernels = if let Some(kernels) = known {
            kernels
        } else {
            keep_freed_memory(&stream)?;
            let mut devices = DEVICES.write().unwrap_or_else(PoisonError::into_inner);
            devices.entry(device.id()).or_default().clone()
        };
        Ok(Self { stream, kernels })
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(super) fn hopper(&self) -> &Hopper {
        &self.kernels.hopper
    }

    /// A text that is for this device's architecture alone, compiled.
    pub(super) fn specific(
        &self,
        kernel: &'static str,
        text: &str,
    ) -> std::result::Result<Arc<CudaModule>, DeviceError> {
        let refused = |error: &dyn ToString| rejected(kernel, error);
        let context = self.stream.context();
        let (major, minor) = context.compute_capability().map_err(|error| refused(&error))?;
        let image = nvrtc::compile(kernel, text, Code::Specific(major * 10 + minor))?;
        context.load_module(Ptx::from_binary(image)).map_err(|error| refused(&error))
    }
}

fn rejected(kernel: &str, reason: &dyn ToString) -> DeviceError {
    DeviceError::Pipeline { name: kernel.to_owned(), reason: reason.to_string() }
}

impl Compiler for Cuda {
    type Module = Arc<CudaModule>;
    type Pipeline = Function;

    /// Machine code for this device, or PTX where the compiler is older than the device.
    fn module(&self, launch: &Launch) -> std::result::Result<Arc<CudaModule>, DeviceError> {
        let (text, context) = (launch.source(Target::Cuda), self.stream.context());
        let (major, minor) = context.compute_capability().map_err(|error| rejected(launch.kernel, &error))?;
        if launch.file.needs_matrix_units() && major < 8 {
            let what = format!("tiles before compute capability 8.0, it has {major}.{minor}");
            return Err(DeviceError::Unsupported { what });
        }
        let mut refused = String::new();
        for code in nvrtc::codes(launch.kernel, major * 10 + minor)? {
            let image = nvrtc::compile(launch.kernel, &text, code)?;
            match context.load_module(Ptx::from_binary(image)) {
                Ok(module) => return Ok(module),
                // The driver is older than the compiler.
                Err(error) => refused = error.to_string(),
            }
        }
        Err(rejected(launch.kernel, &refused))
    }

    fn pipeline(
        &self,
        module: &Arc<CudaModule>,
        launch: &Launch,
    ) -> std::result::Result<Function, DeviceError> {
        Function::of(module, launch.kernel)
    }
}

/// Lets the device's memory pool keep what is freed. By default it gives everything back whenever somebody waits for the
/// device, and the next step of a training pays for mapping it again.
fn keep_freed_memory(stream: &CudaStream) -> Result<()> {
    let Some(pool) = pool(stream)? else { return Ok(()) };
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut everything = u64::MAX;
    // SAFETY: the pool is a device's own; the attribute is a u64.
    unsafe { result::mem_pool::set_attribute(pool, threshold, (&raw mut everything).cast()) }
        .map_err(Error::wrap)
}

/// What Candle allocates from, where the device has it.
fn pool(stream: &CudaStream) -> Result<Option<sys::CUmemoryPool>> {
    let context = stream.context();
    let pooled = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    if context.attribute(pooled).map_err(Error::wrap)? == 0 {
        return Ok(None);
    }
    // SAFETY: the device is that of a context.
    unsafe { result::device::get_default_mem_pool(context.cu_device()) }.map(Some).map_err(Error::wrap)
}

const PEAK: sys::CUmemPool_attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;

/// The most bytes that were allocated at once.
pub(super) fn peak_memory(device: &CudaDevice) -> Result<Option<u64>> {
    let Some(pool) = pool(&device.cuda_stream())? else { return Ok(None) };
    let mut peak = 0u64;
    // SAFETY: the pool is a device's own; the attribute is a u64.
    unsafe { result::mem_pool::get_attribute(pool, PEAK, (&raw mut peak).cast()) }.map_err(Error::wrap)?;
    Ok(Some(peak))
}

/// Counts anew from what is allocated now.
pub(super) fn reset_peak_memory(device: &CudaDevice) -> Result<()> {
    let Some(pool) = pool(&device.cuda_stream())? else { return Ok(()) };
    let mut now = 0u64;
    // SAFETY: the pool is a device's own; the attribute is a u64, and zero the one value that it takes.
    unsafe { result::mem_pool::set_attribute(pool, PEAK, (&raw mut now).cast()) }.map_err(Error::wrap)
}

/// Where a storage begins on the device, and what Candle's driver notes once its use is queued.
fn address<'a>(storage: &'a TensorStorage, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
    macro_rules! address {
        ($($dtype:ident),+) => {
            match storage {
                $(TensorStorage::Cuda(CudaStorage { slice: CudaStorageSlice::$dtype(slice), .. }) => {
                    Ok(slice.device_ptr(stream))
                })+
                _ => bail!("the tensors of one operation must be on one device"),
            }
        };
    }
    address!(F32, F16, BF16, U32, I64, U8)
}

/// Queues what needs the addresses of tensors' first elements.
pub(super) fn with_addresses<const N: usize, R>(
    stream: &CudaStream,
    tensors: [&Tensor; N],
    queue: impl FnOnce([u64; N]) -> Result<R>,
) -> Result<R> {
    let storages = tensors.map(|tensor| tensor.storage_and_layout().0);
    let mut guards = Vec::with_capacity(N);
    let mut addresses = [0; N];
    for ((first, tensor), storage) in addresses.iter_mut().zip(tensors).zip(&storages) {
        let (address, guard) = address(storage, stream)?;
        let offset = tensor.layout().start_offset() * tensor.dtype().size_in_bytes();
        *first = address + offset as u64;
        guards.push(guard);
    }
    queue(addresses)
}

/// How a matrix lies whose rows, or whose columns, are in one piece each.
pub(super) struct Lies {
    /// Whether rows are.
    pub(super) in_rows: bool,
    /// From one to the next.
    pub(super) stride: usize,
}

impl Lies {
    /// `None` where neither are.
    pub(super) fn of(matrix: &Tensor) -> Result<Option<Self>> {
        let ((rows, columns), &[row, column]) = (matrix.dims2()?, matrix.stride()) else { return Ok(None) };
        if column == 1 && (row >= columns || rows == 1) {
            Ok(Some(Self { in_rows: true, stride: row.max(columns) }))
        } else if row == 1 && (column >= rows || columns == 1) {
            Ok(Some(Self { in_rows: false, stride: column.max(rows) }))
        } else {
            Ok(None)
        }
    }
}

impl Executor for Cuda {
    type Pipeline = Function;

    fn pipeline(&self, launch: &Launch) -> std::result::Result<Function, DeviceError> {
        self.kernels.pipelines.get(launch, self)
    }

    fn max_threads(function: &Function) -> u32 {
        function.max_threads
    }

    fn prepared(&self) -> &Prepared<Ready<Function>> {
        &self.kernels.prepared
    }

    fn dispatch(&self, launches: &[(Launch, Function)], buffers: &[Argument]) -> Result<()> {
        let storages: Vec<_> = buffers.iter().map(|buffer| buffer.tensor.storage_and_layout().0).collect();
        // One stream needs no events.
        let tracks = self.stream.context().is_managing_stream_synchronization();
        let mut guards = Vec::new();
        let mut addresses = Vec::with_capacity(buffers.len());
        for (buffer, storage) in buffers.iter().zip(&storages) {
            let (address, guard) = address(storage, &self.stream)?;
            addresses.push(address + buffer.offset as u64);
            if tracks {
                guards.push(guard);
            }
        }
        let mut parameters: Vec<*mut c_void> = Vec::with_capacity(buffers.len() + 1);
        for (launch, function) in launches {
            parameters.clear();
            let arguments = launch.arguments.iter().map(|&index| ptr::from_ref(&addresses[index]));
            parameters.extend(arguments.map(|address| address.cast_mut().cast::<c_void>()));
            parameters.push(launch.params.as_ptr().cast_mut().cast());
            let [x, y, z] = launch.threadgroups;
            // SAFETY: `parameters` are one address for each of the kernel's buffers, in order, and the bytes of its PARAM
            // struct, all alive until the call returns, which copies them. The buffers hold what the plan says they do
            // (`gpu.rs` checked it); the kernels stay inside them (the simulator's tests). They are read and written on the
            // stream that all of the device's work is queued on, so that nothing frees or reads them out of order.
            unsafe {
                result::launch_kernel(
                    function.cu_function(),
                    (x, y, z),
                    (launch.threads, 1, 1),
                    0,
                    self.stream.cu_stream(),
                    &mut parameters,
                )
            }
            .map_err(Error::wrap)?;
        }
        Ok(())
    }
}
