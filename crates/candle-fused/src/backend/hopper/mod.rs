//! Runs `candlewick_kernels::hopper`'s kernels: tensors are handed over as tensor maps, which the device's units for tiles
//! read, and launches go to Candle's stream. Needs CUDA 12.

pub(super) mod adapted;
pub(super) mod attention;
pub(super) mod lora;

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaModule, CudaStream, result, sys};
use candle_core::{DType, Error, Result, Shape, Tensor, bail};
use candlewick_kernels::hopper::{COMPUTE_CAPABILITY, Launch, ROW_ALIGNMENT, Text, Tiled};

use super::DeviceKind;
use super::cuda::{Cuda, Function, Lies};
use crate::{DeviceError, telemetry};

/// What is known and compiled for one device.
#[derive(Default)]
pub(super) struct Hopper {
    multiprocessors: OnceLock<Option<usize>>,
    modules: Mutex<HashMap<Text, Compiled<Arc<CudaModule>>>>,
    functions: Mutex<HashMap<(Text, &'static str), Compiled<Function>>>,
    counters: OnceLock<Tensor>,
}

type Compiled<T> = std::result::Result<T, DeviceError>;

impl Hopper {
    /// The device's multiprocessors, if the kernels are for it.
    fn multiprocessors(&self, context: &CudaContext) -> Option<usize> {
        *self.multiprocessors.get_or_init(|| {
            let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
            let is_hopper = context.compute_capability().ok()? == COMPUTE_CAPABILITY;
            is_hopper
                .then(|| context.attribute(attribute).ok())
                .flatten()
                .and_then(|count| count.try_into().ok())
        })
    }

    /// The kernel of a launch, compiled before or now. What was refused once is refused again.
    fn function(&self, cuda: &Cuda, launch: &Launch) -> Compiled<Function> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let made = || {
            let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
            let module = || cuda.specific(launch.kernel, &launch.text.source());
            function(
                modules.entry(launch.text).or_insert_with(module).as_ref().map_err(Clone::clone)?,
                launch,
            )
        };
        functions.entry((launch.text, launch.kernel)).or_insert_with(made).clone()
    }

    /// So many counters, which are zero between launches, if there are as many: enough for two million rows. They stay where
    /// they are, as what was captured expects them to.
    fn counters(&self, count: usize, like: &Tensor) -> Result<Option<&Tensor>> {
        const COUNTERS: usize = 1 << 14;
        if count > COUNTERS {
            return Ok(None);
        }
        if let Some(counters) = self.counters.get() {
            return Ok(Some(counters));
        }
        let counters = Tensor::zeros(COUNTERS, DType::U32, like.device())?;
        Ok(Some(self.counters.get_or_init(|| counters)))
    }
}

fn function(module: &Arc<CudaModule>, launch: &Launch) -> Compiled<Function> {
    let function = Function::of(module, launch.kernel)?;
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let refused = |error: &dyn ToString| DeviceError::Pipeline {
        name: launch.kernel.to_owned(),
        reason: error.to_string(),
    };
    let bytes = c_int::try_from(launch.shared_bytes).map_err(|error| refused(&error))?;
    // SAFETY: the function belongs to a module that `function` keeps loaded.
    unsafe { result::function::set_function_attribute(function.cu_function(), attribute, bytes) }
        .map_err(|error| refused(&error))?;
    Ok(function)
}

/// A tensor to take in tiles: the address of its first value, and in values the distance between a matrix' rows, or between a
/// head's tokens, heads and batch entries.
#[derive(Clone, Copy)]
struct Source {
    address: u64,
    strides: [usize; 3],
}

impl Source {
    /// A matrix, from one row to the next `stride` values.
    fn matrix(address: u64, stride: usize) -> Self {
        Self { address, strides: [stride; 3] }
    }
}

/// How a matrix lies, if tiles can have it: where it and its rows, or columns, begin at whole pieces of 16 bytes.
fn lies(matrix: &Tensor) -> Result<Option<Lies>> {
    let bytes = matrix.dtype().size_in_bytes();
    let aligned = |at: usize| (at * bytes).is_multiple_of(ROW_ALIGNMENT);
    let lies = Lies::of(matrix)?;
    Ok(lies.filter(|lies| aligned(lies.stride) && aligned(matrix.layout().start_offset())))
}

