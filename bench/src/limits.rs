//! How fast this processor copies.

use std::time::Instant;

use rayon::prelude::*;

/// Bytes read and written per second by all threads together, copying buffers of this many bytes in all.
pub fn copy_rate(bytes: usize) -> f64 {
    let threads = rayon::current_num_threads();
    let part = (bytes / 2 / threads).max(1024);
    let mut buffers: Vec<(Vec<u8>, Vec<u8>)> = (0..threads).map(|_| (vec![1; part], vec![0; part])).collect();
    // Small buffers are copied several times between two looks at the clock.
    let repeats = ((64 << 20) / (part * threads)).max(1);
    let mut best = 0f64;
    for _ in 0..12 {
        let start = Instant::now();
        buffers.par_iter_mut().with_max_len(1).for_each(|(from, to)| {
            for _ in 0..repeats {
                std::hint::black_box(&mut *to).copy_from_slice(std::hint::black_box(&*from));
            }
        });
        let bytes = crate::ops::as_f64(2 * part * threads * repeats);
        best = best.max(bytes / start.elapsed().as_secs_f64());
    }
    best
}
