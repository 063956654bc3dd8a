//! The second stage of a gradient that sums over rows: see `kernels/column_sum.metal`.

use crate::launch::{KernelFile, Launch, PlanError, SIMDGROUP_SIZE, Storage};
use crate::params::{Params, Tuning, define, groups, size, small};
use crate::rows::LANES;

/// Partial rows that one simdgroup of the sum takes, at least.
const ROWS_PER_STRIP: usize = 8;
/// The most simdgroups that share the rows of one stretch of columns.
const MOST_STRIPS: usize = 32;

/// Sums `parts` rows (none gives zeros) of `columns` floats in the buffer `partial` into the buffer `total`, stored
/// as `storage`; a second pair of buffers likewise. `None` where there is no column.
pub(crate) fn launch(
    op: &'static str,
    storage: Storage,
    tuning: Tuning,
    parts: usize,
    columns: usize,
    (partial, total): (usize, usize),
    second: Option<(usize, usize)>,
) -> Result<Option<Launch>, PlanError> {
    if columns == 0 {
        return Ok(None);
    }
    let most = MOST_STRIPS.min(tuning.max_simdgroups());
    let strips = small(parts.div_ceil(ROWS_PER_STRIP).clamp(1, most));
    // Where there is no second pair the first stands in its place.
    let (second_partial, second_total) = second.unwrap_or((partial, total));
    Ok(Some(Launch {
        kernel: "column_sum",
        file: KernelFile::ColumnSum,
        storage,
        defines: vec![define("STRIPS", strips)],
        threadgroups: [groups(op, columns.div_ceil(LANES))?, 1 + u32::from(second.is_some()), 1],
        threads: strips * SIMDGROUP_SIZE,
        threadgroup_bytes: strips * SIMDGROUP_SIZE * 4,
        arguments: vec![partial, total, second_partial, second_total],
        params: Params::default().u32(size(op, "rows", parts)?).u32(size(op, "columns", columns)?).bytes(),
    }))
}
