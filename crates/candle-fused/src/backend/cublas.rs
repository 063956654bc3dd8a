//! Matrix products by cuBLAS that add to what is there. Candle's own overwrite.

use std::ffi::{c_int, c_void};
use std::ptr;

use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::gemm_reduced_precision_f32;
use candle_core::{CudaDevice, DType, Error, Result, Tensor, bail};

use super::Place;
use super::cuda::{self, Lies};

use sys::cublasComputeType_t::{CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32};
use sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};

fn int(size: usize) -> Result<c_int> {
    c_int::try_from(size).map_err(Error::wrap)
}

impl Lies {
    /// As cuBLAS sees it: columns first. A row-major matrix is its own transpose there.
    fn operation(&self) -> sys::cublasOperation_t {
        if self.in_rows { CUBLAS_OP_N } else { CUBLAS_OP_T }
    }
}

/// The matrix, or a copy of it that lies in one piece.
fn operand(matrix: &Tensor) -> Result<(Tensor, Lies)> {
    if let Some(lies) = Lies::of(matrix)? {
        return Ok((matrix.clone(), lies));
    }
    let copy = matrix.contiguous()?;
    match Lies::of(&copy)? {
        Some(lies) => Ok((copy, lies)),
        None => bail!("a product's operand must be a matrix, got {:?}", matrix.shape()),
    }
}

fn type_of(dtype: DType) -> Result<sys::cudaDataType_t> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
        DType::F16 => Ok(sys::cudaDataType_t::CUDA_R_16F),
        DType::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
        other => bail!("a product must be f32, f16 or bf16, got {}", other.as_str()),
    }
}

/// `scale·left·right` for `left [m, k]` and `right [k, n]`, summed in f32: fresh, or added to what is in the place of a
/// tensor that is contiguous and nobody else's.
pub(super) fn product(
    device: &CudaDevice,
    left: &Tensor,
    right: &Tensor,
    scale: f32,
    place: Place,
) -> Result<Tensor> {
    let ((m, k), (inner, n), dtype) = (left.dims2()?, right.dims2()?, left.dtype());
    if k != inner || right.dtype() != dtype || m * n * k == 0 {
        bail!("no product of {:?} and {:?} in {}", left.shape(), right.shape(), dtype.as_str());
    }
    let (sum, beta) = match place {
        Place::Onto(sum) if sum.is_contiguous() && sum.dims() == [m, n] => (sum, 1f32),
        Place::Onto(sum) => bail!("a product of [{m}, {n}] is no part of {:?}", sum.layout()),
        // SAFETY: with a beta of 0 the product writes every element and reads none.
        Place::Fresh(dtype) => (unsafe { Tensor::empty((m, n), dtype, left.device()) }?, 0.0),
    };
    let compute = match dtype {
        DType::F32 if gemm_reduced_precision_f32() => CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => CUBLAS_COMPUTE_32F,
    };
    let ((left, of_left), (right, of_right)) = (operand(left)?, operand(right)?);
    queue(device, [(&right, &of_right), (&left, &of_left)], &sum, [scale, beta], compute)?;
    Ok(sum)
}

/// Queues a product of factors that lie so. Row-major `C = L·R` is column-major `Cᵀ = Rᵀ·Lᵀ`: the right factor is the first.
fn queue(
    device: &CudaDevice,
    [(right, of_right), (left, of_left)]: [(&Tensor, &Lies); 2],
    sum: &Tensor,
    [alpha, beta]: [f32; 2],
    compute: sys::cublasComputeType_t,
) -> Result<()> {
    let ((m, k), n) = (left.dims2()?, right.dim(1)?);
    let blas = device.cublas_handle();
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(Error::wrap)?;
    cuda::with_addresses(&stream, [left, right, sum], |[left_address, right_address, sum_address]| {
        // SAFETY: the sizes, strides and offsets are those of tensors that are alive until the call returns, and the work is
        // queued on the stream that everything else on this device is queued on. `sum` is a fresh tensor that only this
        // product writes. alpha and beta are read before the call returns.
        unsafe {
            result::gemm_ex(
                *blas.handle(),
                of_right.operation(),
                of_left.operation(),
                int(n)?,
                int(m)?,
                int(k)?,
                ptr::from_ref(&alpha).cast(),
                right_address as *const c_void,
                type_of(right.dtype())?,
                int(of_right.stride)?,
                left_address as *const c_void,
                type_of(left.dtype())?,
                int(of_left.stride)?,
                ptr::from_ref(&beta).cast(),
                sum_address as *mut c_void,
                type_of(sum.dtype())?,
                int(n)?,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .map_err(Error::wrap)
    })
}
