//! The inner loops: a tile of the result, held in registers, for one block of the common dimension.
//!
//! A tile has up to [`Kernel::rows`] rows of the left matrix, read where they lie, and [`Kernel::columns`] columns of the
//! right one, packed: for each `k` the tile's columns side by side. Each step of `k` multiplies one element of every row
//! with all columns; an element of the result is one chain of additions in the order of `k`, whatever the instructions'
//! width and wherever in a tile it lies.

use super::super::dispatch::Isa;
#[cfg(target_arch = "x86_64")]
use super::STEPS;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx;

/// One tile's work. Its steps, and where the left matrix's are, are those of f32.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Rows, at most [`Kernel::rows`] and at least 1.
    pub rows: usize,
    /// Columns that count, at most [`Kernel::columns`] and at least 1; all are computed in halves of it.
    pub columns: usize,
    /// Steps of the common dimension.
    pub k: usize,
    /// Between rows of the left matrix, in elements.
    pub row_stride: usize,
    /// Between its columns; one of the two strides is 1.
    pub column_stride: usize,
    /// Between rows of the result.
    pub out_stride: usize,
    /// Whether the result is added to what is there.
    pub accumulate: bool,
}

/// What computes a tile: from the left matrix at its first row and step, the packed right one, into the result.
///
/// # Safety
/// `left + i·row_stride + k·column_stride` is readable for each row `i` and step `k`; `right` has `k` times
/// [`Kernel::columns`] elements; `out + i·out_stride + j` is writable for each row and for all columns of the halves in
/// use, and initialised if the tile accumulates. The processor has the kernel's instructions.
pub(super) type TileFn = unsafe fn(tile: &Tile, left: *const f32, right: *const f32, out: *mut f32);

/// Steps of a bf16 tile: the left matrix at the tile's first row and the first step, its columns side by side, and the
/// packed right one, which holds for each two steps the columns' pairs side by side; what an odd last step is paired with
/// does not count. Of several parts the left matrix has as many columns in each, and all are multiplied with the same right,
/// or, if that is [`split`](Self::split), with as many of its own as are not too small to tell.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct PairSteps {
    pub left: *const u16,
    /// Between rows of the left matrix, in elements.
    pub row_stride: usize,
    /// Of the left matrix, at least one.
    pub parts: usize,
    /// Between these, in elements.
    pub part_stride: usize,
    /// 1 if the right matrix is in parts, each [`parts::LINE`](super::parts::LINE) steps of one after those of another, else 0.
    pub split: usize,
    pub right: *const u32,
    /// How many steps.
    pub k: usize,
}

/// As [`TileFn`] for bf16, by pairs of steps of one product after the other.
pub(super) type PairTileFn = unsafe fn(tile: &Tile, steps: &[PairSteps], out: *mut f32);

/// The most rows of any tile.
pub(super) const MAX_ROWS: usize = 32;

/// The tile for bf16 pairs, [`Kernel::columns`] wide.
#[derive(Clone, Copy)]
pub(super) struct Pairs {
    pub rows: usize,
    /// As [`Kernel::halves`].
    pub halves: bool,
    /// Whether several products of pairs are faster than one in f32; the tile of others takes no parts.
    pub fast: bool,
    /// Steps of the common dimension in one piece.
    pub steps: usize,
    /// Those that all rows take before the next, an even number, and with how many panels.
    pub chunk: usize,
    pub panels: usize,
    /// What a thread calls before its tiles, and after them, while nothing else uses what they prepare.
    pub around: [unsafe fn(); 2],
    pub tile: PairTileFn,
}

/// The inner loops of one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub rows: usize,
    pub columns: usize,
    /// Whether a tile of at most half the columns computes only these.
    pub halves: bool,
    pub tile: TileFn,
    pub pairs: Option<Pairs>,
}

impl Kernel {
    pub fn of(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self { rows: 6, columns: 16, halves: true, tile: x86::avx2, pairs: None },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Self { rows: 12, columns: 32, halves: true, tile: x86::avx512, pairs: None },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Self {
                rows: 12,
                columns: 32,
                halves: true,
                tile: x86::avx512,
                pairs: Some(Pairs {
                    rows: 12,
                    halves: true,
                    fast: false,
                    steps: STEPS,
                    chunk: STEPS,
                    panels: 1,
                    around: [|| {}, || {}],
                    tile: x86::avx512_pairs,
                }),
            },
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Isa::Amx => Self {
                rows: 12,
                columns: amx::SIDE,
                halves: true,
                tile: x86::avx512,
                // The longer a piece, the fewer times sums leave the first-level cache. A chunk of two panels stays there for all
                // rows that are taken at once: the unit is faster than what the second-level cache brings for each tile anew.
                pairs: Some(Pairs {
                    rows: amx::SIDE,
                    halves: false,
                    fast: true,
                    steps: 4 * STEPS,
                    chunk: 320,
                    panels: 2,
                    around: [amx::begin, amx::end],
                    tile: amx::tile,
                }),
            },
            _ => Self {
                rows: plain::ROWS,
                columns: plain::COLUMNS,
                halves: false,
                tile: plain::tile,
                pairs: None,
            },
        }
    }
}

