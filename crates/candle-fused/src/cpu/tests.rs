//! Every row loop with every instruction set, dtype and length, between pages that nobody may touch: nothing else is
//! read or written, all of an output is written, and every instruction set computes the same.

#![allow(clippy::unwrap_used, reason = "tests")]
#![expect(clippy::cast_precision_loss, reason = "small integers")]
#![expect(clippy::float_cmp, clippy::cast_possible_truncation, reason = "exact results")]
#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use std::mem::MaybeUninit;

use candlewick_kernels::gated::Gate;
use half::{bf16, f16};

use super::dispatch::{Isa, Vectorised, instruction_sets, vectorise};
use super::gemm::Matrix;
use super::guarded::Guarded;
use super::lanes::{Element, Lanes, Piece};
use super::low_rank::{Backward, Block, Delta, Inner, Rows};
use super::mask::{Mask, Masked};
use super::rows::{self, In, Out, Row, RowLoop};
use super::{cross_entropy, elements, gated, norm, rope, softmax};
use crate::ops::dropout::Dropout;

const LENGTHS: std::ops::RangeInclusive<usize> = 0..=130;

/// Positive and not in order: fit for a root too.
fn value(i: usize, seed: usize) -> f64 {
    ((i * 7 + seed * 13) % 23) as f64 / 8.0 + 0.125
}

/// One row of length `len` through a loop.
struct One<'a, R, T, const N: usize, const M: usize, const P: usize> {
    row: &'a R,
    inputs: &'a [Guarded<T>; N],
    outputs: &'a mut [Guarded<MaybeUninit<T>>; M],
    sums: &'a mut [Guarded<f32>; P],
    scratch: &'a mut [f32],
    wanted: bool,
    stream: bool,
}

impl<R: RowLoop<N, M, P>, T: Element, const N: usize, const M: usize, const P: usize> Vectorised
    for One<'_, R, T, N, M, P>
{
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let row = Row {
            index: 0,
            inputs: self.inputs.each_ref().map(|input| In::new(input.get(), size_of_val(input.get()))),
            outputs: self.outputs.each_mut().map(|out| Some(Out::new(out.get_mut(), self.stream))),
            sums: self.sums.each_mut().map(|sum| self.wanted.then(|| sum.get_mut())),
            scratch: self.scratch,
        };
        self.row.row::<L, T>(row);
        L::fence();
    }
}

/// A value that no loop writes.
fn untouched<T: Element>() -> T {
    T::from_f64(-24576.0)
}

fn check<T: Element, R: RowLoop<N, M, P>, const N: usize, const M: usize, const P: usize>(
    what: &str,
    len: usize,
    row: &R,
    precision: f64,
) {
    let inputs: [Guarded<T>; N] = std::array::from_fn(|k| {
        Guarded::new(&(0..len).map(|i| T::from_f64(value(i, k))).collect::<Vec<T>>())
    });
    let mut first: Option<Vec<f64>> = None;
    for isa in instruction_sets() {
        for (wanted, stream) in [(true, false), (false, true)] {
            let empty = vec![MaybeUninit::new(untouched::<T>()); len];
            let mut outputs: [Guarded<MaybeUninit<T>>; M] = std::array::from_fn(|_| Guarded::new(&empty));
            let mut sums: [Guarded<f32>; P] = std::array::from_fn(|_| Guarded::new(&vec![1f32; len]));
            let mut scratch = vec![0f32; len];
            let (outputs, sums) = (&mut outputs, &mut sums);
            let one = One { row, inputs: &inputs, outputs, sums, scratch: &mut scratch, wanted, stream };
            vectorise(isa, one);
            let outputs: Vec<f64> = outputs
                .iter()
                // SAFETY: initialised above.
                .flat_map(|out| out.get().iter().map(|x| unsafe { x.assume_init() }.to_f64()))
                .collect();
            assert!(
                outputs.iter().all(|&x| x != untouched::<T>().to_f64()),
                "{what} {isa:?} {len}: not all written"
            );
            let sums: Vec<f64> =
                sums.iter().flat_map(|sum| sum.get().iter().map(|&x| f64::from(x))).collect();
            if !wanted {
                assert!(sums.iter().all(|&x| x == 1.0), "{what} {isa:?} {len}: a sum that nobody wants");
            }
            let results: Vec<f64> = if wanted { outputs.into_iter().chain(sums).collect() } else { outputs };
            let expected = first.get_or_insert_with(|| results.clone());
            let largest = expected.iter().fold(1e-6f64, |a, b| a.max(b.abs()));
            for (got, expected) in results.iter().zip(expected.iter()) {
                let close = (got - expected).abs() <= precision * largest;
                assert!(
                    close || got.is_nan() && expected.is_nan(),
                    "{what} {isa:?} {len}: {got}, {expected}"
                );
            }
        }
    }
}

