//! Every instruction set that the processor has, against float64: shapes around the tiles' edges, every layout and
//! dtype, and memory that must not be touched.

#![allow(clippy::unwrap_used, reason = "tests")]
#![expect(clippy::float_cmp, reason = "exact sums")]
#![expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "small integers; rounding")]

use half::{bf16, f16};

use super::*;
use crate::cpu::dispatch::instruction_sets;
use crate::ops::dropout::Dropout;

/// Small multiples of 1/8: exact in every dtype.
fn value(i: usize) -> f32 {
    (((i * 2_654_435_761) >> 7) % 17) as f32 / 8.0 - 1.0
}

/// Where a matrix lies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lies {
    Rows,
    Columns,
    Apart,
}

/// A matrix in a storage of its own with a margin of NaN around it and in its gaps.
struct Stored {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
    dims: [usize; 2],
    strides: [usize; 2],
}

const MARGIN: usize = 5;

impl Stored {
    fn new(dims: [usize; 2], lies: Lies, seed: usize) -> Self {
        let [rows, columns] = dims;
        let strides = match lies {
            Lies::Rows => [columns + 3, 1],
            Lies::Columns => [1, rows + 3],
            Lies::Apart => [2 * columns + 1, 2],
        };
        let size = 2 * MARGIN + rows * strides[0] + columns * strides[1];
        let mut f32 = vec![f32::NAN; size];
        for i in 0..rows {
            for j in 0..columns {
                f32[MARGIN + i * strides[0] + j * strides[1]] = value(seed + i * columns + j);
            }
        }
        let f16 = f32.iter().map(|&x| f16::from_f32(x)).collect();
        let bf16 = f32.iter().map(|&x| bf16::from_f32(x)).collect();
        Self { f32, f16, bf16, dims, strides }
    }

    fn matrices(&self) -> [Matrix<'_>; 3] {
        [Data::F32(&self.f32), Data::F16(&self.f16), Data::BF16(&self.bf16)]
            .map(|data| Matrix::new(data, MARGIN, self.dims, self.strides).unwrap())
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        f64::from(self.f32[MARGIN + i * self.strides[0] + j * self.strides[1]])
    }
}

/// A product that a mask keeps half of.
struct Masks {
    left: Stored,
    right: Stored,
    dropout: Dropout,
    mask: Mask,
}

impl Masks {
    fn new([m, k, n]: [usize; 3], lies: Lies) -> Self {
        let dropout = Dropout { p: 0.5, seed: (m * n) as u64 };
        Self {
            left: Stored::new([m, k], Lies::Rows, 5),
            right: Stored::new([k, n], lies, 6),
            dropout,
            mask: Mask::new(dropout, m * n),
        }
    }

    /// With matrices of these dtypes.
    fn start(&self, [left, right]: [usize; 2]) -> Start<'_> {
        let product = Product { left: self.left.matrices()[left], right: self.right.matrices()[right] };
        Start::Masked(product, &self.mask)
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        let index = i * self.right.dims[1] + j;
        let factor = self.dropout.factors(index as u64 / 4)[index % 4];
        let sum = (0..self.left.dims[1]).map(|k| self.left.at(i, k) * self.right.at(k, j)).sum::<f64>();
        if factor == 0.0 { 0.0 } else { sum }
    }
}

fn exact(start: impl Fn(usize, usize) -> f64, terms: &[(&Stored, &Stored)], [m, n]: [usize; 2]) -> Vec<f64> {
    let element = |i: usize, j: usize| {
        let dot = |(left, right): &(&Stored, &Stored)| -> f64 {
            (0..left.dims[1]).map(|k| left.at(i, k) * right.at(k, j)).sum()
        };
        start(i, j) + terms.iter().map(dot).sum::<f64>()
    };
    (0..m * n).map(|at| element(at / n, at % n)).collect()
}

/// All sums are exact in f32, and so is their rounding: results are compared bit by bit.
fn check<T: Element + Into<f64>>(
    isa: Isa,
    what: &str,
    dims: [usize; 2],
    start: Start,
    products: &[Product],
    expected: &[f64],
    round: impl Fn(f64) -> T,
) {
    let guard = round(77.0);
    let (size, margin) = (dims[0] * dims[1], 64);
    let mut memory: Vec<MaybeUninit<T>> = vec![MaybeUninit::new(guard); size + margin];
    write(isa, dims, start, products, &mut memory);
    // SAFETY: initialised above.
    let got: Vec<f64> = memory.into_iter().map(|x| unsafe { x.assume_init() }.into()).collect();
    let expected = expected.iter().map(|&x| round(x).into()).chain(vec![guard.into(); margin]);
    for (at, (got, expected)) in got.into_iter().zip(expected).enumerate() {
        assert!(got == expected, "{isa:?} {what} {dims:?}: element {at} is {got}, not {expected}");
    }
}

