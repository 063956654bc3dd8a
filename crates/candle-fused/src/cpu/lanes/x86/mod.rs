//! Lanes of AVX2 (with FMA and F16C) and of AVX-512 (F, BW, DQ and VL), and what both are made of.

#![allow(clippy::wildcard_imports, reason = "intrinsics have long names of their own")]

/// Calls an intrinsic.
macro_rules! x86 {
    ($call:expr) => {{
        // SAFETY: a value of these lanes exists only where `dispatch` has found the instructions; the addresses are
        // those of whole pieces, of any alignment but for streams, whose callers promise theirs.
        unsafe { $call }
    }};
}

macro_rules! operators {
    ([$($parameters:tt)*] $T:ty,) => {
        impl<$($parameters)*> Neg for $T {
            type Output = Self;

            #[inline(always)]
            fn neg(self) -> Self {
                Self::splat(-0.0).xor(self)
            }
        }
    };
    ([$($parameters:tt)*] $T:ty, $trait:ident $method:ident $f:ident, $($rest:tt)*) => {
        impl<$($parameters)*> $trait for $T {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(other, #[inline(always)] |a, b| x86!($f(a, b)))
            }
        }

        operators! { [$($parameters)*] $T, $($rest)* }
    };
}

mod avx2;
mod avx512;

use std::arch::asm;
use std::arch::x86_64::*;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;

#[inline(always)]
fn ask<const SOON: bool>(address: *const u8) {
    // SAFETY: a prefetch reads nothing, and never faults, wherever the address lies.
    unsafe {
        if SOON {
            _mm_prefetch::<_MM_HINT_T0>(address.cast());
        } else {
            _mm_prefetch::<_MM_HINT_T1>(address.cast());
        }
    }
}

#[inline(always)]
fn ask_to_write(address: *const u8) {
    // SAFETY: a prefetch changes no memory, and never faults, wherever the address lies; what has AVX2 knows this one or does
    // nothing.
    unsafe { asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly)) };
}

/// Past the cache, 16 bytes at a time: a greater alignment no allocator promises.
#[inline(always)]
fn stream_16(bits: __m256i, to: *mut __m128i) {
    x86!({
        _mm_stream_si128(to, _mm256_castsi256_si128(bits));
        _mm_stream_si128(to.add(1), _mm256_extracti128_si256::<1>(bits));
    });
}

/// The pairwise sum of eight lanes.
#[inline(always)]
fn sum(x: __m256) -> f32 {
    x86!({
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    })
}

/// The greatest lane, in the order of [`Lanes::join`].
#[inline(always)]
fn greatest(x: __m256) -> f32 {
    x86!({
        // The instruction has the second operand where one is NaN.
        let (low, high) = (_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_max_ps(high, low);
        let x = _mm_max_ps(_mm_movehl_ps(x, x), x);
        _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(x), x))
    })
}
