//! The kernels of candlewick-kernels in the simulator: right ones are clean and exact, wrong ones are caught.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::float_cmp,
    reason = "oracles round to other types on purpose, and hold integers as floats"
)]
#![expect(clippy::unwrap_used, reason = "all of this is test code")]

mod case;
mod cases;
mod data;
mod mutant_list;
mod mutants;
mod ops_in_simulator;
mod oracle;