/// From one row to the next, where tiles can have rows.
fn row_stride(matrix: &Tensor) -> Result<Option<usize>> {
    Ok(lies(matrix)?.filter(|lies| lies.in_rows).map(|lies| lies.stride))
}

/// The driver's description of a tensor and its tiles.
fn tensor_map(source: Source, tiled: &Tiled, dtype: DType) -> Result<sys::CUtensorMap> {
    use sys::CUtensorMapDataType_enum::{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
    use sys::CUtensorMapSwizzle_enum::{
        CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let of_type = match dtype {
        DType::F16 => CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        other => bail!("tiles hold f16 or bf16, got {}", other.as_str()),
    };
    // From the dimension that lies in one piece on.
    let (rank, sizes, tile) = match *tiled {
        Tiled::Matrix { rows, columns, tile: [down, across] } => {
            (2, [columns, rows, 1, 1], [across, down, 1, 1])
        }
        Tiled::Heads { sizes: [batch, tokens, heads, width], tokens: of_tile } => {
            (4, [width, tokens, heads, batch], [64, of_tile, 1, 1])
        }
    };
    let swizzle = match tile[0] {
        16 => CU_TENSOR_MAP_SWIZZLE_32B,
        32 => CU_TENSOR_MAP_SWIZZLE_64B,
        64 => CU_TENSOR_MAP_SWIZZLE_128B,
        other => bail!("a tile has 16, 32 or 64 columns, got {other}"),
    };
    let sizes = sizes.map(|size| size as u64);
    let strides = source.strides.map(|stride| (stride * dtype.size_in_bytes()) as u64);
    let steps = [1; 4];
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the map is written, and the arrays read, before the call returns; each has as many elements as the
    // dimensions ask for. The address is not followed here: the launch says why what the map spans is there.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            of_type,
            rank,
            source.address as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            tile.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(Error::wrap)?;
    Ok(map)
}

/// Queues a launch: of `sources` by tiles, and of `addresses`. False if the launch asks for all threadgroups at once and
/// the device has no room for them.
///
/// # Safety
/// The sources and what is at the addresses are those that the launch was planned for, alive on the device and of `dtype`
/// where the launch says so; what it writes, nobody else has.
unsafe fn queue(
    stream: &CudaStream,
    (launch, function): (&Launch, &Function),
    dtype: DType,
    sources: &[Source],
    addresses: &[u64],
) -> Result<bool> {
    if sources.len() != launch.tiles.len() {
        bail!("{} takes {} tensors, got {}", launch.kernel, launch.tiles.len(), sources.len());
    }
    let maps = sources.iter().zip(&launch.tiles).map(|(&source, tiled)| tensor_map(source, tiled, dtype));
    let maps: Vec<_> = maps.collect::<Result<_>>()?;
    let maps = maps.iter().map(|map| ptr::from_ref(map).cast_mut().cast::<c_void>());
    let addresses = addresses.iter().map(|address| ptr::from_ref(address).cast_mut().cast());
    let mut parameters: Vec<_> = maps.chain(addresses).collect();
    parameters.push(launch.params.as_ptr().cast_mut().cast());
    let [x, y] = launch.threadgroups;
    let mut at_once = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { cooperative: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: 1,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared_bytes,
        hStream: stream.cu_stream(),
        attrs: &raw mut at_once,
        numAttrs: u32::from(launch.at_once),
    };
    // SAFETY: `parameters` are one address for each of the kernel's arguments, in order, all alive until the call returns,
    // which copies them, as it does the attribute. The kernels stay inside of their tensors: the units for tiles do by
    // themselves, and what is at an address is read and written below the sizes in the parameters. The work is queued on the
    // stream that all of the device's work is queued on.
    let queued = unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            function.cu_function(),
            parameters.as_mut_ptr(),
            ptr::null_mut(),
        )
    };
    match queued {
        sys::CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE => Ok(false),
        queued => queued.result().map(|()| true).map_err(Error::wrap),
    }
}

