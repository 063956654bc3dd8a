//! `candlewick-bench`: candlewick's operations and training steps beside the competition, every result waited for and
//! checked. docs/benchmarks.md explains the method.

mod case;
mod chart;
mod compare;
mod engine;
mod error;
mod judge;
mod limits;
mod machine;
mod measure;
mod ops;
mod options;
mod oracle;
mod protocol;
mod report;
mod runner;
mod seed_method;
mod session;
mod statistics;
mod tensors;
mod training;
mod trainings;

#[cfg(test)]
mod tests;

use std::process::ExitCode;

use clap::Parser;
use error::{Error, Result};
use mimalloc::MiMalloc;

/// As in `wick`. What `wick` tells it by calls, the runner tells it by environment variables.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    options::Cli::parse().run().unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}
