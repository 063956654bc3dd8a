//! The kernels of candlewick-kernels in the simulator: right ones are clean and exact, wrong ones are caught.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "oracles round to f32 and count in floats on purpose"
)]

mod case;
mod cases;
mod data;
mod mutant_list;
mod mutants;
mod ops_in_simulator;
mod oracle;
