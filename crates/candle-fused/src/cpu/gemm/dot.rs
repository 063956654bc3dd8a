//! A product of few rows, as in generation: each column of the right matrix is read once, where it lies, and multiplied
//! with every row. Packing would cost more than it saves.

use super::super::dispatch::Isa;
use super::matrix::{Data, Matrix};

/// The most rows that are multiplied so.
pub(super) const ROWS: usize = 4;

const LANES: usize = 32;
/// Elements that are widened at a time.
const PIECE: usize = 256;

/// Whether a column of `right` is contiguous.
pub(super) fn serves(right: &Matrix) -> bool {
    right.row_stride == 1
}

/// Adds the products of the `rows` rows of `left`, `k` elements each, with the column `j` of `right` to `sums`.
pub(super) fn add(isa: Isa, left: &[f32], rows: usize, right: &Matrix, j: usize, sums: &mut [f32; ROWS]) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 {
        // SAFETY: the processor has AVX2 and FMA.
        unsafe { add_avx2(left, rows, right, j, sums) };
        return;
    }
    let _ = isa;
    add_to::<{ cfg!(target_arch = "aarch64") }>(left, rows, right, j, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn add_avx2(left: &[f32], rows: usize, right: &Matrix, j: usize, sums: &mut [f32; ROWS]) {
    add_to::<true>(left, rows, right, j, sums);
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled for the caller's instructions")]
fn add_to<const FUSED: bool>(left: &[f32], rows: usize, right: &Matrix, j: usize, sums: &mut [f32; ROWS]) {
    let k = right.rows;
    if k == 0 {
        return;
    }
    let start = right.index(0, j);
    let mut wide = [0f32; PIECE];
    for first in (0..k).step_by(PIECE) {
        let count = PIECE.min(k - first);
        let column = match right.data {
            Data::F32(data) => &data[start + first..][..count],
            data => {
                data.widen(start + first, &mut wide[..count]);
                &wide[..count]
            }
        };
        for (row, sum) in left.chunks_exact(k).take(rows).zip(sums.iter_mut()) {
            *sum += dot::<FUSED>(&row[first..first + count], column);
        }
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled for the caller's instructions")]
fn dot<const FUSED: bool>(x: &[f32], y: &[f32]) -> f32 {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let multiply_add = |x: f32, y: f32, sum: f32| if FUSED { x.mul_add(y, sum) } else { x * y + sum };
    let mut lanes = [0f32; LANES];
    for (x, y) in x.iter().zip(y) {
        for (lane, (&x, &y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane = multiply_add(x, y, *lane);
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane = multiply_add(x, y, *lane);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}
