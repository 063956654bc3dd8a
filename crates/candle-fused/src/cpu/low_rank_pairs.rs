//! LoRA beside bf16 rows on a processor's matrix unit: the products of [`low_rank`](super::low_rank) in pairs of bf16.
//!
//! Rows and gradients are multiplied as they are stored. What is f32 is the sum of parts in bf16: a float's 24 bits are three
//! times bf16's eight, so that three parts are the float itself, and its products with bf16 are exact (but for what is
//! subnormal, which the unit takes for zero, and for infinity, which times a part that is 0 is NaN). Factors of f32 are
//! split so, and `h` and `e` for the gradient of such a factor. Two parts, which are a float within 2⁻¹⁶ of it, serve what
//! is rounded to bf16 afterwards: the update of `y` or `dx`, and the gradient of a bf16 factor. Of an f32 result the update is
//! the six products of parts that it can tell.
//!
//! The update is a term of the base's sum ([`Update`]). For the rest some rows are taken at a time, which stay in the cache.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::borrow::Cow;
use std::mem::MaybeUninit;

use candle_core::{DType, Result, bail};
use half::bf16;

use super::dispatch::{self, Vectorised};
use super::gemm::{self, Data, Matrix, PARALLEL, Product, Right};
use super::lanes::{LANES, Lanes};
use super::rows::{load_part, store_part};
use super::spread::{Kept, spread};

/// Rows, columns and steps of what the matrix unit multiplies at once.
const UNIT: usize = 32;
/// The fewest rows of a task, and the most tasks: each has sums of the factors' gradients.
const TASK_ROWS: usize = 128;
const TASKS: usize = 16;
/// Columns of rows that are packed at a time, a multiple of [`UNIT`].
const COLUMNS: usize = 128;
/// Elements of the rows that are taken at a time.
const BLOCK: usize = 1 << 18;

/// One part of each number, 0 the largest; the last that is taken is rounded, so that the sum of those before and it is as
/// close as they can be. Beyond bf16's range the first is infinite, and the others are 0.
struct Split<'a> {
    from: &'a [f32],
    part: usize,
    to: &'a mut [MaybeUninit<bf16>],
}

impl Vectorised for Split<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { from, part, to } = self;
        let (pieces, rest) = from.as_chunks();
        let (rooms, rest_to) = to.as_chunks_mut();
        for (piece, room) in pieces.iter().zip(rooms) {
            part_of(L::load(piece), part).store_bf16(room);
        }
        if !rest.is_empty() {
            store_part(part_of(load_part::<L, f32>(rest), part), rest_to);
        }
    }
}

#[inline(always)]
fn part_of<L: Lanes>(mut x: L, part: usize) -> L {
    let zero = L::splat(0.0);
    for _ in 0..part {
        let mut taken = [MaybeUninit::new(bf16::ZERO); LANES];
        x.store_bf16(&mut taken);
        // SAFETY: initialised.
        let taken = L::load_bf16(&taken.map(
            #[inline(always)]
            |x| unsafe { x.assume_init() },
        ));
        x = taken.abs().if_less(L::splat(f32::INFINITY), x - taken, zero);
    }
    x
}

/// Appends a part of each number.
fn split(from: &[f32], part: usize, to: &mut Vec<bf16>) {
    let length = to.len();
    to.reserve(from.len());
    let room = &mut to.spare_capacity_mut()[..from.len()];
    dispatch::vectorise(dispatch::isa(), Split { from, part, to: room });
    // SAFETY: within the capacity, and all is written.
    unsafe { to.set_len(length + from.len()) };
}

/// The rows of a matrix in f32, whichever way it lies.
fn in_rows(matrix: Matrix) -> Cow<[f32]> {
    if matrix.in_rows().is_some() {
        return matrix.rows_f32();
    }
    let (columns, mut rows) = (matrix.t().rows_f32(), vec![0.0; matrix.rows * matrix.columns]);
    gemm::transpose(&columns, matrix.rows, [matrix.columns, matrix.rows], &mut rows);
    Cow::Owned(rows)
}

