//! Plans of the rotary position embedding; the mathematics is at the head of `kernels/rope.metal`.

use crate::flat::FlatGrid;
use crate::launch::{KernelFile, Launch, Plan, PlanError, Storage};
use crate::params::{Buffers, Params, Tuning, define, flag, product, shape, size};
use crate::rows::width;

const OP: &str = "rope";

/// A rotary embedding of x `[batch, heads, positions, columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rope {
    /// Batch entries.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Positions.
    pub positions: usize,
    /// The head's dimension.
    pub columns: usize,
    /// Columns that turn, even, at most `columns`: twice the width of the cosine and sine tables.
    pub rotary: usize,
    /// x's strides over batch, heads and positions, in elements; its last dimension is contiguous.
    pub strides: [usize; 3],
    /// Whether each batch entry has its own table `[batch, positions, rotary / 2]`, not one `[positions, rotary / 2]`.
    pub batched_table: bool,
    /// Pairs are (2i, 2i + 1), not (i, i + rotary / 2).
    pub interleaved: bool,
    /// x's type and y's.
    pub storage: Storage,
    /// The tables' type: f32, or x's.
    pub table: Storage,
}

impl Rope {
    /// Contiguous strides for these dimensions.
    #[must_use]
    pub const fn contiguous(heads: usize, positions: usize, columns: usize) -> [usize; 3] {
        [heads * positions * columns, positions * columns, columns]
    }

    /// Inputs x (through its strides), cos, sin; output y, contiguous.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        self.plan(["x", "y"], 1.0, tuning)
    }

    /// Inputs grad (through `strides`, which are the gradient's here), cos, sin; output `grad_x`, contiguous.
    pub fn backward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        self.plan(["grad", "grad_x"], -1.0, tuning)
    }

    fn plan(&self, [from, to]: [&'static str; 2], direction: f32, tuning: Tuning) -> Result<Plan, PlanError> {
        if !self.rotary.is_multiple_of(2) || self.rotary > self.columns {
            return Err(shape(
                OP,
                "rotary columns",
                format!("even and at most {}", self.columns),
                self.rotary,
            ));
        }
        if self.table != Storage::F32 && self.table != self.storage {
            return Err(shape(
                OP,
                "table type",
                format!("float or {}", self.storage.word()),
                self.table.word(),
            ));
        }
        let dims = [self.batch, self.heads, self.positions, self.columns];
        let elements = product(OP, "x", &dims)?;
        let mut reach = usize::from(elements > 0);
        for (dim, stride) in dims.into_iter().zip(self.strides.into_iter().chain([1])) {
            let distance = product(OP, "x", &[dim.saturating_sub(1), stride])?;
            reach = if elements > 0 { reach.saturating_add(distance) } else { 0 };
        }
        let table = product(OP, "table", &[self.positions, self.rotary / 2])?;
        let tables = if self.batched_table { product(OP, "table", &[self.batch, table])? } else { table };

        let mut buffers = Buffers::default();
        let x = buffers.input(from, self.storage.element(), reach);
        let cosines = buffers.input("cos", self.table.element(), tables);
        let sines = buffers.input("sin", self.table.element(), tables);
        let y = buffers.output(to, self.storage.element(), elements);
        if elements == 0 {
            return Ok(buffers.plan(Vec::new()));
        }
        let [batch_stride, head_stride, position_stride] = self.strides;
        let multiples = [self.columns, self.rotary / 2, batch_stride, head_stride, position_stride];
        let width = width(self.storage, tuning, &multiples);
        let pair_units = self.rotary / 2 / width;
        let units_per_row = pair_units + (self.columns - self.rotary) / width;
        let units = elements / self.columns * units_per_row;
        let grid = FlatGrid::over(OP, units, tuning)?;
        let launch = Launch {
            kernel: "rope",
            file: KernelFile::Rope,
            storage: self.storage,
            defines: vec![
                define("WIDTH", width),
                define("TABLE", self.table.word()),
                flag("INTERLEAVED", self.interleaved),
            ],
            threadgroups: grid.threadgroups,
            threads: grid.threads,
            threadgroup_bytes: 0,
            arguments: vec![x, cosines, sines, y],
            params: Params::default()
                .u32(size(OP, "elements", units)?)
                .u32(size(OP, "columns", units_per_row)?)
                .u32(size(OP, "rotary columns", pair_units)?)
                .u32(size(OP, "heads", self.heads)?)
                .u32(size(OP, "positions", self.positions)?)
                .u32(size(OP, "columns", self.columns)?)
                .u32(size(OP, "rotary columns", self.rotary)?)
                .u32(size(OP, "batch stride", batch_stride)?)
                .u32(size(OP, "head stride", head_stride)?)
                .u32(size(OP, "position stride", position_stride)?)
                .u32(size(OP, "table", if self.batched_table { table } else { 0 })?)
                .f32(direction)
                .bytes(),
        };
        Ok(buffers.plan(vec![launch]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROPE: Rope = Rope {
        batch: 2,
        heads: 3,
        positions: 5,
        columns: 64,
        rotary: 32,
        strides: Rope::contiguous(3, 5, 64),
        batched_table: false,
        interleaved: false,
        storage: Storage::F16,
        table: Storage::F32,
    };

    #[test]
    fn units_cover_pairs_and_the_rest() {
        let plan = ROPE.forward(Tuning::default()).unwrap();
        let launch = &plan.launches[0];
        assert_eq!(launch.defines[0], ("WIDTH", "8".to_owned()));
        let units = u32::from_le_bytes(launch.params[..4].try_into().unwrap());
        // 16 pairs are 2 units, 32 columns that pass are 4 units, of 30 rows.
        assert_eq!(units, 30 * 6);
        assert!(launch.threadgroups[0] * launch.threads >= units);
    }

    #[test]
    fn a_transposed_view_is_read_in_place() {
        // [b, t, h, d] in memory, seen as [b, h, t, d].
        let view = Rope { strides: [3 * 5 * 64, 64, 3 * 64], ..ROPE };
        assert_eq!(view.forward(Tuning::default()).unwrap().buffers[0].len, 2 * 3 * 5 * 64);
    }

    #[test]
    fn shapes_are_checked() {
        assert!(Rope { rotary: 33, ..ROPE }.forward(Tuning::default()).is_err());
        assert!(Rope { rotary: 66, ..ROPE }.forward(Tuning::default()).is_err());
        assert!(Rope { table: Storage::BF16, ..ROPE }.forward(Tuning::default()).is_err());
    }
}
