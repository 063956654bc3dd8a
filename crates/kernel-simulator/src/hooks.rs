//! Where kernels call in: the functions that `runtime/hooks.cpp` forwards to, and the thread they concern.
//!
//! A kernel runs on a fiber of the thread that simulates it, so the machine lives in a thread-local. Every hook
//! borrows it for a moment and gives it back before it switches stacks; code that a kernel calls can therefore
//! never find it borrowed.

use crate::fiber::switch;
use crate::findings::Finding;
use crate::machine::{Access, Flow, Machine};
use crate::report::Kind;
use crate::threadgroup::{LANES, Operand, Place, Tiles, What};
use candlewick_kernels::launch::TILE;
use std::cell::RefCell;
use std::ffi::{CStr, c_char};

/// A lane's part in a product of tiles.
const MULTIPLICATIONS_OF_A_LANE: u64 = (TILE * TILE * TILE / LANES) as u64;

thread_local! {
    static MACHINE: RefCell<Option<Machine>> = const { RefCell::new(None) };
}

/// Installs the machine that this thread's kernels run on, and returns the one before it.
pub(crate) fn install(machine: Option<Machine>) -> Option<Machine> {
    MACHINE.replace(machine)
}

/// Borrows this thread's machine. There is none while a library is loaded: the default stands for its answer.
pub(crate) fn with<R: Default>(act: impl FnOnce(&mut Machine) -> R) -> R {
    MACHINE.with_borrow_mut(|machine| machine.as_mut().map(act).unwrap_or_default())
}

/// Continues `thread` of the running threadgroup until it waits, ends, or is stopped.
pub(crate) fn resume(thread: usize) {
    if let Some((save, to)) = with(|machine| Some(machine.resume(thread))) {
        // SAFETY: the machine stays where it is while it is installed, so `save` is valid; the scheduler chose
        // a thread that is ready, whose fiber was started or has suspended itself and has not run since.
        unsafe { switch(save, to) }
    }
}

/// Returns from the running thread to the scheduler. Comes back when the scheduler continues the thread.
fn suspend() {
    if let Some((save, to)) = with(|machine| Some(machine.suspend())) {
        // SAFETY: as in `resume`; the scheduler was saved by the switch that continued this fiber.
        unsafe { switch(save, to) }
    }
}

/// Returns to the scheduler for good.
fn retire() -> ! {
    suspend();
    // Nobody continues a fiber that has finished or was stopped. Going on would run on a stack in use.
    std::process::abort()
}

/// The first function on a fiber's stack: one thread of the kernel, from beginning to end.
pub(crate) extern "C" fn run_thread() -> ! {
    if let Some((entry, arguments, context)) = with(Machine::entry) {
        // SAFETY: `entry` is the kernel that the launch names. Its arguments are as many as its signature says
        // (checked when the launch was bound), in an array that lives as long as the launch; every access that
        // it makes through them is checked before it is made.
        unsafe { entry(arguments, &context) };
    }
    with(|machine| machine.threadgroup.finish());
    retire()
}

/// The table of `runtime/hooks.cpp`, field by field.
#[repr(C)]
pub(crate) struct Hooks {
    access: extern "C" fn(usize, usize, bool, usize),
    vector: extern "C" fn(usize, usize, bool, usize),
    enter: extern "C" fn(usize),
    leave: extern "C" fn(),
    simd: extern "C" fn(u32, u32, *const c_char, u32) -> u32,
    tile_multiply: extern "C" fn(*mut f32, *const f32, *const f32, *const c_char, u32),
    barrier: extern "C" fn(u32, *const c_char, u32),
    threadgroup_array: unsafe extern "C" fn(*const c_char, usize, usize) -> usize,
    multiply: extern "C" fn(),
    undefined: unsafe extern "C" fn(bool, *const c_char, usize),
}

pub(crate) static TABLE: Hooks = Hooks {
    access,
    vector,
    enter,
    leave,
    simd,
    tile_multiply,
    barrier,
    threadgroup_array,
    multiply,
    undefined,
};

extern "C" fn access(address: usize, bytes: usize, write: bool, caller: usize) {
    if with(|machine| machine.access(Access { address, bytes, write, caller })) == Flow::Stop {
        retire();
    }
}

extern "C" fn vector(address: usize, bytes: usize, write: bool, caller: usize) {
    with(|machine| machine.vector(Access { address, bytes, write, caller }));
}

extern "C" fn enter(caller: usize) {
    with(|machine| machine.threadgroup.enter(caller));
}

extern "C" fn leave() {
    with(|machine| machine.threadgroup.leave());
}

extern "C" fn simd(operation: u32, bits: u32, file: *const c_char, line: u32) -> u32 {
    with(|machine| {
        machine.threadgroup.wait(What::Simd(operation), Operand::Bits(bits), Place { file, line });
    });
    suspend();
    with(|machine| machine.threadgroup.result())
}

extern "C" fn tile_multiply(
    sum: *mut f32,
    left: *const f32,
    right: *const f32,
    file: *const c_char,
    line: u32,
) {
    let tiles = Operand::Tiles(Tiles { sum, left, right });
    with(|machine| {
        machine.multiplications += MULTIPLICATIONS_OF_A_LANE;
        machine.threadgroup.wait(What::TileMultiply, tiles, Place { file, line });
    });
    suspend();
}

extern "C" fn barrier(flags: u32, file: *const c_char, line: u32) {
    with(|machine| machine.threadgroup.wait(What::Barrier(flags), Operand::Nothing, Place { file, line }));
    suspend();
}

/// # Safety
/// `name` is a C string.
unsafe extern "C" fn threadgroup_array(name: *const c_char, bytes: usize, caller: usize) -> usize {
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    match with(|machine| machine.declare(&name, bytes, caller)) {
        Some(address) => address,
        None => retire(),
    }
}

extern "C" fn multiply() {
    with(|machine| machine.multiplications += 1);
}

/// # Safety
/// `what` is a C string.
unsafe extern "C" fn undefined(out_of_bounds: bool, what: *const c_char, caller: usize) {
    // SAFETY: the caller's promise.
    let what = unsafe { CStr::from_ptr(what) }.to_string_lossy();
    if out_of_bounds {
        // The access itself would come next, and could hit anything.
        let finding = Finding::new(Kind::OutOfBounds, what);
        if with(|machine| machine.stop(finding, caller)) == Flow::Stop {
            retire();
        }
    } else {
        with(|machine| machine.report(Finding::new(Kind::Undefined, what), caller));
    }
}
