//! Runs row loops on Candle's CPU storage.
//!
//! Here rows are found through a tensor's strides, spread over threads in blocks, and the results made: fresh storage,
//! which a loop writes directly. The blocks depend on the shape alone, and so does every bit of a result, whatever the
//! number of threads.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::mem::MaybeUninit;
use std::ops::RangeInclusive;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use crate::cpu::dispatch::{self, Vectorised};
use crate::cpu::lanes::{Element, Lanes};
use crate::cpu::rows::{In, Out, Row, RowLoop};
use crate::cpu::spread::spread;
use crate::graph;

/// The bytes of a task: enough to begin the next one seldom, because at its end a task asks for rows that are another's.
const TASK: RangeInclusive<usize> = 32 * 1024..=256 * 1024;
/// About so many tasks, more where they would be too large, fewer where too small.
const TASKS: usize = 128;
/// What is asked for is at least so many bytes ahead of what is read: a page, where the processor's own foresight ends.
const AHEAD: usize = 4096;
/// A row of more bytes is not asked for as a whole: it might leave the cache before its turn.
const LONG: usize = 64 * 1024;
/// Fewer elements are not worth asking other threads, which takes some microseconds, and 10 to 30 until one comes.
const PARALLEL: usize = 192 * 1024;
/// The same where each element costs an exponential.
const PARALLEL_EXPONENTIALS: usize = 24 * 1024;
/// What moves more bytes would not stay in the cache, and is written past it.
const STREAM: usize = 12 * 1024 * 1024;
/// The elements of a piece, where rows do not matter.
const PIECE: usize = 2 * 1024;
/// A sum over rows has at most so many partial sums, of at least `MIN_ROWS` rows each.
const MAX_PARTIALS: usize = 64;
const MIN_ROWS: usize = 16;

/// What a loop leaves: the wanted results in the shape of its inputs, the wanted sums over the rows, and each row's
/// statistic.
pub(crate) struct Results<S, const M: usize, const P: usize> {
    pub(crate) outputs: [Option<Tensor>; M],
    pub(crate) sums: [Option<Tensor>; P],
    pub(crate) statistics: Vec<S>,
}

/// Runs a loop over the rows of tensors of one shape and dtype, along the last dimension.
pub(crate) fn map_rows<R: RowLoop<N, M, P>, const N: usize, const M: usize, const P: usize>(
    inputs: [&Tensor; N],
    wanted: [bool; M],
    sums: [bool; P],
    row: &R,
) -> Result<Results<R::Statistic, M, P>> {
    let (rows, d) = matrix(inputs[0].shape());
    run(inputs, rows, d, wanted, sums, row)
}

/// The one result of a loop over rows.
pub(crate) fn map_row<R: RowLoop<N, 1, 0>, const N: usize>(inputs: [&Tensor; N], row: &R) -> Result<Tensor> {
    let [output] = array_of(map_rows(inputs, [true], [], row)?.outputs.into_iter().flatten().map(Ok))?;
    Ok(output)
}

/// As [`map_row`], the result in the place of its one input, which is a fresh tensor that nobody else has, and is empty
/// afterwards.
pub(crate) fn map_row_over<R: RowLoop<1, 1, 0>>(input: &Tensor, row: &R) -> Result<Tensor> {
    let (rows, d) = matrix(input.shape());
    match graph::take_storage(input)? {
        Storage::Cpu(CpuStorage::F32(data)) => over(data, rows, d, row, input.shape()),
        Storage::Cpu(CpuStorage::F16(data)) => over(data, rows, d, row, input.shape()),
        Storage::Cpu(CpuStorage::BF16(data)) => over(data, rows, d, row, input.shape()),
        _ => bail!("rows must be f32, f16 or bf16, on the processor"),
    }
}