fn matrix(data: &[bf16], dims: [usize; 2], stride: usize) -> Result<Matrix<'_>> {
    match Matrix::new(Data::BF16(data), 0, dims, [stride, 1]) {
        Some(matrix) => Ok(matrix),
        None => bail!("{dims:?} parts, {stride} apart, are not within {}", data.len()),
    }
}

/// The parts that are a factor.
fn exact(factor: &Matrix) -> &'static [usize] {
    if matches!(factor.data, Data::BF16(_)) { &[0] } else { &[0, 1, 2] }
}

/// Some parts of a factor `[rank, columns]`, below each other.
fn below(factor: Matrix, parts: &[usize]) -> Vec<bf16> {
    let (rows, mut below) = (in_rows(factor), Vec::new());
    for &part in parts {
        split(&rows, part, &mut below);
    }
    below
}

/// A factor `[rank, columns]` that rows are multiplied with.
pub(crate) struct Contraction {
    rank: usize,
    columns: usize,
    /// The transposed parts, one after the other.
    parts: Right,
}

impl Contraction {
    /// Of a factor that is not empty.
    pub(crate) fn new(factor: Matrix) -> Result<Self> {
        let (rank, columns, parts) = (factor.rows, factor.columns, exact(&factor));
        let below = below(factor, parts);
        let parts = Right::of(&matrix(&below, [parts.len() * rank, columns], columns)?.t(), true);
        Ok(Self { rank, columns, parts })
    }

    /// `h = scaling · rows·factorᵀ [count, rank]`.
    fn contract(&self, rows: &Matrix, scaling: f32, sums: &mut Vec<f32>, h: &mut [f32]) {
        let stride = gemm::whole(self.parts.columns());
        sums.resize(rows.rows * stride, 0.0);
        self.parts.multiply(rows, stride, (&mut *sums, stride), false);
        for (h, sums) in h.chunks_exact_mut(self.rank).zip(sums.chunks_exact(stride)) {
            let parts = &sums[..self.parts.columns()];
            h.copy_from_slice(&parts[..self.rank]);
            for part in parts.chunks_exact(self.rank).skip(1) {
                h.iter_mut().zip(part).for_each(|(h, part)| *h += part);
            }
            for h in h {
                *h *= scaling;
            }
        }
    }
}

/// A factor `[rank, columns]` that makes rows of `h`.
pub(crate) struct Expansion {
    rank: usize,
    columns: usize,
    /// Parts of what is multiplied with [`Self::below`], slot by slot.
    parts: &'static [usize],
    /// `[steps, columns]`: parts, and zeros up to whole steps.
    below: Vec<bf16>,
}

impl Expansion {
    /// Of a factor that is not empty, for rows of this type.
    pub(crate) fn new(factor: Matrix, rows: DType) -> Self {
        let (rank, columns) = (factor.rows, factor.columns);
        // What is left out are products of small parts.
        let (parts, slots): (&[usize], &[usize]) = match (rows, exact(&factor).len()) {
            (DType::F32, 1) => (&[0, 1, 2], &[0, 0, 0]),
            (DType::F32, _) => (&[0, 0, 1, 1, 0, 2], &[0, 1, 0, 1, 2, 0]),
            (_, 1) => (&[0, 1], &[0, 0]),
            _ => (&[0, 0, 1], &[0, 1, 0]),
        };
        let mut below = below(factor, slots);
        below.resize((parts.len() * rank).next_multiple_of(UNIT) * columns, bf16::ZERO);
        Self { rank, columns, parts, below }
    }

    fn steps(&self) -> usize {
        self.below.len() / self.columns
    }

    /// Writes `h`'s parts into rows of an [`Update`].
    fn lay(&self, h: &[f32], parts: &mut Vec<bf16>, left: &mut [bf16]) {
        for (slot, &part) in self.parts.iter().enumerate() {
            parts.clear();
            split(h, part, parts);
            for (left, parts) in left.chunks_exact_mut(self.steps()).zip(parts.chunks_exact(self.rank)) {
                left[slot * self.rank..][..self.rank].copy_from_slice(parts);
            }
        }
    }
}

/// `h·factor` as a term of a sum: `h [n, rank]` in the parts that the factor's take.
pub(crate) struct Update<'a> {
    factor: &'a Expansion,
    /// `[n, steps]`
    left: Vec<bf16>,
}

