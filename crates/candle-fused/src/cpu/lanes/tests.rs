//! Every instruction set's lanes against plain floats.

#![allow(clippy::unwrap_used, reason = "tests")]
#![expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "rounding; small integers")]
#![expect(clippy::float_cmp, reason = "exact results")]

use super::*;
use crate::cpu::dispatch::{Isa, Vectorised, instruction_sets, vectorise};

/// Runs a block of code that is generic over `L` with every instruction set.
macro_rules! with_lanes {
    (|$isa:ident: $L:ident| $body:block) => {{
        struct Work(Isa);
        impl Vectorised for Work {
            type Output = ();

            #[inline(always)]
            fn run<$L: Lanes>(self) {
                let $isa = self.0;
                $body
            }
        }
        for isa in instruction_sets() {
            vectorise(isa, Work(isa));
        }
    }};
}

/// Where streams may write.
#[repr(align(16))]
struct Aligned<T>(Piece<T>);

/// Numbers of every kind, in sixteens.
fn numbers() -> Vec<Piece<f32>> {
    let odd = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        1e-45,
        -1e-45,
        65504.0,
        65519.9,
        65520.0,
        65536.0,
        6e-8,
        2.98e-8,
        2.99e-8,
        6.1e-5,
        1.5,
        2.5,
        3.389e38,
        3.396e38,
    ];
    let patterns = (0..1u32 << 14).map(|i| f32::from_bits(i.wrapping_mul(0x9E37_79B9)));
    // Halfway between two bf16 and between two f16, and a bit beside.
    let ties = (0..1u32 << 12).flat_map(|i| {
        let bits = i.wrapping_mul(0x0012_3457) << 13;
        [bits | 0x8000, bits | 0x7FFF, bits | 0x8001, bits | 0x1000, bits | 0x0FFF, bits | 0x1001]
            .map(f32::from_bits)
    });
    let all: Vec<f32> = odd.into_iter().chain(patterns).chain(ties).collect();
    all.as_chunks::<LANES>().0.to_vec()
}

#[test]
fn bits_are_lanes() {
    with_lanes!(|isa: L| {
        for bits in [0, 1, 0x8000, 0x5A3C, 0xFFFF] {
            let expected: Piece<f32> = std::array::from_fn(|i| f32::from(bits >> i & 1));
            assert_eq!(L::of_bits(bits).to_array(), expected, "{isa:?} {bits:x}");
        }
    });
}

#[test]
fn storage_of_16_bits_is_rounded_as_half_rounds() {
    fn check<T: Element, L: Lanes>(isa: Isa, bits: fn(T) -> u16, round: fn(f32) -> T, nan: fn(T) -> bool) {
        let all = numbers();
        for (i, first) in all.iter().enumerate() {
            let second = &all[(i * 7 + 3) % all.len()];
            let (mut alone, mut both) = ([T::zero(); LANES], [MaybeUninit::new(T::zero()); 2 * LANES]);
            T::store(L::load(first), as_room(&mut alone));
            L::store_both(L::load(first), L::load(second), &mut both);
            // SAFETY: initialised above.
            let both = both.map(|x| unsafe { x.assume_init() });
            let numbers = first.iter().chain(first).chain(second);
            for (&x, got) in numbers.zip(alone.into_iter().chain(both)) {
                let expected = round(x);
                let same = bits(got) == bits(expected) || nan(got) && nan(expected);
                assert!(
                    same,
                    "{isa:?} {x:e} ({:08x}): {:04x}, {:04x}",
                    x.to_bits(),
                    bits(got),
                    bits(expected)
                );
            }
        }
    }
    with_lanes!(|isa: L| {
        check::<f16, L>(isa, f16::to_bits, f16::from_f32, f16::is_nan);
        check::<bf16, L>(isa, bf16::to_bits, bf16::from_f32, bf16::is_nan);
    });
}

