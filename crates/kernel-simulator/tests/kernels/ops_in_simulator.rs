//! Every op × storage × {forward, backward}, at sizes on both sides of every limit of the kernels.

use crate::cases::{ALL, Cases};
use candlewick_kernels::Storage;
use kernel_simulator::Simulator;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

/// Around one lane, one simdgroup, one threadgroup, the registers, and beyond them.
const COLUMNS: [usize; 11] = [1, 31, 32, 33, 255, 256, 257, 1000, 4096, 4097, 8192];

#[test]
fn every_op_is_clean_and_as_exact_as_it_must_be() {
    let start = Instant::now();
    let simulator = Simulator::new().unwrap();
    let mut jobs: Vec<(&str, Cases, Storage, usize)> = Vec::new();
    // The longest first, so that the threads end together.
    for columns in COLUMNS.into_iter().rev() {
        for (op, cases) in ALL {
            jobs.extend(Storage::ALL.map(|storage| (op, cases, storage, columns)));
        }
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut outcomes = Vec::new();
        while let Some(&(_, cases, storage, columns)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            outcomes.extend(cases(storage, columns).iter().map(|case| case.check(&simulator)));
        }
        outcomes
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let outcomes: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let faults: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    println!("{} cases of {} ops in {:.1} s", outcomes.len(), ALL.len(), start.elapsed().as_secs_f64());
    assert!(faults.is_empty(), "{} cases fail:\n{}", faults.len(), faults.iter().map(|fault| format!("{fault}\n")).collect::<String>());
}
