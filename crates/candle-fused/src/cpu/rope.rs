//! The rotation of a row's pairs.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

use super::lanes::{Element, Lanes};
use super::rows::{Row, RowLoop, map, pass};

/// The angles of the rows of `[b, heads, t, d]`; columns beyond the pairs are copied.
pub(crate) struct Rotation<'a> {
    /// `[t, w]` or, `per_batch`, `[b, t, w]`. For pairs `(i, i + w)` the tables have one angle for each; for pairs
    /// `(2i, 2i + 1)` one for each column, the sines of even columns negated.
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) width: usize,
    pub(crate) interleaved: bool,
    pub(crate) per_batch: bool,
    pub(crate) heads: usize,
    pub(crate) positions: usize,
    /// By the opposite angle.
    pub(crate) back: bool,
}

// SAFETY: `pass` and `map` write the columns that are turned, the last `map` the others.
unsafe impl RowLoop<1, 1, 0> for Rotation<'_> {
    type Statistic = ();

    #[inline(always)]
    fn row<L: Lanes, T: Element>(&self, row: Row<'_, T, 1, 1, 0>) {
        let ([x], [Some(y)]) = (row.inputs, row.outputs) else { return };
        let batch = if self.per_batch { row.index / (self.heads * self.positions) } else { 0 };
        let angles = (batch * self.positions + row.index % self.positions) * self.width;
        let tables = [&self.cos[angles..angles + self.width], &self.sin[angles..angles + self.width]];
        let sign = L::splat(if self.back { -1.0 } else { 1.0 });
        // Not asked for `soon`, though there is one pass: rows are short, what is asked for is some rows away, and the first-level
        // cache was the slower place for it (4.7 to 3.7 ms for 2048x4096).
        let (x, rest) = x.split_at(if self.interleaved { self.width } else { 2 * self.width });
        let (y, y_rest) = y.split_at(x.len());
        if self.interleaved {
            map(
                [x],
                tables,
                y,
                #[inline(always)]
                |[x]: [L; 1], [c, s]| x.mul_add(c, x.swap_pairs() * (s * sign)),
            );
        } else {
            let (u, v) = x.split_at(self.width);
            let (first, second) = y.split_at(self.width);
            let outputs = [Some(first), Some(second)];
            pass(
                [u, v],
                tables,
                outputs,
                [],
                #[inline(always)]
                |[u, v]: [L; 2], [c, s], []| {
                    let s = s * sign;
                    ([u.mul_add(c, -(v * s)), v.mul_add(c, u * s)], [])
                },
            );
        }
        map(
            [rest],
            [],
            y_rest,
            #[inline(always)]
            |[x]: [L; 1], []| x,
        );
    }
}
