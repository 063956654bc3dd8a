//! Sixteen floats at once, whatever the processor: what the row loops are written over.
//!
//! A loop is generic over [`Lanes`] and says each thing once; `dispatch` compiles it for every instruction set and picks
//! one at run time. There are always sixteen lanes, in one register of AVX-512, two of AVX2 or four of NEON, so that the
//! order of additions is the same everywhere. (With FMA a product is not rounded before it is added, without it is.)
//!
//! Storage of 16 bits is widened as it is loaded and rounded as it is stored, to the nearest, ties to even, NaN kept.
//! The conversion of `AVX512_BF16`, which takes subnormal numbers for zero, is used for sixteens that have none.
//!
//! Every function here and in the loops is `#[inline(always)]`, closures included: only what is inlined into the
//! function that enables the instructions is compiled for them.

#![expect(clippy::inline_always, reason = "an instruction set reaches only what is inlined")]

#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
pub(super) mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

use std::mem::MaybeUninit;
use std::ops::{Add, Div, Mul, Neg, Sub};

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// How many there are.
pub(crate) const LANES: usize = 16;

/// Sixteen elements of a row.
pub(crate) type Piece<T> = [T; LANES];
/// Room for sixteen elements.
pub(crate) type Room<T> = [MaybeUninit<T>; LANES];

/// Sixteen lanes of f32.
///
/// A value of a type that needs instructions exists only below `dispatch::vectorise`, which has asked the processor.
pub(crate) trait Lanes:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self>
{
    /// How many of these the processor has registers for.
    const REGISTERS: usize = 8;

    /// `x` in every lane.
    fn splat(x: f32) -> Self;
    fn load(from: &Piece<f32>) -> Self;
    fn load_f16(from: &Piece<f16>) -> Self;
    fn load_bf16(from: &Piece<bf16>) -> Self;
    fn store(self, to: &mut Room<f32>);
    fn store_f16(self, to: &mut Room<f16>);
    fn store_bf16(self, to: &mut Room<bf16>);

