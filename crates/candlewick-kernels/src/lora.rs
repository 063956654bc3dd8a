//! Plans of LoRA's update, its gradients and its dropout; the mathematics is at the heads of `kernels/lora.metal`,
//! `kernels/lora_gradient.metal` and `kernels/lora_mask.metal`.

use crate::column_sum;
use crate::flat::FlatGrid;
use crate::launch::{Element, KernelFile, Launch, MAX_THREADGROUP_BYTES, Plan, PlanError, Storage};
use crate::params::{Buffers, Params, Tuning, define, flag, groups, product, shape, size, small};
use crate::rows::{LANES, width};

const OP: &str = "lora";
/// Ranks that one simdgroup projects at a time.
const RANK_TILE: usize = 4;
/// What a thread asks of B before S is there, where a block has one row: f32 registers, and ranks of a column.
const UP_REGISTERS: usize = 32;
const UP_TILE: usize = 8;
/// f32 registers that `lora_update` sums in.
const UPDATE_SUMS: usize = 32;
/// f32 registers that `lora_gradient` sums in.
const GRADIENT_SUMS: usize = 64;
/// Rows that a part of `lora_gradient` has at least, and the most parts.
const ROWS_PER_PART: usize = 4;
const MOST_PARTS: usize = 64;
const GRADIENT_THREADS: usize = 128;

/// How one factor lies in memory, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FactorStrides {
    /// From one rank to the next.
    pub rank: usize,
    /// From one column (an input for A, an output for B) to the next.
    pub column: usize,
}

/// Dropout on x; see `kernels/common/philox.h`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability of zero, in 0..1.
    pub p: f32,
    /// The key.
    pub seed: u64,
}

/// `y = scaling · drop(x) · Aᵀ · B (+ base)`, with A seen as `[rank, inputs]` and B as `[rank, outputs]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    /// The product of all of x's dimensions but the last.
    pub rows: usize,
    /// x's last dimension.
    pub inputs: usize,
    /// y's last dimension.
    pub outputs: usize,
    /// The rank.
    pub rank: usize,
    /// The type of x, base and y.
    pub storage: Storage,
    /// The type of A and B: x's, or f32 beside a 16-bit x.
    pub adapter: Storage,
    /// How A lies in memory.
    pub a: FactorStrides,
    /// How B lies in memory.
    pub b: FactorStrides,
    /// Multiplies the update.
    pub scaling: f32,
    /// Dropout on x.
    pub dropout: Option<Dropout>,
    /// Whether a base product is added: to y in forward, to x's gradient in backward.
    pub base: bool,
}

/// Which gradients a backward computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraGradients {
    /// x's.
    pub x: bool,
    /// A's, contiguous in the order of A's strides: the smaller stride is the inner dimension.
    pub a: bool,
    /// B's, likewise.
    pub b: bool,
}

impl FactorStrides {
    /// `[rank, columns]`, contiguous: PEFT's A, and the other layout's B.
    #[must_use]
    pub const fn rank_major(columns: usize) -> Self {
        Self { rank: columns, column: 1 }
    }

    /// `[columns, rank]`, contiguous: PEFT's B, and the other layout's A.
    #[must_use]
    pub const fn column_major(rank: usize) -> Self {
        Self { rank: 1, column: rank }
    }

    fn reach(self, rank: usize, columns: usize) -> Result<usize, PlanError> {
        if rank == 0 || columns == 0 {
            return Ok(0);
        }
        let ranks = product(OP, "factor", &[rank - 1, self.rank])?;
        let columns = product(OP, "factor", &[columns - 1, self.column])?;
        Ok(ranks.saturating_add(columns).saturating_add(1))
    }

    /// The contiguous layout whose inner dimension is this one's.
    fn packed(self, rank: usize, columns: usize) -> Self {
        if self.rank < self.column { Self::column_major(rank) } else { Self::rank_major(columns) }
    }
}

/// Where dropout falls in `lora.metal`.
#[derive(Clone, Copy)]
enum DropoutPlace {
    None = 0,
    Input = 1,
    Output = 2,
}