/// The same in every dtype.
macro_rules! check {
    ($len:ident, $row:expr) => {
        let row = &$row;
        check::<f32, _, _, _, _>(stringify!($row), $len, row, 4e-6);
        check::<f16, _, _, _, _>(stringify!($row), $len, row, 2e-3);
        check::<bf16, _, _, _, _>(stringify!($row), $len, row, 1.6e-2);
    };
}

#[test]
fn softmax_stays_within_its_rows() {
    for len in LENGTHS {
        let visible = softmax::Visible { queries: 0 };
        check!(len, softmax::Forward { scale: 0.5, visible });
        check!(len, softmax::Backward { scale: 0.5, visible });
        if len > 0 {
            // The first of a few queries: the last keys are hidden.
            let visible = softmax::Visible { queries: len.min(3) };
            check!(len, softmax::Forward { scale: 0.5, visible });
            check!(len, softmax::Backward { scale: 0.5, visible });
        }
        let mut row = Guarded::new(&vec![0.5f32; len]);
        let factor = softmax::exponentials_in_place::<f32>(1.0, row.get_mut());
        assert!((factor * len as f32 - 1.0).abs() < 1e-6 || len == 0);
        assert!(row.get().iter().all(|&x| x == 1.0));
        let mut dx = Guarded::new(&vec![7f32; len]);
        softmax::backward_in_place(1.0, factor, row.get_mut(), dx.get_mut());
        assert!(row.get().iter().all(|x| (x - factor).abs() < 1e-9));
        assert!(dx.get().iter().all(|x| x.abs() < 1e-5));
    }
}

#[test]
fn norms_stay_within_their_rows() {
    for len in LENGTHS.skip(1) {
        let weight: Vec<f32> = (0..len).map(|i| 0.5 + i as f32 / 64.0).collect();
        let (weight, bias) = (Guarded::new(&weight), Guarded::new(&weight));
        for centred in [false, true] {
            for weight in [None, Some(weight.get())] {
                for bias in [None, Some(bias.get())] {
                    check!(len, norm::Forward { centred, eps: 1e-5, weight, bias });
                }
                // A great eps: the gradient of a short row is not all cancellation.
                check!(len, norm::Backward { centred, eps: 1.0, weight });
            }
        }
    }
}

#[test]
fn gates_sums_and_steps_stay_within_their_rows() {
    for len in LENGTHS {
        for gate in [Gate::Silu, Gate::Gelu] {
            check!(len, gated::Forward(gate));
            check!(len, gated::Backward(gate));
        }
        check!(len, elements::Add);
        check!(len, Masked(&Mask::new(Dropout { p: 0.25, seed: 3 }, len)));
        let adam = elements::Adam(candlewick_kernels::adam::Adam {
            elements: 0,
            new1: 0.1,
            old2: 0.99,
            new2: 0.01,
            eps: 1e-3,
            rate: 0.1,
            part: 1.5,
            shrink: 0.9,
            l2: 0.1,
        });
        check!(len, adam);
    }
}

#[test]
fn rotations_stay_within_their_rows() {
    for len in LENGTHS {
        for width in [0, 1, len / 4, len / 2] {
            if 2 * width > len {
                continue;
            }
            for (interleaved, back) in [(false, false), (false, true), (true, false), (true, true)] {
                let width = if interleaved { 2 * width } else { width };
                let table =
                    |seed| Guarded::new(&(0..width).map(|i| value(i, seed) as f32).collect::<Vec<f32>>());
                let (cos, sin) = (table(3), table(5));
                let (cos, sin) = (cos.get(), sin.get());
                let (per_batch, heads, positions) = (false, 1, 1);
                check!(
                    len,
                    rope::Rotation { cos, sin, width, interleaved, per_batch, heads, positions, back }
                );
            }
        }
    }
}

#[test]
fn cross_entropies_stay_within_their_rows() {
    for len in LENGTHS.skip(1).chain([4095, 4096, 4097, 8195]) {
        for columns in [[None], [Some(len - 1)], [Some(0)]] {
            let columns = &columns;
            check!(len, cross_entropy::Forward { columns });
            for least in [0.0, -1e3] {
                check!(len, cross_entropy::Backward { columns, lse: &[[3.0, len as f32, least]], g: 0.5 });
            }
        }
    }
}