fn over<T: Element, R: RowLoop<1, 1, 0>>(
    mut data: Vec<T>,
    rows: usize,
    d: usize,
    row: &R,
    shape: &Shape,
) -> Result<Tensor> {
    /// Some rows, each read from a copy while it is written.
    struct Work<'a, T, R> {
        row: &'a R,
        first: usize,
        rows: &'a mut [T],
        copy: &'a mut Vec<T>,
        scratch: &'a mut [f32],
        d: usize,
    }

    impl<T: Element, R: RowLoop<1, 1, 0>> Vectorised for Work<'_, T, R> {
        type Output = ();

        #[inline(always)]
        fn run<L: Lanes>(self) {
            let Self { row, first, rows, copy, scratch, d } = self;
            for (index, to) in (first..).zip(rows.chunks_exact_mut(d)) {
                copy.clear();
                copy.extend_from_slice(to);
                let (inputs, outputs) = ([In::new(copy, 0)], [Some(Out::over(to))]);
                row.row::<L, T>(Row { index, inputs, outputs, sums: [], scratch });
            }
        }
    }

    if data.len() != rows * d || d == 0 {
        bail!("a tensor that is written over must be the whole of its storage");
    }
    let block = block(size_of_val(data.as_slice()), d * size_of::<T>());
    let worth = data.len() >= worth::<R, 1, 1, 0>();
    let tasks: Vec<_> = data.chunks_mut(block * d).enumerate().collect();
    spread(tasks, worth, |(copy, scratch): &mut (Vec<T>, Vec<f32>), (index, rows)| {
        scratch.resize(if R::SCRATCH { d } else { 0 }, 0.0);
        let first = index * block;
        dispatch::vectorise(dispatch::isa(), Work { row, first, rows, copy, scratch, d });
    });
    Tensor::from_vec(data, shape, &Device::Cpu)
}

/// As [`map_rows`], where an element of the results depends on the same element of the inputs alone: contiguous inputs
/// are cut into pieces of any length. A row's index is that of its first element.
pub(crate) fn map_elements<R: RowLoop<N, M, 0>, const N: usize, const M: usize>(
    inputs: [&Tensor; N],
    wanted: [bool; M],
    row: &R,
) -> Result<[Option<Tensor>; M]> {
    let shape = inputs[0].shape();
    let (rows, d) = if inputs.iter().all(|input| input.is_contiguous()) {
        (shape.elem_count().div_ceil(PIECE), PIECE)
    } else {
        matrix(shape)
    };
    Ok(run(inputs, rows, d, wanted, [], &Elements { row, d })?.outputs)
}

/// The one result of [`map_elements`].
pub(crate) fn map_element<R: RowLoop<N, 1, 0>, const N: usize>(
    inputs: [&Tensor; N],
    row: &R,
) -> Result<Tensor> {
    let [output] = array_of(map_elements(inputs, [true], row)?.into_iter().flatten().map(Ok))?;
    Ok(output)
}

/// A loop whose rows are counted by elements.
struct Elements<'a, R> {
    row: &'a R,
    d: usize,
}

// SAFETY: the inner loop's.
unsafe impl<R: RowLoop<N, M, 0>, const N: usize, const M: usize> RowLoop<N, M, 0> for Elements<'_, R> {
    type Statistic = R::Statistic;

    const SCRATCH: bool = R::SCRATCH;
    const EXPONENTIALS: bool = R::EXPONENTIALS;

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, N, M, 0>) -> R::Statistic {
        self.row.row::<L, T>(Row { index: row.index * self.d, ..row })
    }
}

/// The elements of a tensor, in order, as f32.
pub(crate) fn to_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    // Candle panics at an empty view whose offset is beyond its empty storage.
    if tensor.elem_count() == 0 {
        return Ok(Vec::new());
    }
    tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
}

