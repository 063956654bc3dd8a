//! Pairs of columns, turned by an angle of their position.

use crate::case::{Case, Size};
use crate::data::Tensor;
use candlewick_kernels::Storage;
use candlewick_kernels::rope::Rope;

const BATCH: usize = 2;
const HEADS: usize = 2;

pub fn cases(size: Size) -> Vec<Case> {
    let layouts = [false, true].into_iter();
    layouts.flat_map(|interleaved| [case(size, interleaved, false), case(size, interleaved, true)]).collect()
}

/// One layout, forward or backward. The other options go with them: the interleaved one turns half of the columns,
/// reads a transposed tensor, and has a table in x's type for each batch entry.
pub fn case(size: Size, interleaved: bool, backward: bool) -> Case {
    let Size { storage, rows: positions, columns, .. } = size;
    let turning = if interleaved { columns / 2 } else { columns };
    let rotary = turning / 2 * 2;
    let strides = if interleaved {
        [positions * HEADS * columns, columns, HEADS * columns]
    } else {
        Rope::contiguous(HEADS, positions, columns)
    };
    let table = if interleaved { storage } else { Storage::F32 };
    let op = Rope {
        batch: BATCH,
        heads: HEADS,
        positions,
        columns,
        rotary,
        strides,
        batched_table: interleaved,
        interleaved,
        storage,
        table,
    };
    let x = Tensor::random(1, BATCH * HEADS * positions * columns, 2.0, storage);
    let angles = positions * (rotary / 2) * if interleaved { BATCH } else { 1 };
    let angle = |index: usize| (index % 1000) as f64 * 0.37;
    let cosines = Tensor::new((0..angles).map(|index| angle(index).cos()), table.element());
    let sines = Tensor::new((0..angles).map(|index| angle(index).sin()), table.element());
    let plan = if backward { op.backward(size.tuning) } else { op.forward(size.tuning) }.unwrap();
    let direction = if backward { -1.0 } else { 1.0 };
    let name = if backward { "rope backward" } else { "rope forward" };
    let inputs = [&x.clone(), &cosines.clone(), &sines.clone()];
    Case::new(name, size, plan, &inputs, move |a| {
        let mut y = Vec::new();
        for row in 0..BATCH * HEADS * positions {
            let (batch, head, position) = (row / positions / HEADS, row / positions % HEADS, row % positions);
            let start = batch * strides[0] + head * strides[1] + position * strides[2];
            let mut out = x.values[start..start + columns].to_vec();
            let first_angle = (if interleaved { batch * positions } else { 0 } + position) * (rotary / 2);
            for pair in 0..rotary / 2 {
                let (low, high) =
                    if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + rotary / 2) };
                let (cos, sin) =
                    (cosines.values[first_angle + pair], sines.values[first_angle + pair] * direction);
                let (x0, x1) = (out[low], out[high]);
                out[low] = a.round(a.round(x0 * cos) - a.round(x1 * sin));
                out[high] = a.round(a.round(x1 * cos) + a.round(x0 * sin));
            }
            y.extend(out);
        }
        vec![y]
    })
}
