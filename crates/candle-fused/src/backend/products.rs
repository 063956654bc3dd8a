//! Matrix products on Candle's CPU storage.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor, bail};
use candlewick_kernels::lora::LoraGradients;
use half::{bf16, f16};

use crate::cpu::dispatch;
use crate::cpu::gemm::{Data, Matrix, PARALLEL, Product, Start, sum_of_products};
use crate::cpu::lanes::Element;
use crate::cpu::low_rank::{Backward, Block, Delta, Inner, ROWS, Rows};
use crate::cpu::spread::spread;

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

/// The gradients of low-rank factors have at most so many partial sums, of at least `PARTIAL_ROWS` rows each.
const PARTIALS: usize = 32;
const PARTIAL_ROWS: usize = 8 * ROWS;

/// `y = h·Bᵀ` in the dtype of `x [n, in]`, and `h = scaling·x·Aᵀ` in f32, for `A [r, in]` and `B [out, r]`.
pub(crate) fn low_rank(x: Matrix, a: Matrix, b: Matrix, scaling: f32) -> Result<(Tensor, Tensor)> {
    let (n, rank) = (x.rows, a.rows);
    let [inputs, outputs] = [a.columns, b.rows];
    let delta = Delta { a: &a.panels(), b: &b.t().panels(), rank, inputs, outputs, scaling };
    let mut h = vec![0f32; n * rank];
    let y = match in_rows(&x)? {
        (Data::F32(data), stride) => rows_of(delta, Rows { data, stride }, n, &mut h),
        (Data::F16(data), stride) => rows_of(delta, Rows { data, stride }, n, &mut h),
        (Data::BF16(data), stride) => rows_of(delta, Rows { data, stride }, n, &mut h),
    }?;
    Ok((y, Tensor::from_vec(h, (n, rank), &Device::Cpu)?))
}

/// `scaling·x·Aᵀ` in f32 for `x [n, in]` and `A [r, in]`: the `h` of [`low_rank`].
pub(crate) fn low_rank_inner(x: Matrix, a: Matrix, scaling: f32) -> Result<Vec<f32>> {
    let delta = Delta { a: &a.panels(), b: &[], rank: a.rows, inputs: a.columns, outputs: 0, scaling };
    match in_rows(&x)? {
        (Data::F32(data), stride) => Ok(inner_of(delta, Rows { data, stride }, x.rows)),
        (Data::F16(data), stride) => Ok(inner_of(delta, Rows { data, stride }, x.rows)),
        (Data::BF16(data), stride) => Ok(inner_of(delta, Rows { data, stride }, x.rows)),
    }
}

fn inner_of<T: Element>(delta: Delta, x: Rows<T>, n: usize) -> Vec<f32> {
    let mut h = vec![0f32; n * delta.rank];
    let rows = rows_of_a_task(n);
    let blocks = h.chunks_mut(rows * delta.rank).enumerate().collect();
    spread(blocks, n * delta.inputs * delta.rank >= PARALLEL, |(), (i, h)| {
        dispatch::vectorise(dispatch::isa(), Inner { delta, x: x.after(i * rows), h });
    });
    h
}

/// Enough tasks for the threads to end together, else as many rows as share what is read of the factors.
fn rows_of_a_task(n: usize) -> usize {
    ROWS * (n / (16 * ROWS)).clamp(1, 4)
}

/// A matrix's elements from its first one on, and the distance between its rows.
fn in_rows<'a>(matrix: &Matrix<'a>) -> Result<(Data<'a>, usize)> {
    match matrix.in_rows() {
        Some((Data::F32(data), offset, stride)) => Ok((Data::F32(&data[offset..]), stride)),
        Some((Data::F16(data), offset, stride)) => Ok((Data::F16(&data[offset..]), stride)),
        Some((Data::BF16(data), offset, stride)) => Ok((Data::BF16(&data[offset..]), stride)),
        None => bail!("rows of a low-rank product must lie in one piece"),
    }
}

fn rows_of<T: Element>(delta: Delta, x: Rows<T>, n: usize, h: &mut [f32]) -> Result<Tensor> {
    let Delta { rank, inputs, outputs, .. } = delta;
    let mut y: Vec<T> = Vec::with_capacity(n * outputs);
    let rows = rows_of_a_task(n);
    let blocks =
        h.chunks_mut(rows * rank).zip(y.spare_capacity_mut()[..n * outputs].chunks_mut(rows * outputs));
    let blocks = blocks.enumerate().map(|(i, (h, y))| (i * rows, h, y)).collect();
    spread(blocks, n * (inputs + outputs) * rank >= PARALLEL, |(), (first, h, y)| {
        dispatch::vectorise(dispatch::isa(), Block { inner: Inner { delta, x: x.after(first), h }, y });
    });
    // SAFETY: within the capacity; the blocks partition the rows, and each writes all of its own.
    unsafe { y.set_len(n * outputs) };
    Tensor::from_vec(y, (n, outputs), &Device::Cpu)
}

