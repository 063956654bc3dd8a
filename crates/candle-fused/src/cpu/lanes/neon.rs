//! Lanes of NEON: four registers.

#![allow(clippy::wildcard_imports, reason = "intrinsics have long names of their own")]

use std::arch::aarch64::*;
use std::array;
use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::{Lanes, Piece, Room};

/// Calls an intrinsic.
macro_rules! neon {
    ($call:expr) => {{
        // SAFETY: every aarch64 processor that runs this has NEON; the addresses are those of whole pieces.
        #[allow(unused_unsafe, reason = "some are safe where NEON is the target's")]
        unsafe {
            $call
        }
    }};
}

#[derive(Clone, Copy)]
pub(crate) struct Neon([float32x4_t; 4]);

impl Neon {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        let ([a, b, c, d], [e, g, h, i]) = (self.0, other.0);
        Self([f(a, e), f(b, g), f(c, h), f(d, i)])
    }

    #[inline(always)]
    fn map(self, f: impl Fn(float32x4_t) -> float32x4_t) -> Self {
        let [a, b, c, d] = self.0;
        Self([f(a), f(b), f(c), f(d)])
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $f:ident) => {
        impl $trait for Neon {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(
                    other,
                    #[inline(always)]
                    |a, b| neon!($f(a, b)),
                )
            }
        }
    };
}
operator!(Add, add, vaddq_f32);
operator!(Sub, sub, vsubq_f32);
operator!(Mul, mul, vmulq_f32);
operator!(Div, div, vdivq_f32);

impl Neg for Neon {
    type Output = Self;

    #[inline(always)]
    fn neg(self) -> Self {
        self.map(
            #[inline(always)]
            |x| neon!(vnegq_f32(x)),
        )
    }
}

/// To the nearest, ties to even; the upper half of a NaN, made quiet.
#[inline(always)]
fn round_bf16(x: float32x4_t) -> uint16x4_t {
    neon!({
        let bits = vreinterpretq_u32_f32(x);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
        vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(x, x), rounded, quiet))
    })
}

impl Lanes for Neon {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([neon!(vdupq_n_f32(x)); 4])
    }

    #[inline(always)]
    fn load(from: &Piece<f32>) -> Self {
        let from = from.as_ptr();
        Self(array::from_fn(
            #[inline(always)]
            |i| neon!(vld1q_f32(from.add(4 * i))),
        ))
    }

    #[inline(always)]
    fn load_f16(from: &Piece<f16>) -> Self {
        let from = from.as_ptr().cast::<u16>();
        Self(array::from_fn(
            #[inline(always)]
            |i| neon!(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from.add(4 * i))))),
        ))
    }

    #[inline(always)]
    fn load_bf16(from: &Piece<bf16>) -> Self {
        let from = from.as_ptr().cast::<u16>();
        Self(array::from_fn(
            #[inline(always)]
            |i| neon!(vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.add(4 * i))))),
        ))
    }

    #[inline(always)]
    fn store(self, to: &mut Room<f32>) {
        let to = to.as_mut_ptr().cast::<f32>();
        for (i, x) in self.0.into_iter().enumerate() {
            neon!(vst1q_f32(to.add(4 * i), x));
        }
    }

    #[inline(always)]
    fn store_f16(self, to: &mut Room<f16>) {
        let to = to.as_mut_ptr().cast::<u16>();
        for (i, x) in self.0.into_iter().enumerate() {
            neon!(vst1_u16(to.add(4 * i), vreinterpret_u16_f16(vcvt_f16_f32(x))));
        }
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut Room<bf16>) {
        let to = to.as_mut_ptr().cast::<u16>();
        for (i, x) in self.0.into_iter().enumerate() {
            neon!(vst1_u16(to.add(4 * i), round_bf16(x)));
        }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(array::from_fn(
            #[inline(always)]
            |i| neon!(vfmaq_f32(addend.0[i], self.0[i], factor.0[i])),
        ))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(
            other,
            #[inline(always)]
            |a, b| neon!(vbslq_f32(vcgtq_f32(b, a), b, a)),
        )
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(
            other,
            #[inline(always)]
            |a, b| neon!(vbslq_f32(vcltq_f32(b, a), b, a)),
        )
    }

    #[inline(always)]
    fn abs(self) -> Self {
        self.map(
            #[inline(always)]
            |x| neon!(vabsq_f32(x)),
        )
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.map(
            #[inline(always)]
            |x| neon!(vsqrtq_f32(x)),
        )
    }

    #[inline(always)]
    fn if_less(self, other: Self, then: Self, otherwise: Self) -> Self {
        Self(array::from_fn(
            #[inline(always)]
            |i| neon!(vbslq_f32(vcltq_f32(self.0[i], other.0[i]), then.0[i], otherwise.0[i])),
        ))
    }

    /// As two powers, neither of which leaves the range of exponents.
    #[inline(always)]
    fn times_power_of_two(self, n: Self) -> Self {
        self.zip(
            n,
            #[inline(always)]
            |x, n| {
                neon!({
                    let bias = vdupq_n_s32(127);
                    let n = vcvtq_s32_f32(n);
                    let half = vshrq_n_s32::<1>(n);
                    let rest = vsubq_s32(n, half);
                    let half = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(half, bias)));
                    let rest = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(rest, bias)));
                    vmulq_f32(vmulq_f32(x, half), rest)
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
                neon!({
                    let n = vshlq_n_u32::<23>(vreinterpretq_u32_f32(n));
                    vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(x), n))
                })
            },
        )
    }

    #[inline(always)]
    fn all_within(self, bound: f32) -> bool {
        let [a, b, c, d] = self.0;
        neon!({
            let bound = vdupq_n_f32(bound);
            let [a, b, c, d] =
                [vcaleq_f32(a, bound), vcaleq_f32(b, bound), vcaleq_f32(c, bound), vcaleq_f32(d, bound)];
            vminvq_u32(vandq_u32(vandq_u32(a, b), vandq_u32(c, d))) != 0
        })
    }

    #[inline(always)]
    fn swap_pairs(self) -> Self {
        self.map(
            #[inline(always)]
            |x| neon!(vrev64q_f32(x)),
        )
    }
}
