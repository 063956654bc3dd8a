//! A base product with a low-rank one in its sum, and what the kernels of `kernels/hopper/product.h` have in common.

use super::{BOX, Launch, ROOM_BESIDE, Text, Tiled, serves};
use crate::launch::Storage;
use crate::params::{Params, define, small};

/// Threadgroups that compute a part of the result together.
pub(super) const CLUSTER: usize = 2;
/// Rows of such a part.
pub(super) const PART_ROWS: usize = 256;
/// Columns of such a part.
pub(super) const PART_COLUMNS: usize = 256;
/// Two teams and the asker's.
pub(super) const THREADS: u32 = 384;
/// Tiles on their way in and out, and what is beside them.
pub(super) const SHARED_BYTES: u32 = {
    let (stages, columns) = (4, BOX * 4);
    stages * (2 * BOX + columns) * BOX * 2 + 4 * BOX * BOX + ROOM_BESIDE
};

/// What every text of them is told.
pub(super) fn defines(turned: bool, bias: bool) -> Vec<(&'static str, String)> {
    vec![define("TURNED", u8::from(turned)), define("BIAS", u8::from(bias))]
}

/// `y = L·R + l·r + bias` with `L [rows, inner]`, `R [inner, columns]`, `l [rows, rank]`, `r [rank, columns]`, all of one
/// 16-bit type, summed in f32 and rounded once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumOfProducts {
    /// Rows of `y`.
    pub rows: usize,
    /// Columns of `y`.
    pub columns: usize,
    /// What the base product sums over.
    pub inner: usize,
    /// What the low-rank product sums over.
    pub rank: usize,
    /// F16 or BF16.
    pub storage: Storage,
    /// Whether `R` and `r` lie row after row, else column after column.
    pub turned: bool,
    /// Whether there is a bias `[columns]`.
    pub bias: bool,
}

impl SumOfProducts {
    /// The launch: tiles of `L`, `R`, `l`, `r` and `y`; the bias' address, or any. `None` where it does not serve:
    /// another type, rows that tiles cannot have, or a shape for which the device's own products, one for the update and
    /// one that adds to it, take less time.
    #[must_use]
    pub fn launch(&self, multiprocessors: usize) -> Option<Launch> {
        let Self { rows, columns, inner, rank, storage, turned, bias } = *self;
        let clusters = multiprocessors / CLUSTER;
        self.serves(clusters).then(|| Launch {
            kernel: "sum_of_products",
            text: Text::SumOfProducts { storage, turned, bias },
            tiles: self.tiles().to_vec(),
            threadgroups: self.threadgroups(clusters),
            threads: THREADS,
            shared_bytes: SHARED_BYTES,
            at_once: false,
            params: [rows, columns, inner, rank]
                .into_iter()
                .fold(Params::default(), |params, size| params.u32(small(size)))
                .bytes(),
        })
    }

    /// Whether tiles can have the matrices, and the kernel pays.
    pub(super) fn serves(&self, clusters: usize) -> bool {
        let fits = [self.columns, self.inner, self.rank].into_iter().all(serves);
        let fits = fits && self.storage.bytes() == 2 && i32::try_from(self.rows).is_ok() && self.rows > 0;
        fits && clusters > 0 && self.pays(clusters)
    }

    /// Of `L`, `R`, `l`, `r` and `y`.
    pub(super) fn tiles(&self) -> [Tiled; 5] {
        let Self { rows, columns, inner, rank, turned, .. } = *self;
        let half = 2 * BOX;
        let right = |inner| {
            if turned {
                Tiled::Matrix { rows: inner, columns, tile: [BOX, BOX] }
            } else {
                Tiled::Matrix { rows: columns, columns: inner, tile: [half, BOX] }
            }
        };
        let left = |columns| Tiled::Matrix { rows, columns, tile: [half, BOX] };
        let result = Tiled::Matrix { rows, columns, tile: [BOX, BOX / 2] };
        [left(inner), right(inner), left(rank), right(rank), result]
    }

    /// Clusters take turns where there are more parts.
    pub(super) fn threadgroups(&self, clusters: usize) -> [u32; 2] {
        [small(self.parts().min(clusters) * CLUSTER), 1]
    }

    /// Parts of `y` that a cluster computes at a time.
    fn parts(&self) -> usize {
        self.rows.div_ceil(PART_ROWS) * self.columns.div_ceil(PART_COLUMNS)
    }

    /// Whether what rounds leave idle costs less than another launch and another pass over `y`. In steps of one part, each
    /// about 0.55 µs on an H100: a launch and its beginning 9, and a value written and read 1 / 800,000.
    fn pays(&self, clusters: usize) -> bool {
        const LAUNCH: usize = 9;
        const VALUES_A_STEP: usize = 800_000;
        let steps = self.inner.div_ceil(BOX as usize);
        let taken = self.parts().div_ceil(clusters).saturating_mul(steps);
        let values = self.rows.saturating_mul(self.columns);
        let needed = (values / (PART_ROWS * PART_COLUMNS)).saturating_mul(steps) / clusters;
        taken <= needed + LAUNCH + values / VALUES_A_STEP
    }
}

#[cfg(test)]
mod tests {
    use super::super::MOST_SHARED_BYTES;
    use super::*;

    const MULTIPROCESSORS: usize = 132;

    fn product(rows: usize, columns: usize, inner: usize) -> SumOfProducts {
        SumOfProducts { rows, columns, inner, rank: 16, storage: Storage::BF16, turned: false, bias: false }
    }

    #[test]
    fn a_product_has_as_many_clusters_as_it_has_parts_at_most() {
        let large = product(8192, 4096, 4096).launch(MULTIPROCESSORS).unwrap();
        assert_eq!(large.threadgroups, [132, 1]);
        assert!(large.shared_bytes <= MOST_SHARED_BYTES, "{}", large.shared_bytes);
        let small = product(1000, 520, 328).launch(MULTIPROCESSORS).unwrap();
        assert_eq!(small.threadgroups, [2 * 4 * 3, 1]);
        assert_eq!(small.tiles[1], Tiled::Matrix { rows: 520, columns: 328, tile: [128, 64] });
        let turned =
            SumOfProducts { turned: true, ..product(1000, 520, 328) }.launch(MULTIPROCESSORS).unwrap();
        assert_eq!(turned.tiles[1], Tiled::Matrix { rows: 328, columns: 520, tile: [64, 64] });
        assert_eq!(turned.tiles[3], Tiled::Matrix { rows: 16, columns: 520, tile: [64, 64] });
    }

    #[test]
    fn where_most_would_be_idle_the_devices_own_products_serve() {
        assert!(product(2048, 2048, 2048).launch(MULTIPROCESSORS).is_some());
        assert!(product(512, 4096, 4096).launch(MULTIPROCESSORS).is_none());
        assert!(product(256, 256, 4096).launch(MULTIPROCESSORS).is_none());
    }

    #[test]
    fn what_tiles_cannot_hold_is_declined() {
        let declined = |change: fn(&mut SumOfProducts)| {
            let mut product = product(1024, 512, 512);
            assert!(product.launch(MULTIPROCESSORS).is_some());
            change(&mut product);
            product.launch(MULTIPROCESSORS).is_none()
        };
        assert!(declined(|product| product.columns = 513));
        assert!(declined(|product| product.inner = 4));
        assert!(declined(|product| product.rank = 12));
        assert!(declined(|product| product.rows = 0));
        assert!(declined(|product| product.rank = 0));
        assert!(declined(|product| product.storage = Storage::F32));
        assert!(product(1024, 512, 512).launch(1).is_none());
    }
}