#[test]
fn parts_of_a_piece_are_its_first_elements() {
    fn check<T: Element + Into<f64>, L: Lanes>(isa: Isa, of: fn(f32) -> T) {
        for count in 0..=LANES {
            let piece: Piece<T> = std::array::from_fn(|l| of(l as f32 + 1.0));
            let rest = of(-1.0);
            let got: Piece<f64> = L::part(&piece[..count], rest).map(Into::into);
            let mut memory = [rest; LANES].map(MaybeUninit::new);
            L::put_part(&piece, &mut memory[..count]);
            // SAFETY: initialised above.
            let put: Piece<f64> = memory.map(|x| unsafe { x.assume_init() }.into());
            let expected: Piece<f64> = std::array::from_fn(|l| if l < count { l as f64 + 1.0 } else { -1.0 });
            assert_eq!((got, put), (expected, expected), "{isa:?} {count}");
            let numbers: Piece<f32> = std::array::from_fn(|l| l as f32 + 1.0);
            let first = L::load(&numbers).first(count, L::splat(-1.0)).to_array().map(f64::from);
            assert_eq!(first, expected, "{isa:?} {count}");
        }
    }
    with_lanes!(|isa: L| {
        check::<f32, L>(isa, |x| x);
        check::<f16, L>(isa, f16::from_f32);
        check::<bf16, L>(isa, bf16::from_f32);
    });
}

#[test]
fn the_greatest_lane_is_found_wherever_it_is() {
    with_lanes!(|isa: L| {
        for at in 0..LANES {
            let mut numbers = [-2.0; LANES];
            numbers[at] = 3.0;
            assert_eq!(L::load(&numbers).greatest(), 3.0, "{isa:?} {at}");
            for all in [f32::NEG_INFINITY, f32::NAN] {
                let mut numbers = [all; LANES];
                assert!(L::load(&numbers).greatest().to_bits() == all.to_bits(), "{isa:?}");
                // The first lane's NaN stays, another is passed over: pairs join with the lower lane first.
                numbers[at] = 1.0;
                let expected = if all.is_nan() && at > 0 { all } else { 1.0 };
                let got = L::load(&numbers).greatest();
                assert!(got == expected || got.is_nan() && expected.is_nan(), "{isa:?} {at} {all}");
            }
        }
    });
}

#[test]
fn pairs_of_bf16_are_rounded_as_half_rounds() {
    with_lanes!(|isa: L| {
        let all = numbers();
        for (i, low) in all.iter().enumerate() {
            let high = &all[(i * 7 + 3) % all.len()];
            let mut pairs = [0f32; LANES];
            L::store_bf16_pairs(L::load(low), L::load(high), as_room(&mut pairs));
            for (l, pair) in pairs.into_iter().enumerate() {
                let [a, b, c, d] = pair.to_bits().to_le_bytes();
                for (x, got) in [(low[l], [a, b]), (high[l], [c, d])] {
                    let (got, expected) = (bf16::from_le_bytes(got), bf16::from_f32(x));
                    let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                    assert!(same, "{isa:?} {x:e}: {got}, not {expected}");
                }
            }
        }
    });
}

#[test]
fn every_16_bit_number_is_widened_exactly() {
    with_lanes!(|isa: L| {
        for first in (0..=u16::MAX).step_by(LANES) {
            let bits: Piece<u16> = std::array::from_fn(|l| first + u16::try_from(l).unwrap());
            let (halves, brains) = (bits.map(f16::from_bits), bits.map(bf16::from_bits));
            let (got, got_brains) = (L::load_f16(&halves).to_array(), L::load_bf16(&brains).to_array());
            for l in 0..LANES {
                let (half, brain) = (halves[l].to_f32(), brains[l].to_f32());
                assert!(got[l] == half || got[l].is_nan() && half.is_nan(), "{isa:?} f16 {:04x}", bits[l]);
                assert!(
                    got_brains[l] == brain || got_brains[l].is_nan() && brain.is_nan(),
                    "{isa:?} bf16 {:04x}",
                    bits[l]
                );
            }
        }
    });
}

