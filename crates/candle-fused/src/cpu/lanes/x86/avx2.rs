//! Lanes of AVX2, with FMA and F16C.

#![allow(clippy::wildcard_imports, reason = "intrinsics have long names of their own")]
#![expect(clippy::cast_ptr_alignment, reason = "the loads and stores say what alignment they need")]

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::super::{Lanes, Piece, Room};
use super::{ask, ask_to_write, greatest, stream_16, sum};

/// Two registers of AVX2.
#[derive(Clone, Copy)]
pub(crate) struct Avx2([__m256; 2]);

operators! {
    [] Avx2,
    Add add _mm256_add_ps,
    Sub sub _mm256_sub_ps,
    Mul mul _mm256_mul_ps,
    Div div _mm256_div_ps,
}

impl Avx2 {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(__m256, __m256) -> __m256) -> Self {
        Self([f(self.0[0], other.0[0]), f(self.0[1], other.0[1])])
    }

    #[inline(always)]
    fn map(self, f: impl Fn(__m256) -> __m256) -> Self {
        Self([f(self.0[0]), f(self.0[1])])
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        self.zip(
            other,
            #[inline(always)]
            |a, b| x86!(_mm256_xor_ps(a, b)),
        )
    }

    /// Eight lanes each.
    #[inline(always)]
    fn to_f16(self) -> [__m128i; 2] {
        [
            x86!(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0[0])),
            x86!(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0[1])),
        ]
    }

    /// Whether a lane is NaN.
    #[inline(always)]
    fn has_nan(self) -> bool {
        x86!(_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0[0], self.0[1])) != 0)
    }

    /// To the nearest bf16, ties to even, in the upper half of each lane; below it lies what was rounded away.
    #[inline(always)]
    fn rounded_to_bf16(self) -> [__m256i; 2] {
        let [a, b] = self.0;
        let (a, b) = (x86!(_mm256_castps_si256(a)), x86!(_mm256_castps_si256(b)));
        // A NaN stays one: its upper half, made quiet. Both registers are asked at once whether they hold one.
        if self.has_nan() { [quiet_or_rounded(a), quiet_or_rounded(b)] } else { [rounded(a), rounded(b)] }
    }

    #[inline(always)]
    fn to_bf16(self) -> __m256i {
        let [low, high] = self.rounded_to_bf16();
        x86!({
            let both = _mm256_packus_epi32(_mm256_srli_epi32::<16>(low), _mm256_srli_epi32::<16>(high));
            // Packing works within each half of the registers.
            _mm256_permute4x64_epi64::<0b11_01_10_00>(both)
        })
    }

    /// Lane l of the first register beside lane l of the second.
    #[inline(always)]
    fn to_bf16_in_pairs(self) -> __m256i {
        let [even, odd] = self.rounded_to_bf16();
        x86!(_mm256_blend_epi16::<0b1010_1010>(_mm256_srli_epi32::<16>(even), odd))
    }
}

#[inline(always)]
fn rounded(bits: __m256i) -> __m256i {
    x86!({
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)))
    })
}

#[inline(always)]
fn quiet_or_rounded(bits: __m256i) -> __m256i {
    x86!({
        let x = _mm256_castsi256_ps(bits);
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        _mm256_blendv_epi8(rounded(bits), _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000)), nan)
    })
}

#[inline(always)]
fn widen_bf16(half: __m128i) -> __m256 {
    x86!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))))
}

