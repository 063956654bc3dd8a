//! The bf16 tile on Intel's matrix unit, AMX (Intel SDM volume 1, chapter 18): 32 × 32 sums in four of its eight
//! registers, and 32 steps of both matrices in the others.
//!
//! A register is up to 16 rows of 64 bytes. The packed right matrix is what it wants as it is: a pair of steps a row, 16
//! columns of pairs. The left matrix is read where it lies.
//!
//! A thread configures the unit for a piece of work ([`begin`]) and releases it when that is done ([`end`]), so that others
//! find it as if nobody had used it. For each tile this would take a sixth of the time.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::ptr;

use super::kernel::{PairSteps, Tile};

/// Rows and columns of a tile.
pub(super) const SIDE: usize = 32;
/// Steps that one instruction takes, and words of them in a column.
const STEPS: usize = 32;
const WORDS: usize = STEPS / 2;
/// The most products whose steps one tile takes.
const PRODUCTS: usize = 2;
/// Rows of a register.
const HALF: usize = SIDE / 2;

/// Whether the processor multiplies bf16 on its matrix unit (CPUID leaf 7, EDX bits 22 and 24) and the kernel lets this
/// process use it, which must be asked for: threads get larger register areas.
pub(crate) fn is_usable() -> bool {
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BF16_AND_TILES == BF16_AND_TILES;
    // SAFETY: a call that reads and writes no memory of ours; a kernel that does not know it refuses.
    has && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    first_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// Registers 0 to 3 are the sums, upper half first; 4 and 5 the left matrix, 6 and 7 the right one.
    const fn of([upper, lower]: [u8; 2]) -> Self {
        let mut row_bytes = [0; 16];
        let mut i = 0;
        while i < 8 {
            row_bytes[i] = 64;
            i += 1;
        }
        let rows = [upper, upper, lower, lower, upper, lower, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0];
        Self { palette: 1, first_row: 0, reserved: [0; 14], row_bytes, rows }
    }
}

static WHOLE: Configuration = Configuration::of([16, 16]);

/// Configures the unit for whole tiles.
///
/// # Safety
/// [`is_usable`] has said yes, and nothing but [`tile`] uses the unit on this thread until [`end`].
pub(super) unsafe fn begin() {
    // SAFETY: the caller's promise.
    unsafe { configure(&WHOLE) };
}

/// Releases the unit.
///
/// # Safety
/// The unit is usable, and this thread's.
pub(super) unsafe fn end() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// # Safety
/// The unit is usable, and nothing in its registers is needed.
unsafe fn configure(configuration: &Configuration) {
    // SAFETY: the caller's promise; 64 bytes are read.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) ptr::from_ref(configuration), options(nostack, readonly));
    }
}

/// # Safety
/// That of [`PairTileFn`](super::kernel::PairTileFn), for all [`SIDE`] columns; after [`begin`].
pub(super) unsafe fn tile(tile: &Tile, steps: &[PairSteps], out: *mut f32) {
    if tile.rows == SIDE {
        // SAFETY: the caller's promise.
        return unsafe { configured(tile, HALF, steps, out) };
    }
    // With few rows both halves are the same rows, computed twice.
    let first = if tile.rows > HALF { HALF } else { 0 };
    let size = [if first > 0 { HALF } else { tile.rows }, tile.rows - first];
    let partial = Configuration::of(size.map(|rows| u8::try_from(rows).unwrap_or(16)));
    // SAFETY: the unit is configured, so it is usable, and no register's content outlives a tile.
    unsafe {
        configure(&partial);
        configured(tile, first, steps, out);
        configure(&WHOLE);
    }
}

/// The tile, whose lower half begins at row `first`, with the unit configured for both.
///
/// # Safety
/// That of [`tile`].
unsafe fn configured(tile: &Tile, first: usize, steps: &[PairSteps], out: *mut f32) {
    let sums = Sums { out: [out, out.wrapping_add(first * tile.out_stride)], stride: tile.out_stride };
    let mut runs = [Run::default(); PRODUCTS];
    let mut count = 0;
    for steps in steps.iter().filter(|steps| steps.k >= STEPS) {
        runs[count] = Run::of(steps, first, steps.k / STEPS);
        count += 1;
    }
    let mut begun = tile.accumulate;
    if count > 0 {
        // SAFETY: whole blocks of steps are within both matrices; the rest is the caller's promise.
        unsafe { sums.add(&runs[..count], begun) };
        begun = true;
    }
    for steps in steps.iter().filter(|steps| !steps.k.is_multiple_of(STEPS)) {
        // SAFETY: the caller's promise.
        unsafe { last(tile, first, steps, &sums, begun) };
        begun = true;
    }
}

