//! Some steps of the common dimension, tile by tile.
//!
//! Sums are loaded and stored once for a block of steps, so that a few steps are best added to many others: those of LoRA's
//! update to its base product's.

use std::ops::Range;

use super::kernel::{self, Kernel, PairSteps, Pairs, Tile};
use super::matrix::{Data, Matrix};
use super::{pack, parts};

/// Rows of the left matrix that are taken with one panel after the other, to stay in the second-level cache.
pub(super) const ROWS: usize = 96;

/// What the steps of a piece and of a chunk are a multiple of, where more follow: those of a register of the matrix unit.
pub(super) const WHOLE_STEPS: usize = 32;

/// Some steps of a product whose right matrix is packed.
pub(super) struct Steps<'a> {
    pub(super) kernel: Kernel,
    pub(super) left: &'a Matrix<'a>,
    /// The left matrix's columns are those of so many parts, each of which is multiplied with the same steps.
    pub(super) parts: usize,
    /// Whether the right matrix is in parts, too.
    pub(super) split: bool,
    /// The tile for them, where they are packed in pairs.
    pub(super) pairs: Option<Pairs>,
    pub(super) range: Range<usize>,
    /// Words of a column of a panel: [`words`] of the steps, or of more that are packed with them.
    pub(super) words: usize,
}

/// Words of a column's packed steps: as many, or half of them in pairs, or the parts of whole lines.
pub(super) fn words(pairs: Option<Pairs>, split: bool, steps: usize) -> usize {
    match pairs {
        None => steps,
        Some(_) if split => steps.div_ceil(parts::LINE) * parts::words(1),
        Some(_) => steps.div_ceil(2),
    }
}

/// Steps of one product, or of pairs of two, which are added up together.
pub(super) struct Block<'a> {
    pub(super) steps: Steps<'a>,
    pub(super) then: Option<Steps<'a>>,
    /// Columns of the panels, with those that fill them up.
    pub(super) padded: usize,
}

/// A row, a panel, and some of a block's first steps.
type At<'a> = (usize, usize, &'a Range<usize>);

/// How many of a piece's steps are taken at a time, and for how many panels: all in f32 and of parts, which have enough to
/// multiply, and else about [`Pairs::chunk`] of pairs, in chunks of one size.
fn chunk(pairs: Option<Pairs>, parts: usize, steps: usize) -> (usize, usize) {
    match pairs {
        Some(pairs) if parts == 1 => {
            let chunks = steps.div_ceil(pairs.chunk).max(1);
            (steps.div_ceil(chunks).next_multiple_of(WHOLE_STEPS).max(WHOLE_STEPS), pairs.panels)
        }
        _ => (steps.max(1), 1),
    }
}

impl Block<'_> {
    /// Adds the products of these rows and the first columns of the panels, first those of `steps`, then of `then`, to `out`, or
    /// writes them there.
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
        let Steps { kernel, left, parts, pairs, ref range, .. } = self.steps;
        let wide = kernel.columns;
        let tall = pairs.map_or(kernel.rows, |pairs| pairs.rows);
        let [begin, end] = pairs.map_or([(|| {}) as unsafe fn(); 2], |pairs| pairs.around);
        // SAFETY: the tiles between are on this thread, and are all that uses what this prepares.
        unsafe { begin() };
        let (chunk, group) = chunk(pairs, parts, range.len());
        let panels_of = |first: usize| first..columns.div_ceil(wide).min(first + group);
        for first in rows.clone().step_by(ROWS) {
            for panel in (0..columns.div_ceil(wide)).step_by(group) {
                for from in (0..range.len()).step_by(chunk) {
                    let steps = from..range.len().min(from + chunk);
                    let down = (first..rows.end.min(first + ROWS)).step_by(tall);
                    for (i, j) in down.flat_map(|i| panels_of(panel).map(move |j| (i, j))) {
                        let tile = Tile {
                            rows: tall.min(rows.end - i),
                            columns: wide.min(columns - j * wide),
                            k: steps.len(),
                            row_stride: left.row_stride,
                            column_stride: left.column_stride,
                            out_stride: stride,
                            accumulate: accumulate || from > 0,
                        };
                        // SAFETY: a tile of the block.
                        unsafe {
                            let out = out.add((i - rows.start) * stride + j * wide);
                            self.tile(tile, (i, j, &steps), panels, out);
                        }
                    }
                }
            }
        }
        // SAFETY: after the last tile.
        unsafe { end() };
    }

    /// The tile at a row, a panel and some of the first steps, after the last of which come the second product's; by way of a
    /// buffer where it has fewer columns than are computed.
    ///
    /// # Safety
    /// `out` has the tile's columns in each of its rows, initialised if it accumulates.
    unsafe fn tile(&self, tile: Tile, at: At, panels: &[f32], out: *mut f32) {
        let Steps { kernel, pairs, .. } = self.steps;
        let half = kernel.columns / 2;
        let halves = pairs.map_or(kernel.halves, |pairs| pairs.halves);
        let computed = if halves && tile.columns <= half { half } else { kernel.columns };
        if tile.columns == computed {
            // SAFETY: the tile's columns are all that is computed.
            unsafe { self.run(&tile, at, panels, out) };
            return;
        }
        let mut buffer = [0f32; kernel::MAX_ROWS * pack::MAX_WIDTH];
        let buffered = Tile { out_stride: computed, accumulate: false, ..tile };
        // SAFETY: the buffer has all columns of every row.
        unsafe { self.run(&buffered, at, panels, buffer.as_mut_ptr()) };
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
    unsafe fn run(&self, tile: &Tile, (row, panel, some): At, panels: &[f32], out: *mut f32) {
        let Self { steps, then, padded } = self;
        let panel_of = |steps: &Steps| panel * steps.words * steps.kernel.columns;
        // SAFETY: the left matrices' elements lie within their data, those of these rows and steps too; a panel has the
        // steps' packed columns; the caller promises the rest.
        unsafe {
            let Some(pairs) = steps.pairs else {
                if let Data::F32(data) = steps.left.data {
                    let left = data.as_ptr().add(steps.left.index(row, steps.range.start));
                    (steps.kernel.tile)(tile, left, panels.as_ptr().add(panel_of(steps)), out);
                }
                return;
            };
            let of = |steps: &Steps, panel: usize, some: &Range<usize>| {
                let Data::BF16(data) = steps.left.data else { return None };
                Some(PairSteps {
                    left: data.as_ptr().add(steps.left.index(row, steps.range.start + some.start)).cast(),
                    row_stride: steps.left.row_stride,
                    parts: steps.parts,
                    part_stride: steps.left.columns / steps.parts,
                    split: steps.split.into(),
                    // Parts are taken in one chunk, from the panel's beginning.
                    right: panels.as_ptr().add(panel + some.start / 2 * steps.kernel.columns).cast(),
                    // Parts end with zeros on either side.
                    k: if steps.split { some.len().next_multiple_of(parts::LINE) } else { some.len() },
                })
            };
            let then = then.as_ref().filter(|_| some.end == steps.range.len());
            let second =
                then.and_then(|then| of(then, steps.words * padded + panel_of(then), &(0..then.range.len())));
            match (of(steps, panel_of(steps), some), second) {
                (Some(first), Some(second)) => (pairs.tile)(tile, &[first, second], out),
                (Some(first), None) => (pairs.tile)(tile, &[first], out),
                _ => {}
            }
        }
    }
}
