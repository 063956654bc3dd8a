//! Products of tiles, whose values the lanes of a simdgroup hold as the dialect's `simulator.h` says: as Metal does.

use super::{Fiber, LANES, Operand, Status, Tiles};
use candlewick_kernels::launch::TILE;

/// Values of a tile that a lane holds.
const HELD: usize = TILE * TILE / LANES;
/// The distances between lanes that hold the same rows.
pub(super) const SAME_ROWS: [usize; 2] = [1, 8];

type Tile = [[f32; TILE]; TILE];

/// Where the value `e` of a lane lies, in a tile.
fn place(lane: usize, e: usize) -> (usize, usize) {
    let row = ((lane / 4) & 4) + lane / 2 % 4;
    let column = ((lane / 4) & 2) * 2 + lane % 2 * 2;
    (row + e / 4 * 8, column + e / 2 % 2 * 8 + e % 2)
}

/// `sum += left · right`, one term after the other, with one rounding for each.
pub(super) fn multiply(lanes: &mut [Fiber]) {
    let [mut sum, mut left, mut right] = [Tile::default(); 3];
    let operands: Vec<Tiles> = lanes.iter().filter_map(|lane| operand(lane.status)).collect();
    for (lane, tiles) in operands.iter().enumerate() {
        for e in 0..HELD {
            let (row, column) = place(lane, e);
            // SAFETY: each points to `HELD` floats on the stack of a fiber that waits for this product, which
            // `hooks::tile_multiply` was given.
            unsafe {
                sum[row][column] = tiles.sum.add(e).read();
                left[row][column] = tiles.left.add(e).read();
                right[row][column] = tiles.right.add(e).read();
            }
        }
    }
    for (sums, factors) in sum.iter_mut().zip(&left) {
        for (factor, row) in factors.iter().zip(&right) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum = factor.mul_add(*value, *sum);
            }
        }
    }
    for (lane, tiles) in operands.iter().enumerate() {
        for e in 0..HELD {
            let (row, column) = place(lane, e);
            // SAFETY: as above; nobody else runs meanwhile.
            unsafe { tiles.sum.add(e).write(sum[row][column]) };
        }
    }
    for lane in lanes {
        lane.status = Status::Ready;
    }
}

fn operand(status: Status) -> Option<Tiles> {
    match status {
        Status::Waiting(_, Operand::Tiles(tiles)) => Some(tiles),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_lanes_hold_a_tile_once_and_rows_at_their_distances() {
        let mut places = BTreeSet::new();
        for lane in 0..LANES {
            for e in 0..HELD {
                places.insert(place(lane, e));
                for distance in SAME_ROWS {
                    assert_eq!(place(lane, e).0, place(lane ^ distance, e).0);
                }
            }
        }
        assert_eq!(places.len(), TILE * TILE);
    }
}
