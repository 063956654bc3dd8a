//! Lanes of AVX-512: F, BW, DQ and VL, with or without `AVX512_BF16`.

#![allow(clippy::wildcard_imports, reason = "intrinsics have long names of their own")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::{Add, Div, Mul, Neg, Sub};

use candle_core::DType;
use half::{bf16, f16};

use super::super::{Element, LANES, Lanes, Piece, Room};
use super::{ask, ask_to_write, greatest, stream_16, sum};

/// One register of AVX-512, which rounds to bf16 by an instruction if it is `NATIVE`.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const NATIVE: bool>(__m512);

operators! {
    [const NATIVE: bool] Avx512<NATIVE>,
    Add add _mm512_add_ps,
    Sub sub _mm512_sub_ps,
    Mul mul _mm512_mul_ps,
    Div div _mm512_div_ps,
}

/// Where the upper halves of the lanes of two registers lie among their words.
#[rustfmt::skip]
const UPPER_HALVES: [u16; 2 * LANES] = [
    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63,
];

/// Where the words of two halves of a register lie if one of each half are a pair.
#[rustfmt::skip]
const PAIRS: [u16; 2 * LANES] = [
    0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31,
];

/// Numbers of which the instruction would take some for zero.
#[cold]
#[inline(never)]
fn round_each(x: &Piece<f32>) -> Piece<bf16> {
    x.map(bf16::from_f32)
}

impl<const NATIVE: bool> Avx512<NATIVE> {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(__m512, __m512) -> __m512) -> Self {
        Self(f(self.0, other.0))
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        self.zip(
            other,
            #[inline(always)]
            |a, b| x86!(_mm512_xor_ps(a, b)),
        )
    }

    #[inline(always)]
    fn to_f16(self) -> __m256i {
        x86!(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0))
    }

    /// Rounded to bf16, in the upper half of each lane.
    #[inline(always)]
    fn round_bf16(self) -> __m512i {
        x86!({
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
            // A NaN stays one: its upper half, made quiet.
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            _mm512_mask_mov_epi32(rounded, nan, quiet)
        })
    }

    /// The lanes that are subnormal.
    #[inline(always)]
    fn subnormal(self) -> __mmask16 {
        const SUBNORMAL: i32 = 1 << 5;
        x86!(_mm512_fpclass_ps_mask::<SUBNORMAL>(self.0))
    }

    #[inline(always)]
    fn to_bf16(self) -> __m256i {
        if NATIVE {
            if self.subnormal() != 0 {
                return x86!(_mm256_loadu_si256(round_each(&self.to_array()).as_ptr().cast()));
            }
            return x86!(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0)));
        }
        x86!({
            // One instruction instead of a shift and a truncation.
            let upper = _mm512_loadu_si512(UPPER_HALVES.as_ptr().cast());
            _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, self.round_bf16()))
        })
    }
}

