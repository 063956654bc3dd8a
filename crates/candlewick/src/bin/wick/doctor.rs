//! `wick doctor`

use candle_core::utils;
use candle_fused::{DeviceKind, fused_ops};

pub fn run() {
    println!("wick {}", env!("CARGO_PKG_VERSION"));
    line("system", &format!("{} {}", std::env::consts::OS, std::env::consts::ARCH));
    line(
        "features",
        &list(&[("custom-metal", cfg!(feature = "custom-metal")), ("cuda", cfg!(feature = "cuda"))]),
    );
    line("allocator", "mimalloc, keeping freed pages");
    line("threads", &utils::get_num_threads().to_string());
    line(
        "vector units",
        &list(&[
            ("avx2", utils::with_avx()),
            ("f16c", utils::with_f16c()),
            ("neon", utils::with_neon()),
            ("simd128", utils::with_simd128()),
        ]),
    );
    for kind in [DeviceKind::Cpu, DeviceKind::Metal, DeviceKind::Cuda] {
        if !kind.is_available() {
            line(&kind.to_string(), "not in this build or on this machine");
            continue;
        }
        let fused: Vec<_> = fused_ops(kind).collect();
        line(&kind.to_string(), &format!("available; fused: {}", fused.join(", ")));
    }
    line("auto", "CUDA where it is available, else the CPU; Metal only when it is named");
}

fn line(name: &str, value: &str) {
    println!("{name:>12}  {value}");
}

/// The names that are on, or `none`.
fn list(flags: &[(&str, bool)]) -> String {
    let on: Vec<_> = flags.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    if on.is_empty() { "none".into() } else { on.join(", ") }
}