#[test]
fn sums_are_exact_in_every_shape_layout_and_dtype() {
    let sizes = [1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33, 100, 200];
    for isa in instruction_sets() {
        for (case, (m, n)) in sizes.iter().flat_map(|&m| sizes.map(|n| (m, n))).enumerate() {
            let k = [0, 1, 2, 5, 7, 33, 257, 300, 1100][case % 9];
            let lies = [Lies::Rows, Lies::Columns, Lies::Apart];
            let (left, right) =
                (Stored::new([m, k], lies[case % 3], 1), Stored::new([k, n], lies[case / 3 % 3], 2));
            let (more_left, more_right) =
                (Stored::new([m, 3], lies[case / 2 % 3], 3), Stored::new([3, n], lies[case / 5 % 3], 4));
            let first: Vec<f32> = (0..m * n).map(value).collect();
            let masked = Masks::new([m, 40, n], lies[case / 4 % 3]);
            let (start, at): (Start, Box<dyn Fn(usize, usize) -> f64>) = match case % 4 {
                0 => (Start::Zero, Box::new(|_, _| 0.0)),
                1 => (Start::Row(&first[..n]), Box::new(|_, j| f64::from(value(j)))),
                2 => (Start::Matrix(&first), Box::new(move |i, j| f64::from(value(i * n + j)))),
                _ => (masked.start([case % 3, case / 3 % 3]), Box::new(|i, j| masked.at(i, j))),
            };
            for (l, left_matrix) in left.matrices().into_iter().enumerate() {
                for (r, right_matrix) in right.matrices().into_iter().enumerate() {
                    let what = format!("{l} {r} k {k} case {case}");
                    let one = Product { left: left_matrix, right: right_matrix };
                    let two = Product { left: more_left.matrices()[0], right: more_right.matrices()[r] };
                    let sum = exact(&at, &[(&left, &right), (&more_left, &more_right)], [m, n]);
                    check(isa, &what, [m, n], start, &[one, two], &sum, |x| x as f32);
                    let sum = exact(&at, &[(&left, &right)], [m, n]);
                    check(isa, &what, [m, n], start, &[one], &sum, |x| bf16::from_f32(x as f32));
                    check(isa, &what, [m, n], start, &[one], &sum, |x| f16::from_f32(x as f32));
                }
            }
        }
    }
}

#[test]
fn many_tasks_cover_a_large_result() {
    for isa in instruction_sets() {
        for (m, n) in [(1100, 40), (40, 1100), (601, 530), (700, 1100)] {
            let (left, right) = (Stored::new([m, 40], Lies::Rows, 1), Stored::new([40, n], Lies::Columns, 2));
            let sum = exact(|_, _| 0.0, &[(&left, &right)], [m, n]);
            let product = Product { left: left.matrices()[0], right: right.matrices()[0] };
            check(isa, "f32", [m, n], Start::Zero, &[product], &sum, |x| x as f32);
            let product = Product { left: left.matrices()[2], right: right.matrices()[2] };
            check(isa, "bf16", [m, n], Start::Zero, &[product], &sum, |x| bf16::from_f32(x as f32));
        }
    }
}