    /// 1 in each lane whose bit is set, the lowest first, else 0.
    #[inline(always)]
    fn of_bits(bits: u16) -> Self {
        let (bits, mut lanes) = (u32::from(bits), [0.0; LANES]);
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = if bits & 1 << i == 0 { 0.0 } else { 1.0 };
        }
        Self::load(&lanes)
    }

    /// [`Element::store`] of two, one after the other.
    #[inline(always)]
    fn store_both<T: Element>(first: Self, second: Self, to: &mut [MaybeUninit<T>; 2 * LANES]) {
        for (lanes, to) in [first, second].into_iter().zip(to.as_chunks_mut().0) {
            T::store(lanes, to);
        }
    }

    /// In each word of 32 bits `low` rounded to bf16 in the low half, and `high` in the other.
    #[inline(always)]
    fn store_bf16_pairs(low: Self, high: Self, to: &mut Room<f32>) {
        let (low, high) = (low.to_array(), high.to_array());
        for (to, (low, high)) in to.iter_mut().zip(low.into_iter().zip(high)) {
            let [low, high] = [low, high].map(
                #[inline(always)]
                |x| u32::from(bf16::from_f32(x).to_bits()),
            );
            to.write(f32::from_bits(low | high << 16));
        }
    }

    /// Each with the lower half of its bits cleared: rounded towards zero to bf16, but for a NaN that was one by these alone.
    #[inline(always)]
    fn upper_halves(self) -> Self {
        Self::load(&self.to_array().map(
            #[inline(always)]
            |x| f32::from_bits(x.to_bits() & 0xFFFF_0000),
        ))
    }

    /// [`Self::upper_halves`] of two as bf16, one after the other.
    #[inline(always)]
    fn store_upper_halves(first: Self, second: Self, to: &mut [MaybeUninit<bf16>; 2 * LANES]) {
        for (to, x) in to.iter_mut().zip(first.to_array().into_iter().chain(second.to_array())) {
            let [.., low, high] = x.to_bits().to_le_bytes();
            to.write(bf16::from_le_bytes([low, high]));
        }
    }

    /// [`Self::upper_halves`] in each word of 32 bits, that of `low` in the low half, and that of `high` in the other.
    #[inline(always)]
    fn store_upper_pairs(low: Self, high: Self, to: &mut Room<f32>) {
        for (to, (low, high)) in to.iter_mut().zip(low.to_array().into_iter().zip(high.to_array())) {
            to.write(f32::from_bits(low.to_bits() >> 16 | high.to_bits() & 0xFFFF_0000));
        }
    }

    /// [`Self::store`] past the cache, to an address that is a multiple of 16. [`Self::fence`] orders it.
    ///
    /// # Safety
    /// The address must be such a multiple.
    unsafe fn stream(self, to: &mut Room<f32>) {
        self.store(to);
    }

    /// As [`Self::stream`].
    ///
    /// # Safety
    /// As for [`Self::stream`].
    unsafe fn stream_f16(self, to: &mut Room<f16>) {
        self.store_f16(to);
    }

    /// As [`Self::stream`].
    ///
    /// # Safety
    /// As for [`Self::stream`].
    unsafe fn stream_bf16(self, to: &mut Room<bf16>) {
        self.store_bf16(to);
    }

    /// Asks memory for the line at this address, which may lie anywhere: for the first-level cache, or for the second where it
    /// is not wanted `SOON`.
    #[inline(always)]
    fn ask<const SOON: bool>(_: *const u8) {}

    /// Asks memory for the line at this address, which may lie anywhere, to be written.
    #[inline(always)]
    fn ask_to_write(_: *const u8) {}

    /// What was streamed so far is seen by others before what this thread writes from here on.
    fn fence() {}

    /// [`Self::load_bf16`] in an order that suits the processor, the same as [`Self::store_bf16_in_any_order`]'s.
    #[inline(always)]
    fn load_bf16_in_any_order(from: &Piece<bf16>) -> Self {
        Self::load_bf16(from)
    }

    /// What [`Self::load_bf16_in_any_order`] has loaded, each back in its place.
    #[inline(always)]
    fn store_bf16_in_any_order(self, to: &mut Room<bf16>) {
        self.store_bf16(to);
    }

    /// [`Self::store_bf16_in_any_order`] past the cache, as [`Self::stream`].
    ///
    /// # Safety
    /// As for [`Self::stream`].
    #[inline(always)]
    unsafe fn stream_bf16_in_any_order(self, to: &mut Room<bf16>) {
        // SAFETY: the caller's.
        unsafe { self.stream_bf16(to) }
    }

    /// `self · factor + addend`, rounded once where the processor can.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// `other` where it is greater, else `self`, a NaN of which is kept and one of `other` passed over.
    fn max(self, other: Self) -> Self;
    /// `other` where it is less, else `self`, a NaN of which is kept and one of `other` passed over.
    fn min(self, other: Self) -> Self;
    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    /// `then` in the lanes where `self < other`, else `otherwise`.
    fn if_less(self, other: Self, then: Self, otherwise: Self) -> Self;
    /// `self · 2ⁿ` for whole numbers `-151 <= n <= 129`, subnormal results included.
    fn times_power_of_two(self, n: Self) -> Self;
    /// `self · 2ⁿ` for the whole number in the low nine bits of `shifted`; all must be in the range of normal numbers.
    fn add_to_exponent(self, shifted: Self) -> Self;
    /// Whether every lane is in `-bound..=bound`; NaN is not.
    fn all_within(self, bound: f32) -> bool;
    /// Lanes 2i and 2i + 1 exchanged.
    fn swap_pairs(self) -> Self;

    /// The lanes in order.
    #[inline(always)]
    fn to_array(self) -> Piece<f32> {
        let mut lanes = [0.0; LANES];
        self.store(as_room(&mut lanes));
        lanes
    }

    /// Fewer than sixteen elements of 16 or 32 bits, and `rest` after them.
    #[inline(always)]
    fn part<T: Copy>(from: &[T], rest: T) -> Piece<T> {
        let mut piece = [rest; LANES];
        piece[..from.len()].copy_from_slice(from);
        piece
    }

    /// The first elements of a piece, of 16 or 32 bits, where there is room for fewer than sixteen.
    #[inline(always)]
    fn put_part<T: Copy>(piece: &Piece<T>, to: &mut [MaybeUninit<T>]) {
        to.write_copy_of_slice(&piece[..to.len()]);
    }

    /// `other` from lane `count` on.
    #[inline(always)]
    fn first(self, count: usize, other: Self) -> Self {
        let (mut lanes, other) = (self.to_array(), other.to_array());
        lanes[count..].copy_from_slice(&other[count..]);
        Self::load(&lanes)
    }

    /// The sum of the lanes, in the order of [`Self::join`].
    #[inline(always)]
    fn sum(self) -> f32 {
        self.join(
            #[inline(always)]
            |a, b| a + b,
        )
    }

    /// The greatest lane, as [`Self::max`] tells it, in the order of [`Self::join`].
    #[inline(always)]
    fn greatest(self) -> f32 {
        self.join(
            #[inline(always)]
            |a, b| if b > a { b } else { a },
        )
    }

    /// The lanes joined pairwise, always in the same order.
    #[inline(always)]
    fn join(self, join: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = self.to_array();
        let mut width = LANES / 2;
        while width > 0 {
            for l in 0..width {
                lanes[l] = join(lanes[l], lanes[l + width]);
            }
            width /= 2;
        }
        lanes[0]
    }
}

