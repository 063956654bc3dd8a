//! Fibers: one stack per simulated thread, and the switch between them.
//!
//! A kernel's thread must stop in the middle of a function, at a barrier or at a simd operation, until the
//! others arrive. Operating system threads would make that a matter of luck and of milliseconds; a fiber is a
//! stack and a saved stack pointer, and switching costs a few nanoseconds and happens exactly when asked.
//!
//! Only the registers that a called function must preserve are saved: [`switch`] looks like an ordinary call
//! to the compiler on both sides.

use crate::pages::Pages;
use std::ops::Range;

/// Bytes of stack per fiber. Kernels keep a few hundred bytes of private arrays and do not recurse; the
/// simulator's own checks run on the same stack.
const STACK_BYTES: usize = 64 << 10;

/// A suspended fiber (or the scheduler): its stack pointer, below which its registers are saved.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Suspended(*mut u8);

impl Suspended {
    /// A place to save into; switching to it is an error.
    pub(crate) const NOWHERE: Self = Self(std::ptr::null_mut());
}

/// Stacks for the fibers of one threadgroup, used again for the next one.
pub(crate) struct Stacks {
    memory: Pages,
    count: usize,
}

impl Stacks {
    pub(crate) fn new(count: usize) -> Self {
        Self { memory: Pages::new(count * STACK_BYTES), count }
    }

    /// The addresses of one stack.
    pub(crate) fn addresses(&self, index: usize) -> Range<usize> {
        let low = self.memory.address() + index * STACK_BYTES;
        low..low + STACK_BYTES
    }

    /// The addresses of all stacks.
    pub(crate) fn all(&self) -> Range<usize> {
        self.memory.addresses()
    }

    /// Makes a fiber on stack `index` that runs `entry` when it is first switched to. Whatever ran on this
    /// stack before must never be continued.
    pub(crate) fn start(&mut self, index: usize, entry: extern "C" fn() -> !) -> Suspended {
        assert!(index < self.count, "no stack {index} among {}", self.count);
        let top = self.addresses(index).end;
        let frame = self.memory.bytes_mut(&(top - FRAME_BYTES..top));
        frame.fill(0);
        let entry = (entry as usize).to_ne_bytes();
        frame[ENTRY_OFFSET..ENTRY_OFFSET + entry.len()].copy_from_slice(&entry);
        Suspended(frame.as_mut_ptr())
    }
}

/// The first frame of a fiber: six zeroed registers, the entry as the return address, and 8 bytes so that
/// `entry` finds the stack aligned as after a call.
#[cfg(target_arch = "x86_64")]
const FRAME_BYTES: usize = 64;
#[cfg(target_arch = "x86_64")]
const ENTRY_OFFSET: usize = 48;

/// Saves the caller's registers and stack pointer in `*save` and continues `to` where it stopped.
///
/// # Safety
/// `to` was made by [`Stacks::start`] or saved by an earlier switch that nobody has continued since, its stack
/// is alive, and `save` stays valid until the caller is continued.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn switch(save: *mut Suspended, to: Suspended) {
    std::arch::naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi], rsp",
        "mov rsp, rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// The first frame of a fiber: x19 to x30 (x30 is the return address) and d8 to d15, in the order in which
/// [`switch`] loads them.
#[cfg(target_arch = "aarch64")]
const FRAME_BYTES: usize = 160;
#[cfg(target_arch = "aarch64")]
const ENTRY_OFFSET: usize = 88;

/// Saves the caller's registers and stack pointer in `*save` and continues `to` where it stopped.
///
/// # Safety
/// `to` was made by [`Stacks::start`] or saved by an earlier switch that nobody has continued since, its stack
/// is alive, and `save` stays valid until the caller is continued.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn switch(save: *mut Suspended, to: Suspended) {
    std::arch::naked_asm!(
        "sub sp, sp, #160",
        "stp x19, x20, [sp, #0]",
        "stp x21, x22, [sp, #16]",
        "stp x23, x24, [sp, #32]",
        "stp x25, x26, [sp, #48]",
        "stp x27, x28, [sp, #64]",
        "stp x29, x30, [sp, #80]",
        "stp d8, d9, [sp, #96]",
        "stp d10, d11, [sp, #112]",
        "stp d12, d13, [sp, #128]",
        "stp d14, d15, [sp, #144]",
        "mov x9, sp",
        "str x9, [x0]",
        "mov sp, x1",
        "ldp x19, x20, [sp, #0]",
        "ldp x21, x22, [sp, #16]",
        "ldp x23, x24, [sp, #32]",
        "ldp x25, x26, [sp, #48]",
        "ldp x27, x28, [sp, #64]",
        "ldp x29, x30, [sp, #80]",
        "ldp d8, d9, [sp, #96]",
        "ldp d10, d11, [sp, #112]",
        "ldp d12, d13, [sp, #128]",
        "ldp d14, d15, [sp, #144]",
        "add sp, sp, #160",
        "ret",
    )
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!(
    "kernel-simulator switches stacks on x86_64 and aarch64; add the switch for this architecture"
);

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    thread_local! {
        static SCHEDULER: Cell<Suspended> = const { Cell::new(Suspended::NOWHERE) };
        static FIBERS: RefCell<Vec<Suspended>> = const { RefCell::new(Vec::new()) };
        static CURRENT: Cell<usize> = const { Cell::new(0) };
        static LOG: RefCell<Vec<(usize, u32)>> = const { RefCell::new(Vec::new()) };
    }

    extern "C" fn three_steps() -> ! {
        let mut step = 0;
        loop {
            let me = CURRENT.get();
            LOG.with_borrow_mut(|log| log.push((me, step)));
            step += 1;
            let save = FIBERS.with_borrow_mut(|fibers| &raw mut fibers[me]);
            // SAFETY: the scheduler was saved by the switch that continued this fiber, and waits on it.
            unsafe { switch(save, SCHEDULER.get()) };
        }
    }

    #[test]
    fn fibers_keep_their_place_and_their_variables() {
        let mut stacks = Stacks::new(3);
        FIBERS.set((0..3).map(|i| stacks.start(i, three_steps)).collect());
        for (fiber, _) in [0, 2, 1, 1, 0, 2].into_iter().zip(0..) {
            CURRENT.set(fiber);
            let to = FIBERS.with_borrow(|fibers| fibers[fiber]);
            // SAFETY: `to` was just started or saved by its own switch; the stacks outlive the loop.
            unsafe { switch(SCHEDULER.with(Cell::as_ptr), to) };
        }
        let log = LOG.take();
        assert_eq!(log, [(0, 0), (2, 0), (1, 0), (1, 1), (0, 1), (2, 1)]);
    }
}