/// Large enough for parts of both matrices, with what a sum begins with, a second product and every dtype of the right one.
#[test]
fn sums_of_large_products_are_exact() {
    let (m, k, n) = (601, 230, 530);
    let (left, right) = (Stored::new([m, k], Lies::Rows, 1), Stored::new([k, n], Lies::Columns, 2));
    let (more_left, more_right) =
        (Stored::new([m, 200], Lies::Rows, 3), Stored::new([200, n], Lies::Rows, 4));
    let row: Vec<f32> = (0..n).map(value).collect();
    let terms = [(&left, &right), (&more_left, &more_right)];
    let sum = exact(|_, j| f64::from(value(j)), &terms, [m, n]);
    let masked = Masks::new([m, 300, n], Lies::Rows);
    let beside_masked = exact(|i, j| masked.at(i, j), &terms, [m, n]);
    for (isa, at) in instruction_sets().flat_map(|isa| (0..3).map(move |at| (isa, at))) {
        let products =
            terms.map(|(left, right)| Product { left: left.matrices()[0], right: right.matrices()[at] });
        let what = format!("{at}");
        check(isa, &what, [m, n], Start::Row(&row), &products, &sum, |x| x as f32);
        check(isa, &what, [m, n], Start::Row(&row), &products, &sum, |x| bf16::from_f32(x as f32));
        for left in [0, 2] {
            let (start, what) = (masked.start([left, at]), format!("{at}, {left} masked"));
            check(isa, &what, [m, n], start, &products, &beside_masked, |x| x as f32);
            check(isa, &what, [m, n], start, &products, &beside_masked, |x| bf16::from_f32(x as f32));
        }
    }
}

#[test]
fn products_are_added_to_what_is_there() {
    let (left, right) = (Stored::new([7, 300], Lies::Columns, 1), Stored::new([300, 19], Lies::Rows, 2));
    let expected = exact(|i, j| f64::from(value(i * 19 + j)), &[(&left, &right)], [7, 19]);
    let mut to: Vec<f32> = (0..7 * 19).map(value).collect();
    add_products([7, 19], &[Product { left: left.matrices()[1], right: right.matrices()[2] }], &mut to);
    assert!(to.iter().map(|&x| f64::from(x)).eq(expected));
}

/// With some of its rows and columns, packed again in the same memory, in pairs (to which f32 is rounded, here exactly) and not.
#[test]
fn a_right_matrix_serves_many_products() {
    let mut packed = Right::default();
    let kinds = if multiplies_pairs() { vec![false, true] } else { vec![false] };
    for (case, [k, n]) in [[1, 1], [64, 70], [33, 31], [2050, 16], [3, 300], [0, 5]].into_iter().enumerate() {
        for lies in [Lies::Rows, Lies::Columns, Lies::Apart] {
            let right = Stored::new([k, n], lies, 2);
            for (in_pairs, at) in kinds.iter().flat_map(|&pairs| [(pairs, 0), (pairs, 1), (pairs, 2)]) {
                if in_pairs && at == 1 {
                    // f16 does not come in pairs.
                    continue;
                }
                packed.pack(&right.matrices()[at], in_pairs);
                for [m, steps, columns] in [[1, k, n], [65, k, n], [7, k - k / 3, n - n / 2], [3, k / 2, n]] {
                    let left = Stored::new([m, steps], if in_pairs { Lies::Rows } else { lies }, 1);
                    let part = Stored { dims: [steps, columns], ..Stored::new([k, n], lies, 2) };
                    for add in [false, true] {
                        let start =
                            |i: usize, j: usize| if add { f64::from(value(i * 400 + j)) } else { 0.0 };
                        let expected = exact(start, &[(&left, &part)], [m, columns]);
                        let mut to: Vec<f32> = (0..m * 400).map(value).collect();
                        let left = left.matrices()[if in_pairs { 2 } else { case % 3 }];
                        packed.multiply(&left, columns, (&mut to, 400), add);
                        for (i, row) in to.chunks_exact(400).enumerate() {
                            let (got, rest) = row.split_at(columns);
                            let expected = &expected[i * columns..][..columns];
                            assert!(
                                got.iter().map(|&x| f64::from(x)).eq(expected.iter().copied()),
                                "{in_pairs} {at} {lies:?} {m} {steps} {columns} {add}"
                            );
                            assert!(rest.iter().zip(columns..).all(|(&x, j)| x == value(i * 400 + j)));
                        }
                    }
                }
            }
        }
    }
}

/// Steps beyond those of the left matrix do not count, though an odd last one is packed with the next.
#[test]
fn steps_that_do_not_count_are_not_read() {
    for (in_pairs, k) in [false, true].into_iter().flat_map(|pairs| [(pairs, 3), (pairs, 33), (pairs, 35)]) {
        if in_pairs && !multiplies_pairs() {
            continue;
        }
        let mut data = vec![bf16::ONE; k * 40];
        data.resize((k + 1) * 40, bf16::NAN);
        let packed = Right::of(&Matrix::new(Data::BF16(&data), 0, [k + 1, 40], [40, 1]).unwrap(), in_pairs);
        let ones = vec![bf16::ONE; 5 * k];
        let left = Matrix::new(Data::BF16(&ones), 0, [5, k], [k, 1]).unwrap();
        let mut to = vec![7.0; 5 * 40];
        packed.multiply(&left, 40, (&mut to, 40), false);
        assert!(to.iter().all(|&x| x == k as f32), "{in_pairs} {k}");
    }
}