/// The extremes of rows of every sign, with and without NaN.
#[test]
fn extremes_are_those_of_the_numbers() {
    struct Extremes<'a, T>(&'a [T]);
    impl<T: Element> Vectorised for Extremes<'_, T> {
        type Output = [f32; 2];

        #[inline(always)]
        fn run<L: Lanes>(self) -> [f32; 2] {
            rows::extremes::<L, T>(self.0)
        }
    }
    fn check<T: Element>(isa: Isa, x: &[f64]) {
        let row: Vec<T> = x.iter().map(|&x| T::from_f64(x)).collect();
        let wide = || row.iter().map(|x| x.to_f64() as f32);
        let expected = [wide().fold(f32::INFINITY, f32::min), wide().fold(f32::NEG_INFINITY, f32::max)];
        assert_eq!(vectorise(isa, Extremes(&row)), expected, "{isa:?} {} {x:?}", T::DTYPE.as_str());
    }
    for isa in instruction_sets() {
        for len in [0, 1, 15, 16, 17, 31, 33, 64, 100] {
            for (factor, offset) in
                [(1.0, 0.0), (1.0, 5.0), (-1.0, -1.0), (1.0, -1.5), (0.0, 0.0), (-0.0, -0.0)]
            {
                let mut x: Vec<f64> = (0..len).map(|i| value(i, 4) * factor + offset).collect();
                for odd in [1.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, -f64::NAN] {
                    if let Some(last) = x.last_mut() {
                        *last *= odd;
                    }
                    check::<f32>(isa, &x);
                    check::<f16>(isa, &x);
                    check::<bf16>(isa, &x);
                    if let Some(last) = x.last_mut() {
                        *last = odd;
                    }
                    check::<f32>(isa, &x);
                    check::<f16>(isa, &x);
                    check::<bf16>(isa, &x);
                    if let Some(last) = x.last_mut() {
                        *last = factor;
                    }
                }
            }
        }
    }
}

/// What lies far below the greatest element, however far, has the exponential that it has.
#[test]
fn far_elements_vanish() {
    /// Softmax of a row, and its cross-entropy with its gradient.
    struct All<'a, T>(&'a [T], f32, [&'a mut [MaybeUninit<T>]; 2]);
    impl<T: Element> Vectorised for All<'_, T> {
        type Output = f32;

        #[inline(always)]
        fn run<L: Lanes>(self) -> f32 {
            let Self(x, scale, [y, dx]) = self;
            let (visible, columns) = (softmax::Visible { queries: 0 }, &[Some(1)]);
            let mut scratch = vec![0.0; x.len()];
            let inputs = [In::new(x, 0)];
            let row = Row {
                index: 0,
                inputs,
                outputs: [Some(Out::new(y, false))],
                sums: [],
                scratch: &mut scratch,
            };
            softmax::Forward { scale, visible }.row::<L, T>(row);
            let row = Row { index: 0, inputs, outputs: [], sums: [], scratch: Default::default() };
            let (lse, loss) = cross_entropy::Forward { columns }.row::<L, T>(row);
            let outputs = [Some(Out::new(dx, false))];
            let row = Row { index: 0, inputs, outputs, sums: [], scratch: Default::default() };
            cross_entropy::Backward { columns, lse: &[lse], g: 1.0 }.row::<L, T>(row);
            loss
        }
    }
    fn check<T: Element>(isa: Isa, x: &[f64], scale: f32, precision: f64) {
        let row: Vec<T> = x.iter().map(|&x| T::from_f64(x)).collect();
        let empty = vec![MaybeUninit::new(T::zero()); x.len()];
        let (mut y, mut dx) = (empty.clone(), empty);
        let loss = vectorise(isa, All(&row, scale, [&mut y, &mut dx]));
        let shares = |scale: f64| {
            let scaled = row.iter().map(|x| x.to_f64() * scale);
            let greatest = scaled.clone().fold(f64::NEG_INFINITY, f64::max);
            let all: Vec<f64> = scaled.map(|x| (x - greatest).exp()).collect();
            let total: f64 = all.iter().sum();
            all.into_iter().map(|e| e / total).collect::<Vec<f64>>()
        };
        let (soft, plain) = (shares(f64::from(scale)), shares(1.0));
        // Below the normal numbers there are fewer digits.
        let least = if T::DTYPE == candle_core::DType::F16 { 6.2e-5 } else { 1e-37 };
        for i in 0..x.len() {
            // SAFETY: initialised above.
            let [got, slope] = [&y, &dx].map(|row| unsafe { row[i].assume_init() }.to_f64());
            let expected = plain[i] - if i == 1 { 1.0 } else { 0.0 };
            for (what, got, expected) in [("y", got, soft[i]), ("dx", slope, expected)] {
                let near = (got - expected).abs() <= precision * expected.abs().max(least);
                assert!(near, "{isa:?} {} {what} {i}: {got}, expected {expected}", T::DTYPE.as_str());
            }
            assert!(row[i].to_f64().is_finite() || got == 0.0 && slope == 0.0, "{isa:?} {i}: {got} {slope}");
        }
        let expected = -plain[1].ln();
        let close = (f64::from(loss) - expected).abs() <= 1e-4 * expected.abs().max(1.0);
        assert!(close, "{isa:?} {} loss {loss}, expected {expected}", T::DTYPE.as_str());
    }
    for isa in instruction_sets() {
        // As near as can be, and so great that a product must be rounded before the greatest is taken from it.
        check::<f32>(isa, &[1e30; 77], 0.3, 1e-5);
        check::<bf16>(isa, &[1e30; 77], 0.3, 1e-2);
        for (far, scale) in [(50.0, 1.0), (80.0, -1.0), (300.0, 1.0), (300.0, -0.5), (6e4, 1.0), (6e4, 0.01)]
        {
            let mut x: Vec<f64> = (0..77).map(|i| value(i, 2) * far / 3.0 - far / 2.0).collect();
            x[1] = far / 2.0 - 8.0;
            // Products of some hundreds are rounded to a part of 2⁻¹⁶ of one.
            check::<f32>(isa, &x, scale, 1e-4);
            check::<f16>(isa, &x, scale, 2e-3);
            check::<bf16>(isa, &x, scale, 1e-2);
            if scale > 0.0 {
                x[64] = f64::NEG_INFINITY;
                check::<f32>(isa, &x, scale, 1e-4);
                check::<f16>(isa, &x, scale, 2e-3);
                check::<bf16>(isa, &x, scale, 1e-2);
            }
        }
    }
}