/// Initialised elements as room for others.
#[inline(always)]
pub(super) fn as_room<T: Copy>(piece: &mut Piece<T>) -> &mut Room<T> {
    // SAFETY: the same elements in the same places. `Lanes` and `Element` write values to room, never the lack of one.
    unsafe { &mut *std::ptr::from_mut(piece).cast() }
}

/// A row's bits, and what each is as a float.
pub(crate) type Bits<'a> = (&'a [u16], fn(u16) -> f32);

/// What a row is stored as.
pub(crate) trait Element: WithDType {
    fn load<L: Lanes>(from: &Piece<Self>) -> L;
    fn store<L: Lanes>(lanes: L, to: &mut Room<Self>);

    /// # Safety
    /// As for [`Lanes::stream`].
    unsafe fn stream<L: Lanes>(lanes: L, to: &mut Room<Self>);

    /// [`Self::load`] for what is the same in every lane and meets no other type: in any order, which [`Self::store_again`]
    /// and [`Self::stream_again`] know.
    fn load_any<L: Lanes>(from: &Piece<Self>) -> L;
    fn store_again<L: Lanes>(lanes: L, to: &mut Room<Self>);

    /// # Safety
    /// As for [`Lanes::stream`].
    unsafe fn stream_again<L: Lanes>(lanes: L, to: &mut Room<Self>);

    /// [`exp`] for rows of this type, as exactly as what is computed of them can tell.
    fn exp<L: Lanes>(x: L) -> L;
    /// [`Self::exp`] of lanes within [`NEAR`], or NaN that was one in a row of this type: of 16 bits by 2/3 of the instructions.
    fn exp_near<L: Lanes>(x: L) -> L;

    /// The row itself, if it is of f32.
    fn as_f32(row: &[Self]) -> Option<&[f32]>;
    /// The row's bits, if they are 16.
    fn as_bits(row: &[Self]) -> Option<Bits<'_>>;
}

macro_rules! element {
    ($T:ty, [$load:ident, $store:ident, $stream:ident], [$load_any:ident, $again:ident, $stream_again:ident], $exp:ident,
     $exp_near:ident, $as_f32:expr, |$row:ident| $as_bits:expr) => {
        impl Element for $T {
            #[inline(always)]
            fn load<L: Lanes>(from: &Piece<Self>) -> L {
                L::$load(from)
            }

            #[inline(always)]
            fn store<L: Lanes>(lanes: L, to: &mut Room<Self>) {
                lanes.$store(to);
            }

            #[inline(always)]
            unsafe fn stream<L: Lanes>(lanes: L, to: &mut Room<Self>) {
                // SAFETY: the caller's.
                unsafe { lanes.$stream(to) }
            }

            #[inline(always)]
            fn load_any<L: Lanes>(from: &Piece<Self>) -> L {
                L::$load_any(from)
            }

            #[inline(always)]
            fn store_again<L: Lanes>(lanes: L, to: &mut Room<Self>) {
                lanes.$again(to);
            }

            #[inline(always)]
            unsafe fn stream_again<L: Lanes>(lanes: L, to: &mut Room<Self>) {
                // SAFETY: the caller's.
                unsafe { lanes.$stream_again(to) }
            }

            #[inline(always)]
            fn exp<L: Lanes>(x: L) -> L {
                $exp(x)
            }

            #[inline(always)]
            fn exp_near<L: Lanes>(x: L) -> L {
                $exp_near(x)
            }

            #[inline(always)]
            fn as_f32(row: &[Self]) -> Option<&[f32]> {
                $as_f32(row)
            }

            #[inline(always)]
            fn as_bits($row: &[Self]) -> Option<Bits<'_>> {
                $as_bits
            }
        }
    };
}
element!(f32, [load, store, stream], [load, store, stream], exp, exp, Some, |_row| None);
element!(
    f16,
    [load_f16, store_f16, stream_f16],
    [load_f16, store_f16, stream_f16],
    short_exp,
    short_exp_near,
    |_| None,
    |row| Some((row.reinterpret_cast(), |bits| f16::from_bits(bits).to_f32()))
);
element!(
    bf16,
    [load_bf16, store_bf16, stream_bf16],
    [load_bf16_in_any_order, store_bf16_in_any_order, stream_bf16_in_any_order],
    short_exp,
    short_exp_near,
    |_| None,
    |row| Some((row.reinterpret_cast(), |bits| bf16::from_bits(bits).to_f32()))
);

