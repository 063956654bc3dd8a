//! Matrices where they lie: a slice, an offset and two strides.

use std::borrow::Cow;

use candle_core::{Result, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::super::dispatch;
use super::super::lanes::{LANES, Piece};
use super::super::spread::spread;
use super::pack::pack;

/// Elements that are worth waking another thread.
const ELEMENTS: usize = 64 * 1024;

/// The elements of a matrix and whatever lies between them.
#[derive(Clone, Copy)]
pub(crate) enum Data<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl Data<'_> {
    fn len(self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::BF16(data) => data.len(),
        }
    }

    /// The elements from `start`, as many as `to` has, widened.
    pub(super) fn widen(self, start: usize, to: &mut [f32]) {
        let range = start..start + to.len();
        match self {
            Self::F32(data) => to.copy_from_slice(&data[range]),
            Self::F16(data) => data[range].convert_to_f32_slice(to),
            Self::BF16(data) => {
                for (to, x) in to.iter_mut().zip(&data[range]) {
                    *to = f32::from_bits(u32::from(x.to_bits()) << 16);
                }
            }
        }
    }
}

/// A matrix of f32, f16 or bf16; every element lies within its data.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) data: Data<'a>,
    offset: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows` × `columns` elements from `offset`, with these strides; `None` if some would lie outside of the data.
    pub(crate) fn new(
        data: Data<'a>,
        offset: usize,
        [rows, columns]: [usize; 2],
        [row_stride, column_stride]: [usize; 2],
    ) -> Option<Self> {
        let matrix = Self { data, offset, rows, columns, row_stride, column_stride };
        if rows == 0 || columns == 0 {
            return Some(matrix);
        }
        let last =
            (rows - 1).checked_mul(row_stride)?.checked_add((columns - 1).checked_mul(column_stride)?)?;
        (offset.checked_add(last)? < data.len()).then_some(matrix)
    }

    /// The matrix whose rows lie side by side at the beginning of a slice.
    pub(crate) fn of_rows(data: &'a [f32], [rows, columns]: [usize; 2]) -> Result<Self> {
        match Self::new(Data::F32(data), 0, [rows, columns], [columns, 1]) {
            Some(matrix) => Ok(matrix),
            None => bail!("a matrix of [{rows}, {columns}] has more than {} elements", data.len()),
        }
    }

    /// Columns as rows.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// `count` rows from `first` on, or as many as there are.
    pub(crate) fn some_rows(self, first: usize, count: usize) -> Self {
        let first = first.min(self.rows);
        let offset = if count == 0 { self.offset } else { self.offset + first * self.row_stride };
        Self { offset, rows: count.min(self.rows - first), ..self }
    }

    pub(super) fn index(&self, row: usize, column: usize) -> usize {
        self.offset + row * self.row_stride + column * self.column_stride
    }

    /// The storage from its first element on, and how far a row is from the one before, if rows lie in one piece.
    pub(crate) fn in_rows(&self) -> Option<(Data<'a>, usize, usize)> {
        (self.column_stride == 1 || self.columns < 2).then_some((self.data, self.offset, self.row_stride))
    }

    /// Its elements in f32, row by row, where they lie if that is how they lie.
    pub(crate) fn rows_f32(self) -> Cow<'a, [f32]> {
        let whole = self.column_stride == 1 && self.row_stride == self.columns;
        match self.data {
            Data::F32(data) if whole => Cow::Borrowed(&data[self.offset..][..self.rows * self.columns]),
            _ => Cow::Owned(self.to_f32()),
        }
    }

    /// Its elements in f32 in panels of [`LANES`] columns, for each row side by side, filled up with zero.
    pub(crate) fn panels(self) -> Vec<Piece<f32>> {
        let mut panels = vec![[0.0; LANES]; self.rows * self.columns.div_ceil(LANES)];
        let to = panels.as_flattened_mut();
        if !to.is_empty() {
            pack(dispatch::isa(), &self, 0..self.rows, 0..self.columns, LANES, to);
        }
        panels
    }

    /// Its elements in f32, row by row.
    pub(crate) fn to_f32(self) -> Vec<f32> {
        let mut wide = vec![0.0; self.rows * self.columns];
        let few = (ELEMENTS / self.columns.max(1)).max(1);
        let tasks = wide.chunks_mut(few * self.columns.max(1)).enumerate().collect();
        spread(tasks, self.rows > few, |(): &mut (), (i, wide): (usize, &mut [f32])| {
            for (row, to) in (i * few..).zip(wide.chunks_exact_mut(self.columns)) {
                self.widen_row(row, to);
            }
        });
        wide
    }

    pub(super) fn widen_row(&self, row: usize, to: &mut [f32]) {
        if self.column_stride == 1 || to.len() < 2 {
            self.data.widen(self.index(row, 0), to);
        } else {
            for (j, to) in to.iter_mut().enumerate() {
                self.data.widen(self.index(row, j), std::slice::from_mut(to));
            }
        }
    }
}