/// The elements of tensors, in order, as f32, without a copy where they are that already.
pub(crate) fn with_f32<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let tensors: [Tensor; N] = array_of(tensors.into_iter().map(|tensor| match tensor.elem_count() {
        0 => Tensor::zeros(0, DType::F32, &Device::Cpu),
        _ => tensor.to_dtype(DType::F32)?.contiguous(),
    }))?;
    let guards = tensors.each_ref().map(Tensor::storage_and_layout);
    f(array_of(guards.iter().map(|(storage, layout)| match &**storage {
        Storage::Cpu(CpuStorage::F32(data)) => {
            let start = layout.start_offset();
            Ok(&data[start..start + layout.shape().elem_count()])
        }
        _ => bail!("the tensors of one operation must be on one device"),
    }))?)
}

/// The rows of a task, by the bytes of all of them and of one.
fn block(all: usize, row: usize) -> usize {
    ((all / TASKS).clamp(*TASK.start(), *TASK.end()) / row.max(1)).max(1)
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

/// A dtype's elements in Candle's storage.
trait Stored: Element {
    fn of(storage: &CpuStorage) -> Option<&[Self]>;
}

macro_rules! stored {
    ($T:ty, $variant:ident) => {
        impl Stored for $T {
            fn of(storage: &CpuStorage) -> Option<&[Self]> {
                match storage {
                    CpuStorage::$variant(data) => Some(data),
                    _ => None,
                }
            }
        }
    };
}
stored!(f32, F32);
stored!(f16, F16);
stored!(bf16, BF16);

/// The rows of a tensor: where each begins, and what they hold.
struct Rows<'a, T> {
    data: &'a [T],
    offset: usize,
    /// Size and stride of the dimensions that count the rows, outermost first, merged where they can be.
    outer: Vec<(usize, usize)>,
}

impl<'a, T> Rows<'a, T> {
    /// `d` is the last dimension, or any length if the tensor is contiguous.
    fn new(data: &'a [T], layout: &Layout, d: usize) -> Self {
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
        Self { data, offset: layout.start_offset(), outer }
    }

    /// So many bytes after a row's element lies that of the next row, or of a later one where rows are short. (Not
    /// always where the outer dimensions do not merge, nor where all rows are one; nothing depends on it but time.)
    fn ahead(&self, d: usize) -> usize {
        let bytes = d * size_of::<T>();
        match self.outer.last() {
            Some(&(_, stride)) if bytes <= LONG => stride * size_of::<T>() * AHEAD.div_ceil(bytes.max(1)),
            _ => AHEAD,
        }
    }

    /// At a row of `d` elements.
    fn cursor(&self, mut row: usize, d: usize) -> Cursor<'_, T> {
        let mut start = self.offset;
        let mut index = vec![0; self.outer.len()];
        for (i, &(size, stride)) in self.outer.iter().enumerate().rev() {
            index[i] = if i == 0 { row } else { row % size };
            row /= size;
            start += index[i] * stride;
        }
        Cursor { rows: self, index, start, ahead: self.ahead(d) }
    }
}

/// A row of a tensor.
struct Cursor<'a, T> {
    rows: &'a Rows<'a, T>,
    index: Vec<usize>,
    start: usize,
    /// See [`Rows::ahead`].
    ahead: usize,
}

impl<'a, T> Cursor<'a, T> {
    /// The row's first `len` elements; then the next row.
    #[inline(always)]
    fn next(&mut self, len: usize) -> &'a [T] {
        let row = if len == 0 { &[] } else { &self.rows.data[self.start..self.start + len] };
        for (i, &(size, stride)) in self.rows.outer.iter().enumerate().rev() {
            self.index[i] += 1;
            self.start += stride;
            // The outermost index has no end.
            if self.index[i] < size || i == 0 {
                break;
            }
            self.start -= size * stride;
            self.index[i] = 0;
        }
        row
    }
}

