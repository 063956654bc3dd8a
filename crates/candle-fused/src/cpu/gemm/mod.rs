//! Sums of matrix products, `C = C₀ + A₁·B₁ + A₂·B₂ + …`, as the linear layers need them.
//!
//! The way is that of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008). The result is
//! cut into blocks of columns, one task each (and into blocks of rows where there are few columns). A task takes the
//! common dimension in pieces; it packs its part of the right matrix, which then stays in the second-level cache, and
//! goes over the left matrix's rows, which are read where they lie. The packed block is all that is copied: once for all
//! rows of the task (a large one of a 16-bit result for some rows after the other), and then it is forgotten: between
//! calls threads keep the memory, but nothing that is in it.
//!
//! 16-bit right matrices are widened as they are packed; a 16-bit left matrix is widened whole beforehand, unless the
//! processor multiplies bf16 pairs (AMX or `AVX512_BF16`), which takes both as they are. Sums are f32, and rounded once.
//!
//! Several products in one sum cost no pass over the result: they are further pieces of the common dimension. That is
//! how LoRA's update rides on its frozen product.
//!
//! On AMX f32 rows are multiplied in three bf16 parts where the matrices are large enough, and a right matrix that is not bf16 is
//! packed in parts, too ([`parts`]).
//!
//! The order of additions in an element depends on the common dimensions alone (and on whether there are at most
//! [`dot::ROWS`] rows, which are multiplied without packing; on AMX also on whether there are rows and columns enough for parts,
//! and whether its column is one of the last few, whose tile is summed up beside what is there): not on the block, nor on the
//! threads.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) mod amx;
mod dot;
mod kernel;
mod left;
mod matrix;
mod pack;
mod parts;
mod right;
mod rounding;
#[cfg(test)]
mod tests;
mod tiles;

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::DType;

use super::dispatch::{self, Isa};
use super::lanes::Element;
use super::mask::Mask;
use super::spread::{Kept, spread};
pub(crate) use dot::ROWS as FEW;
use kernel::{Kernel, Pairs};
pub(crate) use left::{Columns, Left, multiplies_pairs, multiplies_parts, takes_parts};
use left::{Term, lefts, takes_pairs, terms};
pub(crate) use matrix::{Data, Matrix};
pub(crate) use right::{Right, whole};
pub(crate) use rounding::{round, store};
use rounding::{round_rows, round_with};
use tiles::{Block, ROWS, Steps, WHOLE_STEPS};

/// Steps of the common dimension in one piece.
const STEPS: usize = 256;
/// Steps of pairs that are added up with those of the product before.
const FEW_STEPS: usize = 256;
/// Columns in one task's block, unless there are too few for all threads; and where their packed parts are three.
const COLUMNS: usize = 256;
const SPLIT_COLUMNS: usize = 128;
/// With so few steps there is little but the result, which is best written row by row: so many columns of it, if there are rows
/// enough for all threads.
const FEWEST_STEPS: usize = 64;
const MOST_COLUMNS: usize = 1024;
/// Rows of a 16-bit result that are summed up in f32 at a time: whole tiles of every kind.
const ROUNDED_ROWS: usize = 5 * ROWS;
/// Words of packed pieces that are kept for a task's next rows.
const PACKED: usize = 1 << 18;
/// Columns of one task where there are few rows.
const FEW_COLUMNS: usize = 128;
/// Multiplications that are worth waking another thread.
pub(crate) const PARALLEL: usize = 1 << 19;

/// `left [m, k] · right [k, n]`.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) left: Matrix<'a>,
    pub(crate) right: Matrix<'a>,
}

