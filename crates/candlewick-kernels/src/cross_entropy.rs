//! Plans of cross-entropy; the mathematics is at the head of `kernels/cross_entropy.metal`.

use crate::launch::{Element, KernelFile, Launch, Plan, PlanError, SIMDGROUP_SIZE, Storage};
use crate::params::{Buffers, Params, Tuning, define, groups, product, shape, size};
use crate::rows::{LANES, RowGeometry, SCRATCH_BYTES};

const OP: &str = "cross_entropy";
/// Bytes that the mean keeps of every simdgroup beside the scratch.
const COUNTS_BYTES: u32 = 2 * SIMDGROUP_SIZE * 4;

/// The value of the output `invalid` when every target is a class or ignored.
pub const NO_ROW: u32 = u32::MAX;

/// Mean cross-entropy of logits `[rows, columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrossEntropy {
    /// Rows of the logits.
    pub rows: usize,
    /// Classes.
    pub columns: usize,
    /// The logits' type, and their gradient's.
    pub storage: Storage,
    /// The targets' type: [`Element::I64`] or [`Element::U32`].
    pub targets: Element,
    /// The target that does not count.
    pub ignore_index: Option<i64>,
}

impl CrossEntropy {
    /// Inputs logits, targets; outputs `loss` `[1]`, `lse` `[rows, 2]` (the maximum, and the sum of `exp(x − maximum)`),
    /// `counted` `[1]` (all f32), and `invalid` `[1]` (u32): the first row whose target is neither a class nor ignored,
    /// or [`NO_ROW`]. Where there is one, the loss is NaN.
    pub fn forward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let elements = self.elements()?;
        let mut buffers = Buffers::default();
        let logits = buffers.input("logits", self.storage.element(), elements);
        let targets = buffers.input("targets", self.targets, self.rows);
        let loss = buffers.output("loss", Element::F32, 1);
        let lse = buffers.output("lse", Element::F32, product(OP, "lse", &[self.rows, 2])?);
        let counted = buffers.output("counted", Element::F32, 1);
        let invalid = buffers.output("invalid", Element::U32, 1);
        let losses = buffers.scratch("losses", Element::F32, self.rows);
        let mut launches = Vec::new();
        if self.rows > 0 {
            let geometry = RowGeometry::walking(self.rows, self.columns, self.storage, tuning);
            let arguments = vec![logits, targets, lse, losses];
            launches.push(self.launch("cross_entropy_rows", geometry, self.rows, arguments)?);
        }
        let simdgroups = self.rows.div_ceil(LANES).clamp(1, tuning.max_simdgroups());
        let one_team = RowGeometry { width: 1, items: 0, simdgroups, teams: 1 };
        let arguments = vec![losses, targets, loss, counted, invalid];
        launches.push(self.launch("cross_entropy_mean", one_team, 1, arguments)?);
        Ok(buffers.plan(launches))
    }

    /// Inputs logits, targets, lse and counted (the forward's), grad `[1]` (f32, the loss' gradient); output `grad_logits`.
    pub fn backward(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        let elements = self.elements()?;
        let mut buffers = Buffers::default();
        let logits = buffers.input("logits", self.storage.element(), elements);
        let targets = buffers.input("targets", self.targets, self.rows);
        let lse = buffers.input("lse", Element::F32, product(OP, "lse", &[self.rows, 2])?);
        let counted = buffers.input("counted", Element::F32, 1);
        let grad = buffers.input("grad", Element::F32, 1);
        let grad_logits = buffers.output("grad_logits", self.storage.element(), elements);
        if elements == 0 {
            return Ok(buffers.plan(Vec::new()));
        }
        let geometry = RowGeometry::walking(self.rows, self.columns, self.storage, tuning);
        let arguments = vec![logits, targets, lse, counted, grad, grad_logits];
        let launch = self.launch("cross_entropy_backward", geometry, self.rows, arguments)?;
        Ok(buffers.plan(vec![launch]))
    }

    fn elements(&self) -> Result<usize, PlanError> {
        if !matches!(self.targets, Element::I64 | Element::U32) {
            return Err(shape(OP, "targets", "i64 or u32", self.targets.word()));
        }
        product(OP, "logits", &[self.rows, self.columns])
    }

    fn launch(
        &self,
        kernel: &'static str,
        geometry: RowGeometry,
        teams: usize,
        arguments: Vec<usize>,
    ) -> Result<Launch, PlanError> {
        let mut defines = geometry.defines();
        let target = if self.targets == Element::I64 { "INT64" } else { "uint" };
        defines.push(define("TARGET", target));
        let [low, high] = {
            let bytes = self.ignore_index.unwrap_or(0).to_le_bytes();
            [
                u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            ]
        };
        Ok(Launch {
            kernel,
            file: KernelFile::CrossEntropy,
            storage: self.storage,
            defines,
            threadgroups: [groups(OP, teams.div_ceil(geometry.teams))?, 1, 1],
            threads: geometry.threads(),
            threadgroup_bytes: SCRATCH_BYTES + COUNTS_BYTES,
            arguments,
            params: Params::default()
                .u32(size(OP, "rows", self.rows)?)
                .u32(size(OP, "classes", self.columns)?)
                .u32(low)
                .u32(high)
                .u32(u32::from(self.ignore_index.is_some()))
                .bytes(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ignored_class_keeps_its_sign() {
        let op = CrossEntropy {
            rows: 4,
            columns: 10,
            storage: Storage::F32,
            targets: Element::I64,
            ignore_index: Some(-100),
        };
        let plan = op.forward(Tuning::default()).unwrap();
        let params = &plan.launches[0].params;
        assert_eq!(i64::from_le_bytes(params[8..16].try_into().unwrap()), -100);
        assert_eq!(params[16], 1);
    }
}
