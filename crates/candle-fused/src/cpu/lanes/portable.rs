//! Lanes in plain Rust, which the compiler vectorises for what every processor of its target has.

use std::array;
use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::{LANES, Lanes, Piece, Room};

#[derive(Clone, Copy)]
pub(crate) struct Portable(Piece<f32>);

impl Portable {
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Self(array::from_fn(|l| f(self.0[l])))
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(array::from_fn(|l| f(self.0[l], other.0[l])))
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident) => {
        impl $trait for Portable {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(other, f32::$method)
            }
        }
    };
}
operator!(Add, add);
operator!(Sub, sub);
operator!(Mul, mul);
operator!(Div, div);

impl Neg for Portable {
    type Output = Self;

    #[inline(always)]
    fn neg(self) -> Self {
        self.map(f32::neg)
    }
}

impl Lanes for Portable {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    fn load(from: &Piece<f32>) -> Self {
        Self(*from)
    }

    #[inline(always)]
    fn load_f16(from: &Piece<f16>) -> Self {
        Self(from.map(f16::to_f32))
    }

    #[inline(always)]
    fn load_bf16(from: &Piece<bf16>) -> Self {
        Self(from.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16)))
    }

    #[inline(always)]
    fn store(self, to: &mut Room<f32>) {
        to.write_copy_of_slice(&self.0);
    }

    #[inline(always)]
    fn store_f16(self, to: &mut Room<f16>) {
        for (to, x) in to.iter_mut().zip(self.0) {
            to.write(f16::from_f32(x));
        }
    }

    #[inline(always)]
    fn store_bf16(self, to: &mut Room<bf16>) {
        for (to, x) in to.iter_mut().zip(self.0) {
            to.write(bf16::from_f32(x));
        }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        self * factor + addend
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if b > a { b } else { a })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if b < a { b } else { a })
    }

    #[inline(always)]
    fn abs(self) -> Self {
        self.map(f32::abs)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.map(f32::sqrt)
    }

    #[inline(always)]
    fn if_less(self, other: Self, then: Self, otherwise: Self) -> Self {
        Self(array::from_fn(|l| if self.0[l] < other.0[l] { then.0[l] } else { otherwise.0[l] }))
    }

    /// As two powers, neither of which leaves the range of exponents. A small whole number in the low bits of a float
    /// is what adding 1.5·2²³ leaves there.
    #[inline(always)]
    fn times_power_of_two(self, n: Self) -> Self {
        const SHIFT: f32 = 12_582_912.0;
        self.zip(n, |x, n| {
            let n = (n + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()).cast_signed();
            let power = |n: i32| f32::from_bits(n.wrapping_add(127).cast_unsigned() << 23);
            x * power(n >> 1) * power(n.wrapping_sub(n >> 1))
        })
    }

    #[inline(always)]
    fn add_to_exponent(self, shifted: Self) -> Self {
        self.zip(shifted, |x, n| f32::from_bits(x.to_bits().wrapping_add(n.to_bits() << 23)))
    }

    #[inline(always)]
    fn all_within(self, bound: f32) -> bool {
        // Without a branch for each lane.
        self.0.iter().fold(true, |all, x| all & (x.abs() <= bound))
    }

    #[inline(always)]
    fn swap_pairs(self) -> Self {
        Self(array::from_fn(|l| self.0[l ^ 1]))
    }
}
