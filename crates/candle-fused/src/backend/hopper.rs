//! Runs `candlewick_kernels::hopper`'s kernels: matrices are handed over as tensor maps, which the device's units for tiles
//! read, and launches go to Candle's stream. Needs CUDA 12.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaModule, CudaStream, result, sys};
use candle_core::{CudaDevice, DType, Error, Result, Tensor, bail};
use candlewick_kernels::hopper::{
    COMPUTE_CAPABILITY, GradientPass, Launch, LowRankGradient, ROW_ALIGNMENT, SumOfProducts, Text, Tiled,
};

use super::cuda::{self, Cuda, Function, Lies};
use super::{DeviceKind, gpu};
use crate::{DeviceError, telemetry};

/// What is known and compiled for one device.
#[derive(Default)]
pub(super) struct Hopper {
    multiprocessors: OnceLock<Option<usize>>,
    modules: Mutex<HashMap<Text, Compiled<Arc<CudaModule>>>>,
    functions: Mutex<HashMap<(Text, &'static str), Compiled<Function>>>,
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

/// A matrix to take in tiles: the address of its first value, and the distance between its rows in memory, in values.
#[derive(Clone, Copy)]
struct Matrix {
    address: u64,
    stride: usize,
}

/// The driver's description of a matrix and its tiles.
fn tensor_map(matrix: Matrix, tiled: &Tiled, dtype: DType) -> Result<sys::CUtensorMap> {
    use sys::CUtensorMapDataType_enum::{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
    use sys::CUtensorMapSwizzle_enum::{CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_128B};
    let of_type = match dtype {
        DType::F16 => CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        other => bail!("tiles hold f16 or bf16, got {}", other.as_str()),
    };
    let [tile_rows, tile_columns] = tiled.tile;
    let swizzle = match tile_columns {
        16 => CU_TENSOR_MAP_SWIZZLE_32B,
        64 => CU_TENSOR_MAP_SWIZZLE_128B,
        other => bail!("a tile has 16 or 64 columns, got {other}"),
    };
    let sizes = [tiled.columns as u64, tiled.rows as u64];
    let strides = [(matrix.stride * dtype.size_in_bytes()) as u64];
    let (tile, steps) = ([tile_columns, tile_rows], [1, 1]);
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the map is written, and the arrays read, before the call returns; each has as many elements as two dimensions
    // ask for. The address is not followed here: the launch says why what the map spans is there.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            of_type,
            2,
            matrix.address as *mut c_void,
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

/// Queues a launch: of `matrices` by tiles, and of `addresses`.
///
/// # Safety
/// The matrices and what is at the addresses are those that the launch was planned for, alive on the device and of `dtype`
/// where the launch says so; what it writes, nobody else has.
unsafe fn queue(
    stream: &CudaStream,
    (launch, function): (&Launch, &Function),
    dtype: DType,
    matrices: &[Matrix],
    addresses: &[u64],
) -> Result<()> {
    if matrices.len() != launch.tiles.len() {
        bail!("{} takes {} matrices, got {}", launch.kernel, launch.tiles.len(), matrices.len());
    }
    let maps = matrices.iter().zip(&launch.tiles).map(|(&matrix, tiled)| tensor_map(matrix, tiled, dtype));
    let maps: Vec<_> = maps.collect::<Result<_>>()?;
    let maps = maps.iter().map(|map| ptr::from_ref(map).cast_mut().cast::<c_void>());
    let addresses = addresses.iter().map(|address| ptr::from_ref(address).cast_mut().cast());
    let mut parameters: Vec<_> = maps.chain(addresses).collect();
    parameters.push(launch.params.as_ptr().cast_mut().cast());
    let [x, y] = launch.threadgroups;
    // SAFETY: `parameters` are one address for each of the kernel's arguments, in order, all alive until the call returns,
    // which copies them. The kernels stay inside of their matrices: the units for tiles do by themselves, and what is at an
    // address is read and written below the sizes in the parameters. The work is queued on the stream that all of the
    // device's work is queued on.
    unsafe {
        result::launch_kernel(
            function.cu_function(),
            (x, y, 1),
            (launch.threads, 1, 1),
            launch.shared_bytes,
            stream.cu_stream(),
            &mut parameters,
        )
    }
    .map_err(Error::wrap)
}

/// A kernel that the device should take and refuses is worth a warning: the device's own products do its work.
fn warned<T>(kernel: &'static str, made: std::result::Result<T, DeviceError>) -> Option<T> {
    made.inspect_err(|error| telemetry::warn_once(kernel, DeviceKind::Cuda, error)).ok()
}

/// An uninitialised matrix.
fn fresh((rows, columns): (usize, usize), dtype: DType, like: &Tensor) -> Result<Tensor> {
    // SAFETY: only results and scratch are made so, and their launches write every element before any is read.
    unsafe { Tensor::empty((rows, columns), dtype, like.device()) }
}

/// `left·right + l·r + bias`, where there is a kernel that takes less time than the device's own products.
pub(super) fn sum_of_products(
    device: &CudaDevice,
    [left, right]: [&Tensor; 2],
    [l, r]: [&Tensor; 2],
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let cuda = Cuda::of(device)?;
    let Some(multiprocessors) = cuda.hopper().multiprocessors(cuda.stream().context()) else {
        return Ok(None);
    };
    let ((rows, inner), (columns, rank), dtype) = (left.dims2()?, (right.dim(1)?, l.dim(1)?), left.dtype());
    let same = [right, l, r].into_iter().chain(bias).all(|tensor| tensor.dtype() == dtype);
    let shapes = [(right, [inner, columns]), (l, [rows, rank]), (r, [rank, columns])];
    let bias_fits = bias.is_none_or(|bias| bias.dims() == [columns]);
    if !same || !bias_fits || shapes.iter().any(|(matrix, dims)| matrix.dims() != dims) {
        bail!("no sum of {:?}·{:?} and {:?}·{:?}", left.shape(), right.shape(), l.shape(), r.shape());
    }
    let (Some(left_stride), Some(l_stride)) = (row_stride(left)?, row_stride(l)?) else {
        return Ok(None);
    };
    let (Some(of_right), Some(of_r)) = (lies(right)?, lies(r)?) else { return Ok(None) };
    // The bias is read in pairs.
    let paired = |bias: &Tensor| bias.is_contiguous() && bias.layout().start_offset().is_multiple_of(2);
    let paired = bias.is_none_or(paired);
    if of_right.in_rows != of_r.in_rows || !paired || !matches!(dtype, DType::F16 | DType::BF16) {
        return Ok(None);
    }
    let (storage, turned) = (gpu::storage(left)?, of_right.in_rows);
    let plan = SumOfProducts { rows, columns, inner, rank, storage, turned, bias: bias.is_some() };
    let Some(launch) = plan.launch(multiprocessors) else { return Ok(None) };
    let Some(function) = warned(launch.kernel, cuda.hopper().function(&cuda, &launch)) else {
        return Ok(None);
    };
    let y = fresh((rows, columns), dtype, left)?;
    let tensors = [left, right, l, r, &y, bias.unwrap_or(l)];
    cuda::with_addresses(cuda.stream(), tensors, |[left, right, l, r, y, bias]| {
        let matrix = |address, stride| Matrix { address, stride };
        let matrices = [
            matrix(left, left_stride),
            matrix(right, of_right.stride),
            matrix(l, l_stride),
            matrix(r, of_r.stride),
            matrix(y, columns),
        ];
        // SAFETY: the shapes were checked against the plan, strides and offsets are the tensors' own; `y` is fresh.
        unsafe { queue(cuda.stream(), (&launch, &function), dtype, &matrices, &[bias]) }
    })?;
    Ok(Some(y))
}

/// `scale·g·b` in the dtype of `g` and `gᵀ·h` in `factor`, for `g [n, out]`, `b [out, r]` and `h [n, r]`, by one pass over `g`,
/// where there is a kernel for it.
pub(super) fn low_rank_gradient(
    device: &CudaDevice,
    [g, b, h]: [&Tensor; 3],
    scale: f32,
    factor: DType,
) -> Result<Option<[Tensor; 2]>> {
    let cuda = Cuda::of(device)?;
    let Some(multiprocessors) = cuda.hopper().multiprocessors(cuda.stream().context()) else {
        return Ok(None);
    };
    let ((rows, columns), rank, dtype) = (g.dims2()?, h.dim(1)?, g.dtype());
    let shapes = [(b, [columns, rank]), (h, [rows, rank])];
    if shapes.iter().any(|(matrix, dims)| matrix.dims() != dims || matrix.dtype() != dtype) {
        bail!("no gradient of {:?} for {:?} and {:?}", g.shape(), b.shape(), h.shape());
    }
    let strides = (row_stride(g)?, row_stride(b)?, row_stride(h)?);
    let (Some(g_stride), Some(b_stride), Some(h_stride)) = strides else { return Ok(None) };
    let (storage, factor_storage) = match (dtype, factor) {
        (DType::F16 | DType::BF16, DType::F32) => (gpu::storage(g)?, candlewick_kernels::Storage::F32),
        (DType::F16 | DType::BF16, same) if same == dtype => (gpu::storage(g)?, gpu::storage(g)?),
        _ => return Ok(None),
    };
    let plan = LowRankGradient { rows, columns, rank, storage, factor: factor_storage, scale };
    let Some(GradientPass { parts, pass, sum }) = plan.launches(multiprocessors) else { return Ok(None) };
    let functions = cuda.hopper().function(&cuda, &pass).and_then(|of_pass| {
        let of_sum = cuda.hopper().function(&cuda, &sum)?;
        Ok((of_pass, of_sum))
    });
    let Some((of_pass, of_sum)) = warned(pass.kernel, functions) else { return Ok(None) };
    let [e_parts, d_parts] = parts;
    let scratch = fresh((1, e_parts + d_parts), DType::F32, g)?;
    let (e, d) = (fresh((rows, rank), dtype, g)?, fresh((columns, rank), factor, g)?);
    cuda::with_addresses(cuda.stream(), [g, b, h, &scratch, &e, &d], |[g, b, h, scratch, e, d]| {
        let matrix = |address, stride| Matrix { address, stride };
        let matrices = [matrix(g, g_stride), matrix(b, b_stride), matrix(h, h_stride)];
        let scratches = [scratch, scratch + (e_parts * size_of::<f32>()) as u64];
        // SAFETY: as above; the scratch is as large as the plan says, fresh like both results, and the second launch runs
        // after the first.
        unsafe {
            queue(cuda.stream(), (&pass, &of_pass), dtype, &matrices, &scratches)?;
            queue(cuda.stream(), (&sum, &of_sum), dtype, &[], &[scratches[0], scratches[1], e, d])
        }
    })?;
    Ok(Some([e, d]))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use candle_core::Device;

    use super::*;

    /// The device, if it is one that the kernels are for.
    fn hopper() -> Option<CudaDevice> {
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
    fn matrix(device: &CudaDevice, dims: [usize; 2], before: usize, dtype: DType, seed: usize) -> Tensor {
        let [rows, columns] = [dims[0] + 1, dims[1] + 2 * before];
        let step = |i: usize| u8::try_from((i * 7919 + seed * 104_729) % 1009 % 33).unwrap();
        let value = |i| f32::from(step(i)) / 16.0 - 1.0;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        let wide = Tensor::from_vec(values, (rows, columns), &Device::Cuda(device.clone())).unwrap();
        let wide = wide.to_dtype(dtype).unwrap();
        wide.narrow(0, 1, dims[0]).unwrap().narrow(1, before, dims[1]).unwrap()
    }

    /// As [`matrix`], with columns that lie in one piece.
    fn across(
        device: &CudaDevice,
        [rows, columns]: [usize; 2],
        before: usize,
        dtype: DType,
        seed: usize,
    ) -> Tensor {
        matrix(device, [columns, rows], before, dtype, seed).t().unwrap()
    }

    fn exact(matrix: &Tensor) -> Tensor {
        matrix.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().contiguous().unwrap()
    }

    fn values(matrix: &Tensor) -> Vec<f64> {
        exact(matrix).flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Sums of exact products, and the sums of their absolute values.
    fn products(pairs: &[[&Tensor; 2]], scale: f64) -> [Vec<f64>; 2] {
        [false, true].map(|absolute| {
            let of = |matrix: &Tensor| if absolute { exact(matrix).abs().unwrap() } else { exact(matrix) };
            let product = |[left, right]: &[&Tensor; 2]| of(left).matmul(&of(right)).unwrap();
            let sum = pairs.iter().map(product).reduce(|sum, product| (sum + product).unwrap()).unwrap();
            values(&(sum * scale).unwrap())
        })
    }

    /// One rounding to the result's type, and f32 sums whose terms are cut off, not rounded.
    fn assert_near(got: &Tensor, [expected, magnitudes]: &[Vec<f64>; 2], what: &str) {
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

    #[test]
    fn a_sum_of_products_is_rounded_once() {
        let Some(device) = hopper() else { return };
        let shapes = [
            [1, 8, 8, 8],
            [33, 264, 72, 16],
            [128, 256, 64, 64],
            [257, 248, 520, 72],
            [1000, 520, 328, 24],
            [2062, 384, 512, 40],
            // More parts than clusters.
            [5000, 1032, 136, 8],
        ];
        for [rows, columns, inner, rank] in shapes {
            for dtype in [DType::F16, DType::BF16] {
                for (turned, biased, before) in
                    [(false, false, 0), (true, false, 0), (false, true, 8), (true, true, 24)]
                {
                    let right = if turned { matrix } else { across };
                    let (left, r) = (
                        matrix(&device, [rows, inner], before, dtype, 1),
                        right(&device, [inner, columns], before, dtype, 2),
                    );
                    let (low_left, low_right) = (
                        matrix(&device, [rows, rank], before, dtype, 3),
                        right(&device, [rank, columns], before, dtype, 4),
                    );
                    let bias = matrix(&device, [1, columns], 0, dtype, 5).flatten_all().unwrap();
                    let bias = biased.then_some(&bias);
                    let what =
                        format!("{rows}x{columns}x{inner} r {rank} {dtype:?} {turned} {biased} {before}");
                    let sum = || {
                        let sum = sum_of_products(&device, [&left, &r], [&low_left, &low_right], bias);
                        sum.unwrap().unwrap_or_else(|| panic!("{what}: declined"))
                    };
                    let one = Tensor::ones((rows, 1), DType::F64, &Device::Cpu).unwrap();
                    let row = bias.map(|bias| bias.reshape((1, columns)).unwrap());
                    let pairs = [[&left, &r], [&low_left, &low_right]].into_iter();
                    let pairs: Vec<_> = pairs.chain(row.as_ref().map(|row| [&one, row])).collect();
                    let got = sum();
                    assert_near(&got, &products(&pairs, 1.0), &what);
                    assert_eq!(values(&got), values(&sum()), "{what}: two runs differ");
                }
            }
        }
    }

    #[test]
    fn one_pass_gives_both_gradients() {
        let Some(device) = hopper() else { return };
        let shapes =
            [[1, 8, 8], [64, 256, 16], [65, 264, 24], [1000, 520, 32], [2062, 384, 16], [8192, 4096, 8]];
        for [rows, columns, rank] in shapes {
            for dtype in [DType::F16, DType::BF16] {
                for (factor, before) in [(DType::F32, 0), (dtype, 8)] {
                    let g = matrix(&device, [rows, columns], before, dtype, 1);
                    let b = matrix(&device, [columns, rank], before, dtype, 2);
                    let h = matrix(&device, [rows, rank], before, dtype, 3);
                    let what = format!("{rows}x{columns} r {rank} {dtype:?} {factor:?} {before}");
                    let pass = || {
                        let pass = low_rank_gradient(&device, [&g, &b, &h], 0.75, factor).unwrap();
                        pass.unwrap_or_else(|| panic!("{what}: declined"))
                    };
                    let [e, d] = pass();
                    assert_near(&e, &products(&[[&g, &b]], 0.75), &format!("{what}: e"));
                    assert_near(&d, &products(&[[&g.t().unwrap(), &h]], 1.0), &format!("{what}: d"));
                    assert_eq!((e.dtype(), d.dtype()), (dtype, factor));
                    let again = pass();
                    assert_eq!([values(&e), values(&d)], again.map(|gradient| values(&gradient)), "{what}");
                }
            }
        }
    }

    #[test]
    fn what_tiles_cannot_hold_is_left_to_the_device() {
        let Some(device) = hopper() else { return };
        let dims = [[1000, 520], [520, 328], [1000, 16], [16, 328]];
        let made = |dims: [usize; 2], seed| matrix(&device, dims, 0, DType::BF16, seed);
        let [left, right, l, r] = [0, 1, 2, 3].map(|i| made(dims[i], i));
        let sum = |left: &Tensor, right: &Tensor, l: &Tensor, r: &Tensor| {
            sum_of_products(&device, [left, right], [l, r], None).unwrap().is_some()
        };
        assert!(sum(&left, &right, &l, &r));
        let shifted = matrix(&device, dims[0], 4, DType::BF16, 9);
        assert!(!sum(&shifted, &right, &l, &r), "rows that begin at 8 bytes");
        let column = across(&device, dims[3], 0, DType::BF16, 9);
        assert!(!sum(&left, &right, &l, &column), "factors that lie differently");
        let [odd_l, odd_r] = [made([1000, 12], 1), made([12, 328], 2)];
        assert!(!sum(&left, &right, &odd_l, &odd_r), "a rank of 12");
        assert!(sum_of_products(&device, [&left, &right], [&r, &l], None).is_err());
    }
}
