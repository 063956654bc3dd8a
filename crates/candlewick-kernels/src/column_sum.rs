//! The second stage of a gradient that sums over rows: see `kernels/column_sum.metal`.

use crate::launch::{KernelFile, Launch, PlanError, SIMDGROUP_SIZE, Storage};
use crate::params::{Params, Tuning, define, groups, size, small};
use crate::rows::LANES;

/// Sums `parts` rows of `columns` floats in the buffer `partial` into the buffer `total`, stored as `storage`.
pub(crate) fn launch(
    op: &'static str,
    storage: Storage,
    tuning: Tuning,
    parts: usize,
    columns: usize,
    (partial, total): (usize, usize),
) -> Result<Launch, PlanError> {
    let strips = small(parts.div_ceil(8).clamp(1, tuning.max_simdgroups().min(16)));
    Ok(Launch {
        kernel: "column_sum",
        file: KernelFile::ColumnSum,
        storage,
        defines: vec![define("STRIPS", strips)],
        threadgroups: [groups(op, columns.div_ceil(LANES))?, 1, 1],
        threads: strips * SIMDGROUP_SIZE,
        threadgroup_bytes: strips * SIMDGROUP_SIZE * 4,
        arguments: vec![partial, total],
        params: Params::default().u32(size(op, "rows", parts)?).u32(size(op, "columns", columns)?).bytes(),
    })
}