/// A kernel that the device should take and refuses is worth a warning: others do its work.
fn warned<T>(kernel: &'static str, made: std::result::Result<T, DeviceError>) -> Option<T> {
    made.inspect_err(|error| telemetry::warn_once(kernel, DeviceKind::Cuda, error)).ok()
}

/// An uninitialised tensor.
fn fresh(shape: impl Into<Shape>, dtype: DType, like: &Tensor) -> Result<Tensor> {
    // SAFETY: only results and scratch are made so, and their launches write every element before any is read.
    unsafe { Tensor::empty(shape, dtype, like.device()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use candle_core::{CudaDevice, DType, Device, Tensor};

    use super::COMPUTE_CAPABILITY;

    /// The device, if it is one that the kernels are for.
    pub(super) fn hopper() -> Option<CudaDevice> {
        let device = Device::new_cuda(0).ok().and_then(|device| device.as_cuda_device().ok().cloned());
        let device = device.filter(|device| {
            let stream = device.cuda_stream();
            stream.context().compute_capability().unwrap() == COMPUTE_CAPABILITY
        });
        if device.is_none() {
            std::io::stderr().write_all(b"skipped: no device of compute capability 9.0\n").unwrap();
        }
        device
    }

    /// A matrix on the device, exact in f16 and bf16: a window of a wider one, `before` columns from its beginning.
    pub(super) fn matrix(
        device: &CudaDevice,
        dims: [usize; 2],
        before: usize,
        dtype: DType,
        seed: usize,
    ) -> Tensor {
        let [rows, columns] = [dims[0] + 1, dims[1] + 2 * before];
        let step = |i: usize| u8::try_from((i * 7919 + seed * 104_729) % 1009 % 33).unwrap();
        let value = |i| f32::from(step(i)) / 16.0 - 1.0;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        let wide = Tensor::from_vec(values, (rows, columns), &Device::Cuda(device.clone())).unwrap();
        let wide = wide.to_dtype(dtype).unwrap();
        wide.narrow(0, 1, dims[0]).unwrap().narrow(1, before, dims[1]).unwrap()
    }

    /// As [`matrix`], with columns that lie in one piece.
    pub(super) fn across(
        device: &CudaDevice,
        [rows, columns]: [usize; 2],
        before: usize,
        dtype: DType,
        seed: usize,
    ) -> Tensor {
        matrix(device, [columns, rows], before, dtype, seed).t().unwrap()
    }

    pub(super) fn exact(matrix: &Tensor) -> Tensor {
        matrix.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().contiguous().unwrap()
    }

    pub(super) fn values(matrix: &Tensor) -> Vec<f64> {
        exact(matrix).flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Sums of exact products, and the sums of their absolute values.
    pub(super) fn products(pairs: &[[&Tensor; 2]], scale: f64) -> [Vec<f64>; 2] {
        [false, true].map(|absolute| {
            let of = |matrix: &Tensor| if absolute { exact(matrix).abs().unwrap() } else { exact(matrix) };
            let product = |[left, right]: &[&Tensor; 2]| of(left).matmul(&of(right)).unwrap();
            let sum = pairs.iter().map(product).reduce(|sum, product| (sum + product).unwrap()).unwrap();
            values(&(sum * scale).unwrap())
        })
    }

    /// One rounding to the result's type, and f32 sums whose terms are cut off, not rounded.
    pub(super) fn assert_near(got: &Tensor, [expected, magnitudes]: &[Vec<f64>; 2], what: &str) {
        let rounding = match got.dtype() {
            DType::BF16 => 2f64.powi(-8),
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-24),
        };
        for (i, (got, (expected, magnitude))) in
            values(got).iter().zip(expected.iter().zip(magnitudes)).enumerate()
        {
            let bound = rounding * 1.01 * expected.abs() + magnitude * 2f64.powi(-20) + 1e-7;
            assert!((got - expected).abs() <= bound, "{what}: {got} for {expected} at {i}, bound {bound}");
        }
    }
}