/// What a sum begins with.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Zero.
    Zero,
    /// The same row for every row of the result.
    Row(&'a [f32]),
    /// A matrix of the result's shape, row by row.
    Matrix(&'a [f32]),
    /// A product of the result's shape, as far as a mask keeps it.
    Masked(Product<'a>, &'a Mask),
}

/// A result's own memory as f32, if that is what it is.
fn as_f32<T: Element>(to: *mut T) -> Option<*mut f32> {
    (T::DTYPE == DType::F32).then(|| to.cast())
}

/// `start + Σ left·right` as a matrix `m × n`, row by row. Every product must have this shape.
pub(crate) fn sum_of_products<T: Element>([m, n]: [usize; 2], start: Start, products: &[Product]) -> Vec<T> {
    sum_with(dispatch::isa(), [m, n], start, products)
}

fn sum_with<T: Element>(isa: Isa, [m, n]: [usize; 2], start: Start, products: &[Product]) -> Vec<T> {
    let mut result: Vec<T> = Vec::with_capacity(m * n);
    write(isa, [m, n], start, products, result.spare_capacity_mut());
    // SAFETY: `write` has written all elements.
    unsafe { result.set_len(m * n) };
    result
}

/// `to += Σ left·right`, on the calling thread.
pub(crate) fn add_products([m, n]: [usize; 2], products: &[Product], to: &mut [f32]) {
    assert_shapes([m, n], products);
    assert!(to.len() >= m * n, "the result is too small");
    let isa = dispatch::isa();
    if m <= dot::ROWS && products.iter().all(|product| dot::serves(&product.right)) {
        let left: Vec<Vec<f32>> = products.iter().map(|product| product.left.to_f32()).collect();
        let mut sums = vec![[0f32; dot::ROWS]; n];
        for (product, left) in products.iter().zip(&left) {
            dot::add(isa, left, m, &product.right, 0, &mut sums);
        }
        for (j, sums) in sums.iter().enumerate() {
            for (i, sum) in sums.iter().enumerate().take(m) {
                to[i * n + j] += sum;
            }
        }
        return;
    }
    let kernel = Kernel { pairs: None, ..Kernel::of(isa) };
    let lefts = lefts(kernel, products);
    let terms = terms(products, &lefts);
    let sum = Sum { isa, kernel, n, start: Start::Zero, terms: &terms };
    // SAFETY: the result is initialised, as large as is said, and nobody else's.
    unsafe { sum.block(0..m, 0..n, to.as_mut_ptr(), n, true, &mut Vec::new()) };
}

fn assert_shapes([m, n]: [usize; 2], products: &[Product]) {
    for Product { left, right } in products {
        assert!([left.rows, right.columns] == [m, n] && left.columns == right.rows, "a product's shape");
    }
}

/// Writes all `m·n` elements of the result.
fn write<T: Element>(
    isa: Isa,
    [m, n]: [usize; 2],
    start: Start,
    products: &[Product],
    to: &mut [MaybeUninit<T>],
) {
    assert_shapes([m, n], products);
    if let Start::Masked(product, _) = start {
        assert_shapes([m, n], &[product]);
    }
    match start {
        Start::Row(row) => assert_eq!(row.len(), n, "the first row's length"),
        Start::Matrix(matrix) => assert_eq!(matrix.len(), m * n, "the first matrix's size"),
        Start::Zero | Start::Masked(..) => {}
    }
    assert!(to.len() >= m * n, "the result is too small");
    if m * n == 0 {
        return;
    }
    if m <= dot::ROWS && products.iter().all(|product| dot::serves(&product.right)) {
        if let Start::Masked(product, mask) = start {
            let mut first = sum_with::<f32>(isa, [m, n], Start::Zero, &[product]);
            mask.apply_to(isa, &mut first);
            return write_few(isa, [m, n], Start::Matrix(&first), products, to);
        }
        return write_few(isa, [m, n], start, products, to);
    }
    let first = if let Start::Masked(product, _) = start { Some(product) } else { None };
    let products: Vec<_> = first.into_iter().chain(products.iter().copied()).collect();
    let kernel = Kernel::of(isa);
    let lefts = lefts(kernel, &products);
    let terms = terms(&products, &lefts);
    let sum = Sum { isa, kernel, n, start, terms: &terms };

    let steps = terms.iter().map(|term| term.right.rows).sum::<usize>();
    let threads = if m * n * steps < PARALLEL { 1 } else { rayon::current_num_threads() };
    let out = Shared(to.as_mut_ptr().cast::<T>());
    let most = if terms.iter().any(|term| term.split) { SPLIT_COLUMNS } else { COLUMNS };
    let tasks = tasks(kernel, [m, n], steps, most, threads);
    let run = |scratch: &mut Scratch, (rows, columns): (Range<usize>, Range<usize>)| {
        // SAFETY: the tasks' blocks partition the result, which has `n` elements in each row.
        unsafe { sum.task(rows, columns, &out, scratch) };
    };
    spread(tasks, threads > 1, run);
}

/// As [`write`], for few rows.
fn write_few<T: Element>(
    isa: Isa,
    [m, n]: [usize; 2],
    start: Start,
    products: &[Product],
    to: &mut [MaybeUninit<T>],
) {
    let left: Vec<Vec<f32>> = products.iter().map(|product| product.left.to_f32()).collect();
    let mut sums = vec![[0f32; dot::ROWS]; n];
    let compute = |(): &mut (), (block, sums): (usize, &mut [[f32; dot::ROWS]])| {
        let first = block * FEW_COLUMNS;
        for (j, sums) in sums.iter_mut().enumerate() {
            for (i, sum) in sums.iter_mut().enumerate().take(m) {
                *sum = match start {
                    Start::Zero | Start::Masked(..) => 0.0,
                    Start::Row(row) => row[first + j],
                    Start::Matrix(matrix) => matrix[i * n + first + j],
                };
            }
        }
        for (product, left) in products.iter().zip(&left) {
            dot::add(isa, left, m, &product.right, first, sums);
        }
    };
    let work = m * n * left.iter().map(|left| left.len() / m).sum::<usize>();
    spread(sums.chunks_mut(FEW_COLUMNS).enumerate().collect(), work >= PARALLEL, compute);
    let mut row = vec![0f32; n];
    for (i, to) in to.chunks_exact_mut(n).enumerate().take(m) {
        for (x, sums) in row.iter_mut().zip(&sums) {
            *x = sums[i];
        }
        round_with(isa, &row, to);
    }
}

/// The result's memory, of which each task writes its own block.
struct Shared<T>(*mut T);

// SAFETY: what is shared is an address; who writes where is decided by the tasks.
unsafe impl<T: Send> Sync for Shared<T> {}

/// A thread's packed block, and its sums before rounding.
#[derive(Default)]
struct Scratch {
    packed: Vec<f32>,
    sums: Vec<f32>,
}

impl Kept for Scratch {
    fn bytes(&self) -> usize {
        self.packed.bytes() + self.sums.bytes()
    }
}

/// The blocks of the result of so many steps, of at most so many columns.
fn tasks(
    kernel: Kernel,
    [m, n]: [usize; 2],
    steps: usize,
    most: usize,
    threads: usize,
) -> Vec<(Range<usize>, Range<usize>)> {
    // Whole tiles of either kind, where there are two.
    let tall = match kernel.pairs {
        Some(pairs) if pairs.rows != kernel.rows => ROWS,
        _ => kernel.rows,
    };
    let (panels, groups) = (n.div_ceil(kernel.columns), m.div_ceil(tall));
    let (wanted, possible) = (if threads == 1 { 1 } else { 2 * threads }, groups.div_ceil(4));
    let in_rows = steps <= FEWEST_STEPS && threads <= possible;
    let most = if in_rows { MOST_COLUMNS } else { most };
    let mut across = panels.div_ceil((most / kernel.columns).max(1));
    if !in_rows && across < wanted {
        across = wanted.min(panels);
    } else if !in_rows {
        across = across.next_multiple_of(threads).min(panels);
    }
    let down = wanted.div_ceil(across).min(possible);
    let cut = |parts: usize, units: usize, size: usize, end: usize| {
        (0..parts).map(move |i| (i * units / parts * size)..((i + 1) * units / parts * size).min(end))
    };
    cut(across, panels, kernel.columns, n)
        .flat_map(|columns| cut(down, groups, tall, m).map(move |rows| (rows, columns.clone())))
        .collect()
}

/// What all tasks of one sum share.
struct Sum<'a> {
    isa: Isa,
    kernel: Kernel,
    n: usize,
    start: Start<'a>,
    /// The first of which is the start's, if that is a product.
    terms: &'a [Term<'a>],
}

