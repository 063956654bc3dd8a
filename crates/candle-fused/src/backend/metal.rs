//! Kernels on an Apple GPU: compiled from their text as they are asked for, dispatched on Candle's encoder.
//!
//! Candle's buffers are untracked by Metal, and its one encoder is concurrent: launches overlap unless a barrier
//! stands between them. Candle sets it where a launch binds a buffer that a launch since the last barrier was declared
//! to write, or declares to write one that such a launch bound. Every launch here therefore declares whatever is not a
//! plan's input as written, read or not: a scratch buffer orders the launch that fills it before those that read it.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{MetalDevice, Result, Storage as TensorStorage, Tensor, bail};
use candle_metal_kernels::MetalKernelError;
use candle_metal_kernels::metal::{Buffer, ComputePipeline, Device, Library};
use candle_metal_kernels::utils::set_param;
use candlewick_kernels::launch::SIMDGROUP_SIZE;
use candlewick_kernels::{Launch, Storage, Target, launch_named};
use objc2::rc::Retained;
use objc2_metal::{
    MTLCompileOptions, MTLComputePipelineState, MTLLanguageVersion, MTLMathFloatingPointFunctions,
    MTLMathMode, MTLSize,
};

use super::gpu::{Argument, Executor, Ready};
use super::pipelines::{Compiler, Pipelines, Prepared};
use crate::DeviceError;

/// Compiles kernels for one Apple GPU, and keeps what it compiled.
///
/// Texts are in Metal Shading Language 3.1, whose `bfloat` needs macOS 14, and are compiled without fast math.
pub struct MetalKernelCompiler {
    device: Device,
    pipelines: Pipelines<Library, ComputePipeline>,
    prepared: Prepared<Ready<ComputePipeline>>,
}

impl MetalKernelCompiler {
    /// The compiler for a device, after a first kernel: one that adds over a simdgroup and stores `bfloat`.
    ///
    /// # Errors
    /// The system or the GPU cannot run that kernel, and so none of them: [`DeviceError::Compilation`] or
    /// [`DeviceError::Pipeline`] with the reason that Metal gives.
    pub fn new(device: &MetalDevice) -> std::result::Result<Self, DeviceError> {
        let compiler = Self {
            device: device.metal_device().clone(),
            pipelines: Pipelines::default(),
            prepared: Prepared::default(),
        };
        compiler.named("rms_norm", Storage::BF16)?;
        Ok(compiler)
    }

    /// The kernel of this name: any entry point of [`ops`](mod@candlewick_kernels::ops), forward (`"softmax"`), backward
    /// (`"softmax_backward"`) or a part (`"column_sum"`).
    ///
    /// A kernel's text is specialised for each call, so a name stands for the text of
    /// [`launch_named`](candlewick_kernels::launch_named): f32 tensors, aligned, and all gradients.
    /// [`pipeline`](Self::pipeline) makes every other.
    ///
    /// # Errors
    /// [`DeviceError::UnknownKernel`], and those of [`pipeline`](Self::pipeline).
    pub fn create_pipeline(&self, kernel_name: &str) -> std::result::Result<ComputePipeline, DeviceError> {
        self.named(kernel_name, Storage::F32)
    }

    fn named(&self, name: &str, storage: Storage) -> std::result::Result<ComputePipeline, DeviceError> {
        match launch_named(name, storage) {
            Some(launch) => self.pipeline(&launch),
            None => Err(DeviceError::UnknownKernel { name: name.into() }),
        }
    }

    /// The kernel that a launch is for, in its storage type and with its defines.
    ///
    /// # Errors
    /// [`DeviceError::Compilation`] with the compiler's log, [`DeviceError::Pipeline`] with the device's reason.
    pub fn pipeline(&self, launch: &Launch) -> std::result::Result<ComputePipeline, DeviceError> {
        self.pipelines.get(launch, self)
    }
}

impl Compiler for MetalKernelCompiler {
    type Module = Library;
    type Pipeline = ComputePipeline;

    fn module(&self, launch: &Launch) -> std::result::Result<Library, DeviceError> {
        self.device
            .new_library_with_source(&launch.source(Target::Metal), Some(&options()))
            .map_err(|error| DeviceError::Compilation { name: launch.kernel.to_owned(), log: reason(error) })
    }