#[test]
fn columns_are_rows_of_a_left_matrix() {
    for dims in [[64, 64], [5, 3], [130, 17], [1, 40]] {
        for lies in [Lies::Rows, Lies::Columns, Lies::Apart] {
            let stored = Stored::new(dims, lies, 3);
            for (at, matrix) in stored.matrices().into_iter().enumerate() {
                let turned = Columns::of(matrix, at == 2 && multiplies_pairs());
                for (first, count) in [(0, dims[0]), (dims[0] / 4 * 2, dims[0] / 3)] {
                    let got = turned.some(first, count).unwrap().to_f32();
                    let expected = (0..dims[1]).flat_map(|j| (0..count).map(move |i| (first + i, j)));
                    let expected = expected.map(|(i, j)| stored.at(i, j));
                    assert!(got.into_iter().map(f64::from).eq(expected), "{dims:?} {lies:?} {at} {first}");
                }
            }
        }
    }
}

#[test]
fn a_matrix_is_turned() {
    for ([rows, columns], stride) in [([1, 1], 1), ([3, 70], 70), ([64, 33], 64), ([8, 16], 19)] {
        let from: Vec<f32> = (0..rows * stride).map(value).collect();
        let mut to = vec![0.0; rows * columns];
        transpose(&from, stride, [rows, columns], &mut to);
        let expected: Vec<f32> = (0..rows * columns).map(|i| from[i % rows * stride + i / rows]).collect();
        assert_eq!(to, expected);
    }
}

#[test]
fn bf16_rounds_to_the_nearest_even() {
    let cases = [1.0, 1.003_906_2, 1.003_906_4, 1.011_718_8, 3.4e38, -0.0, 1e-40, f32::INFINITY, f32::NAN];
    // Whole vectors, and what is left.
    let cases: Vec<f32> = (0..37).map(|i| cases[i % cases.len()]).collect();
    for isa in instruction_sets() {
        let mut to = [MaybeUninit::new(bf16::ZERO); 37];
        round_with(isa, &cases, &mut to);
        for (x, got) in cases.iter().zip(to) {
            // SAFETY: initialised.
            let (got, expected) = (unsafe { got.assume_init() }, bf16::from_f32(*x));
            assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(), "{isa:?} {x}");
        }
    }
}

#[test]
fn a_matrix_ends_within_its_data() {
    let data = [0f32; 12];
    assert!(Matrix::new(Data::F32(&data), 0, [3, 4], [4, 1]).is_some());
    assert!(Matrix::new(Data::F32(&data), 1, [3, 4], [4, 1]).is_none());
    assert!(Matrix::new(Data::F32(&data), 0, [3, 4], [usize::MAX, 1]).is_none());
    assert!(Matrix::new(Data::F32(&data), 99, [0, 4], [4, 1]).is_some());
}

