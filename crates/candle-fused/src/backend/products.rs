//! Matrix products on Candle's CPU storage.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};

use super::cpu::{STREAM, spread};
use crate::cpu::dispatch;
use crate::cpu::gemm::{Data, Matrix, Product, Start, sum_of_products};
use crate::cpu::lanes::Element;
use crate::cpu::low_rank::{Block, Delta, ROWS};

/// Reads tensors of two dimensions where they lie, whatever their strides.
pub(crate) fn with_matrices<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([Matrix; N]) -> Result<R>,
) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut matrices = Vec::with_capacity(N);
    for (storage, layout) in &guards {
        match &**storage {
            Storage::Cpu(storage) => matrices.push(matrix(storage, layout)?),
            _ => bail!("the tensors of one operation must be on one device"),
        }
    }
    match matrices.try_into() {
        Ok(matrices) => f(matrices),
        Err(_) => bail!("expected {N} matrices"),
    }
}

fn data(storage: &CpuStorage) -> Result<Data<'_>> {
    match storage {
        CpuStorage::F32(data) => Ok(Data::F32(data)),
        CpuStorage::F16(data) => Ok(Data::F16(data)),
        CpuStorage::BF16(data) => Ok(Data::BF16(data)),
        other => bail!("a matrix must be f32, f16 or bf16, got {}", other.dtype().as_str()),
    }
}

fn matrix<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Matrix<'a>> {
    let (&[rows, columns], &[row_stride, column_stride]) = (layout.dims(), layout.stride()) else {
        bail!("a matrix must have 2 dimensions, got {:?}", layout.dims());
    };
    match Matrix::new(data(storage)?, layout.start_offset(), [rows, columns], [row_stride, column_stride]) {
        Some(matrix) => Ok(matrix),
        None => bail!("a matrix of {:?} does not lie within its storage", layout.dims()),
    }
}

/// `start + Σ left·right` as a tensor `[m, n]` of this dtype.
pub(crate) fn product(dtype: DType, dims: [usize; 2], start: Start, products: &[Product]) -> Result<Tensor> {
    let shape = (dims[0], dims[1]);
    match dtype {
        DType::F32 => Tensor::from_vec(sum_of_products::<f32>(dims, start, products), shape, &Device::Cpu),
        DType::F16 => Tensor::from_vec(sum_of_products::<f16>(dims, start, products), shape, &Device::Cpu),
        DType::BF16 => Tensor::from_vec(sum_of_products::<bf16>(dims, start, products), shape, &Device::Cpu),
        other => bail!("a product must be f32, f16 or bf16, got {}", other.as_str()),
    }
}

/// Multiplications that are worth waking another thread.
const PARALLEL: usize = 1 << 19;

/// `y = h·Bᵀ` in the dtype of `x [n, in]`, and `h = scaling·x·Aᵀ` in f32, for `A [r, in]` and `B [out, r]`.
pub(crate) fn low_rank(x: Matrix, a: Matrix, b: Matrix, scaling: f32) -> Result<(Tensor, Tensor)> {
    let (n, rank, inputs, outputs) = (x.rows, a.rows, a.columns, b.rows);
    let (a, b) = (a.rows_f32(), b.t().rows_f32());
    let delta = Delta { a: &a, b: &b, rank, inputs, outputs, scaling };
    let mut h = vec![0f32; n * rank];
    let y = match x.in_rows() {
        Some((Data::F32(data), offset, stride)) => rows_of(delta, &data[offset..], stride, n, &mut h),
        Some((Data::F16(data), offset, stride)) => rows_of(delta, &data[offset..], stride, n, &mut h),
        Some((Data::BF16(data), offset, stride)) => rows_of(delta, &data[offset..], stride, n, &mut h),
        None => bail!("rows of a low-rank product must lie in one piece"),
    }?;
    Ok((y, Tensor::from_vec(h, (n, rank), &Device::Cpu)?))
}

fn rows_of<T: Element>(delta: Delta, x: &[T], stride: usize, n: usize, h: &mut [f32]) -> Result<Tensor> {
    let Delta { rank, inputs, outputs, .. } = delta;
    let mut y: Vec<T> = Vec::with_capacity(n * outputs);
    let stream = n * (inputs + outputs) * size_of::<T>() > STREAM;
    let blocks =
        h.chunks_mut(ROWS * rank).zip(y.spare_capacity_mut()[..n * outputs].chunks_mut(ROWS * outputs));
    let blocks = blocks.enumerate().map(|(i, (h, y))| (i * ROWS * stride, h, y)).collect();
    spread(blocks, n * (inputs + outputs) * rank >= PARALLEL, |(), (first, h, y)| {
        let block = Block { delta, x: &x[first..], stride, h, y, stream };
        dispatch::vectorise(dispatch::isa(), block);
    });
    // SAFETY: within the capacity; the blocks partition the rows, and each writes all of its own.
    unsafe { y.set_len(n * outputs) };
    Tensor::from_vec(y, (n, outputs), &Device::Cpu)
}

/// A tensor `[b, t, h, d]` as one matrix `[t, d]` for each batch and head.
#[derive(Clone)]
pub(crate) struct Heads<'a> {
    data: Data<'a>,
    offset: usize,
    dims: [usize; 4],
    strides: [usize; 4],
}

impl<'a> Heads<'a> {
    /// The matrix of a batch and a head.
    pub(crate) fn at(&self, batch: usize, head: usize) -> Result<Matrix<'a>> {
        let ([_, t, _, d], [to_batch, to_row, to_head, to_column]) = (self.dims, self.strides);
        let offset = self.offset + batch * to_batch + head * to_head;
        match Matrix::new(self.data, offset, [t, d], [to_row, to_column]) {
            Some(matrix) => Ok(matrix),
            None => bail!("a head of {:?} does not lie within its storage", self.dims),
        }
    }
}

/// Reads tensors `[b, t, h, d]` where they lie, whatever their strides.
pub(crate) fn with_heads<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([Heads; N]) -> Result<R>,
) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut heads = Vec::with_capacity(N);
    for (storage, layout) in &guards {
        let Storage::Cpu(storage) = &**storage else {
            bail!("the tensors of one operation must be on one device");
        };
        let (&[a, b, c, d], &[e, f, g, h]) = (layout.dims(), layout.stride()) else {
            bail!("heads must have 4 dimensions, got {:?}", layout.dims());
        };
        let (dims, strides) = ([a, b, c, d], [e, f, g, h]);
        heads.push(Heads { data: data(storage)?, offset: layout.start_offset(), dims, strides });
    }
    match heads.try_into() {
        Ok(heads) => f(heads),
        Err(_) => bail!("expected {N} tensors"),
    }
}