/// Fewer steps than a register has, beside zeros.
///
/// # Safety
/// That of [`tile`].
unsafe fn last(tile: &Tile, first: usize, steps: &PairSteps, sums: &Sums, accumulate: bool) {
    let (blocks, rest) = (steps.k / STEPS, steps.k % STEPS);
    let (mut rows, mut words) = ([0u16; SIDE * STEPS], [0u32; SIDE * WORDS]);
    for (i, to) in rows.chunks_exact_mut(STEPS).enumerate().take(tile.rows) {
        // SAFETY: the row's last steps.
        unsafe {
            let from = steps.left.add(i * steps.row_stride + blocks * STEPS);
            to.as_mut_ptr().copy_from_nonoverlapping(from, rest);
        };
    }
    // SAFETY: the packed words of these steps.
    unsafe {
        let from = steps.right.add(blocks * WORDS * SIDE);
        words.as_mut_ptr().copy_from_nonoverlapping(from, rest.div_ceil(2) * SIDE);
    }
    if rest % 2 == 1 {
        // Beside an odd last step may be one that does not count, and is not to be multiplied by 0.
        words[rest / 2 * SIDE..][..SIDE].iter_mut().for_each(|word| *word &= 0xFFFF);
    }
    let steps = PairSteps { left: rows.as_ptr(), row_stride: STEPS, right: words.as_ptr(), k: STEPS };
    // SAFETY: one block of steps in both buffers, and the sums as above.
    unsafe { sums.add(&[Run::of(&steps, first, 1)], accumulate) };
}

/// Blocks of steps as the loop reads them, word by word: where the left matrix's halves begin, how many bytes its rows are
/// apart, where the right one begins, and how many blocks there are, at least one.
#[derive(Clone, Copy)]
#[repr(C)]
struct Run {
    halves: [*const u16; 2],
    row_bytes: usize,
    right: *const u32,
    blocks: usize,
}

impl Default for Run {
    fn default() -> Self {
        Self { halves: [ptr::null(); 2], row_bytes: 0, right: ptr::null(), blocks: 0 }
    }
}

impl Run {
    fn of(steps: &PairSteps, first: usize, blocks: usize) -> Self {
        let halves = [steps.left, steps.left.wrapping_add(first * steps.row_stride)];
        Self { halves, row_bytes: steps.row_stride * size_of::<u16>(), right: steps.right, blocks }
    }
}

/// A tile's sums in memory, by halves.
struct Sums {
    out: [*mut f32; 2],
    stride: usize,
}

impl Sums {
    /// Adds the products of the runs, at least one, to the sums, or writes them there.
    ///
    /// # Safety
    /// The unit is configured; each half's rows, as many as the configuration says, have the blocks' steps, and `right` has
    /// them packed for [`SIDE`] columns; the halves' sums are writable, and initialised if they are added to.
    unsafe fn add(&self, runs: &[Run], accumulate: bool) {
        // SAFETY: registers are loaded from and stored to what the caller promises.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {accumulate}, {accumulate}",
                "jz 2f",
                "tileloadd tmm0, [{upper} + {out_stride} * 1]",
                "tileloadd tmm1, [{upper} + {out_stride} * 1 + 64]",
                "tileloadd tmm2, [{lower} + {out_stride} * 1]",
                "tileloadd tmm3, [{lower} + {out_stride} * 1 + 64]",
                "2:",
                "mov {first}, [{runs}]",
                "mov {second}, [{runs} + 8]",
                "mov {left_stride}, [{runs} + 16]",
                "mov {right}, [{runs} + 24]",
                "mov {blocks}, [{runs} + 32]",
                "3:",
                "tileloadd tmm4, [{first} + {left_stride} * 1]",
                "tileloadd tmm6, [{right} + {right_stride} * 1]",
                "tileloadd tmm7, [{right} + {right_stride} * 1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{second} + {left_stride} * 1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {first}, 64",
                "add {second}, 64",
                "add {right}, 2048",
                "dec {blocks}",
                "jnz 3b",
                "add {runs}, {run}",
                "dec {count}",
                "jnz 2b",
                "tilestored [{upper} + {out_stride} * 1], tmm0",
                "tilestored [{upper} + {out_stride} * 1 + 64], tmm1",
                "tilestored [{lower} + {out_stride} * 1], tmm2",
                "tilestored [{lower} + {out_stride} * 1 + 64], tmm3",
                accumulate = in(reg) usize::from(accumulate),
                upper = in(reg) self.out[0],
                lower = in(reg) self.out[1],
                out_stride = in(reg) self.stride * size_of::<f32>(),
                runs = inout(reg) runs.as_ptr() => _,
                run = const size_of::<Run>(),
                count = inout(reg) runs.len() => _,
                first = out(reg) _,
                second = out(reg) _,
                left_stride = out(reg) _,
                right = out(reg) _,
                right_stride = in(reg) SIDE * size_of::<u32>(),
                blocks = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
