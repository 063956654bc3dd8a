//! The threads of one threadgroup: who may run, where they meet, and what divides them.

use crate::fiber::Suspended;
use crate::findings::Finding;
use crate::memory::ThreadgroupMemory;
use crate::narrow;
use crate::random::Random;
use crate::report::{Kind, Thread};
use candlewick_kernels::launch::SIMDGROUP_SIZE;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};

mod tiles;

/// Lanes of a simdgroup.
pub(crate) const LANES: usize = SIMDGROUP_SIZE as usize;

/// Barriers passed, for each kind of memory.
#[derive(Clone, Copy, Default)]
pub(crate) struct Epochs {
    pub(crate) device: u32,
    pub(crate) threadgroup: u32,
}

impl Epochs {
    /// Passes a barrier with the dialect's `mem_flags`: it orders the memory it names and no other.
    fn pass(&mut self, flags: u32) {
        self.device += flags & 1;
        self.threadgroup += (flags >> 1) & 1;
    }
}

/// A place in the text as the dialect passes it: a C string in the kernel's image, and a line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub(crate) file: *const c_char,
    pub(crate) line: u32,
}

/// A barrier or simd operation, and the calls that led there. Threads meet when theirs are equal: the same
/// helper called in two branches is two meetings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Meeting {
    pub(crate) what: What,
    pub(crate) place: Place,
    pub(crate) path: u64,
}

/// What threads meet for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum What {
    /// A barrier of the threadgroup, with its `mem_flags`.
    Barrier(u32),
    /// An operation of the simdgroup, by the dialect's number.
    Simd(u32),
    /// A product of tiles.
    TileMultiply,
}

/// What a thread brings to a meeting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operand {
    Nothing,
    /// A value's bits.
    Bits(u32),
    Tiles(Tiles),
}

/// The values of three tiles that a lane holds: `sum += left · right`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tiles {
    pub(crate) sum: *mut f32,
    pub(crate) left: *const f32,
    pub(crate) right: *const f32,
}

/// What keeps a thread from running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Status {
    Ready,
    /// It waits for the others, with its operand.
    Waiting(Meeting, Operand),
    /// Its kernel has returned.
    Finished,
}

/// One simulated thread.
struct Fiber {
    suspended: Suspended,
    status: Status,
    /// What its last simd operation gave.
    result: u32,
    /// Threadgroup arrays it has declared.
    arrays: usize,
    /// The calls it is in: the address of each caller, and the hash of the path up to there.
    calls: Vec<(usize, u64)>,
}

/// What the scheduler is to do next.
pub(crate) enum Next {
    /// Let this thread run.
    Run(usize),
    /// The threadgroup is complete.
    Done,
    /// Its threads wait for each other in different places.
    Diverged(Finding),
}

/// The running threadgroup.
pub(crate) struct Threadgroup {
    /// Its position in the grid.
    pub(crate) position: [u32; 3],
    /// A number that no other threadgroup of the launch has.
    pub(crate) number: u32,
    pub(crate) memory: ThreadgroupMemory,
    /// Barriers that its threads have passed.
    pub(crate) epochs: Epochs,
    fibers: Vec<Fiber>,
    /// Threads that may run, the next one last.
    ready: Vec<usize>,
    /// The thread that runs.
    current: usize,
}

impl Threadgroup {
    pub(crate) fn new() -> Self {
        Self {
            position: [0; 3],
            number: 0,
            memory: ThreadgroupMemory::new(),
            epochs: Epochs::default(),
            fibers: Vec::new(),
            ready: Vec::new(),
            current: 0,
        }
    }

    /// Begins a threadgroup: fresh threadgroup memory, and every thread before its first instruction.
    pub(crate) fn begin(&mut self, position: [u32; 3], threads: impl Iterator<Item = Suspended>) {
        self.position = position;
        self.number += 1;
        self.epochs = Epochs::default();
        self.memory.clear();
        self.fibers.clear();
        self.fibers.extend(threads.map(Fiber::new));
        self.ready.clear();
        self.ready.extend(0..self.fibers.len());
    }

