//! Runs row loops on Candle's CPU storage.
//!
//! A loop of `cpu/` sees rows of f32 and nothing else. Here rows are found through a tensor's strides, widened if they
//! are 16-bit, spread over rayon's threads in blocks, and the results rounded once into fresh storage. The blocks
//! depend on the shape alone, and so does every bit of a result, whatever the number of threads.

use std::array;
use std::mem::{self, MaybeUninit};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// The elements of a task: fewer are not worth waking a thread for.
const BLOCK: usize = 16 * 1024;
/// The elements of a piece, where rows do not matter.
const PIECE: usize = 4 * 1024;
/// A sum over rows has at most so many partial sums, of at least `MIN_ROWS` rows each.
const MAX_PARTIALS: usize = 64;
const MIN_ROWS: usize = 16;

/// Computes each row of `M` results from the same row of `N` tensors of one shape, and a statistic of it:
/// `f(row, inputs, outputs) -> S`. The results have that shape and the given dtype; rows run along the last dimension.
pub(crate) fn map_rows<const N: usize, const M: usize, S: Clone + Default + Send>(
    inputs: [&Tensor; N],
    dtype: DType,
    f: impl Fn(usize, [&[f32]; N], [&mut [f32]; M]) -> S + Sync,
) -> Result<([Tensor; M], Vec<S>)> {
    let (rows, d) = matrix(inputs[0].shape());
    map(inputs, dtype, rows, d, f)
}

/// As [`map_rows`], where an element of the results depends on the same element of the inputs alone: contiguous inputs
/// are cut into pieces of any length. `f` gets the row-major index of the first element of its piece.
pub(crate) fn map_elements<const N: usize, const M: usize>(
    inputs: [&Tensor; N],
    dtype: DType,
    f: impl Fn(usize, [&[f32]; N], [&mut [f32]; M]) + Sync,
) -> Result<[Tensor; M]> {
    let shape = inputs[0].shape();
    let (rows, d) = if inputs.iter().all(|input| input.is_contiguous()) {
        (shape.elem_count().div_ceil(PIECE), PIECE)
    } else {
        matrix(shape)
    };
    let (outputs, _) = map(inputs, dtype, rows, d, |row, inputs, outputs| f(row * d, inputs, outputs))?;
    Ok(outputs)
}

/// A statistic of each row: `f(row, inputs)`.
pub(crate) fn each_row<const N: usize, S: Clone + Default + Send>(
    inputs: [&Tensor; N],
    f: impl Fn(usize, [&[f32]; N]) -> S + Sync,
) -> Result<Vec<S>> {
    let f = |row, inputs: [&[f32]; N], []: [&mut [f32]; 0]| f(row, inputs);
    let ([], statistics) = map_rows(inputs, DType::F32, f)?;
    Ok(statistics)
}

/// Sums over rows: `f(row, inputs, sums)` adds a row's part to the `M` sums, each of a row's length.
pub(crate) fn fold_rows<const N: usize, const M: usize>(
    inputs: [&Tensor; N],
    dtype: DType,
    f: impl Fn(usize, [&[f32]; N], [&mut [f32]; M]) + Sync,
) -> Result<[Tensor; M]> {
    let (rows, d) = matrix(inputs[0].shape());
    let block = rows.div_ceil(MAX_PARTIALS).max(MIN_ROWS);
    let partials = with_rows(inputs, d, |sources| {
        let partial = |first: usize| {
            let mut sums: [Vec<f32>; M] = array::from_fn(|_| vec![0.0; d]);
            let mut scratch = Scratch::<N, 0>::new(sources, d);
            for row in first..(first + block).min(rows) {
                let (inputs, []) = scratch.row(sources, row, d);
                f(row, inputs, sums.each_mut().map(Vec::as_mut_slice));
            }
            sums
        };
        let firsts: Vec<usize> = (0..rows).step_by(block).collect();
        match *firsts.as_slice() {
            [first] => vec![partial(first)],
            _ => firsts.into_par_iter().map(partial).collect(),
        }
    })?;
    let mut partials = partials.into_iter();
    let mut total = partials.next().unwrap_or_else(|| array::from_fn(|_| vec![0.0; d]));
    for partial in partials {
        for (total, partial) in total.iter_mut().flatten().zip(partial.iter().flatten()) {
            *total += partial;
        }
    }
    let tensor = |sum| Tensor::from_vec(sum, d, &Device::Cpu)?.to_dtype(dtype);
    array_of(total.into_iter().map(tensor))
}

/// The elements of a tensor, in order, as f32.
pub(crate) fn to_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
}

