//! Runs launches on an NVIDIA GPU: texts compiled by NVRTC ([`super::nvrtc`]), launched on Candle's stream.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaStream, DevicePtr, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId};
use candle_core::{CudaDevice, Error, Result, Storage as TensorStorage, bail};
use candlewick_kernels::{KernelFile, Launch, Storage, Target};

use super::gpu::{Argument, Executor};
use super::nvrtc;
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

/// Which entry point of which file in which storage; the defines tell its variants apart.
type Name = (&'static str, KernelFile, Storage);

/// The kernels of one device.
#[derive(Default)]
struct Kernels {
    functions: RwLock<HashMap<Name, Vec<(Defines, Function)>>>,
    /// By text, which may hold several entry points.
    modules: RwLock<HashMap<String, Arc<CudaModule>>>,
}

type Defines = Vec<(&'static str, String)>;

impl Cuda {
    /// The executor of a device.
    pub(super) fn of(device: &CudaDevice) -> Result<Self> {
        static DEVICES: LazyLock<RwLock<HashMap<DeviceId, Arc<Kernels>>>> = LazyLock::new(RwLock::default);
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().map_err(Error::wrap)?;
        let known = DEVICES.read().unwrap_or_else(PoisonError::into_inner).get(&device.id()).cloned();
        let kernels = match known {
            Some(kernels) => kernels,
            None => {
                keep_freed_memory(&stream)?;
                let mut devices = DEVICES.write().unwrap_or_else(PoisonError::into_inner);
                devices.entry(device.id()).or_default().clone()
            }
        };
        Ok(Self { stream, kernels })
    }

    fn load(&self, launch: &Launch) -> std::result::Result<Function, DeviceError> {
        let rejected = |reason: String| DeviceError::Pipeline { name: launch.kernel.to_owned(), reason };
        let module = self.module(launch)?;
        let function = module
            .load_function(launch.kernel)
            .map_err(|_| DeviceError::UnknownKernel { name: launch.kernel.to_owned() })?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        // SAFETY: the function belongs to a module that `function` keeps loaded.
        let max_threads =
            unsafe { result::function::get_function_attribute(function.cu_function(), attribute) }
                .map_err(|error| rejected(error.to_string()))?;
        let max_threads = u32::try_from(max_threads).map_err(|error| rejected(error.to_string()))?;
        Ok(Function { function, max_threads })
    }

    /// The module of a launch's text: machine code for this device, or PTX where the compiler is older than the device.
    fn module(&self, launch: &Launch) -> std::result::Result<Arc<CudaModule>, DeviceError> {
        let text = launch.source(Target::Cuda);
        if let Some(module) = self.kernels.modules.read().unwrap_or_else(PoisonError::into_inner).get(&text) {
            return Ok(module.clone());
        }
        let context = self.stream.context();
        let rejected = |reason: String| DeviceError::Pipeline { name: launch.kernel.to_owned(), reason };
        let (major, minor) = context.compute_capability().map_err(|error| rejected(error.to_string()))?;
        let mut refused = String::new();
        for code in nvrtc::codes(launch.kernel, major * 10 + minor)? {
            let image = nvrtc::compile(launch.kernel, &text, code)?;
            match context.load_module(Ptx::from_binary(image)) {
                Ok(module) => {
                    let mut modules = self.kernels.modules.write().unwrap_or_else(PoisonError::into_inner);
                    return Ok(modules.entry(text).or_insert(module).clone());
                }
                // The driver is older than the compiler.
                Err(error) => refused = error.to_string(),
            }
        }
        Err(rejected(refused))
    }
}

/// Lets the device's memory pool keep what is freed. By default it gives everything back whenever somebody waits for the
/// device, and the next step of a training pays for mapping it again.
fn keep_freed_memory(stream: &CudaStream) -> Result<()> {
    let context = stream.context();
    let pooled = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    if context.attribute(pooled).map_err(Error::wrap)? == 0 {
        return Ok(());
    }
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut everything = u64::MAX;
    // SAFETY: the device is that of a context; the attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).map_err(Error::wrap)?;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut everything).cast()).map_err(Error::wrap)
    }
}

impl Executor for Cuda {
    type Pipeline = Function;

    fn pipeline(&self, launch: &Launch) -> std::result::Result<Function, DeviceError> {
        let name = (launch.kernel, launch.file, launch.storage);
        let find = |functions: &HashMap<Name, Vec<(Defines, Function)>>| {
            let variants = functions.get(&name)?;
            variants
                .iter()
                .find(|(defines, _)| *defines == launch.defines)
                .map(|(_, function)| function.clone())
        };
        if let Some(function) = find(&self.kernels.functions.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(function);
        }
        let function = self.load(launch)?;
        let mut functions = self.kernels.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions.entry(name).or_default().push((launch.defines.clone(), function.clone()));
        Ok(function)
    }

    fn max_threads(function: &Function) -> u32 {
        function.max_threads
    }

    fn dispatch(&self, launch: &Launch, function: &Function, arguments: &[Argument]) -> Result<()> {
        let storages: Vec<_> =
            arguments.iter().map(|argument| argument.tensor.storage_and_layout().0).collect();
        let mut guards = Vec::with_capacity(arguments.len());
        let mut addresses = Vec::with_capacity(arguments.len());
        for (argument, storage) in arguments.iter().zip(&storages) {
            macro_rules! address {
                ($($dtype:ident),+) => {
                    match &**storage {
                        $(TensorStorage::Cuda(storage) if matches!(storage.slice, CudaStorageSlice::$dtype(_)) => {
                            let CudaStorageSlice::$dtype(slice) = &storage.slice else { continue };
                            slice.device_ptr(&self.stream)
                        })+
                        _ => bail!("{}: the tensors of one operation must be on one device", launch.kernel),
                    }
                };
            }
            let (address, guard) = address!(F32, F16, BF16, U32, I64);
            addresses.push(address + argument.offset as u64);
            guards.push(guard);
        }
        let mut parameters: Vec<*mut c_void> =
            addresses.iter().map(|address| ptr::from_ref(address).cast_mut().cast()).collect();
        parameters.push(launch.params.as_ptr().cast_mut().cast());
        let [x, y, z] = launch.threadgroups;
        // SAFETY: `parameters` are one address for each of the kernel's buffers, in order, and the bytes of its PARAM
        // struct, all alive until the call returns, which copies them. The buffers hold what the plan says they do
        // (`gpu.rs` checked it); the kernels stay inside them (the simulator's tests). They are read and written on the
        // stream that all of the device's work is queued on, so that nothing frees or reads them out of order.
        unsafe {
            result::launch_kernel(
                function.function.cu_function(),
                (x, y, z),
                (launch.threads, 1, 1),
                0,
                self.stream.cu_stream(),
                &mut parameters,
            )
        }
        .map_err(Error::wrap)
    }
}