impl Sum<'_> {
    /// Computes a block of the result and stores it.
    ///
    /// # Safety
    /// `out` has `n` elements for each row, and nobody else uses those of the block.
    unsafe fn task<T: Element>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &Shared<T>,
        scratch: &mut Scratch,
    ) {
        let width = columns.len();
        // SAFETY: the block's first element.
        let first = unsafe { out.0.add(rows.start * self.n + columns.start) };
        if let Some(out) = as_f32(first) {
            // SAFETY: the block is ours; its rows are `n` apart.
            unsafe {
                let begun = self.begin(rows.clone(), columns.clone(), out, self.n);
                self.block(rows, columns, out, self.n, begun, &mut scratch.packed);
            }
            return;
        }
        // Packed once for all rows, where it fits beside their sums.
        let pieces = self.pieces(columns.len());
        let size = pieces.iter().map(|piece| piece.size).sum::<usize>();
        // As many sums, whatever the columns.
        let most = (ROUNDED_ROWS * COLUMNS / width.max(1) / ROWS * ROWS).clamp(ROWS, ROUNDED_ROWS);
        let at_once = size <= PACKED && rows.len() > most;
        if at_once {
            let mut to = room(&mut scratch.packed, size);
            for piece in &pieces {
                let (panels, rest) = to.split_at_mut(piece.size);
                piece.pack(self.isa, columns.clone(), panels);
                to = rest;
            }
        }
        for rows in parts(rows.clone(), most) {
            scratch.sums.clear();
            scratch.sums.reserve(rows.len() * width);
            let sums = scratch.sums.as_mut_ptr();
            // SAFETY: `sums` has room for the rows, all of which is written by one or the other.
            unsafe {
                let mut begun = self.begin(rows.clone(), columns.clone(), sums, width);
                if at_once {
                    let mut packed = &scratch.packed[..];
                    for piece in &pieces {
                        let (panels, rest) = packed.split_at(piece.size);
                        self.add(piece, panels, rows.clone(), columns.clone(), sums, width, begun);
                        (packed, begun) = (rest, true);
                    }
                } else {
                    self.block(rows.clone(), columns.clone(), sums, width, begun, &mut scratch.packed);
                }
                scratch.sums.set_len(rows.len() * width);
            }
            // SAFETY: the block's rows are ours, and have its columns.
            unsafe {
                let to = out.0.add(rows.start * self.n + columns.start);
                round_rows::<T>(self.isa, &scratch.sums, width, to.cast(), self.n);
            }
        }
    }

    /// Writes what the sum begins with; false if that is nothing and something else will write.
    ///
    /// # Safety
    /// `out` has the block's columns in each of its rows, `stride` apart.
    unsafe fn begin(&self, rows: Range<usize>, columns: Range<usize>, out: *mut f32, stride: usize) -> bool {
        let empty = self.terms.iter().all(|term| term.right.rows == 0);
        if matches!(self.start, Start::Zero | Start::Masked(..)) && !empty {
            return false;
        }
        for (i, row) in rows.enumerate() {
            // SAFETY: the caller's promise; floats of any bits.
            let to = unsafe {
                std::slice::from_raw_parts_mut(out.add(i * stride).cast::<MaybeUninit<f32>>(), columns.len())
            };
            match self.start {
                Start::Zero | Start::Masked(..) => to.fill(MaybeUninit::new(0.0)),
                Start::Row(from) => _ = to.write_copy_of_slice(&from[columns.clone()]),
                Start::Matrix(from) => {
                    to.write_copy_of_slice(&from[row * self.n..][columns.clone()]);
                }
            }
        }
        true
    }

    /// Adds the block's products to `out`, or writes them there if it has not `begun`.
    ///
    /// # Safety
    /// `out` has the block's columns in each of its rows, `stride` apart, initialised if it has begun.
    unsafe fn block(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: *mut f32,
        stride: usize,
        begun: bool,
        packed: &mut Vec<f32>,
    ) {
        let mut accumulate = begun;
        for piece in self.pieces(columns.len()) {
            let panels = room(packed, piece.size);
            piece.pack(self.isa, columns.clone(), panels);
            // SAFETY: the caller's promise.
            unsafe { self.add(&piece, panels, rows.clone(), columns.clone(), out, stride, accumulate) };
            accumulate = true;
        }
    }

    /// Adds a packed piece to `out`, or writes it there; where it is the last one that is masked, masks what is there.
    ///
    /// # Safety
    /// As for [`Block::add`].
    #[expect(clippy::too_many_arguments, reason = "a block of a matrix, and what is added to it")]
    unsafe fn add(
        &self,
        piece: &Piece,
        panels: &[f32],
        rows: Range<usize>,
        columns: Range<usize>,
        out: *mut f32,
        stride: usize,
        accumulate: bool,
    ) {
        let (first, dims) = (rows.start * self.n + columns.start, [rows.len(), columns.len(), stride]);
        // SAFETY: the caller's promise; the piece has written all of the block.
        unsafe {
            piece.block.add(panels, rows, columns.len(), out, stride, accumulate);
            if let Some(mask) = piece.mask {
                mask.apply(self.isa, [first, self.n], dims, out);
            }
        }
    }

    /// The pieces of all products for a block of so many columns, in the order of the sum.
    fn pieces(&self, columns: usize) -> Vec<Piece<'_>> {
        let kernel = self.kernel;
        let padded = columns.next_multiple_of(kernel.columns);
        let mut pieces: Vec<Piece> = Vec::new();
        for (i, &Term { ref left, parts, ref right, split }) in self.terms.iter().enumerate() {
            let pairs = kernel.pairs.filter(|_| split || takes_pairs(kernel.pairs, left, right));
            for range in cut(pairs, right.rows) {
                let words = tiles::words(pairs, split, range.len());
                let steps = Steps { kernel, left, parts, split, pairs, range, words };
                let size = words * padded;
                match pieces.last_mut() {
                    Some(last) if last.takes(&steps) => {
                        last.rights.push(right);
                        last.block.then = Some(steps);
                        last.size += size;
                    }
                    _ => {
                        let block = Block { steps, then: None, padded };
                        pieces.push(Piece { block, rights: vec![right], size, mask: None });
                    }
                }
            }
            if let (0, Start::Masked(_, mask), Some(last)) = (i, self.start, pieces.last_mut()) {
                last.mask = Some(mask);
            }
        }
        pieces
    }
}