/// The number and the length of the rows along the last dimension.
fn matrix(shape: &Shape) -> (usize, usize) {
    match shape.dims() {
        [outer @ .., d] => (outer.iter().product(), *d),
        [] => (1, 1),
    }
}

/// The items as an array of exactly `N`, or the first error among them.
fn array_of<T, const N: usize>(items: impl Iterator<Item = Result<T>>) -> Result<[T; N]> {
    let items: Vec<T> = items.collect::<Result<_>>()?;
    let count = items.len();
    items.try_into().or_else(|_| bail!("expected {N} items, got {count}"))
}

/// Reads `inputs` in rows of `d`, copying only those whose last dimension is not contiguous.
fn with_rows<const N: usize, R>(
    inputs: [&Tensor; N],
    d: usize,
    f: impl FnOnce(&[Rows; N]) -> R,
) -> Result<R> {
    let readable = |tensor: &Tensor| match (tensor.stride(), tensor.dims()) {
        ([.., 1], _) | ([], _) | (_, [.., 0 | 1]) => Ok(tensor.clone()),
        _ => tensor.contiguous(),
    };
    let inputs: [Tensor; N] = array_of(inputs.into_iter().map(readable))?;
    let guards = inputs.each_ref().map(Tensor::storage_and_layout);
    let rows = array_of(guards.iter().map(|(storage, layout)| match &**storage {
        Storage::Cpu(storage) => Rows::new(storage, layout, d),
        _ => bail!("the tensors of one operation must be on one device"),
    }))?;
    Ok(f(&rows))
}

/// The rows of a tensor: where each begins, and what they hold.
struct Rows<'a> {
    data: Data<'a>,
    offset: usize,
    /// Size and stride of the dimensions that count the rows, outermost first, merged where they can be.
    outer: Vec<(usize, usize)>,
}

enum Data<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl<'a> Rows<'a> {
    /// `d` is the last dimension, or any length if the tensor is contiguous.
    fn new(storage: &'a CpuStorage, layout: &Layout, d: usize) -> Result<Self> {
        let data = match storage {
            CpuStorage::F32(data) => Data::F32(data),
            CpuStorage::F16(data) => Data::F16(data),
            CpuStorage::BF16(data) => Data::BF16(data),
            other => bail!("rows must be f32, f16 or bf16, got {}", other.dtype().as_str()),
        };
        let mut outer: Vec<(usize, usize)> = Vec::new();
        if layout.is_contiguous() {
            outer.push((usize::MAX, d));
        } else if let ([dims @ .., _], [strides @ .., _]) = (layout.dims(), layout.stride()) {
            for (&size, &stride) in dims.iter().zip(strides).filter(|&(&size, _)| size != 1) {
                match outer.last_mut() {
                    Some(last) if last.1 == size * stride => *last = (last.0 * size, stride),
                    _ => outer.push((size, stride)),
                }
            }
        }
        Ok(Self { data, offset: layout.start_offset(), outer })
    }

    fn start(&self, mut row: usize) -> usize {
        let mut start = self.offset;
        for (i, &(size, stride)) in self.outer.iter().enumerate().rev() {
            // The outermost index needs no remainder.
            let index = if i == 0 { row } else { row % size };
            row /= size;
            start += index * stride;
        }
        start
    }

    /// `len` elements of a row, in place or widened into `scratch`.
    fn read<'b>(&'b self, row: usize, len: usize, scratch: &'b mut [f32]) -> &'b [f32] {
        let range = self.start(row)..self.start(row) + len;
        match self.data {
            Data::F32(data) => &data[range],
            Data::F16(data) => {
                data[range].convert_to_f32_slice(&mut scratch[..len]);
                &scratch[..len]
            }
            Data::BF16(data) => {
                data[range].convert_to_f32_slice(&mut scratch[..len]);
                &scratch[..len]
            }
        }
    }

    fn needs_scratch(&self) -> bool {
        !matches!(self.data, Data::F32(_))
    }
}

/// A thread's row buffers: the widened inputs and the outputs before rounding. They stay in its cache.
struct Scratch<const N: usize, const M: usize> {
    inputs: [Vec<f32>; N],
    outputs: [Vec<f32>; M],
}

impl<const N: usize, const M: usize> Scratch<N, M> {
    fn new(rows: &[Rows; N], d: usize) -> Self {
        let inputs = rows.each_ref().map(|rows| vec![0.0; if rows.needs_scratch() { d } else { 0 }]);
        Self { inputs, outputs: array::from_fn(|_| vec![0.0; d]) }
    }

