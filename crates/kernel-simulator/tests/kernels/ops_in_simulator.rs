//! Every op × storage × {forward, backward}, at sizes on both sides of every limit of the kernels.

use crate::case::Size;
use crate::cases::{ALL, Cases, lora};
use candlewick_kernels::{Storage, Tuning};
use kernel_simulator::Simulator;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

/// Around one lane, one simdgroup, one threadgroup, what registers hold, and beyond.
const COLUMNS: [usize; 11] = [1, 31, 32, 33, 255, 256, 257, 1000, 4096, 4097, 8192];

/// Those sizes on a few rows, the longest first, and what they do not reach: many rows, rows that are walked, and
/// buffers that are not aligned.
fn sizes(storage: Storage) -> Vec<Size> {
    let mut sizes: Vec<_> = COLUMNS.iter().rev().map(|&columns| Size::new(storage, 3, columns)).collect();
    sizes.extend([33, 256].map(|columns| Size::new(storage, 260, columns)));
    // Several rows for a team of several simdgroups.
    sizes.push(Size::new(storage, 130, 1000));
    let small_groups = Tuning { max_threads: 64, ..Tuning::default() };
    sizes.extend([4097, 8192].map(|columns| Size { tuning: small_groups, ..Size::new(storage, 2, columns) }));
    // More partial rows than the simdgroups of a column sum read at once.
    sizes.push(Size { tuning: small_groups, ..Size::new(storage, 130, 33) });
    let unaligned = Tuning { aligned: false, ..Tuning::default() };
    sizes.extend([32, 1000].map(|columns| Size { tuning: unaligned, ..Size::new(storage, 3, columns) }));
    sizes
}

#[test]
fn every_op_is_clean_and_as_exact_as_it_must_be() {
    let start = Instant::now();
    let aligned = Simulator::new().unwrap();
    let unaligned = aligned.clone().with_alignment(4);
    let mut jobs: Vec<(Cases, Size)> = Vec::new();
    for (_, cases) in ALL {
        jobs.extend(Storage::ALL.into_iter().flat_map(sizes).map(|size| (cases, size)));
    }
    jobs.sort_by_key(|(_, size)| std::cmp::Reverse(size.elements()));
    let next = AtomicUsize::new(0);
    let work = || {
        let mut outcomes = Vec::new();
        while let Some(&(cases, size)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let simulator = if size.tuning.aligned { &aligned } else { &unaligned };
            outcomes.extend(cases(size).iter().map(|case| case.check(simulator)));
        }
        outcomes
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let outcomes: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let faults: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err().cloned()).collect();
    let seconds = start.elapsed().as_secs_f64();
    println!("{} cases of {} ops in {seconds:.1} s on {threads} threads", outcomes.len(), ALL.len());
    assert!(faults.is_empty(), "{} cases fail:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn the_order_of_threads_changes_no_bit() {
    let simulator = Simulator::new().unwrap();
    let other = simulator.clone().with_seed(2);
    for (op, cases) in ALL {
        // Attention has no kernels for f32.
        let storage = if op == "attention" { Storage::BF16 } else { Storage::F32 };
        for case in cases(Size::new(storage, 3, 257)) {
            let run = |simulator: &Simulator| simulator.run(&case.plan, &case.inputs()).unwrap().outputs;
            assert_eq!(run(&simulator), run(&other), "{op}: {}", case.name);
        }
    }
}

/// A kernel in which each output element takes its own product of x with A would multiply
/// `rows · inputs · rank · outputs` times.
#[test]
fn lora_multiplies_x_by_a_once() {
    let simulator = Simulator::new().unwrap();
    for (rows, inputs, outputs) in [(1, 1000, 256), (3, 257, 96), (64, 256, 512)] {
        let size = Size::new(Storage::F32, rows, inputs);
        let op = lora::peft(size, outputs);
        let case = lora::forward(size, op);
        let counted = case.check(&simulator).unwrap();
        println!(
            "lora_delta of {rows} rows, {inputs} -> {outputs}, rank {}: {counted} multiplications, {} in x·A",
            op.rank,
            rows * inputs * op.rank
        );
        assert_eq!(counted, op.forward_multiplications() as u64, "{}", case.name);
    }
}
