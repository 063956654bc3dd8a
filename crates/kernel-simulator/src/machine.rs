//! The state of a plan's run: device memory, the launch, the running threadgroup, and what was found.
//!
//! Everything here is ordinary, single-threaded state. [`run`](crate::run) decides who runs, the
//! [`hooks`](crate::hooks) call in from the kernel's code, and both go through these methods.

use crate::fiber::{Stacks, Suspended};
use crate::findings::{Finding, Findings};
use crate::index;
use crate::memory::{DeclarationError, DeviceMemory, Region};
use crate::module::{Entry, same_image};
use crate::random::Random;
use crate::report::Kind;
use crate::shadow::{Conflict, Fault, Stamp};
use crate::threadgroup::{Next, Threadgroup};
use candlewick_kernels::launch::SIMDGROUP_SIZE;
use std::ops::Range;

/// Whether the running thread may go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[must_use]
pub(crate) enum Flow {
    #[default]
    Continue,
    /// The run is over: what comes next cannot be simulated.
    Stop,
}

/// One access that is about to happen.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    pub(crate) address: usize,
    pub(crate) bytes: usize,
    pub(crate) write: bool,
    /// Where in the kernel's code.
    pub(crate) caller: usize,
}

impl Access {
    fn describe(&self) -> String {
        format!("{} {} bytes", if self.write { "writes" } else { "reads" }, self.bytes)
    }

    fn range(&self) -> Range<usize> {
        self.address..self.address.saturating_add(self.bytes)
    }
}

/// A launch with everything bound.
pub(crate) struct Bound {
    pub(crate) entry: Entry,
    /// The addresses of the buffers, and at the end that of `params`.
    pub(crate) arguments: Vec<usize>,
    /// The parameter bytes, aligned as their fields need.
    #[expect(dead_code, reason = "kept for the address in `arguments`")]
    pub(crate) params: Vec<u32>,
    pub(crate) threads: u32,
    /// Threadgroup memory that the launch says its kernel declares.
    pub(crate) threadgroup_bytes: u32,
}

/// The dialect's `SimulatorContext`: what a thread knows about itself.
#[repr(C)]
pub(crate) struct Context {
    threadgroup: [u32; 3],
    thread: [u32; 3],
    threads: [u32; 3],
    lane: u32,
    simdgroup: u32,
    simdgroups: u32,
}

/// The state of a plan's run.
pub(crate) struct Machine {
    pub(crate) device: DeviceMemory,
    pub(crate) findings: Findings,
    pub(crate) multiplications: u64,
    pub(crate) threadgroup: Threadgroup,
    /// Nothing more can be simulated.
    pub(crate) stopped: bool,
    launch: Option<Bound>,
    random: Random,
    stacks: Stacks,
    scheduler: Suspended,
    /// The stack of the thread that runs.
    private: Range<usize>,
    /// Accesses to shared memory so far, and those after which the launch is taken for endless.
    steps: u64,
    step_limit: u64,
}

impl Machine {
    /// A machine for launches of at most `threads` threads to a threadgroup.
    pub(crate) fn new(device: DeviceMemory, threads: u32, seed: u64, step_limit: u64) -> Self {
        Self {
            device,
            findings: Findings::default(),
            multiplications: 0,
            threadgroup: Threadgroup::new(),
            stopped: false,
            launch: None,
            random: Random::new(seed),
            stacks: Stacks::new(index(threads)),
            scheduler: Suspended::NOWHERE,
            private: 0..0,
            steps: 0,
            step_limit,
        }
    }

    /// Begins a launch, after all others are complete: the order in which its threadgroups run.
    pub(crate) fn begin_launch(&mut self, launch: Bound, grid: [u32; 3]) -> Vec<[u32; 3]> {
        self.device.next_launch();
        self.launch = Some(launch);
        self.steps = 0;
        let [nx, ny, nz] = grid;
        let rows = (0..nz).flat_map(|z| (0..ny).map(move |y| (y, z)));
        let mut order: Vec<_> = rows.flat_map(|(y, z)| (0..nx).map(move |x| [x, y, z])).collect();
        self.random.shuffle(&mut order);
        order
    }

