//! Runs the launches of a [`Plan`] on the CPU, exactly, and reports every bug it sees.
//!
//! No Mac is needed to know that a kernel is free of races: this crate compiles the kernel's own text, with the
//! dialect's dictionary for the host, and runs every simulated thread of every threadgroup on its own stack. Each
//! load and store is checked before it happens.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let plan = candlewick_kernels::Plan { buffers: Vec::new(), launches: Vec::new() };
//! # let inputs: Vec<&[u8]> = Vec::new();
//! let simulator = kernel_simulator::Simulator::new()?;
//! let run = simulator.run(&plan, &inputs)?;
//! assert!(run.reports.is_empty(), "{}", run);
//! # Ok(()) }
//! ```
//!
//! # What it sees
//! Every [`Kind`] of bug, each with the place in the kernel's text, the buffer, the byte and the thread:
//!
//! - accesses outside a device buffer, a threadgroup array, or a private array of known size;
//! - reads of device or threadgroup memory that nothing has written, in this launch or an earlier one;
//! - writes to inputs, and elements of outputs that nobody writes;
//! - data races, within a threadgroup and between threadgroups. A barrier orders only the memory that its flags
//!   name: `mem_none` orders nothing, `mem_device` nothing in threadgroup memory. The verdict does not depend on
//!   the order in which threads happened to run;
//! - barriers and simd operations that not all threads reach by the same path through the text;
//! - vector accesses that are not aligned, and launches outside what every device allows;
//! - launches that give a kernel another number of buffers, or of parameter bytes, than it takes;
//! - division by zero, overlong shifts, signed overflow; loops that do not end.
//!
//! # What it does not see
//! - An overrun that stays in its buffer: the next row of a matrix, for example. The result shows it.
//! - Private variables that are read before they are written. They start with a pattern, so the result shows it.
//! - A struct that is passed by value straight from shared memory, which GCC does not announce. The dialect's own
//!   types are loaded in pieces, so that this does not arise.
//! - Code that did not run. Sizes on both sides of every limit are the tests' business.
//! - Apple's and NVIDIA's own arithmetic: fast math, flushed denormals, their `exp` and `log`.
//! - How fast anything is.
//!
//! # How it works
//! The text is compiled with `-fsanitize=thread` and linked without that library, so that every access to memory
//! calls a function of ours (`runtime/hooks.cpp`, `hooks.rs`), which checks it (`machine.rs`). The shadow of each
//! buffer (`shadow.rs`) knows what was written, by whom, and between which barriers. Each thread is a fiber
//! (`fiber.rs`), which runs until it reaches a barrier or a simd operation; when all others have, they meet
//! (`threadgroup.rs`) and go on. Which of the threads runs next is drawn at random. Compiled texts are kept in a
//! folder (`toolchain.rs`).
//!
//! The host needs a C++17 compiler, GCC 12 or clang 16 and later (`CXX`, or `c++`), and `addr2line` for line
//! numbers.

mod fiber;
mod findings;
mod hooks;
mod machine;
mod memory;
mod module;
mod pages;
mod random;
mod report;
mod run;
mod shadow;
mod threadgroup;
mod toolchain;

pub use report::{Kind, Report, Site, Thread};
pub use run::Run;

use candlewick_kernels::{Launch, Plan, Target};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use toolchain::Toolchain;

/// Why a plan could not be run at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no C++ compiler.
    #[error("the C++ compiler {} does not run ({reason}); set CXX to one that does", .program.display())]
    NoCompiler {
        /// What was tried.
        program: OsString,
        /// Why it failed.
        reason: String,
    },
    /// The folder for compiled kernels cannot be made.
    #[error("cannot make the folder {}", .folder.display())]
    Cache {
        /// The folder.
        folder: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A kernel's text does not compile.
    #[error("{kernel} does not compile:\n{log}")]
    Compile {
        /// The entry point of the launch.
        kernel: &'static str,
        /// What the compiler said.
        log: String,
    },
    /// The text has no kernel of the launch's name.
    #[error("the text of {0} has no KERNEL of that name")]
    NoKernel(&'static str),
    /// The inputs are not those of the plan.
    #[error("{what} must be {expected}, got {got}")]
    Input {
        /// What is at fault.
        what: String,
        /// What the plan says.
        expected: String,
        /// What was given.
        got: String,
    },
}

/// Runs plans. Compiles each kernel once, whatever the number of runs, of threads that ask, and of clones.
#[derive(Clone)]
pub struct Simulator {
    toolchain: Arc<Toolchain>,
    seed: u64,
    alignment: usize,
    step_limit: u64,
}

impl Simulator {
    /// A simulator that keeps its compiled kernels in cargo's target folder, if the program runs from there, and
    /// in the system's folder for temporary files otherwise.
    ///
    /// # Errors
    /// If there is no C++ compiler or the folder cannot be made.
    pub fn new() -> Result<Self, Error> {
        Self::with_cache(default_cache())
    }

    /// A simulator that keeps its compiled kernels in `folder`.
    ///
    /// # Errors
    /// If there is no C++ compiler or the folder cannot be made.
    pub fn with_cache(folder: PathBuf) -> Result<Self, Error> {
        Ok(Self { toolchain: Arc::new(Toolchain::new(folder)?), seed: 1, alignment: 16, step_limit: 1 << 30 })
    }

    /// Draws another order of the threads. The results of a correct kernel are the same for every seed.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Places inputs and outputs at a multiple of `bytes`, a power of two of at most 2048, and of nothing larger.
    /// Otherwise that is 16. Scratch, which every executor allocates by itself, stays at a multiple of 16.
    ///
    /// # Panics
    /// If `bytes` is something else.
    #[must_use]
    pub fn with_alignment(self, bytes: usize) -> Self {
        assert!(bytes.is_power_of_two() && bytes <= 2048, "{bytes} is no power of two up to 2048");
        Self { alignment: bytes, ..self }
    }

    /// Takes a launch for endless after this many accesses to shared memory. Otherwise that is 2³⁰.
    #[must_use]
    pub fn with_step_limit(self, accesses: u64) -> Self {
        Self { step_limit: accesses, ..self }
    }

    /// Runs a plan on the bytes of its inputs, in the order of its buffers.
    ///
    /// # Errors
    /// If the inputs do not fit the plan, or a kernel does not compile. Bugs of a kernel that runs are in the
    /// result's reports.
    pub fn run(&self, plan: &Plan, inputs: &[&[u8]]) -> Result<Run, Error> {
        self.run_text(plan, inputs, &|launch| launch.source(Target::Simulator))
    }

    /// The same for another text than the launches' own: a mutant's.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_text(
        &self,
        plan: &Plan,
        inputs: &[&[u8]],
        text: &dyn Fn(&Launch) -> String,
    ) -> Result<Run, Error> {
        run::run(self, plan, inputs, text)
    }
}

fn default_cache() -> PathBuf {
    // A test runs as target/<profile>/deps/<name>.
    let program = std::env::current_exe().unwrap_or_default();
    let deps = program.ancestors().find(|path| path.ends_with("deps"));
    let target = deps.and_then(|deps| deps.parent()?.parent());
    target.map_or_else(std::env::temp_dir, PathBuf::from).join("kernel-simulator")
}

/// A 32-bit size as an index: no host of this crate has shorter ones.
const fn index(size: u32) -> usize {
    size as usize
}

/// The index of a thread, of which there are at most 1024.
fn narrow(thread: usize) -> u32 {
    u32::try_from(thread).unwrap_or(u32::MAX)
}