    /// The thread that runs.
    pub(crate) fn current(&self) -> Thread {
        Thread { threadgroup: self.position, thread: narrow(self.current) }
    }

    pub(crate) fn resume(&mut self, thread: usize) -> Suspended {
        self.current = thread;
        self.fibers[thread].suspended
    }

    /// Where the running thread is to be saved.
    pub(crate) fn suspend(&mut self) -> *mut Suspended {
        &raw mut self.fibers[self.current].suspended
    }

    /// Notes that the running thread enters a function, called from `caller`.
    pub(crate) fn enter(&mut self, caller: usize) {
        let path = self.path() ^ caller as u64;
        let path = path.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.fibers[self.current].calls.push((caller, path ^ (path >> 29)));
    }

    /// Notes that the running thread leaves a function.
    pub(crate) fn leave(&mut self) {
        self.fibers[self.current].calls.pop();
    }

    fn path(&self) -> u64 {
        self.fibers[self.current].calls.last().map_or(0, |&(_, path)| path)
    }

    /// The running thread's callers, from the innermost outwards.
    pub(crate) fn callers(&self) -> impl Iterator<Item = usize> {
        self.fibers[self.current].callers()
    }

    /// Counts the running thread's threadgroup arrays: how many it declared before this one.
    pub(crate) fn next_array(&mut self) -> usize {
        let fiber = &mut self.fibers[self.current];
        fiber.arrays += 1;
        fiber.arrays - 1
    }

    /// Notes what the running thread waits for. It is suspended next.
    pub(crate) fn wait(&mut self, what: What, operand: Operand, place: Place) {
        let meeting = Meeting { what, place, path: self.path() };
        self.fibers[self.current].status = Status::Waiting(meeting, operand);
    }

    /// What the running thread's simd operation gave.
    pub(crate) fn result(&self) -> u32 {
        self.fibers[self.current].result
    }

    /// Notes that the running thread's kernel has returned. It is suspended for good.
    pub(crate) fn finish(&mut self) {
        self.fibers[self.current].status = Status::Finished;
    }

    /// Chooses who runs next, after letting those meet who wait for nobody else.
    pub(crate) fn next(&mut self, random: &mut Random) -> Next {
        if self.ready.is_empty() {
            self.meet_simdgroups();
        }
        if self.ready.is_empty() {
            self.meet_threadgroup();
        }
        match random.take(&mut self.ready) {
            Some(thread) => Next::Run(thread),
            None if self.fibers.iter().all(|fiber| fiber.status == Status::Finished) => Next::Done,
            None => Next::Diverged(self.divergence()),
        }
    }

    /// Completes the simd operation of every simdgroup whose lanes all wait for the same one.
    fn meet_simdgroups(&mut self) {
        for (simdgroup, lanes) in self.fibers.chunks_mut(LANES).enumerate() {
            match common(lanes).map(|meeting| meeting.what) {
                Some(What::Simd(operation)) => combine(operation, lanes),
                Some(What::TileMultiply) => tiles::multiply(lanes),
                _ => continue,
            }
            let first = simdgroup * LANES;
            self.ready.extend(first..first + lanes.len());
        }
    }

    /// Passes the barrier, if all threads wait for the same one.
    fn meet_threadgroup(&mut self) {
        if let Some(Meeting { what: What::Barrier(flags), .. }) = common(&self.fibers) {
            self.epochs.pass(flags);
            for fiber in &mut self.fibers {
                fiber.status = Status::Ready;
            }
            self.ready.extend(0..self.fibers.len());
        }
    }