/// The log-sum-exp of a row in parts, with its greatest element in each of them, and with parts of `-inf` alone.
#[test]
fn long_rows_are_summed_in_parts() {
    struct Loss<'a>(&'a [f32]);
    impl Vectorised for Loss<'_> {
        type Output = cross_entropy::Loss;

        #[inline(always)]
        fn run<L: Lanes>(self) -> cross_entropy::Loss {
            let row = Row {
                index: 0,
                inputs: [In::new(self.0, 4096)],
                outputs: [],
                sums: [],
                scratch: Default::default(),
            };
            cross_entropy::Forward { columns: &[Some(0)] }.row::<L, f32>(row)
        }
    }
    for isa in instruction_sets() {
        for greatest in [0, 5000, 9999] {
            let mut x: Vec<f32> = (0..10_000).map(|i| (i % 100) as f32 / 50.0).collect();
            x[greatest] = 9.0;
            let check = |x: &[f32]| {
                let ([max, total, least], _) = vectorise(isa, Loss(x));
                assert_eq!(least, x.iter().copied().fold(f32::INFINITY, f32::min), "{isa:?}");
                let exact = x.iter().map(|&x| f64::from(x - max).exp()).sum::<f64>();
                assert_eq!(max, 9.0);
                assert!(
                    (f64::from(total) / exact - 1.0).abs() < 1e-5,
                    "{isa:?} {greatest}: {total}, {exact}"
                );
            };
            check(&x);
            if greatest == 5000 {
                x[..4096].fill(f32::NEG_INFINITY);
                check(&x);
                x[17] = f32::NAN;
                assert!(vectorise(isa, Loss(&x)).0[1].is_nan());
            }
        }
    }
}

