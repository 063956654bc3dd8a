//! Whether a claimed time can be believed.
//!
//! Four things give a liar away. The clock of the runner: what an engine claims must have passed, and little more may
//! have. The request for outputs: made twice, the first may not take longer by more than noise, or work was left for
//! after the clock. The device: nothing is faster than its memory and its arithmetic. The numbers: inputs are fresh
//! before every timing, and what the last timed call computed must agree with float64.

use std::time::Duration;

use crate::case::Case;
use crate::measure::Plan;
use crate::ops;
use crate::oracle::{self, Expected};
use crate::protocol::Times;
use crate::tensors::Tensors;

/// The most that the device can do.
#[derive(Debug, Clone, Copy)]
pub struct Physics {
    /// Bytes per second of a copy far larger than the cache.
    pub copy: f64,
    /// Bytes per second of a copy in the cache.
    pub cached_copy: f64,
    /// Size of the last cache.
    pub cache_bytes: f64,
    /// Operations per second of matrix products in f32.
    pub f32_products: f64,
    /// In 16 bits.
    pub short_products: f64,
}

impl Physics {
    /// Operations per second of matrix products in the case's dtype.
    pub fn products(&self, case: &Case) -> f64 {
        if case.dtype == crate::case::Dtype::F32 { self.f32_products } else { self.short_products }
    }

    /// Microseconds below which a claim is not believed: what the cache's rate, or the memory's where the buffers do not
    /// fit the cache, and the rate of products allow, with a margin for how these rates were measured.
    pub fn floor_us(&self, case: &Case) -> f64 {
        let cost = ops::cost(case);
        let in_cache = cost.bytes < 2.0 * self.cache_bytes && !case.rotate;
        let bytes_per_second = if in_cache { self.cached_copy } else { self.copy };
        let memory = cost.bytes / (MARGIN * bytes_per_second);
        let products = cost.product_operations / (MARGIN * self.products(case));
        memory.max(products) * 1e6
    }
}

/// How much faster than measured a device may be: a busy machine measures itself slow.
const MARGIN: f64 = 2.0;

/// What a runner saw of one timing.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// The timing request, by the runner's clock.
    pub wall: Duration,
    /// The first request for outputs.
    pub first_output: Duration,
    /// The second.
    pub second_output: Duration,
}

/// Noise that is never held against an engine.
const NOISE_US: f64 = 4_000.0;

/// What is wrong with the times, if anything.
pub fn times(case: &Case, physics: &Physics, times: &Times, plan: Plan, seen: Seen) -> Option<String> {
    if times.samples_us.len() != plan.samples {
        return Some(format!("{} samples instead of {}", times.samples_us.len(), plan.samples));
    }
    let us = |duration: Duration| duration.as_secs_f64() * 1e6;
    let claimed: f64 = times.samples_us.iter().sum();
    let wall = us(seen.wall);
    let least = times.samples_us.iter().copied().fold(f64::INFINITY, f64::min) / ops::as_f64(plan.calls);
    if !(claimed.is_finite() && least > 0.0) {
        return Some("times that are no times".to_owned());
    }
    if claimed > 1.05 * wall + NOISE_US {
        return Some(format!("claims {claimed:.0} µs where {wall:.0} µs passed"));
    }
    if claimed < 0.6 * wall - NOISE_US {
        return Some(format!(
            "claims {claimed:.0} µs of the {wall:.0} µs that passed: work outside its clock"
        ));
    }
    let hidden = us(seen.first_output) - us(seen.second_output);
    if hidden > NOISE_US + 0.5 * claimed {
        return Some(format!(
            "claims {claimed:.0} µs, then worked {hidden:.0} µs more before it had the outputs"
        ));
    }
    let floor = physics.floor_us(case);
    if least < floor {
        return Some(format!("claims {least:.2} µs a call, below the device's limit of {floor:.2} µs"));
    }
    None
}

/// What is wrong with the outputs, if anything.
pub fn outputs(case: &Case, expected: &Expected, rows: Option<&[usize]>, got: &Tensors) -> Option<String> {
    for (name, exact) in expected {
        let Some(tensor) = got.get(name) else {
            return Some(format!("no output {name}"));
        };
        if tensor.len() != exact.len() {
            let chosen = rows.map_or_else(String::new, |rows| format!(" of {} rows", rows.len()));
            return Some(format!("output {name}{chosen}: {} elements, not {}", tensor.len(), exact.len()));
        }
        let scale = exact.iter().fold(0f64, |a, b| a.max(b.abs()));
        let error = exact.iter().enumerate().fold(0f64, |worst, (i, exact)| {
            let error = (tensor.at(i) - exact).abs();
            if error.is_nan() { f64::INFINITY } else { worst.max(error) }
        });
        let tolerance = oracle::tolerance(case);
        if error > tolerance * scale {
            return Some(format!(
                "output {name} is wrong: off by {error:.1e} where the largest value is {scale:.1e} and {:.1e} is allowed",
                tolerance * scale
            ));
        }
    }
    None
}