/// One `lora_update`: from `inputs` columns through factor `down` to `outputs` columns through factor `up`.
struct Update {
    inputs: usize,
    outputs: usize,
    down: FactorStrides,
    up: FactorStrides,
    dropout: DropoutPlace,
    base: bool,
    /// Writes y.
    writes_y: bool,
    /// Writes S.
    keeps_s: bool,
}

impl Lora {
    /// Inputs x, a, b, base (if any); output y. base and y may be one buffer.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        self.check()?;
        let mut buffers = Buffers::default();
        let [x, a, b] = self.inputs(&mut buffers)?;
        let outputs = product(OP, "y", &[self.rows, self.outputs])?;
        let element = self.storage.element();
        let base = if self.base { buffers.input("base", element, outputs) } else { x };
        let y = buffers.output("y", element, outputs);
        let update = Update {
            inputs: self.inputs,
            outputs: self.outputs,
            down: self.a,
            up: self.b,
            dropout: self.place(DropoutPlace::Input),
            base: self.base,
            writes_y: true,
            keeps_s: false,
        };
        // S is not kept: x stands in its place.
        let launch = self.update(&update, vec![x, a, b, base, y, x], tuning)?;
        Ok(buffers.plan(if outputs == 0 { Vec::new() } else { vec![launch] }))
    }

    /// Inputs x, a, b, grad, base (if any: the base product's gradient for x); outputs `grad_x`, `grad_a`, `grad_b`,
    /// those wanted. base and `grad_x` may be one buffer.
    pub fn backward(&self, wanted: LoraGradients, tuning: Tuning) -> Result<Plan, PlanError> {
        self.check()?;
        let mut buffers = Buffers::default();
        let [x, a, b] = self.inputs(&mut buffers)?;
        let (element, adapter) = (self.storage.element(), self.adapter.element());
        let grad = buffers.input("grad", element, product(OP, "grad", &[self.rows, self.outputs])?);
        let inputs = product(OP, "x", &[self.rows, self.inputs])?;
        let base = if self.base && wanted.x { buffers.input("base", element, inputs) } else { x };
        let grad_x = wanted.x.then(|| buffers.output("grad_x", element, inputs));
        let [a_len, b_len] =
            [self.inputs, self.outputs].map(|columns| product(OP, "factor", &[self.rank, columns]));
        let (a_len, b_len) = (a_len?, b_len?);
        let grad_a = wanted.a.then(|| buffers.output("grad_a", adapter, a_len));
        let grad_b = wanted.b.then(|| buffers.output("grad_b", adapter, b_len));
        let projected = product(OP, "S", &[self.rows, self.rank])?;
        let mut launches = Vec::new();

        if wanted.x || wanted.a {
            let kept = wanted.a.then(|| buffers.scratch("projected_grad", Element::F32, projected));
            let update = Update {
                inputs: self.outputs,
                outputs: self.inputs,
                down: self.b,
                up: self.a,
                dropout: self.place(DropoutPlace::Output),
                base: self.base && wanted.x,
                writes_y: wanted.x,
                keeps_s: wanted.a,
            };
            let arguments = vec![grad, b, a, base, grad_x.unwrap_or(x), kept.unwrap_or(x)];
            if self.rows > 0 {
                launches.push(self.update(&update, arguments, tuning)?);
            }
            if let (Some(kept), Some(grad_a)) = (kept, grad_a) {
                let ends = [kept, x, grad_a];
                self.gradient(&mut buffers, &mut launches, self.a, self.inputs, true, ends, tuning)?;
            }
        }
        if let Some(grad_b) = grad_b {
            let kept = buffers.scratch("projected_x", Element::F32, projected);
            let update = Update {
                inputs: self.inputs,
                outputs: self.outputs,
                down: self.a,
                up: self.b,
                dropout: self.place(DropoutPlace::Input),
                base: false,
                writes_y: false,
                keeps_s: true,
            };
            if self.rows > 0 {
                launches.push(self.update(&update, vec![x, a, b, x, x, kept], tuning)?);
            }
            let ends = [kept, grad, grad_b];
            self.gradient(&mut buffers, &mut launches, self.b, self.outputs, false, ends, tuning)?;
        }
        Ok(buffers.plan(launches))
    }

    /// Input x; output x with dropout, but for the factor `1 / (1 − p)`, in which what is kept is too small. Both may be one
    /// buffer.
    pub fn mask(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        self.check()?;
        let elements = product(OP, "x", &[self.rows, self.inputs])?;
        let mut buffers = Buffers::default();
        let x = buffers.input("x", self.storage.element(), elements);
        let y = buffers.output("masked", self.storage.element(), elements);
        if elements == 0 {
            return Ok(buffers.plan(Vec::new()));
        }
        let width = width(self.storage, tuning, &[self.inputs]);
        let chunks = elements / width;
        let grid = FlatGrid::over(OP, chunks, tuning)?;
        let params = Params::default().u32(size(OP, "chunks", chunks)?);
        Ok(buffers.plan(vec![Launch {
            kernel: "lora_mask",
            file: KernelFile::LoraMask,
            storage: self.storage,
            defines: vec![define("WIDTH", width)],
            threadgroups: grid.threadgroups,
            threads: grid.threads,
            threadgroup_bytes: 0,
            arguments: vec![x, y],
            params: self.dropout_mask(params).f32(1.0).bytes(),
        }]))
    }

    /// Multiplications of the forward: x·A once per row, then the rank update, then the scaling.
    #[must_use]
    pub const fn forward_multiplications(&self) -> usize {
        self.rows * self.rank * (self.inputs + self.outputs)
    }

    fn check(&self) -> Result<(), PlanError> {
        if self.rank == 0 || self.rank * 4 > MAX_THREADGROUP_BYTES as usize {
            return Err(shape(OP, "rank", "in 1..=8192", self.rank));
        }
        if self.adapter != Storage::F32 && self.adapter != self.storage {
            return Err(shape(OP, "adapter type", "x's or float", self.adapter.word()));
        }
        if let Some(dropout) = self.dropout
            && !(0.0..1.0).contains(&dropout.p)
        {
            return Err(shape(OP, "dropout", "in 0..1", dropout.p));
        }
        Ok(())
    }

    fn inputs(&self, buffers: &mut Buffers) -> Result<[usize; 3], PlanError> {
        let adapter = self.adapter.element();
        Ok([
            buffers.input("x", self.storage.element(), product(OP, "x", &[self.rows, self.inputs])?),
            buffers.input("a", adapter, self.a.reach(self.rank, self.inputs)?),
            buffers.input("b", adapter, self.b.reach(self.rank, self.outputs)?),
        ])
    }

    fn place(&self, place: DropoutPlace) -> DropoutPlace {
        if self.dropout.is_some_and(|dropout| dropout.p > 0.0) { place } else { DropoutPlace::None }
    }

    /// The fields of `DropoutParams`.
    fn dropout_params(&self, params: Params) -> Params {
        self.dropout_mask(params).f32(1.0 / (1.0 - self.dropout.map_or(0.0, |dropout| dropout.p)))
    }

    /// Those but for the scale.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "p is below 1, so the threshold is below 2^32; the seed is split into its halves"
    )]
    fn dropout_mask(&self, params: Params) -> Params {
        let Dropout { p, seed } = self.dropout.unwrap_or(Dropout { p: 0.0, seed: 0 });
        let threshold = (f64::from(p) * 4_294_967_296.0).round() as u32;
        params.u32(seed as u32).u32((seed >> 32) as u32).u32(threshold)
    }

    /// Rows of a row block: enough blocks to fill a device first, then rows that share A and B, as many as a
    /// simdgroup's sums have registers for.
    fn block_rows(&self, rank_tile: usize) -> usize {
        let rows = match self.rows {
            0..=128 => 1,
            129..=1024 => 4,
            _ => UPDATE_SUMS / rank_tile,
        };
        rows.min(8).min(MAX_THREADGROUP_BYTES as usize / 4 / self.rank)
    }

    fn update(&self, update: &Update, arguments: Vec<usize>, tuning: Tuning) -> Result<Launch, PlanError> {
        let vector = self.storage.vector();
        let width = width(self.storage, tuning, &[update.inputs, update.outputs]);
        let along =
            |contiguous: usize, other: usize| width > 1 && contiguous == 1 && other.is_multiple_of(vector);
        let ranks_fit = self.rank.is_multiple_of(width);
        let a_along_columns = width == 1 || along(update.down.column, update.down.rank);
        let a_along_ranks = !a_along_columns && ranks_fit && along(update.down.rank, update.down.column);
        let tile = if a_along_ranks { width } else { RANK_TILE.min(self.rank) };
        let rows = self.block_rows(tile);
        let tiles = self.rank.div_ceil(tile);
        // One block of few rows gets the whole device's attention; many blocks share it.
        let busy = if rows == 1 { 32 } else { 8 };
        let across = update.inputs.max(update.outputs).div_ceil(LANES * width);
        let useful = match rows {
            // Slices enough that a simdgroup has one step or two.
            1 => across.max((update.inputs.div_ceil(LANES * width) * tiles).min(16)),
            _ => across,
        };
        let simdgroups = useful.clamp(1, busy).min(tuning.max_simdgroups());
        let room = MAX_THREADGROUP_BYTES as usize / 4 / (rows * self.rank);
        let slices = (simdgroups / tiles).max(1).min(update.inputs.div_ceil(LANES * width)).min(room).max(1);
        let b_along_ranks = ranks_fit && along(update.up.rank, update.up.column);
        let is_single = rows == 1 && b_along_ranks && !matches!(update.dropout, DropoutPlace::Output);
        let up_width = if is_single { 1 } else { width };
        // Registers that wait for S are registers that rows could sum in.
        let up_tile = match rows {
            _ if b_along_ranks && !is_single => width,
            1 => (UP_REGISTERS / up_width).min(UP_TILE).min(self.rank),
            _ => 1,
        };
        let up_columns = match rows {
            1 => (UP_REGISTERS / (up_width * up_tile))
                .min(update.outputs.div_ceil(simdgroups * LANES * up_width))
                .max(1),
            _ => 1,
        };
        let params = Params::default()
            .u32(size(OP, "rows", self.rows)?)
            .u32(size(OP, "inputs", update.inputs)?)
            .u32(size(OP, "outputs", update.outputs)?)
            .u32(size(OP, "stride", update.down.rank)?)
            .u32(size(OP, "stride", update.down.column)?)
            .u32(size(OP, "stride", update.up.rank)?)
            .u32(size(OP, "stride", update.up.column)?)
            .f32(self.scaling);
        Ok(Launch {
            kernel: "lora_update",
            file: KernelFile::Lora,
            storage: self.storage,
            defines: vec![
                define("ADAPTER", self.adapter.word()),
                define("WIDTH", width),
                define("RANK", self.rank),
                define("ROWS", rows),
                define("RANK_TILE", tile),
                define("UP_WIDTH", up_width),
                define("UP_TILE", up_tile),
                define("UP_COLUMNS", up_columns),
                define("SLICES", slices),
                define("SIMDGROUPS", simdgroups),
                flag("A_ALONG_COLUMNS", a_along_columns),
                flag("A_ALONG_RANKS", a_along_ranks),
                flag("B_ALONG_COLUMNS", along(update.up.column, update.up.rank)),
                flag("B_ALONG_RANKS", b_along_ranks),
                define("DROPOUT", update.dropout as u8),
                flag("BASE", update.base),
                flag("UPDATE", update.writes_y),
                flag("KEEP", update.keeps_s),
            ],
            threadgroups: [groups(OP, self.rows.div_ceil(rows))?.max(1), 1, 1],
            threads: small(simdgroups * LANES),
            threadgroup_bytes: small(slices * rows * self.rank * 4),
            arguments,
            params: self.dropout_params(params).bytes(),
        })
    }

    /// The two launches of one factor's gradient, from S and the tensor it is multiplied with.
    #[expect(clippy::too_many_arguments, reason = "one caller for each factor")]
    fn gradient(
        &self,
        buffers: &mut Buffers,
        launches: &mut Vec<Launch>,
        strides: FactorStrides,
        columns: usize,
        dropout: bool,
        [kept, x, total]: [usize; 3],
        tuning: Tuning,
    ) -> Result<(), PlanError> {
        let width = width(self.storage, tuning, &[columns]);
        let parts = self.rows.div_ceil(ROWS_PER_PART).clamp(1, MOST_PARTS).min(self.rows);
        let sums = product(OP, "gradient", &[self.rank, columns])?;
        let partial = buffers.scratch("partial", Element::F32, product(OP, "partial sums", &[parts, sums])?);
        let tile = (GRADIENT_SUMS / width.max(4)).min(self.rank);
        let threads = GRADIENT_THREADS.min(columns.div_ceil(width).next_multiple_of(LANES));
        let packed = strides.packed(self.rank, columns);
        let place = if dropout { self.place(DropoutPlace::Input) } else { DropoutPlace::None };
        let params = Params::default()
            .u32(size(OP, "rows", self.rows)?)
            .u32(size(OP, "columns", columns)?)
            .u32(small(parts))
            .u32(size(OP, "stride", packed.rank)?)
            .u32(size(OP, "stride", packed.column)?);
        if self.rows > 0 && columns > 0 {
            launches.push(Launch {
                kernel: "lora_gradient",
                file: KernelFile::LoraGradient,
                storage: self.storage,
                defines: vec![
                    define("WIDTH", width),
                    define("RANK", self.rank),
                    define("RANK_TILE", tile),
                    define("DROPOUT", place as u8),
                ],
                threadgroups: [
                    groups(OP, columns.div_ceil(threads * width))?,
                    small(parts),
                    small(self.rank.div_ceil(tile)),
                ],
                threads: small(threads),
                threadgroup_bytes: 0,
                arguments: vec![kept, x, partial],
                params: self.dropout_params(params).bytes(),
            });
        }
        launches.extend(column_sum::launch(OP, self.adapter, tuning, parts, sums, (partial, total), None)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peft(rows: usize, dim: usize, rank: usize) -> Lora {
        Lora {
            rows,
            inputs: dim,
            outputs: dim,
            rank,
            storage: Storage::F32,
            adapter: Storage::F32,
            a: FactorStrides::rank_major(dim),
            b: FactorStrides::column_major(rank),
            scaling: 2.0,
            dropout: None,
            base: false,
        }
    }

    fn defined(launch: &Launch, name: &str) -> usize {
        launch.defines.iter().find(|define| define.0 == name).unwrap().1.parse().unwrap()
    }

    #[test]
    fn every_row_has_one_block() {
        for rows in [1, 64, 127, 128, 129, 1000, 1024, 1025, 4099] {
            for rank in [1, 3, 8, 64, 1024, 8192] {
                let plan = peft(rows, 512, rank).forward(Tuning::default()).unwrap();
                plan.check().unwrap();
                let launch = &plan.launches[0];
                let block = defined(launch, "ROWS");
                assert_eq!(launch.threadgroups, [small(rows.div_ceil(block)), 1, 1]);
                assert_eq!(launch.threads as usize, defined(launch, "SIMDGROUPS") * LANES);
                assert!(defined(launch, "SLICES") >= 1);
            }
        }
    }

    #[test]
    fn gradients_that_nobody_wants_cost_nothing() {
        let count = |x, a, b| {
            let plan = peft(64, 256, 8).backward(LoraGradients { x, a, b }, Tuning::default()).unwrap();
            plan.check().unwrap();
            plan.launches.len()
        };
        assert_eq!(count(false, false, false), 0);
        assert_eq!(count(true, false, false), 1);
        assert_eq!(count(false, true, false), 3);
        assert_eq!(count(false, false, true), 3);
        assert_eq!(count(true, true, true), 6);
    }

    #[test]
    fn bad_options_are_named() {
        let error = |lora: Lora| lora.forward(Tuning::default()).unwrap_err().to_string();
        assert_eq!(error(peft(1, 8, 0)), "lora: rank must be in 1..=8192, got 0");
        let dropout = Some(Dropout { p: 1.0, seed: 0 });
        assert_eq!(error(Lora { dropout, ..peft(1, 8, 8) }), "lora: dropout must be in 0..1, got 1");
        let mixed = Lora { adapter: Storage::F16, ..peft(1, 8, 8) };
        assert_eq!(error(mixed), "lora: adapter type must be x's or float, got half");
    }
}
