//! The bf16 tile on Intel's matrix unit, AMX (Intel SDM volume 1, chapter 18): 32 × 32 sums in four of its eight
//! registers, and 32 steps of both matrices in the others; 16 × 32 in two of them where there are no more rows.
//!
//! A register is up to 16 rows of 64 bytes. The packed right matrix is what it wants as it is: a pair of steps a row, 16
//! columns of pairs. The left matrix is read where it lies.
//!
//! A thread configures the unit for a piece of work ([`begin`]) and releases it when that is done ([`end`]), so that others
//! find it as if nobody had used it. For each tile this would take a sixth of the time.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::mem::offset_of;
use std::ptr;

use super::kernel::{PairSteps, Tile};

/// Rows and columns of a tile.
pub(super) const SIDE: usize = 32;
/// Steps that one instruction takes, and words of them in a column.
const STEPS: usize = 32;
const WORDS: usize = STEPS / 2;
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
    // With few rows there is one half, or both are the same rows, computed twice.
    let first = if tile.rows > HALF { HALF } else { 0 };
    if tile.rows.is_multiple_of(HALF) {
        // SAFETY: the caller's promise.
        return unsafe { configured(tile, first, steps, out) };
    }
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
    let lower = out.wrapping_add(first * tile.out_stride);
    let sums = Sums { upper: out, lower, row_bytes: tile.out_stride * size_of::<f32>(), first };
    let whole = steps.iter().any(|steps| steps.k >= STEPS);
    if whole {
        // SAFETY: whole blocks of steps are within both matrices; the rest is the caller's promise.
        unsafe { sums.add(steps, tile.accumulate) };
    }
    let mut begun = tile.accumulate || whole;
    for steps in steps.iter().filter(|steps| !steps.k.is_multiple_of(STEPS)) {
        // SAFETY: the caller's promise.
        unsafe { last(tile, steps, &sums, begun) };
        begun = true;
    }
}

/// Fewer steps than a register has, beside zeros.
///
/// # Safety
/// That of [`tile`].
#[inline(never)]
unsafe fn last(tile: &Tile, steps: &PairSteps, sums: &Sums, accumulate: bool) {
    let (blocks, rest) = (steps.k / STEPS, steps.k % STEPS);
    let mut words = [0u32; SIDE * WORDS];
    // SAFETY: the packed words of these steps.
    unsafe {
        let from = steps.right.add(blocks * WORDS * SIDE);
        words.as_mut_ptr().copy_from_nonoverlapping(from, rest.div_ceil(2) * SIDE);
    }
    if rest % 2 == 1 {
        // Beside an odd last step may be one that does not count, and is not to be multiplied by 0.
        words[rest / 2 * SIDE..][..SIDE].iter_mut().for_each(|word| *word &= 0xFFFF);
    }
    for part in 0..steps.parts {
        let mut rows = [0u16; SIDE * STEPS];
        for (i, to) in rows.chunks_exact_mut(STEPS).enumerate().take(tile.rows) {
            // SAFETY: the row's last steps.
            unsafe {
                let from = steps.left.add(i * steps.row_stride + part * steps.part_stride + blocks * STEPS);
                to.as_mut_ptr().copy_from_nonoverlapping(from, rest);
            };
        }
        let (left, right) = (rows.as_ptr(), words.as_ptr());
        let steps =
            PairSteps { left, row_stride: STEPS, parts: 1, part_stride: 0, split: 0, right, k: STEPS };
        // SAFETY: one block of steps in both buffers, and the sums as above.
        unsafe { sums.add(&[steps], accumulate || part > 0) };
    }
}

/// Loads the right matrix's steps, so many bytes on.
macro_rules! next_right {
    ($at:literal) => {
        concat!(
            "tileloadd tmm6, [{right} + {right_stride} * 1 + ",
            $at,
            "]\ntileloadd tmm7, [{right} + {right_stride} * 1 + 64 + ",
            $at,
            "]"
        )
    };
}

