//! A product of few rows, as in generation: each column of the right matrix is read once, where it lies, and multiplied
//! with every row. Packing would cost more than it saves.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use super::super::dispatch::{self, Isa, Vectorised};
use super::super::lanes::{Element, LANES, Lanes};
use super::super::rows::load_part;
use super::matrix::{Data, Matrix};

/// The most rows that are multiplied so.
pub(crate) const ROWS: usize = 4;

/// Whether a column of `right` is contiguous.
pub(super) fn serves(right: &Matrix) -> bool {
    right.row_stride == 1
}

/// Adds the products of the `rows` rows of `left`, at least one, with the columns of `right` from `first` on to `sums`,
/// which has a place for each row of each of the columns.
pub(super) fn add(
    isa: Isa,
    left: &[f32],
    rows: usize,
    right: &Matrix,
    first: usize,
    sums: &mut [[f32; ROWS]],
) {
    let (k, stride) = (right.rows, right.column_stride);
    if k == 0 || sums.is_empty() {
        return;
    }
    let start = right.index(0, first);
    match right.data {
        Data::F32(data) => {
            dispatch::vectorise(isa, Few { left, rows, columns: &data[start..], stride, k, sums });
        }
        Data::F16(data) => {
            dispatch::vectorise(isa, Few { left, rows, columns: &data[start..], stride, k, sums });
        }
        Data::BF16(data) => {
            dispatch::vectorise(isa, Few { left, rows, columns: &data[start..], stride, k, sums });
        }
    }
}

struct Few<'a, T> {
    /// `[rows, k]`
    left: &'a [f32],
    rows: usize,
    /// From the first column's first element on.
    columns: &'a [T],
    /// From a column to the next.
    stride: usize,
    k: usize,
    sums: &'a mut [[f32; ROWS]],
}

impl<T: Element> Vectorised for Few<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        // Several chains of additions at a time, which do not wait for each other.
        match self.rows {
            1 => self.columns::<L, 1, 4>(),
            2 => self.columns::<L, 2, 2>(),
            3 => self.columns::<L, 3, 1>(),
            _ => self.columns::<L, 4, 1>(),
        }
    }
}

impl<T: Element> Few<'_, T> {
    /// `R` rows with `C` columns at a time.
    #[inline(always)]
    fn columns<L: Lanes, const R: usize, const C: usize>(self) {
        let Self { left, columns, stride, k, sums, .. } = self;
        let left: [&[f32]; R] = std::array::from_fn(|i| &left[i * k..][..k]);
        let column = |j: usize| &columns[j * stride..][..k];
        let (groups, rest) = sums.as_chunks_mut::<C>();
        let first = groups.len() * C;
        for (group, sums) in groups.iter_mut().enumerate() {
            tile::<L, T, R, C>(left, std::array::from_fn(|c| column(group * C + c)), sums);
        }
        for (j, sums) in rest.iter_mut().enumerate() {
            tile::<L, T, R, 1>(left, [column(first + j)], std::array::from_mut(sums));
        }
    }
}

/// Adds the products of these rows and columns to their sums.
#[inline(always)]
fn tile<L: Lanes, T: Element, const R: usize, const C: usize>(
    rows: [&[f32]; R],
    columns: [&[T]; C],
    sums: &mut [[f32; ROWS]; C],
) {
    let row_pieces = rows.map(
        #[inline(always)]
        |row| row.as_chunks::<LANES>(),
    );
    let column_pieces = columns.map(
        #[inline(always)]
        |column| column.as_chunks::<LANES>(),
    );
    let mut totals = [[L::splat(0.0); C]; R];
    for p in 0..column_pieces[0].0.len() {
        let mut y = [L::splat(0.0); C];
        for (y, column) in y.iter_mut().zip(&column_pieces) {
            *y = T::load(&column.0[p]);
        }
        for (i, totals) in totals.iter_mut().enumerate() {
            let x = L::load(&row_pieces[i].0[p]);
            for (total, y) in totals.iter_mut().zip(y) {
                *total = x.mul_add(y, *total);
            }
        }
    }
    if !column_pieces[0].1.is_empty() {
        for (i, totals) in totals.iter_mut().enumerate() {
            let x: L = load_part(row_pieces[i].1);
            for (c, total) in totals.iter_mut().enumerate() {
                *total = x.mul_add(load_part(column_pieces[c].1), *total);
            }
        }
    }
    for (i, totals) in totals.iter().enumerate() {
        for (total, sums) in totals.iter().zip(sums.iter_mut()) {
            sums[i] += total.sum();
        }
    }
}