/// `d` elements in each of `rows` rows, the last of which may be shorter.
fn run<R: RowLoop<N, M, P>, const N: usize, const M: usize, const P: usize>(
    inputs: [&Tensor; N],
    rows: usize,
    d: usize,
    wanted: [bool; M],
    sums: [bool; P],
    row: &R,
) -> Result<Results<R::Statistic, M, P>> {
    match inputs[0].dtype() {
        DType::F32 => run_on::<f32, R, N, M, P>(inputs, rows, d, wanted, sums, row),
        DType::F16 => run_on::<f16, R, N, M, P>(inputs, rows, d, wanted, sums, row),
        DType::BF16 => run_on::<bf16, R, N, M, P>(inputs, rows, d, wanted, sums, row),
        other => bail!("rows must be f32, f16 or bf16, got {}", other.as_str()),
    }
}

fn run_on<T: Stored, R: RowLoop<N, M, P>, const N: usize, const M: usize, const P: usize>(
    inputs: [&Tensor; N],
    rows: usize,
    d: usize,
    wanted: [bool; M],
    wanted_sums: [bool; P],
    row: &R,
) -> Result<Results<R::Statistic, M, P>> {
    let shape = inputs[0].shape();
    // Only a last dimension that is not contiguous is copied.
    let readable = |tensor: &Tensor| match (tensor.stride(), tensor.dims()) {
        ([.., 1] | [], _) | (_, [.., 1]) => Ok(tensor.clone()),
        _ if tensor.elem_count() == 0 => Ok(tensor.clone()),
        _ => tensor.contiguous(),
    };
    let inputs: [Tensor; N] = array_of(inputs.into_iter().map(readable))?;
    let guards = inputs.each_ref().map(Tensor::storage_and_layout);
    let sources: [Rows<T>; N] = array_of(guards.iter().map(|(storage, layout)| match &**storage {
        Storage::Cpu(storage) => match T::of(storage) {
            Some(data) => Ok(Rows::new(data, layout, d)),
            None => bail!("the rows of one operation must have one dtype"),
        },
        _ => bail!("the tensors of one operation must be on one device"),
    }))?;

    let count = shape.elem_count();
    let bytes = count * size_of::<T>() * (N + wanted.iter().filter(|wanted| **wanted).count());
    // Where arithmetic takes longer than memory, stores past the cache only keep it waiting.
    let arithmetic = R::EXPONENTIALS && size_of::<T>() < size_of::<f32>();
    let sizes = Sizes { count, d, stream: bytes > STREAM && !arithmetic };
    let mut statistics = vec![R::Statistic::default(); rows];
    let mut results = wanted.map(|wanted| wanted.then(|| Vec::<T>::with_capacity(count)));
    let mut free = results
        .each_mut()
        .map(|result| result.as_mut().map(|result| &mut result.spare_capacity_mut()[..count]));

    // A task's rows make up a partial sum, where there are sums.
    let summed = wanted_sums.contains(&true);
    let block = if summed {
        rows.div_ceil(MAX_PARTIALS).max(MIN_ROWS)
    } else {
        block(count * size_of::<T>(), d * size_of::<T>())
    };
    let mut partials = vec![0f32; if summed { rows.div_ceil(block) * P * d } else { 0 }];
    let mut free_partials = partials.as_mut_slice();
    let mut tasks = Vec::with_capacity(rows.div_ceil(block));
    for (index, statistics) in statistics.chunks_mut(block).enumerate() {
        let outputs = free.each_mut().map(|free| {
            free.as_mut().map(|free| {
                let len = (block * d).min(free.len());
                free.split_off_mut(..len).unwrap_or_default()
            })
        });
        let mut partial = free_partials.split_off_mut(..if summed { P * d } else { 0 }).unwrap_or_default();
        let sums = wanted_sums.map(|wanted| {
            let sum = partial.split_off_mut(..if summed { d } else { 0 }).unwrap_or_default();
            wanted.then_some(sum)
        });
        tasks.push(Task { first: index * block, statistics, outputs, sums });
    }
    spread(tasks, count >= worth::<R, N, M, P>(), |scratch: &mut Vec<f32>, task| {
        scratch.resize(if R::SCRATCH { d } else { 0 }, 0.0);
        let work = Block { row, sources: &sources, sizes, scratch, task };
        dispatch::vectorise(dispatch::isa(), work);
    });

    for result in results.iter_mut().flatten() {
        // SAFETY: `count` elements are within the capacity; the tasks' outputs partition them, each task has run its
        // loop on every row of its own, and a loop writes all of a row.
        unsafe { result.set_len(count) };
    }
    let tensor = |result: Option<Vec<T>>| result.map(|result| Tensor::from_vec(result, shape, &Device::Cpu));
    let outputs = array_of(results.into_iter().map(|result| tensor(result).transpose()))?;
    let sum = |k: usize| -> Result<Option<Tensor>> {
        if !wanted_sums[k] {
            return Ok(None);
        }
        let mut total = vec![0f32; d];
        for partial in partials.chunks_exact((P * d).max(1)) {
            for (total, partial) in total.iter_mut().zip(&partial[k * d..]) {
                *total += partial;
            }
        }
        Tensor::from_vec(total, d, &Device::Cpu)?.to_dtype(T::DTYPE).map(Some)
    };
    Ok(Results { outputs, sums: array_of((0..P).map(sum))?, statistics })
}