    /// Begins a threadgroup, whose threads start at `entry`.
    pub(crate) fn begin_threadgroup(&mut self, position: [u32; 3], entry: extern "C" fn() -> !) {
        let threads = self.launch.as_ref().map_or(0, |launch| index(launch.threads));
        let stacks = &mut self.stacks;
        self.threadgroup.begin(position, (0..threads).map(|thread| stacks.start(thread, entry)));
    }

    /// The thread that runs next, unless the threadgroup is complete or cannot go on.
    pub(crate) fn next(&mut self) -> Option<usize> {
        if self.stopped {
            return None;
        }
        match self.threadgroup.next(&mut self.random) {
            Next::Run(thread) => Some(thread),
            Next::Done => None,
            Next::Diverged(finding) => {
                self.findings.add(finding);
                self.stopped = true;
                None
            }
        }
    }

    /// The switch that continues `thread`: where the scheduler is saved, and what to continue.
    pub(crate) fn resume(&mut self, thread: usize) -> (*mut Suspended, Suspended) {
        self.private = self.stacks.addresses(thread);
        (&raw mut self.scheduler, self.threadgroup.resume(thread))
    }

    /// The switch that returns from the running thread to the scheduler.
    pub(crate) fn suspend(&mut self) -> (*mut Suspended, Suspended) {
        (self.threadgroup.suspend(), self.scheduler)
    }

    /// What the running thread has to call, and with what.
    pub(crate) fn entry(&mut self) -> Option<(Entry, *mut usize, Context)> {
        let current = self.threadgroup.current();
        let launch = self.launch.as_mut()?;
        let context = Context {
            threadgroup: current.threadgroup,
            thread: [current.thread, 0, 0],
            threads: [launch.threads, 1, 1],
            lane: current.thread % SIMDGROUP_SIZE,
            simdgroup: current.thread / SIMDGROUP_SIZE,
            simdgroups: launch.threads / SIMDGROUP_SIZE,
        };
        Some((launch.entry, launch.arguments.as_mut_ptr(), context))
    }

    /// Checks an access that the running thread is about to make.
    pub(crate) fn access(&mut self, access: Access) -> Flow {
        if self.private.contains(&access.address) {
            return Flow::Continue;
        }
        self.steps += 1;
        if self.steps > self.step_limit {
            let detail = format!("still running after {} memory accesses", self.step_limit);
            return self.stop(Finding::new(Kind::Endless, detail), access.caller);
        }
        let thread = self.threadgroup.current().thread;
        let number = self.threadgroup.number;
        let epochs = self.threadgroup.epochs;
        let memory = &mut self.threadgroup.memory;
        let (region, epoch) = if memory.contains(access.address) {
            (memory.find(&access.range()), epochs.threadgroup)
        } else {
            (self.device.find(&access.range()), epochs.device)
        };
        let Some(region) = region else {
            return self.stray(access);
        };
        let now = Stamp { threadgroup: number, thread, epoch };
        let offset = access.address - region.addresses.start;
        let checked = if !access.write {
            region.shadow.read(offset, access.bytes, now)
        } else if !region.read_only {
            region.shadow.write(offset, access.bytes, now)
        } else {
            let finding = Finding::new(Kind::WriteToInput, access.describe());
            let finding = finding.in_buffer(&region.name, distance(offset));
            // The write would spoil what the result is compared with.
            return self.stop(finding, access.caller);
        };
        if let Err((offset, fault)) = checked {
            let finding = explain(fault, access, now).in_buffer(&region.name, distance(offset));
            self.report(finding, access.caller);
        }
        Flow::Continue
    }