impl<const NATIVE: bool> Lanes for Avx512<NATIVE> {
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(x86!(_mm512_set1_ps(x)))
    }

    #[inline(always)]
    fn of_bits(bits: u16) -> Self {
        Self(x86!(_mm512_maskz_mov_ps(bits, _mm512_set1_ps(1.0))))
    }

    #[inline(always)]
    fn load(from: &Piece<f32>) -> Self {
        Self(x86!(_mm512_loadu_ps(from.as_ptr())))
    }

    #[inline(always)]
    fn load_f16(from: &Piece<f16>) -> Self {
        Self(x86!(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))))
    }

    #[inline(always)]
    fn load_bf16(from: &Piece<bf16>) -> Self {
        Self(x86!({
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }))
    }

    #[inline(always)]
    fn store(self, to: &mut Room<f32>) {
        x86!(_mm512_storeu_ps(to.as_mut_ptr().cast(), self.0));
    }

    #[inline(always)]
    fn store_f16(self, to: &mut Room<f16>) {
        x86!(_mm256_storeu_si256(to.as_mut_ptr().cast(), self.to_f16()));
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut Room<bf16>) {
        x86!(_mm256_storeu_si256(to.as_mut_ptr().cast(), self.to_bf16()));
    }

    #[inline(always)]
    fn store_both<T: Element>(first: Self, second: Self, to: &mut [MaybeUninit<T>; 2 * LANES]) {
        if NATIVE && T::DTYPE == DType::BF16 && first.subnormal() | second.subnormal() == 0 {
            return x86!(_mm512_storeu_si512(
                to.as_mut_ptr().cast(),
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second.0, first.0)),
            ));
        }
        for (lanes, to) in [first, second].into_iter().zip(to.as_chunks_mut().0) {
            T::store(lanes, to);
        }
    }

    #[inline(always)]
    fn store_bf16_pairs(low: Self, high: Self, to: &mut Room<f32>) {
        if NATIVE && low.subnormal() | high.subnormal() == 0 {
            return x86!({
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high.0, low.0));
                let pairs = _mm512_permutexvar_epi16(_mm512_loadu_si512(PAIRS.as_ptr().cast()), both);
                _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs);
            });
        }
        let (low, high) = (low.round_bf16(), high.round_bf16());
        let (low, high) = x86!((_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)));
        Self::store_upper_pairs(Self(low), Self(high), to);
    }

    #[inline(always)]
    fn store_upper_pairs(low: Self, high: Self, to: &mut Room<f32>) {
        x86!({
            let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(low.0));
            // The upper half of the other word.
            let pairs = _mm512_mask_blend_epi16(0xAAAA_AAAA, low, _mm512_castps_si512(high.0));
            _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs);
        });
    }

    #[inline(always)]
    fn upper_halves(self) -> Self {
        Self(x86!({
            let bits = _mm512_and_si512(
                _mm512_castps_si512(self.0),
                _mm512_set1_epi32(0xFFFF_0000u32.cast_signed()),
            );
            _mm512_castsi512_ps(bits)
        }))
    }

    #[inline(always)]
    fn store_upper_halves(first: Self, second: Self, to: &mut [MaybeUninit<bf16>; 2 * LANES]) {
        x86!({
            let [first, second] = [_mm512_castps_si512(first.0), _mm512_castps_si512(second.0)];
            let upper = _mm512_loadu_si512(UPPER_HALVES.as_ptr().cast());
            let halves = _mm512_permutex2var_epi16(first, upper, second);
            _mm512_storeu_si512(to.as_mut_ptr().cast(), halves);
        });
    }

    #[inline(always)]
    unsafe fn stream(self, to: &mut Room<f32>) {
        let to = to.as_mut_ptr().cast::<f32>();
        // A line at once where it is one: four parts may be written to memory before they are together.
        if to.addr().is_multiple_of(64) {
            return x86!(_mm512_stream_ps(to, self.0));
        }
        x86!({
            _mm_stream_ps(to, _mm512_castps512_ps128(self.0));
            _mm_stream_ps(to.add(4), _mm512_extractf32x4_ps::<1>(self.0));
            _mm_stream_ps(to.add(8), _mm512_extractf32x4_ps::<2>(self.0));
            _mm_stream_ps(to.add(12), _mm512_extractf32x4_ps::<3>(self.0));
        });
    }

    #[inline(always)]
    unsafe fn stream_f16(self, to: &mut Room<f16>) {
        stream_16(self.to_f16(), to.as_mut_ptr().cast());
    }

    #[inline(always)]
    unsafe fn stream_bf16(self, to: &mut Room<bf16>) {
        stream_16(self.to_bf16(), to.as_mut_ptr().cast());
    }

    #[inline(always)]
    fn ask<const SOON: bool>(address: *const u8) {
        ask::<SOON>(address);
    }

    #[inline(always)]
    fn ask_to_write(address: *const u8) {
        ask_to_write(address);
    }

    #[inline(always)]
    fn fence() {
        x86!(_mm_sfence());
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(x86!(_mm512_fmadd_ps(self.0, factor.0, addend.0)))
    }

    /// The instruction has the second operand where one is NaN.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(x86!(_mm512_max_ps(other.0, self.0)))
    }

    /// As [`Self::max`].
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(x86!(_mm512_min_ps(other.0, self.0)))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Self(x86!(_mm512_abs_ps(self.0)))
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(x86!(_mm512_sqrt_ps(self.0)))
    }

    #[inline(always)]
    fn if_less(self, other: Self, then: Self, otherwise: Self) -> Self {
        Self(x86!({
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0);
            _mm512_mask_mov_ps(otherwise.0, less, then.0)
        }))
    }

    #[inline(always)]
    fn times_power_of_two(self, n: Self) -> Self {
        Self(x86!(_mm512_scalef_ps(self.0, n.0)))
    }

    #[inline(always)]
    fn add_to_exponent(self, shifted: Self) -> Self {
        Self(x86!({
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted.0));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), n))
        }))
    }

    #[inline(always)]
    fn all_within(self, bound: f32) -> bool {
        x86!(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(_mm512_abs_ps(self.0), _mm512_set1_ps(bound)) == 0xFFFF)
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        sum(x86!(_mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))))
    }

    #[inline(always)]
    fn greatest(self) -> f32 {
        greatest(x86!(_mm256_max_ps(_mm512_extractf32x8_ps::<1>(self.0), _mm512_castps512_ps256(self.0))))
    }

    #[inline(always)]
    fn part<T: Copy>(from: &[T], rest: T) -> Piece<T> {
        let (mut piece, mask) = ([rest; LANES], first(from.len()));
        let (start, to) = (from.as_ptr(), piece.as_mut_ptr());
        // The mask's elements are those of the slice, and bits stay bits.
        match size_of::<T>() {
            4 => x86!({
                let x = _mm512_mask_loadu_epi32(_mm512_loadu_si512(to.cast()), mask, start.cast());
                _mm512_storeu_si512(to.cast(), x);
            }),
            2 => x86!({
                let x = _mm256_mask_loadu_epi16(_mm256_loadu_si256(to.cast()), mask, start.cast());
                _mm256_storeu_si256(to.cast(), x);
            }),
            _ => piece[..from.len()].copy_from_slice(from),
        }
        piece
    }

    #[inline(always)]
    fn put_part<T: Copy>(piece: &Piece<T>, to: &mut [MaybeUninit<T>]) {
        let (from, mask, start) = (piece.as_ptr(), first(to.len()), to.as_mut_ptr());
        // As above.
        match size_of::<T>() {
            4 => x86!(_mm512_mask_storeu_epi32(start.cast(), mask, _mm512_loadu_si512(from.cast()))),
            2 => x86!(_mm256_mask_storeu_epi16(start.cast(), mask, _mm256_loadu_si256(from.cast()))),
            _ => _ = to.write_copy_of_slice(&piece[..to.len()]),
        }
    }

    #[inline(always)]
    fn first(self, count: usize, other: Self) -> Self {
        Self(x86!(_mm512_mask_mov_ps(other.0, first(count), self.0)))
    }

    #[inline(always)]
    fn swap_pairs(self) -> Self {
        Self(x86!(_mm512_permute_ps::<0b10_11_00_01>(self.0)))
    }
}

/// The first lanes.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    x86!(_cvtu32_mask16(0xFFFF >> (LANES - count.min(LANES))))
}