    /// `len` elements of a row of every input, and room for those of every output.
    fn row<'a>(
        &'a mut self,
        rows: &'a [Rows; N],
        row: usize,
        len: usize,
    ) -> ([&'a [f32]; N], [&'a mut [f32]; M]) {
        let mut buffers = self.inputs.each_mut().map(Vec::as_mut_slice);
        let inputs = array::from_fn(|k| rows[k].read(row, len, mem::take(&mut buffers[k])));
        (inputs, self.outputs.each_mut().map(|output| &mut output[..len]))
    }
}

/// What a task computes: `first` row, the rows' statistics, and the results as yet unwritten.
struct Task<'a, T, S, const M: usize> {
    first: usize,
    statistics: &'a mut [S],
    outputs: [&'a mut [MaybeUninit<T>]; M],
}

fn map<const N: usize, const M: usize, S: Clone + Default + Send>(
    inputs: [&Tensor; N],
    dtype: DType,
    rows: usize,
    d: usize,
    f: impl Fn(usize, [&[f32]; N], [&mut [f32]; M]) -> S + Sync,
) -> Result<([Tensor; M], Vec<S>)> {
    let shape = inputs[0].shape();
    with_rows(inputs, d, |sources| match dtype {
        DType::F32 => map_into::<f32, N, M, S>(sources, shape, rows, d, f),
        DType::F16 => map_into::<f16, N, M, S>(sources, shape, rows, d, f),
        DType::BF16 => map_into::<bf16, N, M, S>(sources, shape, rows, d, f),
        other => bail!("results must be f32, f16 or bf16, got {}", other.as_str()),
    })?
}

fn map_into<T: Float, const N: usize, const M: usize, S: Clone + Default + Send>(
    sources: &[Rows; N],
    shape: &Shape,
    rows: usize,
    d: usize,
    f: impl Fn(usize, [&[f32]; N], [&mut [f32]; M]) -> S + Sync,
) -> Result<([Tensor; M], Vec<S>)> {
    let count = shape.elem_count();
    let mut statistics = vec![S::default(); rows];
    let mut results: [Vec<T>; M] = array::from_fn(|_| Vec::with_capacity(count));

    let block = (BLOCK / d.max(1)).max(1);
    let mut free = results.each_mut().map(|result| &mut result.spare_capacity_mut()[..count]);
    let mut tasks = Vec::with_capacity(rows.div_ceil(block));
    for (index, statistics) in statistics.chunks_mut(block).enumerate() {
        let outputs = free.each_mut().map(|free| {
            let len = (block * d).min(free.len());
            free.split_off_mut(..len).unwrap_or_default()
        });
        tasks.push(Task { first: index * block, statistics, outputs });
    }

    let run = |scratch: &mut Scratch<N, M>, task: Task<T, S, M>| {
        let mut unwritten = task.outputs;
        let mut left = count - (task.first * d).min(count);
        for (row, statistic) in (task.first..).zip(task.statistics) {
            let len = d.min(left);
            left -= len;
            let (inputs, outputs) = scratch.row(sources, row, len);
            *statistic = f(row, inputs, outputs);
            for (output, unwritten) in scratch.outputs.iter().zip(&mut unwritten) {
                T::round(&output[..len], unwritten.split_off_mut(..len).unwrap_or_default());
            }
        }
    };
    match tasks.len() {
        0 | 1 => tasks.into_iter().for_each(|task| run(&mut Scratch::new(sources, d), task)),
        _ => tasks.into_par_iter().for_each_init(|| Scratch::new(sources, d), run),
    }

    for result in &mut results {
        // SAFETY: `count` elements are within the capacity; the tasks' outputs partition them, each task has written
        // its own row by row, and a row's rounding writes all of it.
        unsafe { result.set_len(count) };
    }
    let tensors = results.into_iter().map(|result| Tensor::from_vec(result, shape, &Device::Cpu));
    Ok((array_of(tensors)?, statistics))
}

/// What a result can be stored as.
trait Float: WithDType {
    /// Rounds every element of `row` into `out`, which is as long.
    fn round(row: &[f32], out: &mut [MaybeUninit<Self>]);
}

impl Float for f32 {
    fn round(row: &[f32], out: &mut [MaybeUninit<f32>]) {
        out.write_copy_of_slice(row);
    }
}

macro_rules! half_float {
    ($T:ty) => {
        impl Float for $T {
            fn round(row: &[f32], out: &mut [MaybeUninit<$T>]) {
                let mut piece = [<$T>::ZERO; 64];
                for (row, out) in row.chunks(64).zip(out.chunks_mut(64)) {
                    let piece = &mut piece[..row.len()];
                    piece.convert_from_f32_slice(row);
                    out.write_copy_of_slice(piece);
                }
            }
        }
    };
}
half_float!(f16);
half_float!(bf16);