/// Loads the left matrix's steps, and adds their products with the right one's.
macro_rules! with_next_left {
    () => {
        "tileloadd tmm4, [{first} + {left_stride} * 1]
         tdpbf16ps tmm0, tmm4, tmm6
         tileloadd tmm5, [{second} + {left_stride} * 1]
         tdpbf16ps tmm1, tmm4, tmm7
         tdpbf16ps tmm2, tmm5, tmm6
         tdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// Adds the products of what is loaded.
macro_rules! with_same_left {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6
         tdpbf16ps tmm1, tmm4, tmm7
         tdpbf16ps tmm2, tmm5, tmm6
         tdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// A tile's sums in memory, by halves.
#[repr(C)]
struct Sums {
    upper: *mut f32,
    lower: *mut f32,
    row_bytes: usize,
    /// The lower half's first row; 0 where that is the upper half again.
    first: usize,
}

impl Sums {
    /// Adds the products of the steps that fill registers, at least one, to the sums, or writes them there.
    ///
    /// # Safety
    /// The unit is configured; each half's rows, as many as the configuration says, have the blocks' steps, and `right` has
    /// them packed for [`SIDE`] columns; the halves' sums are writable, and initialised if they are added to.
    unsafe fn add(&self, steps: &[PairSteps], accumulate: bool) {
        let alone = self.first == 0 && steps.iter().all(|steps| steps.parts == 1 && steps.split == 0);
        // SAFETY: the caller's promise.
        unsafe {
            if alone { self.add_to_upper(steps, accumulate) } else { self.add_to_both(steps, accumulate) }
        };
    }

    /// [`Self::add`] to both halves.
    ///
    /// # Safety
    /// That of [`Self::add`].
    unsafe fn add_to_both(&self, steps: &[PairSteps], accumulate: bool) {
        // SAFETY: registers are loaded from and stored to what the caller promises.
        unsafe {
            asm!(
                "test {accumulate}, {accumulate}",
                "jz 2f",
                "mov {first}, [{sums} + {upper}]",
                "mov {second}, [{sums} + {lower}]",
                "mov {left_stride}, [{sums} + {stride}]",
                "tileloadd tmm0, [{first} + {left_stride} * 1]; tileloadd tmm1, [{first} + {left_stride} * 1 + 64]",
                "tileloadd tmm2, [{second} + {left_stride} * 1]; tileloadd tmm3, [{second} + {left_stride} * 1 + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0; tilezero tmm1; tilezero tmm2; tilezero tmm3",
                // The next product's.
                "3:",
                "mov {blocks}, [{steps} + {k}]",
                "shr {blocks}, 5",
                "jz 5f",
                "mov {first}, [{steps} + {left}]",
                "mov {left_stride}, [{steps} + {row_stride}]",
                "add {left_stride}, {left_stride}",
                "mov {right}, [{steps} + {panel}]",
                "mov {second}, {left_stride}; imul {second}, [{sums} + {rows}]",
                "add {second}, {first}",
                "cmp qword ptr [{steps} + {split}], 0",
                "jne 7f",
                // From after the last part's steps to the first one's next.
                "mov {back}, [{steps} + {part_stride}]",
                "imul {back}, [{steps} + {parts}]",
                "lea {back}, [{back} * 2 - 64]",
                "4:",
                next_right!("0"),
                "mov {part}, [{steps} + {parts}]",
                "6:",
                with_next_left!(),
                "add {first}, [{steps} + {part_stride}]; add {first}, [{steps} + {part_stride}]",
                "add {second}, [{steps} + {part_stride}]; add {second}, [{steps} + {part_stride}]",
                "dec {part}; jnz 6b",
                "sub {first}, {back}; sub {second}, {back}",
                "add {right}, 2048",
                "dec {blocks}",
                "jnz 4b",
                "jmp 5f",
                // Both in parts: the left's third, second and first with the right's first, that with the right's third and
                // second, and the left's second with this. Then to the next steps.
                "7:",
                "mov {part}, [{steps} + {part_stride}]",
                "add {part}, {part}",
                "lea {first}, [{first} + {part} * 2]; lea {second}, [{second} + {part} * 2]",
                "lea {back}, [{part} + 64]",
                "8:",
                next_right!("0"),
                with_next_left!(),
                "sub {first}, {part}; sub {second}, {part}",
                with_next_left!(),
                "sub {first}, {part}; sub {second}, {part}",
                with_next_left!(),
                next_right!("4096"),
                with_same_left!(),
                next_right!("2048"),
                with_same_left!(),
                "add {first}, {part}; add {second}, {part}",
                with_next_left!(),
                "add {first}, {back}; add {second}, {back}",
                "add {right}, 3 * 2048",
                "dec {blocks}",
                "jnz 8b",
                "5:",
                "add {steps}, {size}",
                "dec {count}; jnz 3b",
                "mov {first}, [{sums} + {upper}]",
                "mov {second}, [{sums} + {lower}]",
                "mov {left_stride}, [{sums} + {stride}]",
                "tilestored [{first} + {left_stride} * 1], tmm0; tilestored [{first} + {left_stride} * 1 + 64], tmm1",
                "tilestored [{second} + {left_stride} * 1], tmm2; tilestored [{second} + {left_stride} * 1 + 64], tmm3",
                accumulate = inout(reg) usize::from(accumulate) => _,
                sums = in(reg) self,
                upper = const offset_of!(Self, upper),
                lower = const offset_of!(Self, lower),
                stride = const offset_of!(Self, row_bytes),
                rows = const offset_of!(Self, first),
                steps = inout(reg) steps.as_ptr() => _,
                size = const size_of::<PairSteps>(),
                left = const offset_of!(PairSteps, left),
                row_stride = const offset_of!(PairSteps, row_stride),
                parts = const offset_of!(PairSteps, parts),
                part_stride = const offset_of!(PairSteps, part_stride),
                split = const offset_of!(PairSteps, split),
                panel = const offset_of!(PairSteps, right),
                k = const offset_of!(PairSteps, k),
                count = inout(reg) steps.len() => _,
                first = out(reg) _,
                second = out(reg) _,
                left_stride = out(reg) _,
                right = out(reg) _,
                right_stride = in(reg) SIDE * size_of::<u32>(),
                blocks = out(reg) _,
                part = out(reg) _,
                back = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
    /// [`Self::add`] where both halves are one, and no product is in parts.
    ///
    /// # Safety
    /// That of [`Self::add`].
    unsafe fn add_to_upper(&self, steps: &[PairSteps], accumulate: bool) {
        // SAFETY: registers are loaded from and stored to what the caller promises.
        unsafe {
            asm!(
                "test {accumulate}, {accumulate}",
                "jz 2f",
                "tileloadd tmm0, [{sums} + {stride} * 1]; tileloadd tmm1, [{sums} + {stride} * 1 + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0; tilezero tmm1",
                // The next product's.
                "3:",
                "mov {blocks}, [{steps} + {k}]",
                "shr {blocks}, 5",
                "jz 5f",
                "mov {from}, [{steps} + {left}]",
                "mov {left_stride}, [{steps} + {row_stride}]",
                "add {left_stride}, {left_stride}",
                "mov {right}, [{steps} + {panel}]",
                "4:",
                "tileloadd tmm4, [{from} + {left_stride} * 1]",
                next_right!("0"),
                "tdpbf16ps tmm0, tmm4, tmm6; tdpbf16ps tmm1, tmm4, tmm7",
                "add {from}, 64; add {right}, 2048",
                "dec {blocks}; jnz 4b",
                "5:",
                "add {steps}, {size}",
                "dec {count}; jnz 3b",
                "tilestored [{sums} + {stride} * 1], tmm0; tilestored [{sums} + {stride} * 1 + 64], tmm1",
                accumulate = in(reg) usize::from(accumulate),
                sums = in(reg) self.upper,
                stride = in(reg) self.row_bytes,
                steps = inout(reg) steps.as_ptr() => _,
                size = const size_of::<PairSteps>(),
                left = const offset_of!(PairSteps, left),
                row_stride = const offset_of!(PairSteps, row_stride),
                panel = const offset_of!(PairSteps, right),
                k = const offset_of!(PairSteps, k),
                count = inout(reg) steps.len() => _,
                from = out(reg) _,
                left_stride = out(reg) _,
                right = out(reg) _,
                right_stride = in(reg) SIDE * size_of::<u32>(),
                blocks = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