    /// An access that belongs to no buffer and not to the thread's own stack.
    fn stray(&mut self, access: Access) -> Flow {
        if !access.write && same_image(access.address, access.caller) {
            // A constant beside the kernel's code.
            return Flow::Continue;
        }
        let near = if self.threadgroup.memory.contains(access.address) {
            self.threadgroup.memory.nearest(access.address)
        } else {
            self.device.nearest(access.address)
        };
        let what = access.describe();
        let finding = if let Some(region) = near {
            let offset = distance(access.address) - distance(region.addresses.start);
            let detail = format!("{what}, and it holds {}", region.addresses.len());
            Finding::new(Kind::OutOfBounds, detail).in_buffer(&region.name, offset)
        } else if self.stacks.all().contains(&access.address) {
            Finding::new(Kind::OutOfBounds, format!("{what} of another thread's private memory"))
        } else {
            Finding::new(Kind::OutOfBounds, format!("{what} of memory that is nobody's"))
        };
        self.stop(finding, access.caller)
    }

    /// Checks the alignment of a vector access that the running thread is about to make.
    pub(crate) fn vector(&mut self, access: Access) {
        if access.address.is_multiple_of(access.bytes) {
            return;
        }
        let beyond = access.address % access.bytes;
        let detail = format!("{}, {beyond} beyond a multiple of that", access.describe());
        let mut finding = Finding::new(Kind::Misaligned, detail);
        let first = access.address..access.address.saturating_add(1);
        if let Some(Region { name, addresses, .. }) = self.device.find(&first) {
            finding = finding.in_buffer(name, distance(access.address - addresses.start));
        }
        self.report(finding, access.caller);
    }

    /// The address of the next threadgroup array that the running thread declares, or none if the run is over.
    pub(crate) fn declare(&mut self, name: &str, bytes: usize, caller: usize) -> Option<usize> {
        let order = self.threadgroup.next_array();
        let finding = match self.threadgroup.memory.declare(order, name, bytes) {
            Ok(address) => {
                let total = self.threadgroup.memory.bytes();
                let said = self.launch.as_ref().map_or(0, |launch| launch.threadgroup_bytes);
                if total > index(said) {
                    let detail = format!("{total} bytes of threadgroup memory, where the launch says {said}");
                    self.report(Finding::new(Kind::Limit, detail), caller);
                }
                return Some(address);
            }
            Err(DeclarationError::Differs(other)) => {
                let detail = format!("declares {bytes} bytes, where another thread declared {other}");
                Finding::new(Kind::DivergentBarrier, detail)
            }
            Err(DeclarationError::TooLarge(total)) => {
                let detail = format!("{total} bytes of threadgroup memory, more than every device has");
                Finding::new(Kind::Limit, detail)
            }
        };
        self.report(finding.in_buffer(name, 0), caller);
        self.stopped = true;
        None
    }

    /// Adds a finding of the running thread.
    pub(crate) fn report(&mut self, finding: Finding, caller: usize) {
        let stack = std::iter::once(caller).chain(self.threadgroup.callers()).collect();
        self.findings.add(finding.at(stack, self.threadgroup.current()));
    }

    /// Adds a finding after which nothing more can be simulated.
    pub(crate) fn stop(&mut self, finding: Finding, caller: usize) -> Flow {
        self.report(finding, caller);
        self.stopped = true;
        Flow::Stop
    }
}

/// Puts a fault that the shadow found into words.
fn explain(fault: Fault, access: Access, now: Stamp) -> Finding {
    let Fault::Race(conflict) = fault else {
        return Finding::new(Kind::Uninitialised, access.describe());
    };
    let did = match conflict {
        Conflict::Write(_) => "wrote",
        Conflict::Read(_) => "read",
    };
    let other = conflict.stamp();
    if other.threadgroup == now.threadgroup {
        let same = now.thread / SIMDGROUP_SIZE == other.thread / SIMDGROUP_SIZE;
        let whose = if same { "the same simdgroup" } else { "another simdgroup" };
        let detail = format!(
            "{} that thread {} of {whose} {did}, and no barrier orders the two",
            access.describe(),
            other.thread
        );
        Finding::new(Kind::Race, detail)
    } else {
        let detail =
            format!("{} that another threadgroup {did} (its thread {})", access.describe(), other.thread);
        Finding::new(Kind::GridRace, detail)
    }
}

/// An offset for people: addresses fit.
fn distance(offset: usize) -> i64 {
    i64::try_from(offset).unwrap_or(i64::MAX)
}