    /// Describes where everybody stands: in the first simdgroup that is divided, or else in all of them.
    fn divergence(&self) -> Finding {
        let divided = self.fibers.chunks(LANES).position(|lanes| !together(lanes));
        let (whose, first, fibers) = match divided {
            Some(simdgroup) => {
                let first = simdgroup * LANES;
                (format!("of simdgroup {simdgroup}"), first, &self.fibers[first..][..LANES])
            }
            None => ("of the threadgroup".to_owned(), 0, &self.fibers[..]),
        };
        let mut places: BTreeMap<String, u32> = BTreeMap::new();
        for fiber in fibers {
            *places.entry(fiber.status.describe()).or_default() += 1;
        }
        let places: Vec<_> = places.iter().map(|(place, count)| format!("{count} {place}")).collect();
        let detail = format!("threads {whose}: {}", places.join(", "));
        let simd = fibers.iter().any(|fiber| fiber.status.waits_for_simdgroup());
        let finding = Finding::new(if simd { Kind::DivergentSimd } else { Kind::DivergentBarrier }, detail);
        match fibers.iter().position(|fiber| matches!(fiber.status, Status::Waiting(..))) {
            Some(waiting) => {
                let thread = Thread { threadgroup: self.position, thread: narrow(first + waiting) };
                finding.at(fibers[waiting].callers().collect(), thread)
            }
            None => finding,
        }
    }
}

impl Fiber {
    fn new(suspended: Suspended) -> Self {
        Self { suspended, status: Status::Ready, result: 0, arrays: 0, calls: Vec::new() }
    }

    /// Where it was called from, from the innermost call outwards.
    fn callers(&self) -> impl Iterator<Item = usize> {
        self.calls.iter().rev().map(|&(caller, _)| caller)
    }
}

impl Status {
    fn waits_for_simdgroup(&self) -> bool {
        matches!(self, Self::Waiting(Meeting { what: What::Simd(_) | What::TileMultiply, .. }, _))
    }

    fn bits(&self) -> u32 {
        match self {
            Self::Waiting(_, Operand::Bits(bits)) => *bits,
            _ => 0,
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Ready => "ready".to_owned(),
            Self::Finished => "finished".to_owned(),
            Self::Waiting(meeting, _) => {
                // SAFETY: the dialect passes `__builtin_FILE()`, a string constant of the kernel's image,
                // which stays loaded for the whole run.
                let file = unsafe { CStr::from_ptr(meeting.place.file) }.to_string_lossy();
                let what = match meeting.what {
                    What::Barrier(_) => "barrier",
                    What::Simd(_) => "simd operation",
                    What::TileMultiply => "product of tiles",
                };
                // The path tells two calls of one helper apart, and is short enough to show.
                let path = meeting.path & 0xfff;
                format!("at the {what} of {file}:{} (by way of {path:03x})", meeting.place.line)
            }
        }
    }
}

/// What all these threads wait for.
fn common(fibers: &[Fiber]) -> Option<Meeting> {
    let Status::Waiting(meeting, _) = fibers.first()?.status else { return None };
    let same = |fiber: &Fiber| matches!(fiber.status, Status::Waiting(other, _) if other == meeting);
    fibers.iter().all(same).then_some(meeting)
}

/// Whether these threads stand in one place.
fn together(fibers: &[Fiber]) -> bool {
    common(fibers).is_some() || fibers.iter().all(|fiber| fiber.status == Status::Finished)
}

/// Gives every lane the result of a simd operation over all of them, or over those that hold the same rows of a tile.
fn combine(operation: u32, lanes: &mut [Fiber]) {
    let mut values: Vec<u32> = lanes.iter().map(|lane| lane.status.bits()).collect();
    let distances: &[usize] = if operation < 4 { &[16, 8, 4, 2, 1] } else { &tiles::SAME_ROWS };
    // A butterfly, in which every lane computes the same sum in the same order.
    for distance in distances {
        let before = values.clone();
        for (lane, value) in values.iter_mut().enumerate() {
            *value = both(operation, before[lane], before[lane ^ distance]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(values) {
        lane.result = value;
        lane.status = Status::Ready;
    }
}

/// The dialect's `SimulatorSimd`, on two lanes.
fn both(operation: u32, a: u32, b: u32) -> u32 {
    let (x, y) = (f32::from_bits(a), f32::from_bits(b));
    match operation {
        0 | 4 => (x + y).to_bits(),
        1 => a.wrapping_add(b),
        2 | 5 => x.max(y).to_bits(),
        _ => a.min(b),
    }
}