#[test]
fn lanes_compute_as_floats_do() {
    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
    }
    with_lanes!(|isa: L| {
        let all = numbers();
        for (i, &x) in all.iter().enumerate() {
            let y = all[(i * 7 + 3) % all.len()];
            let (a, b) = (L::load(&x), L::load(&y));
            let check = |what: &str, got: L, expected: &dyn Fn(f32, f32) -> f32| {
                for (l, got) in got.to_array().into_iter().enumerate() {
                    let expected = expected(x[l], y[l]);
                    assert!(
                        same(got, expected),
                        "{isa:?} {what} of {:e}, {:e}: {got:e}, {expected:e}",
                        x[l],
                        y[l]
                    );
                }
            };
            check("+", a + b, &|a, b| a + b);
            check("-", a - b, &|a, b| a - b);
            check("*", a * b, &|a, b| a * b);
            check("/", a / b, &|a, b| a / b);
            check("neg", -a, &|a, _| -a);
            check("max", a.max(b), &|a, b| if b > a { b } else { a });
            check("min", a.min(b), &|a, b| if b < a { b } else { a });
            check("abs", a.abs(), &|a, _| a.abs());
            check("sqrt", a.sqrt(), &|a, _| a.sqrt());
            check("if_less", a.if_less(b, a, -b), &|a, b| if a < b { a } else { -b });
            check("splat", L::splat(x[3]), &|_, _| x[3]);
            assert_eq!(a.all_within(2.0), x.iter().all(|x| x.abs() <= 2.0), "{isa:?} {x:?}");
            let swapped = a.swap_pairs().to_array();
            let firsts = a.first(5, b).to_array();
            for l in 0..LANES {
                assert!(same(swapped[l], x[l ^ 1]));
                assert!(same(firsts[l], if l < 5 { x[l] } else { y[l] }));
            }
        }
        let a = L::load(&std::array::from_fn(|l| l as f32));
        assert_eq!(a.mul_add(a, L::splat(0.5)).to_array(), std::array::from_fn(|l| (l * l) as f32 + 0.5));
        assert_eq!(a.join(|a, b| a + b), 120.0);
        for i in 1..100 {
            // Sums whose last bits tell the order.
            let a = L::load(&std::array::from_fn(|l| 1.0 / (16 * i + l) as f32));
            assert_eq!(a.sum(), a.join(|a, b| a + b), "{isa:?} {i}");
        }
        let shifted = a - L::splat(8.0) + L::splat(ROUND);
        let expected = std::array::from_fn(|l| 1.25 * (l as f32 - 8.0).exp2());
        assert_eq!(L::splat(1.25).add_to_exponent(shifted).to_array(), expected);
        assert!(a.all_within(15.0) && !a.all_within(14.5) && (-a).all_within(15.0));
    });
}

#[test]
fn streams_write_what_stores_do() {
    /// At a multiple of 64 bytes.
    #[repr(align(64))]
    struct Line<T>([T; 2 * LANES]);

    fn check<T: Element, L: Lanes>(isa: Isa) {
        for numbers in numbers() {
            let mut stored = [T::zero(); LANES];
            T::store(L::load(&numbers), as_room(&mut stored));
            // A whole line, and parts of two.
            for before in [0, 16 / size_of::<T>()] {
                let mut line = Line([T::zero(); 2 * LANES]);
                let streamed = line.0[before..].first_chunk_mut().unwrap();
                // SAFETY: a multiple of 16.
                unsafe { T::stream(L::load(&numbers), as_room(streamed)) };
                L::fence();
                for (a, b) in stored.into_iter().zip(*streamed) {
                    assert!(a == b || a.to_f64().is_nan() && b.to_f64().is_nan(), "{isa:?} {a} {b}");
                }
            }
        }
    }
    with_lanes!(|isa: L| {
        check::<f32, L>(isa);
        check::<f16, L>(isa);
        check::<bf16, L>(isa);
    });
}