impl<'a> Update<'a> {
    /// Of an `h` that is there.
    pub(crate) fn of(h: &[f32], factor: &'a Expansion) -> Self {
        let (n, rank, steps) = (h.len() / factor.rank, factor.rank, factor.steps());
        let mut left = vec![bf16::ZERO; n * steps];
        let size = task_rows(n);
        let tasks = h.chunks(size * rank).zip(left.chunks_mut(size * steps)).collect();
        spread(tasks, n * rank * factor.columns >= PARALLEL, |parts: &mut Vec<bf16>, (h, left)| {
            factor.lay(h, parts, left);
        });
        Self { factor, left }
    }

    pub(crate) fn product(&self) -> Result<Product<'_>> {
        let (steps, columns) = (self.factor.steps(), self.factor.columns);
        Ok(Product {
            left: matrix(&self.left, [self.left.len() / steps, steps], steps)?,
            right: matrix(&self.factor.below, [steps, columns], columns)?,
        })
    }
}

/// What a thread uses for one block after the other.
#[derive(Default)]
struct Scratch {
    sums: Vec<f32>,
    turned: Vec<f32>,
    parts: Vec<bf16>,
    right: Right,
    of_a: Vec<f32>,
    of_b: Vec<f32>,
}

impl Kept for Scratch {
    fn bytes(&self) -> usize {
        let floats = [&self.sums, &self.turned, &self.of_a, &self.of_b];
        floats.map(Kept::bytes).into_iter().sum::<usize>() + self.parts.bytes() + self.right.bytes()
    }
}

/// The rows of a task.
fn task_rows(n: usize) -> usize {
    n.div_ceil(TASKS).max(TASK_ROWS).next_multiple_of(UNIT)
}

/// `h = scaling · rows·factorᵀ [n, rank]`, and its update by another factor.
pub(crate) fn contract<'a>(
    rows: &Matrix,
    factor: &Contraction,
    scaling: f32,
    onto: &'a Expansion,
) -> (Vec<f32>, Update<'a>) {
    let (n, rank, steps) = (rows.rows, factor.rank, onto.steps());
    let (mut h, mut left) = (vec![0f32; n * rank], vec![bf16::ZERO; n * steps]);
    let size = task_rows(n);
    let tasks = h.chunks_mut(size * rank).zip(left.chunks_mut(size * steps)).enumerate().collect();
    let work = n * rank * factor.columns;
    spread(
        tasks,
        work >= PARALLEL,
        |scratch: &mut Scratch, (i, (h, left)): (usize, (&mut [f32], &mut [bf16]))| {
            factor.contract(&rows.some_rows(i * size, size), scaling, &mut scratch.sums, h);
            onto.lay(h, &mut scratch.parts, left);
        },
    );
    (h, Update { factor: onto, left })
}

/// The sum of `hᵀ·rows` over blocks of rows, in parts: of `[rank, columns]`.
struct Outer<'a> {
    rank: usize,
    columns: usize,
    /// Those of `h`.
    parts: &'static [usize],
    /// Of the parts, below each other, and of rows that fill them up.
    sums: &'a mut Vec<f32>,
}

impl Outer<'_> {
    fn add(
        &mut self,
        h: &[f32],
        rows: &Matrix,
        begun: bool,
        (turned, split_parts, right): (&mut Vec<f32>, &mut Vec<bf16>, &mut Right),
    ) {
        let (count, height) = (rows.rows, (self.parts.len() * self.rank).next_multiple_of(UNIT));
        turned.resize(h.len(), 0.0);
        gemm::transpose(h, self.rank, [count, self.rank], turned);
        split_parts.clear();
        for &part in self.parts {
            split(turned, part, split_parts);
        }
        split_parts.resize(height * count, bf16::ZERO);
        let stride = gemm::whole(self.columns);
        self.sums.resize(height * stride, 0.0);
        let Ok(left) = matrix(split_parts, [height, count], count) else { return };
        // Columns whose packed rows are still in the first-level cache when they are multiplied.
        for first in (0..self.columns).step_by(COLUMNS) {
            let columns = rows.t().some_rows(first, COLUMNS).t();
            right.pack(&columns, true);
            let to = (&mut self.sums[first..], stride);
            right.multiply(&left, gemm::whole(columns.columns), to, begun);
        }
    }

    /// Writes the sums of the parts.
    fn total(&self, to: &mut [f32]) {
        let stride = gemm::whole(self.columns);
        let parts = self.sums.chunks_exact(stride * self.rank).take(self.parts.len());
        for (part, sums) in parts.enumerate() {
            for (to, sums) in to.chunks_exact_mut(self.columns).zip(sums.chunks_exact(stride)) {
                if part == 0 {
                    to.copy_from_slice(&sums[..self.columns]);
                } else {
                    to.iter_mut().zip(sums).for_each(|(to, x)| *to += x);
                }
            }
        }
    }
}