/// A piece of the common dimension of one product, for some columns, or of two.
struct Piece<'a> {
    block: Block<'a>,
    rights: Vec<&'a Matrix<'a>>,
    /// Words of all panels.
    size: usize,
    /// What masks the sums, once it is added.
    mask: Option<&'a Mask>,
}

impl Piece<'_> {
    /// Whether these are a few steps to be added with its own.
    fn takes(&self, steps: &Steps) -> bool {
        let Block { steps: first, then, .. } = &self.block;
        let is_open = then.is_none() && self.mask.is_none();
        is_open && first.pairs.is_some() && steps.pairs.is_some() && steps.range.len() <= FEW_STEPS
    }

    /// Packs its parts of the right matrices.
    fn pack(&self, isa: Isa, columns: Range<usize>, to: &mut [f32]) {
        let Block { steps, then, padded } = &self.block;
        let mut to = to;
        for (Steps { kernel, split, pairs, range, words, .. }, right) in
            [steps].into_iter().chain(then).zip(&self.rights)
        {
            let (panels, rest) = to.split_at_mut(words * padded);
            let pack = match pairs {
                None => pack::pack,
                Some(_) if *split => pack::pack_parts,
                Some(_) => pack::pack_pairs,
            };
            pack(isa, right, range.clone(), columns.clone(), kernel.columns, panels);
            to = rest;
        }
    }
}

/// A common dimension of `k` steps in pieces.
fn cut(pairs: Option<Pairs>, k: usize) -> impl Iterator<Item = Range<usize>> {
    let count = k.div_ceil(pairs.map_or(STEPS, |pairs| pairs.steps));
    let at = move |i: usize| (i * k.div_ceil(WHOLE_STEPS) / count * WHOLE_STEPS).min(k);
    (0..count).map(move |i| at(i)..at(i + 1))
}

/// The first `size` words of a buffer, whatever they are, which grows if it has fewer.
pub(crate) fn room(buffer: &mut Vec<f32>, size: usize) -> &mut [f32] {
    if buffer.len() < size {
        buffer.resize(size, 0.0);
    }
    &mut buffer[..size]
}

/// The transpose of `from`, which has so many rows, `stride` apart, and columns.
pub(crate) fn transpose(from: &[f32], stride: usize, [rows, columns]: [usize; 2], to: &mut [f32]) {
    pack::turn(dispatch::isa(), from, stride, [rows, columns], rows, to);
}

/// A range in parts of `size`.
fn parts(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(size).map(move |first| first..end.min(first + size))
}