#[test]
fn sums_take_every_element_once() {
    struct Sums<'a>(&'a [f32]);
    impl Vectorised for Sums<'_> {
        type Output = [f32; 5];

        #[inline(always)]
        fn run<L: Lanes>(self) -> [f32; 5] {
            let [a, b] = rows::sums::<4, L, f32, 2, 1, 2>([self.0; 2], [self.0], |[a, b], [x, y], [w]| {
                [a + x, b + (x + y - w)]
            });
            let [least, greatest] = rows::extremes::<L, f32>(self.0);
            let mut twice = vec![0.0; self.0.len()];
            let total = rows::map_total(self.0, &mut twice, |x: L| x + x);
            assert!(self.0.iter().zip(twice).all(|(x, y)| x + x == y));
            [a, b, total, least, greatest]
        }
    }
    for isa in instruction_sets() {
        for n in LENGTHS.chain([1000]) {
            let row: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let row = Guarded::new(&row);
            let sum = (0..n).sum::<usize>() as f32;
            let [least, greatest] =
                if n == 0 { [f32::INFINITY, f32::NEG_INFINITY] } else { [0.0, (n - 1) as f32] };
            let got = vectorise(isa, Sums(row.get()));
            assert_eq!(got, [sum, sum, 2.0 * sum, least, greatest], "{isa:?} {n}");
        }
    }
}

/// The panels of rows of so many elements.
fn panels(rows: &[f32], columns: usize) -> Guarded<Piece<f32>> {
    Guarded::new(&Matrix::of_rows(rows, [rows.len() / columns, columns]).unwrap().panels())
}

/// Low-rank products of every number of rows and ranks around the tiles, in every dtype, against f64.
#[test]
fn low_rank_products_stay_within_their_matrices() {
    fn check<T: Element>(isa: Isa, [count, inputs, outputs, rank]: [usize; 4]) {
        let stride = inputs + 3;
        let x: Vec<T> = (0..(count - 1) * stride + inputs).map(|i| T::from_f64(value(i, 1) - 1.5)).collect();
        let part = |len: usize, seed| -> Vec<f32> { (0..len).map(|i| value(i, seed) as f32 - 1.5).collect() };
        let (a, b) = (part(rank * inputs, 2), part(rank * outputs, 3));
        let (x, a, b) = (Guarded::new(&x), Guarded::new(&a), Guarded::new(&b));
        let [a_panels, b_panels] = [panels(a.get(), inputs), panels(b.get(), outputs)];
        let delta = Delta { a: a_panels.get(), b: b_panels.get(), rank, inputs, outputs, scaling: 0.5 };
        let mut h = Guarded::new(&vec![0f32; count * rank]);
        let mut y = Guarded::new(&vec![MaybeUninit::new(untouched::<T>()); count * outputs]);
        let inner = Inner { delta, x: Rows { data: x.get(), stride }, h: h.get_mut() };
        vectorise(isa, Block { inner, y: y.get_mut() });
        let exact = |i: usize, k: usize| {
            let dot =
                (0..inputs).map(|j| x.get()[i * stride + j].to_f64() * f64::from(a.get()[k * inputs + j]));
            0.5 * dot.sum::<f64>()
        };
        let what = format!("{isa:?} {} {count} {inputs} {outputs} {rank}", T::DTYPE.as_str());
        let precision = if T::DTYPE == candle_core::DType::BF16 { 4e-3 } else { 5e-4 };
        for i in 0..count {
            let exact: Vec<f64> = (0..rank).map(|k| exact(i, k)).collect();
            for (k, exact) in exact.iter().enumerate() {
                assert!((f64::from(h.get()[i * rank + k]) - exact).abs() < 1e-4, "{what}: h[{i}, {k}]");
            }
            for j in 0..outputs {
                let exact: f64 = (0..rank).map(|k| exact[k] * f64::from(b.get()[k * outputs + j])).sum();
                // SAFETY: initialised above.
                let got = unsafe { y.get()[i * outputs + j].assume_init() }.to_f64();
                assert!(
                    (got - exact).abs() <= precision * exact.abs().max(1.0),
                    "{what}: y[{i}, {j}]: {got}, {exact}"
                );
            }
        }
    }
    for isa in instruction_sets() {
        for count in [1, 2, 3, 4, 5, 7, 11, 12, 13, 25] {
            for rank in [1, 2, 3, 8, 13] {
                for (inputs, outputs) in [(1, 1), (16, 33), (31, 16), (100, 15), (513, 64), (1040, 529)] {
                    check::<f32>(isa, [count, inputs, outputs, rank]);
                    check::<f16>(isa, [count, inputs, outputs, rank]);
                    check::<bf16>(isa, [count, inputs, outputs, rank]);
                }
            }
        }
    }
}