/// Nothing is read or written beyond a matrix's last element.
#[cfg(unix)]
#[test]
fn the_loops_stay_within_their_matrices() {
    use crate::cpu::guarded::Guarded;
    // The last for parts of both matrices.
    let sizes = [
        (1, 1, 1),
        (2, 3, 5),
        (5, 7, 9),
        (6, 8, 16),
        (7, 9, 17),
        (13, 257, 33),
        (12, 33, 32),
        (25, 64, 48),
        (49, 193, 257),
    ];
    let lying = [Lies::Rows, Lies::Columns, Lies::Apart];
    for isa in instruction_sets() {
        for (case, &(m, k, n)) in sizes.iter().enumerate() {
            for (left_lies, right_lies) in lying.iter().flat_map(|&a| lying.map(|b| (a, b))) {
                let (left, right) = (Stored::new([m, k], left_lies, 1), Stored::new([k, n], right_lies, 2));
                let cut = |stored: &Stored| {
                    let [rows, columns] = stored.dims;
                    let last = (rows - 1) * stored.strides[0] + (columns - 1) * stored.strides[1];
                    MARGIN..MARGIN + last + 1
                };
                let wide = [&left, &right].map(|stored| Guarded::new(&stored.f32[cut(stored)]));
                let narrow = [&left, &right].map(|stored| Guarded::new(&stored.bf16[cut(stored)]));
                let matrix =
                    |data, stored: &Stored| Matrix::new(data, 0, stored.dims, stored.strides).unwrap();
                let products = [
                    Product {
                        left: matrix(Data::F32(wide[0].get()), &left),
                        right: matrix(Data::F32(wide[1].get()), &right),
                    },
                    Product {
                        left: matrix(Data::BF16(narrow[0].get()), &left),
                        right: matrix(Data::BF16(narrow[1].get()), &right),
                    },
                ];
                let expected = exact(|_, _| 0.0, &[(&left, &right), (&left, &right)], [m, n]);
                let mut to = Guarded::new(&vec![MaybeUninit::new(0f32); m * n]);
                write(isa, [m, n], Start::Zero, &products, to.get_mut());
                // SAFETY: initialised.
                let got = to.get().iter().map(|x| f64::from(unsafe { x.assume_init() }));
                assert!(got.eq(expected.iter().copied()), "{isa:?} {case} {left_lies:?} {right_lies:?}");
                let mut to = Guarded::new(&vec![MaybeUninit::new(bf16::ZERO); m * n]);
                write(isa, [m, n], Start::Zero, &products, to.get_mut());
            }
        }
    }
}

/// More rows than are summed up at a time: the packed pieces of both products serve all of them, or are packed again where
/// they do not fit.
#[test]
fn a_rounded_result_of_many_rows_is_exact() {
    let m = 2 * ROUNDED_ROWS + 7;
    for (n, k) in [(5, 33), (70, 1100), (40, 4200)] {
        let (left, right) = (Stored::new([m, k], Lies::Rows, 1), Stored::new([k, n], Lies::Columns, 2));
        let (more_left, more_right) =
            (Stored::new([m, 3], Lies::Rows, 3), Stored::new([3, n], Lies::Rows, 4));
        let row: Vec<f32> = (0..n).map(value).collect();
        let terms = [(&left, &right), (&more_left, &more_right)];
        let sum = exact(|_, j| f64::from(value(j)), &terms, [m, n]);
        for isa in instruction_sets() {
            for at in 0..3 {
                let products = terms
                    .map(|(left, right)| Product { left: left.matrices()[at], right: right.matrices()[at] });
                check(isa, &format!("{at}"), [m, n], Start::Row(&row), &products, &sum, |x| {
                    bf16::from_f32(x as f32)
                });
            }
        }
    }
}

#[test]
fn a_large_matrix_is_widened_row_by_row() {
    // One task, several with the last one short, rows longer than a task.
    for dims in [[3, 5], [131, 1000], [3, 70_000], [0, 4], [4, 0]] {
        let stored = Stored::new(dims, Lies::Rows, 3);
        let exact: Vec<f32> = (0..dims[0])
            .flat_map(|i| stored.f32[MARGIN + i * stored.strides[0]..][..dims[1]].to_vec())
            .collect();
        for matrix in stored.matrices() {
            assert_eq!(matrix.to_f32(), exact, "{dims:?}");
        }
    }
}

/// Numbers of 24 bits times numbers of 8 are as exact as f32 has them, in parts or not: a part that is left out, or another
/// part's place, is an error of 2⁻⁸, 2⁻¹⁶ or more of a term.
#[test]
fn f32_times_bf16_loses_no_bits() {
    let number = |i: usize| (((i * 2_654_435_761) >> 5) % 16_777_213) as f32 / 8_388_608.0 - 1.0;
    for [m, k, n] in [[5, 7, 200], [33, 1100, 230], [70, 96, 193], [100, 4100, 192]] {
        for stride in [k, k + 3] {
            let left: Vec<f32> = (0..m * stride).map(number).collect();
            let right: Vec<bf16> = (0..k * n).map(|i| bf16::from_f32(number(i + 99))).collect();
            let start: Vec<f32> = (0..n).map(|j| number(j + 7)).collect();
            let product = Product {
                left: Matrix::new(Data::F32(&left), 0, [m, k], [stride, 1]).unwrap(),
                right: Matrix::new(Data::BF16(&right), 0, [k, n], [1, k]).unwrap(),
            };
            for isa in instruction_sets() {
                let got: Vec<f32> = sum_with(isa, [m, n], Start::Row(&start), &[product]);
                for (at, got) in got.into_iter().enumerate() {
                    let (i, j) = (at / n, at % n);
                    let term =
                        |l: usize| f64::from(left[i * stride + l]) * f64::from(right[j * k + l].to_f32());
                    let (sum, size) =
                        (0..k).map(term).fold((f64::from(start[j]), 0.0), |(sum, size): (f64, f64), x| {
                            (sum + x, size + x.abs())
                        });
                    let error = (f64::from(got) - sum).abs();
                    // What rounded sums take; without the third parts it is more.
                    assert!(
                        error <= (1.0 + size) * 3e-6,
                        "{isa:?} {m} {k} {n} {stride} {i} {j}: {error:e} of {size:e}"
                    );
                }
            }
        }
    }
}