/// The elements that are worth waking threads for.
const fn worth<R: RowLoop<N, M, P>, const N: usize, const M: usize, const P: usize>() -> usize {
    if R::EXPONENTIALS { PARALLEL_EXPONENTIALS } else { PARALLEL }
}

/// How large the whole is.
#[derive(Clone, Copy)]
struct Sizes {
    /// Elements.
    count: usize,
    /// Elements of a row.
    d: usize,
    /// Whether results go past the cache.
    stream: bool,
}

/// What a task computes: its `first` row, the rows' statistics, the results as yet unwritten, and its partial sums.
struct Task<'a, T, S, const M: usize, const P: usize> {
    first: usize,
    statistics: &'a mut [S],
    outputs: [Option<&'a mut [MaybeUninit<T>]>; M],
    sums: [Option<&'a mut [f32]>; P],
}

/// A task and what it needs.
struct Block<'a, T, R: RowLoop<N, M, P>, const N: usize, const M: usize, const P: usize> {
    row: &'a R,
    sources: &'a [Rows<'a, T>; N],
    sizes: Sizes,
    scratch: &'a mut [f32],
    task: Task<'a, T, R::Statistic, M, P>,
}

impl<T: Element, R: RowLoop<N, M, P>, const N: usize, const M: usize, const P: usize> Vectorised
    for Block<'_, T, R, N, M, P>
{
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { row, sources, sizes: Sizes { count, d, stream }, scratch, task } = self;
        let Task { first, statistics, mut outputs, mut sums } = task;
        let mut cursors = sources.each_ref().map(|source| source.cursor(first, d));
        let mut left = count - (first * d).min(count);
        for (index, statistic) in (first..).zip(statistics) {
            let len = d.min(left);
            left -= len;
            // Not by `map`, which is not inlined: rows may be short.
            let mut inputs = [In::new(&[], 0); N];
            for (input, cursor) in inputs.iter_mut().zip(&mut cursors) {
                *input = In::new(cursor.next(len), cursor.ahead);
            }
            let mut to = [const { None }; M];
            for (to, outputs) in to.iter_mut().zip(&mut outputs) {
                if let Some(outputs) = outputs {
                    *to = Some(Out::new(outputs.split_off_mut(..len).unwrap_or_default(), stream));
                }
            }
            let mut add_to = [const { None }; P];
            for (add_to, sum) in add_to.iter_mut().zip(&mut sums) {
                *add_to = sum.as_deref_mut();
            }
            *statistic = row.row::<L, T>(Row { index, inputs, outputs: to, sums: add_to, scratch });
        }
        if stream {
            L::fence();
        }
    }
}
