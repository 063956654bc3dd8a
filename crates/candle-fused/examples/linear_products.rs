//! Times the linear layers' products on the CPU beside Candle's own, checks them against float64, and prints ratios:
//!
//! ```sh
//! cargo run --release -p candle-fused --example linear_products
//! CANDLE_FUSED_SIMD=avx2 cargo run --release -p candle-fused --example linear_products
//! ```
//!
//! Each figure is the median of several rounds in which all contenders take turns. With glibc's allocator, large results
//! are mapped anew for each call; `GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296`
//! keeps that out of the figures.

#![expect(clippy::cast_precision_loss, reason = "small counts")]

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused::{LoraLinearOptions, frozen_linear, lora_linear};

const ROUNDS: usize = 15;
const WIDTH: usize = 1024;

type Contender<'a> = (&'a str, Box<dyn Fn() -> Result<Tensor> + 'a>);

/// The median seconds of each contender.
fn race(contenders: &[Contender]) -> Result<Vec<f64>> {
    let mut times = vec![Vec::new(); contenders.len()];
    for _ in 0..ROUNDS {
        for ((_, run), times) in contenders.iter().zip(&mut times) {
            let clock = Instant::now();
            let result = run()?;
            times.push(clock.elapsed().as_secs_f64());
            drop(result);
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok(times.into_iter().map(median).collect())
}

/// The greatest difference from float64 in the first rows, relative to the greatest element.
fn error(got: &Tensor, x: &Tensor, w: &Tensor) -> Result<f64> {
    let wide = |t: &Tensor| t.narrow(0, 0, 64)?.to_dtype(DType::F64);
    let exact = wide(x)?.matmul(&w.to_dtype(DType::F64)?.t()?)?;
    let greatest = |t: Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
    Ok(greatest((wide(got)? - &exact)?)? / greatest(exact)?)
}

/// Prints one shape and dtype; returns the seconds of `frozen_linear`.
fn report(rows: usize, dtype: DType) -> Result<f64> {
    let device = Device::Cpu;
    let tensor = |dims: [usize; 2]| Tensor::randn(0f32, 1.0, &dims, &device)?.to_dtype(dtype);
    let (x, w, g) = (tensor([rows, WIDTH])?, tensor([WIDTH, WIDTH])?, tensor([rows, WIDTH])?);
    let tracked = Var::from_tensor(&x)?;
    let adapter = |dims: [usize; 2]| Var::from_tensor(&Tensor::randn(0f32, 0.02, &dims, &device)?);
    let (a8, b8) = (adapter([8, WIDTH])?, adapter([WIDTH, 8])?);
    let (a16, b16) = (adapter([16, WIDTH])?, adapter([WIDTH, 16])?);
    let options = LoraLinearOptions { scaling: 2.0, dropout: None };
    let both = |y: Tensor| -> Result<Tensor> {
        let gradients = y.mul(&g)?.sum_all()?.backward()?;
        match gradients.get(&tracked) {
            Some(gradient) => Ok(gradient.clone()),
            None => candle_core::bail!("no gradient"),
        }
    };
    let lora = |a: &Var, b: &Var| both(lora_linear(&tracked, &w, None, a, b, options)?);
    let contenders: [Contender; 6] = [
        ("candle matmul", Box::new(|| x.matmul(&w.t()?))),
        ("frozen_linear", Box::new(|| frozen_linear(&x, &w, None))),
        ("frozen_linear, forward + backward", Box::new(|| both(frozen_linear(&tracked, &w, None)?))),
        ("lora_linear r = 8", Box::new(|| lora(&a8, &b8))),
        ("lora_linear r = 16", Box::new(|| lora(&a16, &b16))),
        ("neither", Box::new(|| both(tracked.as_tensor().clone()))),
    ];
    let times = race(&contenders)?;
    let error = error(&frozen_linear(&x, &w, None)?, &x, &w)?;
    println!("{rows} × {WIDTH} × {WIDTH} {}, error {error:.1e}", dtype.as_str());
    let flops = 2.0 * (rows * WIDTH * WIDTH) as f64;
    for ((name, _), seconds) in contenders.iter().zip(&times).take(2) {
        println!("  {name:36} {:8.3} ms  {:6.1} GFLOP/s", seconds * 1e3, flops / seconds / 1e9);
    }
    // Without the sum that gradients begin at.
    let own = |i: usize| times[i] - times[5];
    for (i, (name, _)) in contenders.iter().enumerate().skip(2).take(3) {
        println!("  {name:36} {:8.3} ms  {:.3} of the base", own(i) * 1e3, own(i) / own(2));
    }
    Ok(times[1])
}

fn main() -> Result<()> {
    let limit = std::env::var("CANDLE_FUSED_SIMD").unwrap_or_else(|_| "none".into());
    println!("{} threads, limit of instructions: {limit}", rayon::current_num_threads());
    for rows in [64, 512, 2048] {
        let wide = report(rows, DType::F32)?;
        let narrow = report(rows, DType::BF16)?;
        println!("  frozen_linear in bf16 takes {:.2} of its f32 time", narrow / wide);
    }
    Ok(())
}