#[test]
fn any_order_is_undone_by_what_writes_again() {
    fn check<T: Element, L: Lanes>(isa: Isa) {
        for numbers in numbers() {
            let mut piece = [T::zero(); LANES];
            T::store(L::load(&numbers), as_room(&mut piece));
            let third = L::splat(1.0 / 3.0);
            let mut plain = [T::zero(); LANES];
            T::store(T::load::<L>(&piece) * third, as_room(&mut plain));
            let lanes = T::load_any::<L>(&piece) * third;
            let (mut stored, mut streamed) = (Aligned([T::zero(); LANES]), Aligned([T::zero(); LANES]));
            T::store_again(lanes, as_room(&mut stored.0));
            // SAFETY: aligned.
            unsafe { T::stream_again(lanes, as_room(&mut streamed.0)) };
            L::fence();
            for (l, plain) in plain.into_iter().enumerate() {
                for got in [stored.0[l], streamed.0[l]] {
                    let same = got == plain || got.to_f64().is_nan() && plain.to_f64().is_nan();
                    assert!(same, "{isa:?} lane {l}: {got}, {plain}");
                }
            }
        }
    }
    with_lanes!(|isa: L| {
        check::<f32, L>(isa);
        check::<f16, L>(isa);
        check::<bf16, L>(isa);
    });
}

#[test]
fn the_short_exp_is_close() {
    with_lanes!(|isa: L| {
        let mut x = -104.5f32;
        while x < 88.7 {
            let row: Piece<f32> = std::array::from_fn(|l| x + 0.000_7 * l as f32);
            for (x, got) in row.into_iter().zip(short_exp(L::load(&row)).to_array()) {
                let (expected, got) = (f64::from(x).exp(), f64::from(got));
                // Below the normal numbers there are fewer digits.
                let bound = (expected * 0.5f64.powi(16)).max(1.5e-45);
                assert!((got - expected).abs() <= bound, "{isa:?} exp({x}) = {got}, expected {expected}");
            }
            x += 0.000_7 * LANES as f32;
        }
        let mut odd = [0.0; LANES];
        odd[..6].copy_from_slice(&[f32::NEG_INFINITY, f32::INFINITY, 0.0, f32::NAN, -1e30, 100.0]);
        let got = short_exp(L::load(&odd)).to_array();
        assert_eq!(got[..3], [0.0, f32::INFINITY, 1.0], "{isa:?}");
        assert!(got[3].is_nan() && got[4] == 0.0 && got[5].is_infinite(), "{isa:?}");
        // Alone, far from every bound, zero gives exactly one.
        assert_eq!(short_exp(L::splat(0.0)).to_array(), [1.0; LANES], "{isa:?}");
    });
}

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    with_lanes!(|isa: L| {
        let mut x = -104.5f32;
        while x < 89.5 {
            let row: Piece<f32> = std::array::from_fn(|l| x + 0.001_3 * l as f32);
            for (x, got) in row.into_iter().zip(exp(L::load(&row)).to_array()) {
                let (expected, got) = (f64::from(x).exp(), f64::from(got));
                if expected > f64::from(f32::MAX) {
                    assert!(got.is_infinite() || expected < 3.402_823_6e38, "{isa:?} exp({x}) = {got}");
                } else {
                    let ulp = f64::from((expected as f32).next_up()) - f64::from(expected as f32);
                    assert!(
                        (got - expected).abs() <= 2.0 * ulp,
                        "{isa:?} exp({x}) = {got}, expected {expected}"
                    );
                }
            }
            x += 0.001_3 * LANES as f32;
        }
        let mut odd = [0.0; LANES];
        odd[..4].copy_from_slice(&[f32::NEG_INFINITY, f32::INFINITY, 0.0, f32::NAN]);
        let got = exp(L::load(&odd)).to_array();
        assert_eq!(got[..3], [0.0, f32::INFINITY, 1.0], "{isa:?}");
        assert!(got[3].is_nan(), "{isa:?}");
    });
}
