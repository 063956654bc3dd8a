//! Which instructions the loops with several versions use: asked of the processor once.

use std::sync::OnceLock;

use super::lanes::{self, Lanes};

/// A set of instructions, each including those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    /// What the compiler makes of plain loops: SSE2 on x86-64, NEON on aarch64.
    Scalar,
    /// NEON, asked for by name.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// With the dot product of bf16 pairs, and rounding to bf16.
    Avx512Bf16,
    /// With the matrix unit, which multiplies tiles of bf16 pairs.
    Amx,
}

/// The best of this processor, or less if the environment variable `CANDLE_FUSED_SIMD` says so: `scalar`, `neon`,
/// `avx2`, `avx512` (without what is for bf16) or `avx512bf16` (without AMX). Read once; another value is warned of, and is no
/// limit.
pub(crate) fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        let limit = match std::env::var("CANDLE_FUSED_SIMD").as_deref() {
            Ok("scalar") => Isa::Scalar,
            Ok("neon") => Isa::Neon,
            Ok("avx2") => Isa::Avx2,
            Ok("avx512") => Isa::Avx512,
            Ok("avx512bf16") => Isa::Avx512Bf16,
            Ok(other) => {
                tracing::warn!(
                    CANDLE_FUSED_SIMD = other,
                    "not one of scalar, neon, avx2, avx512, avx512bf16: no limit"
                );
                Isa::Amx
            }
            Err(_) => Isa::Amx,
        };
        detect().min(limit)
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    if !(is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c"))
    {
        return Isa::Scalar;
    }
    let wide = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    if !wide {
        return Isa::Avx2;
    }
    let has_bf16 = is_x86_feature_detected!("avx512bf16");
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if has_bf16 && super::gemm::amx::is_usable() {
        return Isa::Amx;
    }
    // Processors with the matrix unit take longer for the dot product of pairs than for two products in f32 (1.7 times as
    // long for a whole linear layer on a Sapphire Rapids), also where the system keeps the unit from us.
    if has_bf16 && !has_matrix_unit() { Isa::Avx512Bf16 } else { Isa::Avx512 }
}

/// Whether the processor has AMX for bf16 (CPUID leaf 7, EDX bit 22).
#[cfg(target_arch = "x86_64")]
fn has_matrix_unit() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> 22 & 1 == 1
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Isa {
    Isa::Neon
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Isa {
    Isa::Scalar
}

/// Work that is written once for all lanes.
pub(crate) trait Vectorised {
    type Output;

    /// To be `#[inline(always)]`, as all that it calls.
    fn run<L: Lanes>(self) -> Self::Output;
}

/// Runs `work` with these instructions.
///
/// # Panics
/// If the processor does not have them, or the cap excludes them.
pub(crate) fn vectorise<W: Vectorised>(isa: Isa, work: W) -> W::Output {
    assert!(isa <= self::isa(), "{isa:?} is beyond {:?}", self::isa());
    match isa {
        // SAFETY: the processor has the instructions: `isa()` says so.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(work) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512(work) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512_bf16(work) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => work.run::<lanes::neon::Neon>(),
        _ => work.run::<lanes::portable::Portable>(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<W: Vectorised>(work: W) -> W::Output {
    work.run::<lanes::x86::Avx2>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn avx512<W: Vectorised>(work: W) -> W::Output {
    work.run::<lanes::x86::Avx512<false>>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
fn avx512_bf16<W: Vectorised>(work: W) -> W::Output {
    work.run::<lanes::x86::Avx512<true>>()
}

/// Every set of instructions up to [`isa`]'s, for tests.
#[cfg(test)]
pub(super) fn instruction_sets() -> impl Iterator<Item = Isa> {
    let all = if cfg!(target_arch = "aarch64") {
        vec![Isa::Scalar, Isa::Neon]
    } else {
        vec![Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx]
    };
    all.into_iter().filter(|&isa| isa <= self::isa())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// Run again with a cap, in a process of its own: the cap is read once.
    #[test]
    fn the_cap_is_obeyed() {
        for (cap, limit) in [
            ("scalar", Isa::Scalar),
            ("neon", Isa::Neon),
            ("avx2", Isa::Avx2),
            ("avx512", Isa::Avx512),
            ("avx512bf16", Isa::Avx512Bf16),
        ] {
            let mut capped = std::process::Command::new(std::env::current_exe().unwrap());
            let output = capped
                .args(["--exact", "cpu::dispatch::tests::what_runs", "--nocapture"])
                .env("CANDLE_FUSED_SIMD", cap)
                .output()
                .unwrap();
            let printed = String::from_utf8(output.stdout).unwrap();
            let expected = format!("the loops use {:?}\n", detect().min(limit));
            assert!(printed.contains(&expected), "{cap}: {expected}{printed}");
        }
    }

    #[test]
    fn what_runs() {
        println!("the loops use {:?}", isa());
    }
}