/// What [`low_rank_backward`] leaves.
pub(crate) struct LowRankGradients {
    /// `scaling·g·B [n, r]`
    pub(crate) e: Vec<f32>,
    /// `e·A [n, in]` in the dtype of `g`.
    pub(crate) x: Option<Tensor>,
    /// `eᵀ·x [r, in]` in f32.
    pub(crate) a: Option<Tensor>,
    /// `hᵀ·g [r, out]` in f32.
    pub(crate) b: Option<Tensor>,
}

/// The gradients of [`low_rank`] at `x [n, in]` and `h [n, r]`, contiguous and f32, for the gradient `g [n, out]`, for
/// `A [r, in]` and `B [out, r]`. A sum over rows is made of partial sums in an order that the shape decides.
pub(crate) fn low_rank_backward(
    [x, a, b, h, g]: [Matrix; 5],
    scaling: f32,
    wanted: LoraGradients,
) -> Result<LowRankGradients> {
    let (rank, h) = (a.rows, h.rows_f32());
    let [inputs, outputs] = [a.columns, b.rows];
    let a = if wanted.x { a.panels() } else { Vec::new() };
    let delta = Delta { a: &a, b: &b.t().panels(), rank, inputs, outputs, scaling };
    let work = BackwardRows { delta, h: &h, wanted };
    let (x, (g, stride)) = (in_rows(&x)?, in_rows(&g)?);
    match g {
        Data::F32(data) => work.of(x, Rows { data, stride }),
        Data::F16(data) => work.of(x, Rows { data, stride }),
        Data::BF16(data) => work.of(x, Rows { data, stride }),
    }
}

struct BackwardRows<'a> {
    delta: Delta<'a>,
    h: &'a [f32],
    wanted: LoraGradients,
}

impl BackwardRows<'_> {
    fn of<T: Element>(&self, (x, stride): (Data, usize), gradient: Rows<T>) -> Result<LowRankGradients> {
        match x {
            Data::F32(data) => self.run(Rows { data, stride }, gradient),
            Data::F16(data) => self.run(Rows { data, stride }, gradient),
            Data::BF16(data) => self.run(Rows { data, stride }, gradient),
        }
    }

    fn run<T: Element, U: Element>(&self, x: Rows<U>, gradient: Rows<T>) -> Result<LowRankGradients> {
        let Self { delta, h, wanted } = *self;
        let Delta { rank, inputs, outputs, .. } = delta;
        let n = h.len() / rank;
        let block = n.div_ceil(PARTIALS).max(PARTIAL_ROWS).next_multiple_of(ROWS);
        let partials = n.div_ceil(block);
        let [a_size, b_size] = [(wanted.a, inputs), (wanted.b, outputs)]
            .map(|(wanted, columns)| if wanted { rank * columns } else { 0 });
        let all = partials * (a_size + b_size);
        let mut sums: Vec<f32> = Vec::with_capacity(all);
        let mut e = vec![0f32; n * rank];
        let size = if wanted.x { n * inputs } else { 0 };
        let mut dx: Vec<T> = Vec::with_capacity(size);
        let mut free = &mut dx.spare_capacity_mut()[..size];
        let mut free_sums = &mut sums.spare_capacity_mut()[..all];
        let mut tasks = Vec::with_capacity(partials);
        for (i, (e, h)) in e.chunks_mut(block * rank).zip(h.chunks(block * rank)).enumerate() {
            let len = if wanted.x { e.len() / rank * inputs } else { 0 };
            let dx = free.split_off_mut(..len).unwrap_or_default();
            let da = free_sums.split_off_mut(..a_size).unwrap_or_default();
            let db = free_sums.split_off_mut(..b_size).unwrap_or_default();
            tasks.push(Backward {
                delta,
                x: x.after(i * block),
                gradient: gradient.after(i * block),
                h,
                e,
                dx: wanted.x.then_some(dx),
                da: wanted.a.then_some(da),
                db: wanted.b.then_some(db),
            });
        }
        spread(tasks, n * (inputs + outputs) * rank >= PARALLEL, |(), task| {
            dispatch::vectorise(dispatch::isa(), task);
        });
        // SAFETY: within the capacities; the tasks partition the rows and the sums, and each writes all of its own.
        unsafe {
            dx.set_len(size);
            sums.set_len(all);
        }
        let total = |wanted: bool, skip: usize, columns: usize| -> Result<Option<Tensor>> {
            /// Sums of a task, and elements of all partial sums that are worth waking another thread.
            const SUMS: usize = 1 << 11;
            const MANY: usize = 1 << 17;
            if !wanted {
                return Ok(None);
            }
            let mut total = vec![0f32; rank * columns];
            let tasks = total.chunks_mut(SUMS).enumerate().collect();
            spread(tasks, all >= MANY, |(): &mut (), (i, total): (usize, &mut [f32])| {
                for partial in sums.chunks_exact((a_size + b_size).max(1)) {
                    for (total, partial) in total.iter_mut().zip(&partial[skip + i * SUMS..]) {
                        *total += partial;
                    }
                }
            });
            Tensor::from_vec(total, (rank, columns), &Device::Cpu).map(Some)
        };
        Ok(LowRankGradients {
            a: total(wanted.a, 0, inputs)?,
            b: total(wanted.b, a_size, outputs)?,
            x: wanted.x.then(|| Tensor::from_vec(dx, (n, inputs), &Device::Cpu)).transpose()?,
            e,
        })
    }
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