/// Evaluates an expression with a number of rows as the constant it names.
macro_rules! with_rows {
    ($rows:expr, [$($n:literal)*], $name:ident => $body:expr) => {
        match $rows {
            $($n => {
                const $name: usize = $n;
                $body
            })*
            _ => {}
        }
    };
}

mod plain {
    //! Plain loops, which the compiler turns into whatever vectors the target always has.

    use super::Tile;

    // As many accumulators as fit the registers: 16 of 4 floats on x86-64, 32 on aarch64.
    pub(super) const ROWS: usize = if cfg!(target_arch = "aarch64") { 6 } else { 3 };
    pub(super) const COLUMNS: usize = 16;

    fn multiply_add(x: f32, y: f32, sum: f32) -> f32 {
        // Without the instruction it would be a call.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            x.mul_add(y, sum)
        } else {
            x * y + sum
        }
    }

    /// # Safety
    /// That of [`TileFn`](super::TileFn).
    pub(super) unsafe fn tile(tile: &Tile, left: *const f32, right: *const f32, out: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { with_rows!(tile.rows, [1 2 3 4 5 6], R => rows::<R>(tile, left, right, out)) }
    }

    unsafe fn rows<const R: usize>(tile: &Tile, left: *const f32, right: *const f32, out: *mut f32) {
        let mut sums = [[0f32; COLUMNS]; R];
        for k in 0..tile.k {
            // SAFETY: `right` has `COLUMNS` elements for each step.
            let columns = unsafe { &*right.add(k * COLUMNS).cast::<[f32; COLUMNS]>() };
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: every row has an element at each step.
                let x = unsafe { *left.add(i * tile.row_stride + k * tile.column_stride) };
                for (sum, y) in sums.iter_mut().zip(columns) {
                    *sum = multiply_add(x, *y, *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                // SAFETY: the result has all columns of each row, initialised where it is read.
                unsafe {
                    let out = out.add(i * tile.out_stride + j);
                    *out = if tile.accumulate { *out + sum } else { *sum };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, __m512bh, __m512i, _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps,
        _mm256_setzero_ps, _mm256_storeu_ps, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_setzero_si512, _mm512_storeu_ps,
    };

    use super::{PairSteps, Tile};

    macro_rules! float_kernel {
        ($name:ident, $rows:ident, $step:ident, $features:literal, $lanes:literal, $vector:ty, $zero:ident, $load:ident,
         $store:ident, $add:ident, $set:ident, $multiply_add:ident, [$($n:literal)*]) => {
            /// # Safety
            /// That of [`TileFn`](super::TileFn).
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(tile: &Tile, left: *const f32, right: *const f32, out: *mut f32) {
                // SAFETY: the caller's promise.
                unsafe {
                    match (tile.columns <= $lanes, tile.column_stride == 1) {
                        (true, true) => with_rows!(tile.rows, [$($n)*], R => $rows::<R, 1, true>(tile, left, right, out)),
                        (true, false) => with_rows!(tile.rows, [$($n)*], R => $rows::<R, 1, false>(tile, left, right, out)),
                        (false, true) => with_rows!(tile.rows, [$($n)*], R => $rows::<R, 2, true>(tile, left, right, out)),
                        (false, false) => with_rows!(tile.rows, [$($n)*], R => $rows::<R, 2, false>(tile, left, right, out)),
                    }
                }
            }

            /// `ALONG`: the left matrix's column stride is 1, else its row stride.
            #[target_feature(enable = $features)]
            unsafe fn $rows<const R: usize, const V: usize, const ALONG: bool>(
                tile: &Tile,
                left: *const f32,
                right: *const f32,
                out: *mut f32,
            ) {
                let mut sums = [[$zero(); V]; R];
                let (row, column) = if ALONG { (tile.row_stride, 1) } else { (1, tile.column_stride) };
                let (mut left, mut right) = (left, right);
                // SAFETY: four steps at a time, then one, as many as the tile has; each within both matrices.
                unsafe {
                    for _ in 0..tile.k / 4 {
                        for k in 0..4 {
                            $step(&mut sums, row, left.add(k * column), right.add(k * 2 * $lanes));
                        }
                        left = left.wrapping_add(4 * column);
                        right = right.wrapping_add(4 * 2 * $lanes);
                    }
                    for _ in 0..tile.k % 4 {
                        $step(&mut sums, row, left, right);
                        left = left.wrapping_add(column);
                        right = right.wrapping_add(2 * $lanes);
                    }
                }
                for (i, sums) in sums.iter().enumerate() {
                    for (v, sum) in sums.iter().enumerate() {
                        // SAFETY: the result has these columns of each row, initialised where it is read.
                        unsafe {
                            let out = out.add(i * tile.out_stride + v * $lanes);
                            let sum = if tile.accumulate { $add($load(out), *sum) } else { *sum };
                            $store(out, sum);
                        }
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn $step<const R: usize, const V: usize>(
                sums: &mut [[$vector; V]; R],
                row_stride: usize,
                left: *const f32,
                right: *const f32,
            ) {
                // SAFETY: a step has an element in each row and `2·lanes` packed columns.
                unsafe {
                    let mut columns = [$zero(); V];
                    for (v, column) in columns.iter_mut().enumerate() {
                        *column = $load(right.add(v * $lanes));
                    }
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let x = $set(*left.add(i * row_stride));
                        for (sum, column) in sums.iter_mut().zip(&columns) {
                            *sum = $multiply_add(x, *column, *sum);
                        }
                    }
                }
            }
        };
    }

    float_kernel!(avx2, avx2_rows, avx2_step, "avx2,fma", 8, __m256, _mm256_setzero_ps, _mm256_loadu_ps,
        _mm256_storeu_ps, _mm256_add_ps, _mm256_set1_ps, _mm256_fmadd_ps, [1 2 3 4 5 6]);
    float_kernel!(avx512, avx512_rows, avx512_step, "avx512f", 16, __m512, _mm512_setzero_ps, _mm512_loadu_ps,
        _mm512_storeu_ps, _mm512_add_ps, _mm512_set1_ps, _mm512_fmadd_ps, [1 2 3 4 5 6 7 8 9 10 11 12]);

    /// # Safety
    /// That of [`PairTileFn`](super::PairTileFn).
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn avx512_pairs(tile: &Tile, steps: &[PairSteps], out: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            if tile.columns <= 16 {
                with_rows!(tile.rows, [1 2 3 4 5 6 7 8 9 10 11 12], R => pair_rows::<R, 1>(tile, steps, out));
            } else {
                with_rows!(tile.rows, [1 2 3 4 5 6 7 8 9 10 11 12], R => pair_rows::<R, 2>(tile, steps, out));
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn pair_rows<const R: usize, const V: usize>(tile: &Tile, steps: &[PairSteps], out: *mut f32) {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for &PairSteps { mut left, row_stride, mut right, k, .. } in steps {
            // SAFETY: as many pairs as both matrices have, and a last step alone where `k` is odd, of which one element of
            // each row is read.
            unsafe {
                for _ in 0..k / 2 {
                    pair_step(&mut sums, right, |i| left.add(i * row_stride).cast::<i32>().read_unaligned());
                    left = left.wrapping_add(2);
                    right = right.wrapping_add(32);
                }
                if k % 2 == 1 {
                    // Beside it may be a step that does not count, and is not to be multiplied by 0.
                    let last = (*right.cast::<[u32; 32]>()).map(|word| word & 0xFFFF);
                    pair_step(&mut sums, last.as_ptr(), |i| i32::from(*left.add(i * row_stride)));
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: the result has these columns of each row, initialised where it is read.
                unsafe {
                    let out = out.add(i * tile.out_stride + v * 16);
                    let sum = if tile.accumulate { _mm512_add_ps(_mm512_loadu_ps(out), *sum) } else { *sum };
                    _mm512_storeu_ps(out, sum);
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn pair_step<const R: usize, const V: usize>(
        sums: &mut [[__m512; V]; R],
        right: *const u32,
        left: impl Fn(usize) -> i32,
    ) {
        let mut columns = [_mm512_setzero_si512(); V];
        for (v, column) in columns.iter_mut().enumerate() {
            // SAFETY: 32 packed pairs for each step.
            *column = unsafe { _mm512_loadu_si512(right.add(v * 16).cast()) };
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let x = _mm512_set1_epi32(left(i));
            for (sum, column) in sums.iter_mut().zip(&columns) {
                // SAFETY: bit patterns of one size.
                let (x, column) = unsafe {
                    (
                        std::mem::transmute::<__m512i, __m512bh>(x),
                        std::mem::transmute::<__m512i, __m512bh>(*column),
                    )
                };
                *sum = _mm512_dpbf16_ps(*sum, x, column);
            }
        }
    }
}