/// The parts of `h` for the gradient of a factor of this type.
fn parts_for(factor: DType) -> &'static [usize] {
    if factor == DType::F32 { &[0, 1, 2] } else { &[0, 1] }
}

/// What [`gradients`] leaves.
pub(crate) struct Gradients<'a> {
    /// `e·A`, if that is wanted.
    pub(crate) update: Option<Update<'a>>,
    /// `eᵀ·x [rank, inputs]`
    pub(crate) a: Option<Vec<f32>>,
    /// `gᵀ·h [outputs, rank]`
    pub(crate) b: Option<Vec<f32>>,
}

/// With `e = scaling·g·Bᵀ`, for `A [rank, inputs]`, `B [rank, outputs]`, bf16 `x [n, inputs]` and `g [n, outputs]`, and the saved
/// `h [n, rank]` in f32: the update of x's gradient, if that is wanted, and the gradients of A and B, each for a factor of the
/// type that is given. A sum over rows is made of partial sums in an order that the shape decides.
pub(crate) fn gradients<'a>(
    [x, g]: [&Matrix; 2],
    h: &[f32],
    (a, b): (&'a Expansion, &Contraction),
    scaling: f32,
    (wants_x, of_a, of_b): (bool, Option<DType>, Option<DType>),
) -> Gradients<'a> {
    struct Task<'a> {
        first: usize,
        h: &'a [f32],
        e: &'a mut [f32],
        left: &'a mut [bf16],
        da: &'a mut [f32],
        db: &'a mut [f32],
    }

    let (n, rank, steps, outputs) = (x.rows, a.rank, a.steps(), b.columns);
    let (size, block) = (task_rows(n), BLOCK / a.columns.max(b.columns));
    let block = (block - block % UNIT).max(UNIT);
    let count = n.div_ceil(size);
    let [a_size, b_size] = [(of_a, a.columns), (of_b, b.columns)]
        .map(|(of, columns)| if of.is_some() { rank * columns } else { 0 });
    let (mut e, mut left) = (vec![0f32; n * rank], vec![bf16::ZERO; if wants_x { n * steps } else { 0 }]);
    let mut sums = vec![0f32; count * (a_size + b_size)];
    let (mut free, mut free_left) = (sums.as_mut_slice(), left.as_mut_slice());
    let mut tasks = Vec::with_capacity(count);
    for (i, (e, h)) in e.chunks_mut(size * rank).zip(h.chunks(size * rank)).enumerate() {
        let rows = if wants_x { h.len() / rank } else { 0 };
        tasks.push(Task {
            first: i * size,
            h,
            e,
            left: free_left.split_off_mut(..rows * steps).unwrap_or_default(),
            da: free.split_off_mut(..a_size).unwrap_or_default(),
            db: free.split_off_mut(..b_size).unwrap_or_default(),
        });
    }
    let work = n * rank * (a.columns + b.columns);
    spread(tasks, work >= PARALLEL, |scratch: &mut Scratch, task| {
        let Scratch { sums, turned, parts, right, of_a: a_sums, of_b: b_sums } = scratch;
        let outer = |of: Option<DType>, columns, sums| {
            of.map(|of| Outer { rank, columns, parts: parts_for(of), sums })
        };
        let (mut outer_a, mut outer_b) = (outer(of_a, a.columns, a_sums), outer(of_b, b.columns, b_sums));
        for (i, (e, h)) in task.e.chunks_mut(block * rank).zip(task.h.chunks(block * rank)).enumerate() {
            let [x, g] = [x, g].map(|rows| rows.some_rows(task.first + i * block, h.len() / rank));
            if let Some(outer) = &mut outer_b {
                outer.add(h, &g, i > 0, (turned, parts, right));
            }
            if wants_x || of_a.is_some() {
                b.contract(&g, scaling, sums, e);
            }
            if let Some(outer) = &mut outer_a {
                outer.add(e, &x, i > 0, (turned, parts, right));
            }
        }
        if wants_x {
            a.lay(task.e, parts, task.left);
        }
        for (outer, to) in [(outer_a, task.da), (outer_b, task.db)] {
            if let Some(outer) = outer {
                outer.total(to);
            }
        }
    });
    let total = |of: Option<DType>, skip: usize, size: usize| {
        of.map(|_| {
            let mut total = vec![0f32; size];
            for partial in sums.chunks_exact(a_size + b_size) {
                total.iter_mut().zip(&partial[skip..]).for_each(|(total, x)| *total += x);
            }
            total
        })
    };
    let turned = |b: Vec<f32>| {
        let mut turned = vec![0f32; b.len()];
        gemm::transpose(&b, outputs, [rank, outputs], &mut turned);
        turned
    };
    Gradients {
        a: total(of_a, 0, a_size),
        b: total(of_b, a_size, b_size).map(turned),
        update: wants_x.then_some(Update { factor: a, left }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    #![expect(clippy::float_cmp, reason = "exact sums")]
    #![expect(clippy::cast_precision_loss, reason = "small integers")]

    use super::*;

    fn parts(x: f32, count: usize) -> f64 {
        let mut parts = Vec::new();
        (0..count).for_each(|part| split(&[x; 17], part, &mut parts));
        assert_eq!(parts.len(), 17 * count);
        (0..count).map(|part| f64::from(parts[17 * part + 16].to_f32())).sum()
    }

    /// Numbers of all bits between −1 and 1, and these in bf16.
    fn numbers(count: usize, seed: u32) -> (Vec<f32>, Vec<bf16>) {
        let number = |i: u32| {
            let bits = (i + seed).wrapping_mul(0x9E37_79B9);
            ((bits ^ bits >> 15).wrapping_mul(0x85EB_CA6B) >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let wide: Vec<f32> = (0..u32::try_from(count).unwrap()).map(number).collect();
        let narrow = wide.iter().map(|&x| bf16::from_f32(x)).collect();
        (wide, narrow)
    }

    /// Whether `got [m, n]` is `left [m, k] · right [k, n]` within a part of the sums of the terms' magnitudes.
    fn check(what: &str, got: &[f32], dims: [usize; 3], part: f64, at: impl Fn(usize, usize, usize) -> f64) {
        let [m, k, n] = dims;
        assert_eq!(got.len(), m * n, "{what}");
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let (sum, size) = (0..k)
                .map(|l| at(i, l, j))
                .fold((0.0, 0.0), |(sum, size): (f64, f64), x| (sum + x, size + x.abs()));
            let error = (f64::from(got[i * n + j]) - sum).abs();
            assert!(error <= part * size, "{what} {dims:?} {i} {j}: {error:e} of {size:e}");
        }
    }

    /// Every product against float64: as f32 computes it where it is said to be exact, else within 2⁻¹⁵ of the terms. Few
    /// terms, where no part can be missed, and several tasks, blocks of columns and of rows.
    #[test]
    fn products_in_parts_are_those_of_f32() {
        const EXACT: f64 = 1.0 / 2_097_152.0;
        const CLOSE: f64 = 1.0 / 32_768.0;
        if !gemm::multiplies_pairs() {
            println!("skipped: this processor, or the cap, has no products of bf16 pairs");
            return;
        }
        for [n, rank, inputs, outputs] in [[7, 5, 6, 200], [5, 40, 33, 3], [300, 3, 9000, 70]] {
            let (x, g) = (numbers(n * inputs, 1).1, numbers(n * outputs, 2).1);
            let h = numbers(n * rank, 3).0;
            let (a, b) = (numbers(rank * inputs, 4), numbers(rank * outputs, 5));
            let rows = |data, columns: usize| Matrix::new(data, 0, [n, columns], [columns, 1]).unwrap();
            let (x_rows, g_rows) = (rows(Data::BF16(&x), inputs), rows(Data::BF16(&g), outputs));
            for short in [false, true] {
                let factor = |(wide, narrow): &(Vec<f32>, Vec<bf16>), at: usize| {
                    f64::from(if short { narrow[at].to_f32() } else { wide[at] })
                };
                let data = |factor: &'static str| match (factor, short) {
                    ("a", false) => Data::F32(&a.0),
                    ("a", true) => Data::BF16(&a.1),
                    (_, false) => Data::F32(&b.0),
                    (_, true) => Data::BF16(&b.1),
                };
                let a_rows = Matrix::new(data("a"), 0, [rank, inputs], [inputs, 1]).unwrap();
                let b_rows = Matrix::new(data("b"), 0, [rank, outputs], [outputs, 1]).unwrap();
                let exact = |terms: usize| EXACT * (1.0 + terms as f64 / 32.0);
                let (contraction, expansion) =
                    (Contraction::new(a_rows).unwrap(), Expansion::new(b_rows, DType::BF16));

                let (got, update) = contract(&x_rows, &contraction, 2.0, &expansion);
                check("h", &got, [n, inputs, rank], exact(inputs), |i, l, j| {
                    2.0 * f64::from(x[i * inputs + l].to_f32()) * factor(&a, j * inputs + l)
                });
                let y = |update: &Update, columns| {
                    gemm::sum_of_products::<f32>(
                        [n, columns],
                        gemm::Start::Zero,
                        &[update.product().unwrap()],
                    )
                };
                check("y", &y(&update, outputs), [n, rank, outputs], CLOSE, |i, l, j| {
                    f64::from(got[i * rank + l]) * factor(&b, l * outputs + j)
                });

                let whole = Expansion::new(b_rows, DType::F32);
                check(
                    "y in f32",
                    &y(&Update::of(&got, &whole), outputs),
                    [n, rank, outputs],
                    EXACT,
                    |i, l, j| f64::from(got[i * rank + l]) * factor(&b, l * outputs + j),
                );

                let dtype = if short { DType::BF16 } else { DType::F32 };
                let (expansion, contraction) =
                    (Expansion::new(a_rows, DType::BF16), Contraction::new(b_rows).unwrap());
                let wanted = (true, Some(dtype), Some(dtype));
                let gradients = gradients([&x_rows, &g_rows], &h, (&expansion, &contraction), 0.5, wanted);
                let part = if short { CLOSE } else { exact(n) };
                check("db", &gradients.b.unwrap(), [outputs, n, rank], part, |i, l, j| {
                    f64::from(g[l * outputs + i].to_f32()) * f64::from(h[l * rank + j])
                });
                let (e, _) = contract(&g_rows, &contraction, 0.5, &expansion);
                check("da", &gradients.a.unwrap(), [rank, n, inputs], part, |i, l, j| {
                    f64::from(e[l * rank + i]) * f64::from(x[l * inputs + j].to_f32())
                });
                check("dx", &y(&gradients.update.unwrap(), inputs), [n, rank, inputs], CLOSE, |i, l, j| {
                    f64::from(e[i * rank + l]) * factor(&a, l * inputs + j)
                });
            }
        }
    }

    #[test]
    fn three_parts_are_the_number_and_two_are_close() {
        let odd = [1.0, -0.1, 1.0 / 3.0, 16_777_215.0, 3.0e38, -1.234_567_9e-20, 0.0, f32::INFINITY];
        for x in odd
            .into_iter()
            .chain((1..2000u32).map(|i| f32::from_bits(i.wrapping_mul(0x0021_2345) % 0x7F00_0000)))
        {
            if x.abs() < 1e-30 && x != 0.0 {
                // The last part would be subnormal.
                continue;
            }
            assert_eq!(parts(x, 3), f64::from(x), "{x:e}");
            let two = parts(x, 2);
            assert!(
                two == f64::from(x) || (two - f64::from(x)).abs() <= f64::from(x).abs() / 65_536.0,
                "{x:e} {two:e}"
            );
        }
        assert!(parts(f32::NAN, 3).is_nan());
        assert_eq!(parts(f32::MAX, 3), f64::INFINITY);
    }
}
