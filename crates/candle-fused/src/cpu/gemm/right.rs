//! A right matrix that several products of one thread share.

use std::ops::Range;

use super::super::dispatch;
use super::super::spread::Kept;
use super::kernel::{Kernel, Pairs};
use super::left::{Left, reads_pairs};
use super::matrix::{Data, Matrix};
use super::tiles::{self, Block, Steps};
use super::{cut, pack, room};

/// So many columns, and the others that are computed with them.
pub(crate) fn whole(columns: usize) -> usize {
    columns.next_multiple_of(Kernel::of(dispatch::isa()).columns)
}

/// A right matrix, packed whole for products with some rows after others, and with some of its columns and steps.
#[derive(Default)]
pub(crate) struct Right {
    pairs: Option<Pairs>,
    rows: usize,
    columns: usize,
    /// The steps of each piece of the common dimension, and the words of all its panels.
    pieces: Vec<(Range<usize>, usize)>,
    panels: Vec<f32>,
}

impl Right {
    /// [`Self::pack`] into memory of its own.
    pub(crate) fn of(right: &Matrix, in_pairs: bool) -> Self {
        let mut packed = Self::default();
        packed.pack(right, in_pairs);
        packed
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Packs a matrix in the place of the one before: in pairs of bf16, to which f32 is rounded, where that is said, the
    /// processor multiplies them, and the matrix is not f16; else in f32.
    pub(crate) fn pack(&mut self, right: &Matrix, in_pairs: bool) {
        let (isa, kernel) = (dispatch::isa(), Kernel::of(dispatch::isa()));
        self.pairs = kernel.pairs.filter(|_| in_pairs && !matches!(right.data, Data::F16(_)));
        (self.rows, self.columns) = (right.rows, right.columns);
        let padded = whole(right.columns);
        let with_size = |range: Range<usize>| {
            let size = tiles::words(self.pairs, false, range.len()) * padded;
            (range, size)
        };
        self.pieces.clear();
        self.pieces.extend(cut(self.pairs, right.rows).map(with_size));
        let size = self.pieces.iter().map(|(_, size)| size).sum();
        let mut to = room(&mut self.panels, size);
        for (range, size) in &self.pieces {
            let (panels, rest) = to.split_at_mut(*size);
            let pack = if self.pairs.is_some() { pack::pack_pairs } else { pack::pack };
            pack(isa, right, range.clone(), 0..right.columns, kernel.columns, panels);
            to = rest;
        }
    }

    /// Bytes that it has asked for.
    pub(crate) fn bytes(&self) -> usize {
        self.panels.bytes()
    }

    /// `to = left · right`, or `to += left · right`, for the first `columns` of this right matrix, which has columns of zeros
    /// up to the [`whole`], and as many of its rows as the left one has columns; the rows of `to` are `stride` apart. A left
    /// matrix beside pairs is bf16, its rows in one piece.
    ///
    /// # Panics
    /// If there are not so many rows or columns, or the left matrix is another.
    pub(crate) fn multiply(
        &self,
        left: &Matrix,
        columns: usize,
        (to, stride): (&mut [f32], usize),
        add: bool,
    ) {
        let (kernel, wide) = (Kernel::of(dispatch::isa()), Left::new(*left));
        let left = if self.pairs.is_some() { left } else { &wide.wide() };
        assert!(self.pairs.is_none() || reads_pairs(left), "a left matrix of pairs");
        assert!(left.columns <= self.rows && columns <= whole(self.columns), "a product's shape");
        if left.rows * columns == 0 {
            return;
        }
        assert!(
            columns <= stride && to.len() >= (left.rows - 1) * stride + columns,
            "the result is too small"
        );
        let (mut panels, mut begun) = (&self.panels[..], add);
        let padded = whole(self.columns).max(1);
        for (range, size) in self.pieces.iter().take_while(|(range, _)| range.start < left.columns) {
            let (here, rest) = panels.split_at(*size);
            let range = range.start..range.end.min(left.columns);
            let (pairs, words) = (self.pairs, size / padded);
            let steps = Steps { kernel, left, parts: 1, split: false, pairs, range, words };
            let block = Block { steps, then: None, padded };
            // SAFETY: the result is initialised, as large as is said, and nobody else's.
            unsafe { block.add(here, 0..left.rows, columns, to.as_mut_ptr(), stride, begun) };
            (panels, begun) = (rest, true);
        }
        if !begun {
            to.chunks_mut(stride).take(left.rows).for_each(|row| row[..columns].fill(0.0));
        }
    }
}
