//! LoRA beside bf16 rows on a processor's matrix unit: the products of [`low_rank`](super::low_rank) in pairs of bf16.
//!
//! Rows and gradients are multiplied as they are stored. What is f32 is the sum of parts in bf16: a float's 24 bits are three
//! times bf16's eight, so that three parts are the float itself, and its products with bf16 are exact (but for what is
//! subnormal, which the unit takes for zero, and for infinity, which times a part that is 0 is NaN). Factors of f32 are
//! split so, and `h` and `e` for the gradient of such a factor. Two parts, which are a float within 2⁻¹⁶ of it, serve what
//! is rounded to bf16 afterwards: the update of `y` or `dx`, and the gradient of a bf16 factor. Of an f32 result the update is
//! the six products of parts that it can tell.
//!
//! The update is a term of the base's sum ([`Update`]).

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::ptr;

use candle_core::{DType, Result, bail};
use half::bf16;

use super::dispatch::{self, Vectorised};
use super::gemm::{self, Data, Matrix, PARALLEL, Product, Right, Start};
use super::lanes::{LANES, Lanes};
use super::rows::{load_part, store_part};
use super::spread::spread;

/// Rows, columns and steps of what the matrix unit multiplies at once.
const UNIT: usize = 32;
/// The fewest rows of a task, and the most tasks.
const TASK_ROWS: usize = 128;
const TASKS: usize = 16;
/// The most blocks whose rows become columns.
const TURNED: usize = 4;

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

/// A part of each number.
fn split(from: &[f32], part: usize, to: &mut [bf16]) {
    // SAFETY: the same memory, in which bf16 are written, and nothing else.
    let to = unsafe { &mut *(ptr::from_mut(to) as *mut [MaybeUninit<bf16>]) };
    dispatch::vectorise(dispatch::isa(), Split { from, part, to });
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
    let rows = in_rows(factor);
    let mut below = vec![bf16::ZERO; parts.len() * rows.len()];
    for (to, &part) in below.chunks_exact_mut(rows.len()).zip(parts) {
        split(&rows, part, to);
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

    /// `scaling · rows·factorᵀ [n, rank]`, of bf16 rows.
    pub(crate) fn contract(&self, rows: &Matrix, scaling: f32) -> Vec<f32> {
        let (n, rank) = (rows.rows, self.rank);
        let (mut h, size) = (vec![0f32; n * rank], task_rows(n));
        let tasks = h.chunks_mut(size * rank).enumerate().collect();
        let work = n * rank * self.columns;
        spread(tasks, work >= PARALLEL, |sums: &mut Vec<f32>, (i, h): (usize, &mut [f32])| {
            self.contract_some(&rows.some_rows(i * size, size), scaling, sums, h);
        });
        h
    }

    /// [`Self::contract`] on this thread, by way of sums for each part.
    fn contract_some(&self, rows: &Matrix, scaling: f32, sums: &mut Vec<f32>, h: &mut [f32]) {
        let stride = gemm::whole(self.parts.columns());
        let sums = gemm::room(sums, rows.rows * stride);
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
        parts.resize(h.len(), bf16::ZERO);
        for (slot, &part) in self.parts.iter().enumerate() {
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

/// The rows of a task.
fn task_rows(n: usize) -> usize {
    n.div_ceil(TASKS).max(TASK_ROWS).next_multiple_of(UNIT)
}

/// `hᵀ·rows [rank, columns]`, for the `h [n, rank]` of bf16 rows, as exact as the gradient of a factor of this type has to be.
pub(crate) fn outer(h: &[f32], rank: usize, rows: &Matrix, factor: DType) -> Result<Vec<f32>> {
    let parts: &[usize] = if factor == DType::F32 { &[0, 1, 2] } else { &[0, 1] };
    let (n, columns, height) = (rows.rows, rows.columns, parts.len() * rank);
    // Blocks of h in columns, the parts below each other.
    let size = n.div_ceil(TURNED).max(TASK_ROWS).next_multiple_of(UNIT);
    let mut turned = vec![bf16::ZERO; n * height];
    let tasks = h.chunks(size * rank).zip(turned.chunks_mut(size * height)).collect();
    let work = n * height * columns;
    spread(tasks, work >= PARALLEL, |block: &mut Vec<f32>, (h, turned): (&[f32], &mut [bf16])| {
        let count = h.len() / rank;
        let block = gemm::room(block, h.len());
        gemm::transpose(h, rank, [count, rank], block);
        for (to, &part) in turned.chunks_exact_mut(h.len()).zip(parts) {
            split(block, part, to);
        }
    });
    let products = turned.chunks(size * height).enumerate().map(|(i, turned)| {
        let (right, count) = (rows.some_rows(i * size, size), turned.len() / height);
        Ok(Product { left: matrix(turned, [height, count], count)?, right })
    });
    let products = products.collect::<Result<Vec<_>>>()?;
    let mut sums = gemm::sum_of_products::<f32>([height, columns], Start::Zero, &products);
    let (total, others) = sums.split_at_mut(rank * columns);
    for part in others.chunks_exact(rank * columns) {
        total.iter_mut().zip(part).for_each(|(total, x)| *total += x);
    }
    sums.truncate(rank * columns);
    Ok(sums)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    #![expect(clippy::float_cmp, reason = "exact sums")]
    #![expect(clippy::cast_precision_loss, reason = "small integers")]

    use super::*;

    fn parts(x: f32, count: usize) -> f64 {
        let mut parts = vec![bf16::NAN; 17 * count];
        parts.chunks_exact_mut(17).enumerate().for_each(|(part, to)| split(&[x; 17], part, to));
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

                let got = contraction.contract(&x_rows, 2.0);
                let update = Update::of(&got, &expansion);
                check("h", &got, [n, inputs, rank], exact(inputs), |i, l, j| {
                    2.0 * f64::from(x[i * inputs + l].to_f32()) * factor(&a, j * inputs + l)
                });
                let y = |update: &Update, columns| {
                    gemm::sum_of_products::<f32>([n, columns], Start::Zero, &[update.product().unwrap()])
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
                let e = contraction.contract(&g_rows, 0.5);
                let part = if short { CLOSE } else { exact(n) };
                check(
                    "db",
                    &outer(&h, rank, &g_rows, dtype).unwrap(),
                    [rank, n, outputs],
                    part,
                    |i, l, j| f64::from(h[l * rank + i]) * f64::from(g[l * outputs + j].to_f32()),
                );
                check("da", &outer(&e, rank, &x_rows, dtype).unwrap(), [rank, n, inputs], part, |i, l, j| {
                    f64::from(e[l * rank + i]) * f64::from(x[l * inputs + j].to_f32())
                });
                let update = Update::of(&e, &expansion);
                check("dx", &y(&update, inputs), [n, rank, inputs], CLOSE, |i, l, j| {
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