/// Parts of what is no number reach the whole row, and no other.
#[test]
fn what_is_not_finite_stays_so() {
    let [m, k, n] = [50, 200, 270];
    for lies in [Lies::Rows, Lies::Columns] {
        let (mut left, right) = (Stored::new([m, k], Lies::Rows, 1), Stored::new([k, n], lies, 2));
        for (i, x) in [(3, f32::NAN), (4, f32::INFINITY), (5, f32::from_bits(0x7F80_0001))] {
            left.f32[MARGIN + i * left.strides[0] + 7] = x;
        }
        let product = Product { left: left.matrices()[0], right: right.matrices()[0] };
        for isa in instruction_sets() {
            let got: Vec<f32> = sum_with(isa, [m, n], Start::Zero, &[product]);
            for (at, got) in got.into_iter().enumerate() {
                // A number times infinity, but for those that are 0.
                let spoilt = (3..6).contains(&(at / n));
                assert_eq!(got.is_finite(), !spoilt, "{isa:?} {lies:?} {at}: {got}");
            }
        }
    }
}

/// Rows of one number each, so that sums hide nothing: products of floats in every layout, as exact as six roundings to f32,
/// whether they are made of parts or not. A part's product that is left out, or two that change places, is more.
#[test]
fn f32_times_f32_is_as_exact_as_f32() {
    let number = |i: usize| {
        let fraction = ((i * 2_654_435_761) >> 5) % 8_388_593;
        // From 2^-50 to 2^50, and some beyond 2^110.
        let exponent = if i.is_multiple_of(31) { 235 + i % 16 } else { 77 + i * 7 % 101 };
        f32::from_bits((fraction | exponent << 23) as u32) * if i.is_multiple_of(3) { -1.0 } else { 1.0 }
    };
    let shapes =
        [[48, 192, 256], [49, 193, 257], [70, 1100, 300], [45, 161, 300], [5, 150, 200], [131, 2049, 416]];
    for ([m, k, n], lies) in shapes
        .into_iter()
        .flat_map(|shape| [Lies::Rows, Lies::Columns, Lies::Apart].map(|lies| (shape, lies)))
    {
        // The last steps, which zeros fill up, too.
        let at = |i: usize| if i < 3 { k - 1 - i } else { i * 37 % k };
        let mut left = Stored::new([m, k], Lies::Rows, 1);
        let mut right = Stored::new([k, n], lies, 2);
        for i in 0..m {
            let row = &mut left.f32[MARGIN + i * left.strides[0]..][..k];
            row.fill(0.0);
            row[at(i)] = number(i);
        }
        for (l, j) in (0..k).flat_map(|l| (0..n).map(move |j| (l, j))) {
            right.f32[MARGIN + l * right.strides[0] + j * right.strides[1]] = number(l * n + j);
        }
        let product = Product { left: left.matrices()[0], right: right.matrices()[0] };
        for isa in instruction_sets() {
            let got: Vec<f32> = sum_with(isa, [m, n], Start::Zero, &[product]);
            for (index, got) in got.into_iter().enumerate() {
                let (i, j) = (index / n, index % n);
                let exact = left.at(i, at(i)) * right.at(at(i), j);
                let error = (f64::from(got) - exact).abs();
                let bound = exact.abs() * 6.0 * 2f64.powi(-24);
                assert!(
                    error <= bound || exact.abs() > 3e38,
                    "{isa:?} {m} {k} {n} {lies:?} {i} {j}: {got:e}, not {exact:e}"
                );
            }
        }
    }
}