    fn pipeline(
        &self,
        library: &Library,
        launch: &Launch,
    ) -> std::result::Result<ComputePipeline, DeviceError> {
        let name = || launch.kernel.to_owned();
        let function = library
            .get_function(launch.kernel, None)
            .map_err(|_| DeviceError::UnknownKernel { name: name() })?;
        let pipeline = self
            .device
            .new_compute_pipeline_state_with_function(&function)
            .map_err(|error| DeviceError::Pipeline { name: name(), reason: reason(error) })?;
        let width = pipeline.as_ref().threadExecutionWidth();
        if width != SIMDGROUP_SIZE as usize {
            let reason = format!("its simdgroups have {width} threads here, and it needs {SIMDGROUP_SIZE}");
            return Err(DeviceError::Pipeline { name: name(), reason });
        }
        Ok(pipeline)
    }
}

/// Fast math would make `exp(-INFINITY)` non-zero and assume that there is no NaN.
fn options() -> Retained<MTLCompileOptions> {
    let options = MTLCompileOptions::new();
    options.setLanguageVersion(MTLLanguageVersion::Version3_1);
    if objc2::available!(macos = 15.0) {
        options.setMathMode(MTLMathMode::Safe);
        options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
    } else {
        #[expect(deprecated, reason = "macOS 14 has nothing else")]
        options.setFastMathEnabled(false);
    }
    options
}

/// What Metal said; some of these errors do not show it.
fn reason(error: MetalKernelError) -> String {
    match error {
        MetalKernelError::LoadLibraryError(reason) | MetalKernelError::FailedToCreatePipeline(reason) => {
            reason
        }
        other => other.to_string(),
    }
}

/// A device, with what was compiled for its GPU.
pub(super) struct Metal<'a> {
    device: &'a MetalDevice,
    compiler: Arc<MetalKernelCompiler>,
}

impl<'a> Metal<'a> {
    /// The executor of a device. A GPU has one compiler, however many devices Candle makes of it.
    pub(super) fn of(device: &'a MetalDevice) -> std::result::Result<Self, DeviceError> {
        type Compilers = Vec<(u64, std::result::Result<Arc<MetalKernelCompiler>, DeviceError>)>;
        static COMPILERS: Mutex<Compilers> = Mutex::new(Vec::new());
        let gpu = device.registry_id();
        let mut compilers = COMPILERS.lock().unwrap_or_else(PoisonError::into_inner);
        let known = compilers.iter().find(|(of, _)| *of == gpu).map(|(_, compiler)| compiler.clone());
        let compiler = known.unwrap_or_else(|| {
            let compiler = MetalKernelCompiler::new(device).map(Arc::new);
            compilers.push((gpu, compiler.clone()));
            compiler
        });
        Ok(Self { device, compiler: compiler? })
    }
}

impl Executor for Metal<'_> {
    type Pipeline = ComputePipeline;

    fn pipeline(&self, launch: &Launch) -> std::result::Result<ComputePipeline, DeviceError> {
        self.compiler.pipeline(launch)
    }

    fn max_threads(pipeline: &ComputePipeline) -> u32 {
        u32::try_from(pipeline.max_total_threads_per_threadgroup()).unwrap_or(u32::MAX)
    }

    fn prepared(&self) -> &Prepared<Ready<ComputePipeline>> {
        &self.compiler.prepared
    }

    fn dispatch(&self, launches: &[(Launch, ComputePipeline)], buffers: &[Argument]) -> Result<()> {
        let handles: Vec<Buffer> =
            buffers.iter().map(|argument| buffer(argument.tensor)).collect::<Result<_>>()?;
        for (launch, pipeline) in launches {
            // Whoever asks for another encoder, to allocate zeros or to copy, while this one is held, waits forever.
            let guard = self.device.command_encoder()?;
            let encoder = guard.as_ref();
            encoder.set_compute_pipeline_state(pipeline);
            for (index, &bound) in launch.arguments.iter().enumerate() {
                let (argument, buffer) = (&buffers[bound], Some(&handles[bound]));
                if argument.writes {
                    encoder.set_output_buffer(index, buffer, argument.offset);
                } else {
                    encoder.set_input_buffer(index, buffer, argument.offset);
                }
            }
            set_param(encoder, launch.arguments.len(), launch.params.as_slice());
            encoder.dispatch_thread_groups(size(launch.threadgroups), size([launch.threads, 1, 1]));
        }
        Ok(())
    }
}

/// The buffer of a tensor: a handle that outlives the guard of its storage, which two arguments may share.
fn buffer(tensor: &Tensor) -> Result<Buffer> {
    match &*tensor.storage_and_layout().0 {
        TensorStorage::Metal(storage) => Ok(storage.buffer().clone()),
        _ => bail!("the tensors of one operation must be on one device"),
    }
}

fn size([width, height, depth]: [u32; 3]) -> MTLSize {
    MTLSize { width: width as usize, height: height as usize, depth: depth as usize }
}