/// `e^x`, within 2 units in the last place, subnormal results included; NaN stays NaN.
#[inline(always)]
pub(super) fn exp<L: Lanes>(x: L) -> L {
    power(
        x,
        #[inline(always)]
        |x| reduced(x),
    )
}

/// `e^x` within a part of 2⁻¹⁶, which is closer than 16 bits can tell; NaN and the bounds as in [`exp`].
#[inline(always)]
pub(super) fn short_exp<L: Lanes>(x: L) -> L {
    power(
        x,
        #[inline(always)]
        |x| shortly_reduced(x),
    )
}

/// [`short_exp`] of lanes within [`NEAR`], or NaN whose low nine bits are 0, as they are in 16 bits and where arithmetic has made
/// it: of another one the exponent would change.
#[inline(always)]
fn short_exp_near<L: Lanes>(x: L) -> L {
    let (p, shifted) = shortly_reduced(x);
    p.add_to_exponent(shifted)
}

/// `e^x = e^r·2ⁿ`, with `x = n·ln 2 + r` and `|r| <= ln 2 / 2`. Where all lanes are far from the bounds of the exponent, `2ⁿ`
/// is an addition to it.
#[inline(always)]
fn power<L: Lanes>(x: L, reduced: impl Fn(L) -> (L, L)) -> L {
    if x.all_within(NEAR) {
        let (p, shifted) = reduced(x);
        return p.add_to_exponent(shifted);
    }
    // Beyond these bounds the result is 0 or infinity anyway.
    let (p, shifted) = reduced(x.max(L::splat(-104.0)).min(L::splat(89.0)));
    p.times_power_of_two(shifted - L::splat(ROUND))
}

/// While `|x|` is at most this, `e^x` is far from the bounds of the exponent.
pub(super) const NEAR: f32 = 87.0;

/// Added to a small float, it rounds it to an integer, which then is in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `e^r`, and `n` as [`ROUND`] leaves it: the polynomial of Cephes' `expf` (Moshier), its terms in pairs (Estrin), because what
/// limits it is the wait of one term for the other.
#[inline(always)]
fn reduced<L: Lanes>(x: L) -> (L, L) {
    let c = L::splat;
    let shifted = x.mul_add(c(std::f32::consts::LOG2_E), c(ROUND));
    let n = shifted - c(ROUND);
    // ln 2 in two parts, the first so short that its product with n is exact.
    let r = n.mul_add(c(-0.693_359_4), x);
    let r = n.mul_add(c(2.121_944_4e-4), r);
    let squared = r * r;
    let high = c(1.987_569_2e-4).mul_add(r, c(1.398_2e-3));
    let middle = c(8.333_452e-3).mul_add(r, c(4.166_579_6e-2));
    let low = c(1.666_666_5e-1).mul_add(r, c(5e-1));
    let p = high.mul_add(squared, middle).mul_add(squared, low);
    (p.mul_add(squared, r) + c(1.0), shifted)
}

/// As [`reduced`], by the polynomial of degree 4 with the least relative error (2⁻¹⁸·⁴) among those that are 1 at 0; `n·ln 2`
/// is rounded where there is no FMA.
#[inline(always)]
fn shortly_reduced<L: Lanes>(x: L) -> (L, L) {
    let c = L::splat;
    let shifted = x.mul_add(c(std::f32::consts::LOG2_E), c(ROUND));
    let r = (shifted - c(ROUND)).mul_add(c(-std::f32::consts::LN_2), x);
    let p = c(0.041_513_685).mul_add(r, c(0.167_875_92)).mul_add(r, c(0.500_030_2));
    (p.mul_add(r, c(0.999_966_8)).mul_add(r, c(1.0)), shifted)
}