/// Their gradients, likewise.
#[test]
fn low_rank_gradients_stay_within_their_matrices() {
    fn check<T: Element, U: Element>(isa: Isa, [count, inputs, outputs, rank]: [usize; 4]) {
        let value = |i: usize, seed| value(i, seed) - 1.5;
        let part = |len: usize, seed| -> Vec<f32> { (0..len).map(|i| value(i, seed) as f32).collect() };
        let strides = [inputs + 3, outputs + 1];
        let x: Vec<U> = (0..(count - 1) * strides[0] + inputs).map(|i| U::from_f64(value(i, 1))).collect();
        let g: Vec<T> = (0..(count - 1) * strides[1] + outputs).map(|i| T::from_f64(value(i, 2))).collect();
        let (x, g) = (Guarded::new(&x), Guarded::new(&g));
        let (a, b) = (Guarded::new(&part(rank * inputs, 3)), Guarded::new(&part(rank * outputs, 4)));
        let h = Guarded::new(&part(count * rank, 5));
        let [a_panels, b_panels] = [panels(a.get(), inputs), panels(b.get(), outputs)];
        let delta = Delta { a: a_panels.get(), b: b_panels.get(), rank, inputs, outputs, scaling: 0.5 };
        let mut e = Guarded::new(&vec![0f32; count * rank]);
        let mut dx = Guarded::new(&vec![MaybeUninit::new(untouched::<T>()); count * inputs]);
        let mut da = Guarded::new(&vec![MaybeUninit::new(f32::NAN); rank * inputs]);
        let mut db = Guarded::new(&vec![MaybeUninit::new(f32::NAN); rank * outputs]);
        vectorise(
            isa,
            Backward {
                delta,
                x: Rows { data: x.get(), stride: strides[0] },
                gradient: Rows { data: g.get(), stride: strides[1] },
                h: h.get(),
                e: e.get_mut(),
                dx: Some(dx.get_mut()),
                da: Some(da.get_mut()),
                db: Some(db.get_mut()),
            },
        );
        let what = format!("{isa:?} {} {count} {inputs} {outputs} {rank}", T::DTYPE.as_str());
        let f = |x: f32| f64::from(x);
        let close = |name: &str, got: f64, exact: f64, precision: f64| {
            assert!(
                (got - exact).abs() <= precision * exact.abs().max(1.0),
                "{what}: {name}: {got}, {exact}"
            );
        };
        let g = |i: usize, j: usize| g.get()[i * strides[1] + j].to_f64();
        let x = |i: usize, j: usize| x.get()[i * strides[0] + j].to_f64();
        let exact: Vec<f64> = (0..count * rank)
            .map(|i| {
                let (row, k) = (i / rank, i % rank);
                0.5 * (0..outputs).map(|j| g(row, j) * f(b.get()[k * outputs + j])).sum::<f64>()
            })
            .collect();
        for (&got, &exact) in e.get().iter().zip(&exact) {
            close("e", f(got), exact, 1e-4);
        }
        let precision = if T::DTYPE == candle_core::DType::BF16 { 4e-3 } else { 5e-4 };
        for i in 0..count {
            for j in 0..inputs {
                let exact = (0..rank).map(|k| exact[i * rank + k] * f(a.get()[k * inputs + j])).sum();
                // SAFETY: initialised above.
                let got = unsafe { dx.get()[i * inputs + j].assume_init() }.to_f64();
                close("dx", got, exact, precision);
            }
        }
        // SAFETY: initialised above.
        let [da, db] = [&da, &db].map(|sums| unsafe { sums.get().assume_init_ref() });
        for k in 0..rank {
            for j in 0..inputs {
                let exact = (0..count).map(|i| exact[i * rank + k] * x(i, j)).sum::<f64>();
                close("da", f(da[k * inputs + j]), exact, 1e-4);
            }
            for j in 0..outputs {
                let exact = (0..count).map(|i| f(h.get()[i * rank + k]) * g(i, j)).sum::<f64>();
                close("db", f(db[k * outputs + j]), exact, 1e-4);
            }
        }
    }
    for isa in instruction_sets() {
        for count in [1, 2, 5, 11, 12, 13, 25] {
            for rank in [1, 2, 3, 4, 5, 8, 13] {
                for (inputs, outputs) in [(1, 1), (16, 33), (31, 16), (100, 15), (513, 64), (65, 530)] {
                    check::<f32, f32>(isa, [count, inputs, outputs, rank]);
                    check::<f16, f16>(isa, [count, inputs, outputs, rank]);
                    check::<bf16, bf16>(isa, [count, inputs, outputs, rank]);
                    check::<bf16, f32>(isa, [count, inputs, outputs, rank]);
                }
            }
        }
    }
}
