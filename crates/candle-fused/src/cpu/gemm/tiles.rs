//! Some steps of the common dimension, tile by tile.

use std::ops::Range;

use super::kernel::{self, Kernel, Pairs, Tile};
use super::matrix::{Data, Matrix};
use super::pack;

/// Rows of the left matrix that are taken with one panel after the other, to stay in the second-level cache.
pub(super) const ROWS: usize = 96;

/// Some steps of a product whose right matrix is packed.
pub(super) struct Steps<'a> {
    pub(super) kernel: Kernel,
    pub(super) left: &'a Matrix<'a>,
    /// The tile for them, where they are packed in pairs.
    pub(super) pairs: Option<Pairs>,
    pub(super) range: Range<usize>,
    /// Words of a column of a panel: [`words`] of the steps, or of more that are packed with them.
    pub(super) words: usize,
}

/// Words of packed steps: as many, or half of them in pairs.
pub(super) fn words(pairs: Option<Pairs>, steps: usize) -> usize {
    if pairs.is_some() { steps.div_ceil(2) } else { steps }
}

impl Steps<'_> {
    /// Adds their products for these rows and the first columns of the panels to `out`, or writes them there.
    ///
    /// # Safety
    /// `out` has the columns in each of the rows, `stride` apart, initialised if they are added to.
    pub(super) unsafe fn add(
        &self,
        panels: &[f32],
        rows: Range<usize>,
        columns: usize,
        out: *mut f32,
        stride: usize,
        accumulate: bool,
    ) {
        let (wide, size) = (self.kernel.columns, self.words * self.kernel.columns);
        let tall = self.pairs.map_or(self.kernel.rows, |pairs| pairs.rows);
        let [begin, end] = self.pairs.map_or([(|| {}) as unsafe fn(); 2], |pairs| pairs.around);
        // SAFETY: the tiles between are on this thread, and are all that uses what this prepares.
        unsafe { begin() };
        for first in rows.clone().step_by(ROWS) {
            for (j, panel) in panels.chunks_exact(size).take(columns.div_ceil(wide)).enumerate() {
                let count = wide.min(columns - j * wide);
                for i in (first..rows.end.min(first + ROWS)).step_by(tall) {
                    let tile = Tile {
                        rows: tall.min(rows.end - i),
                        columns: count,
                        k: self.range.len(),
                        row_stride: self.left.row_stride,
                        column_stride: self.left.column_stride,
                        out_stride: stride,
                        accumulate,
                    };
                    // SAFETY: a tile of the block.
                    unsafe {
                        let out = out.add((i - rows.start) * stride + j * wide);
                        self.tile(tile, i, panel, out);
                    }
                }
            }
        }
        // SAFETY: after the last tile.
        unsafe { end() };
    }

    /// One tile, by way of a buffer where it has fewer columns than are computed.
    ///
    /// # Safety
    /// `out` has the tile's columns in each of its rows, initialised if it accumulates.
    unsafe fn tile(&self, tile: Tile, row: usize, panel: &[f32], out: *mut f32) {
        let half = self.kernel.columns / 2;
        let halves = self.pairs.map_or(self.kernel.halves, |pairs| pairs.halves);
        let computed = if halves && tile.columns <= half { half } else { self.kernel.columns };
        if tile.columns == computed {
            // SAFETY: the tile's columns are all that is computed.
            unsafe { self.run(&tile, row, panel, out) };
            return;
        }
        let mut buffer = [0f32; kernel::MAX_ROWS * pack::MAX_WIDTH];
        let buffered = Tile { out_stride: computed, accumulate: false, ..tile };
        // SAFETY: the buffer has all columns of every row.
        unsafe { self.run(&buffered, row, panel, buffer.as_mut_ptr()) };
        for (i, from) in buffer.chunks_exact(computed).enumerate().take(tile.rows) {
            for (j, &x) in from.iter().enumerate().take(tile.columns) {
                // SAFETY: the tile's own columns.
                unsafe {
                    let out = out.add(i * tile.out_stride + j);
                    *out = if tile.accumulate { *out + x } else { x };
                }
            }
        }
    }

    /// # Safety
    /// `out` has all columns that are computed in each of the tile's rows, initialised if it accumulates.
    unsafe fn run(&self, tile: &Tile, row: usize, panel: &[f32], out: *mut f32) {
        let left = self.left;
        let start = left.index(row, self.range.start);
        // SAFETY: the left matrix's elements lie within its data, those of these rows and steps too; the panel has the
        // steps' packed columns; the caller promises the rest.
        unsafe {
            match (left.data, self.pairs) {
                (Data::F32(data), _) => {
                    (self.kernel.tile)(tile, data.as_ptr().add(start), panel.as_ptr(), out);
                }
                (Data::BF16(data), Some(pairs)) => {
                    (pairs.tile)(tile, data.as_ptr().add(start).cast(), panel.as_ptr().cast(), out);
                }
                _ => {}
            }
        }
    }
}