impl Lanes for Avx2 {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x86!(_mm256_set1_ps(x)); 2])
    }

    #[inline(always)]
    fn load(from: &Piece<f32>) -> Self {
        let from = from.as_ptr();
        Self([x86!(_mm256_loadu_ps(from)), x86!(_mm256_loadu_ps(from.add(8)))])
    }

    #[inline(always)]
    fn load_f16(from: &Piece<f16>) -> Self {
        let from = from.as_ptr().cast::<__m128i>();
        Self([
            x86!(_mm256_cvtph_ps(_mm_loadu_si128(from))),
            x86!(_mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))),
        ])
    }

    #[inline(always)]
    fn load_bf16(from: &Piece<bf16>) -> Self {
        let from = from.as_ptr().cast::<__m128i>();
        Self([widen_bf16(x86!(_mm_loadu_si128(from))), widen_bf16(x86!(_mm_loadu_si128(from.add(1))))])
    }

    #[inline(always)]
    fn store(self, to: &mut Room<f32>) {
        let to = to.as_mut_ptr().cast::<f32>();
        x86!({
            _mm256_storeu_ps(to, self.0[0]);
            _mm256_storeu_ps(to.add(8), self.0[1]);
        });
    }

    #[inline(always)]
    fn store_f16(self, to: &mut Room<f16>) {
        let ([low, high], to) = (self.to_f16(), to.as_mut_ptr().cast::<__m128i>());
        x86!({
            _mm_storeu_si128(to, low);
            _mm_storeu_si128(to.add(1), high);
        });
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut Room<bf16>) {
        x86!(_mm256_storeu_si256(to.as_mut_ptr().cast(), self.to_bf16()));
    }

    #[inline(always)]
    fn load_bf16_in_any_order(from: &Piece<bf16>) -> Self {
        x86!({
            let pairs = _mm256_loadu_si256(from.as_ptr().cast());
            let (even, odd) =
                (_mm256_slli_epi32::<16>(pairs), _mm256_and_si256(pairs, _mm256_set1_epi32(!0xFFFF)));
            Self([_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)])
        })
    }

    #[inline(always)]
    fn store_bf16_in_any_order(self, to: &mut Room<bf16>) {
        x86!(_mm256_storeu_si256(to.as_mut_ptr().cast(), self.to_bf16_in_pairs()));
    }

    #[inline(always)]
    unsafe fn stream_bf16_in_any_order(self, to: &mut Room<bf16>) {
        stream_16(self.to_bf16_in_pairs(), to.as_mut_ptr().cast());
    }

    #[inline(always)]
    unsafe fn stream(self, to: &mut Room<f32>) {
        let to = to.as_mut_ptr().cast::<f32>();
        // Of 16 bytes each: more than that no allocator promises.
        x86!({
            _mm_stream_ps(to, _mm256_castps256_ps128(self.0[0]));
            _mm_stream_ps(to.add(4), _mm256_extractf128_ps::<1>(self.0[0]));
            _mm_stream_ps(to.add(8), _mm256_castps256_ps128(self.0[1]));
            _mm_stream_ps(to.add(12), _mm256_extractf128_ps::<1>(self.0[1]));
        });
    }

    #[inline(always)]
    unsafe fn stream_f16(self, to: &mut Room<f16>) {
        let ([low, high], to) = (self.to_f16(), to.as_mut_ptr().cast::<__m128i>());
        x86!({
            _mm_stream_si128(to, low);
            _mm_stream_si128(to.add(1), high);
        });
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
        Self([
            x86!(_mm256_fmadd_ps(self.0[0], factor.0[0], addend.0[0])),
            x86!(_mm256_fmadd_ps(self.0[1], factor.0[1], addend.0[1])),
        ])
    }

    /// The instruction has the second operand where one is NaN.
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        other.zip(
            self,
            #[inline(always)]
            |b, a| x86!(_mm256_max_ps(b, a)),
        )
    }

    /// As [`Self::max`].
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        other.zip(
            self,
            #[inline(always)]
            |b, a| x86!(_mm256_min_ps(b, a)),
        )
    }

    #[inline(always)]
    fn abs(self) -> Self {
        self.map(
            #[inline(always)]
            |x| x86!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), x)),
        )
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.map(
            #[inline(always)]
            |x| x86!(_mm256_sqrt_ps(x)),
        )
    }

    #[inline(always)]
    fn if_less(self, other: Self, then: Self, otherwise: Self) -> Self {
        let less = self.zip(
            other,
            #[inline(always)]
            |a, b| x86!(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b)),
        );
        Self([
            x86!(_mm256_blendv_ps(otherwise.0[0], then.0[0], less.0[0])),
            x86!(_mm256_blendv_ps(otherwise.0[1], then.0[1], less.0[1])),
        ])
    }

    /// As two powers, neither of which leaves the range of exponents.
    #[inline(always)]
    fn times_power_of_two(self, n: Self) -> Self {
        self.zip(
            n,
            #[inline(always)]
            |x, n| {
                x86!({
                    let bias = _mm256_set1_epi32(127);
                    let n = _mm256_cvtps_epi32(n);
                    let half = _mm256_srai_epi32::<1>(n);
                    let rest = _mm256_sub_epi32(n, half);
                    let half = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
                    let rest = _mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias));
                    _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(half)), _mm256_castsi256_ps(rest))
                })
            },
        )
    }

    #[inline(always)]
    fn add_to_exponent(self, shifted: Self) -> Self {
        self.zip(
            shifted,
            #[inline(always)]
            |x, n| {
                x86!({
                    let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
                    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n))
                })
            },
        )
    }

    #[inline(always)]
    fn all_within(self, bound: f32) -> bool {
        let [low, high] = self.abs().0;
        x86!({
            let bound = _mm256_set1_ps(bound);
            let low = _mm256_cmp_ps::<_CMP_LE_OQ>(low, bound);
            let high = _mm256_cmp_ps::<_CMP_LE_OQ>(high, bound);
            _mm256_movemask_ps(_mm256_and_ps(low, high)) == 0xFF
        })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let [low, high] = self.0;
        sum(x86!(_mm256_add_ps(low, high)))
    }

    #[inline(always)]
    fn greatest(self) -> f32 {
        let [low, high] = self.0;
        greatest(x86!(_mm256_max_ps(high, low)))
    }

    #[inline(always)]
    fn swap_pairs(self) -> Self {
        self.map(
            #[inline(always)]
            |x| x86!(_mm256_permute_ps::<0b10_11_00_01>(x)),
        )
    }
}
