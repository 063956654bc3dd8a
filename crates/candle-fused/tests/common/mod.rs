//! What the tests of the operations share: inputs in every layout, float64 oracles, and the error rule.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::many_single_char_names,
    reason = "values made from integers, and the mathematics' own names"
)]

pub mod cases;
pub mod oracle;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused::DeviceKind;

pub const SIZES: [usize; 7] = [0, 1, 31, 32, 33, 1000, 4097];
pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Every device of this machine. The test bodies take one.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if DeviceKind::Metal.is_available() {
        devices.push(Device::new_metal(0).unwrap());
    }
    if DeviceKind::Cuda.is_available() {
        devices.push(Device::new_cuda(0).unwrap());
    }
    devices
}

/// Runs tests of this binary again, in a process for each set of instructions that the CPU's loops may be capped to and
/// that is less than the processor has.
pub fn with_less_instructions(filters: &[&str]) {
    if std::env::var_os("CANDLE_FUSED_SIMD").is_some() {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    let caps =
        if is_x86_feature_detected!("avx512f") { vec!["scalar", "avx2", "avx512"] } else { vec!["scalar"] };
    #[cfg(not(target_arch = "x86_64"))]
    let caps = ["scalar"];
    for cap in caps {
        let mut tests = std::process::Command::new(std::env::current_exe().unwrap());
        let output = tests.args(filters).env("CANDLE_FUSED_SIMD", cap).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "capped to {cap}:\n{printed}");
        assert!(!printed.contains("running 0 tests"), "{filters:?} are no tests");
    }
}

/// Where an argument lies in its storage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lies {
    Contiguous,
    /// A window of a larger tensor: an offset, and gaps between rows.
    Window,
    /// The last dimension is not contiguous.
    Transposed,
}

pub const LAYOUTS: [Lies; 3] = [Lies::Contiguous, Lies::Window, Lies::Transposed];

/// An argument of an operation.
#[derive(Debug, Clone)]
pub struct Arg {
    pub dims: Vec<usize>,
    pub lies: Lies,
    pub magnitude: f64,
    pub tracked: bool,
    /// Another dtype than the case's.
    pub dtype: Option<DType>,
    /// In bf16 where the case is in f32.
    pub narrow: bool,
}

pub fn arg(dims: &[usize]) -> Arg {
    Arg {
        dims: dims.to_vec(),
        lies: Lies::Contiguous,
        magnitude: 1.0,
        tracked: true,
        dtype: None,
        narrow: false,
    }
}

impl Arg {
    pub fn lies(self, lies: Lies) -> Self {
        Self { lies, ..self }
    }

    pub fn times(self, magnitude: f64) -> Self {
        Self { magnitude, ..self }
    }

    pub fn frozen(self) -> Self {
        Self { tracked: false, ..self }
    }

    pub fn dtype(self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self }
    }

    pub fn narrow(self) -> Self {
        Self { narrow: true, ..self }
    }

    fn own_dtype(&self, case: DType) -> DType {
        if self.narrow && case == DType::F32 { DType::BF16 } else { self.dtype.unwrap_or(case) }
    }

    /// The shape of the tensor that the argument is a view of.
    fn base_dims(&self) -> Vec<usize> {
        let mut dims = self.dims.clone();
        let rank = dims.len();
        match self.lies {
            Lies::Contiguous => {}
            Lies::Window => {
                dims[rank - 1] += 3;
                dims[0] += 2;
            }
            Lies::Transposed if rank == 1 => dims.push(2),
            Lies::Transposed => dims.swap(rank - 1, rank - 2),
        }
        dims
    }

    fn view(&self, base: &Tensor) -> Result<Tensor> {
        let rank = self.dims.len();
        match self.lies {
            Lies::Contiguous => Ok(base.clone()),
            Lies::Window => {
                base.narrow(rank - 1, 1, self.dims[rank - 1])?.narrow(0, usize::from(rank != 1), self.dims[0])
            }
            Lies::Transposed if rank == 1 => base.narrow(1, 1, 1)?.squeeze(1),
            Lies::Transposed => base.transpose(rank - 1, rank - 2),
        }
    }
}

/// Reproducible values of about unit size, of either sign.
pub fn values(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x1234_5678_9ABC_DEF1);
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as f64) / f64::from(1u32 << 31)
    };
    // The sum of four uniform variables is normal enough, and bounded.
    (0..count).map(|_| (uniform() + uniform() + uniform() + uniform() - 2.0) * 1.7).collect()
}

pub type Op = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

/// A result and the gradients of the tracked arguments (of their bases), as f64.
pub struct Outcome {
    pub tensors: Vec<Vec<f64>>,
}

/// Runs an operation on arguments and goes back from `Σ c·y` with fixed weights `c`, exact in every dtype.
///
/// A gradient must arrive exactly for the tracked arguments, if this is `strict`: Candle's own operations lose some
/// where tensors are empty, and compute those of frozen weights.
pub fn run(
    strict: bool,
    args: &[Arg],
    bases: &[Tensor],
    dtype: DType,
    device: &Device,
    op: &Op,
) -> Result<Outcome> {
    let bases: Vec<Var> = args
        .iter()
        .zip(bases)
        .map(|(arg, base)| {
            let own = if dtype == DType::F64 { dtype } else { arg.own_dtype(dtype) };
            Var::from_tensor(&base.to_dtype(own)?.to_device(device)?)
        })
        .collect::<Result<_>>()?;
    let views: Vec<Tensor> = args
        .iter()
        .zip(&bases)
        .map(|(arg, base)| {
            arg.view(&if arg.tracked { base.as_tensor().clone() } else { base.as_detached_tensor() })
        })
        .collect::<Result<_>>()?;
    let y = op(&views)?;
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let c = Tensor::from_vec(values(y.elem_count(), 99), y.shape(), &Device::Cpu)?;
    let c = c.to_dtype(DType::BF16)?.to_dtype(wide)?.to_device(device)?;
    let gradients = (y.to_dtype(wide)? * c)?.sum_all()?.backward()?;
    let mut tensors = vec![to_f64(&y)?];
    for (k, ((arg, base), view)) in args.iter().zip(&bases).zip(&views).enumerate() {
        if !arg.tracked {
            let got = gradients.get(view).is_some();
            assert!(!(strict && got), "the untracked argument {k} of {args:?} got a gradient");
            continue;
        }
        if let Some(gradient) = gradients.get(base) {
            assert_eq!(gradient.dims(), base.dims(), "a gradient's shape");
            assert_eq!(gradient.dtype(), base.dtype(), "a gradient's dtype");
            tensors.push(to_f64(gradient)?);
        } else {
            assert!(!strict || y.elem_count() == 0, "the tracked argument {k} of {args:?} got no gradient");
            tensors.push(vec![0.0; base.elem_count()]);
        }
    }
    Ok(Outcome { tensors })
}

pub fn to_f64(t: &Tensor) -> Result<Vec<f64>> {
    t.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// The values of the arguments' bases, as they are in `dtype`.
pub fn bases(args: &[Arg], dtype: DType) -> Result<Vec<Tensor>> {
    let base = |(seed, arg): (u64, &Arg)| {
        let dims = arg.base_dims();
        let values = values(dims.iter().product(), seed);
        let values: Vec<f64> = values.into_iter().map(|x| x * arg.magnitude).collect();
        let own = arg.own_dtype(dtype);
        Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(own)?.to_dtype(DType::F64)
    };
    (1u64..).zip(args).map(base).collect()
}

/// What rounding alone explains, relative to the greatest value: the stated floor of the error rule.
fn floor(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-22),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => unreachable!(),
    }
}

/// An operation applied to arguments, three times.
pub struct Case {
    pub what: String,
    /// Multiplies the error rule's floor.
    pub slack: f64,
    pub args: Vec<Arg>,
    pub fused: Op,
    pub reference: Op,
    pub oracle: Op,
}

impl Case {
    /// The error rule: against float64, result and gradients of `fused` are at most twice as wrong as those of
    /// `reference` in the same dtype, plus the floor. Where the reference overflows, `fused` still is finite wherever
    /// the oracle is, and within sixteen times the floor of it.
    pub fn error_rule(&self, dtype: DType, device: &Device) {
        let (args, what) = (&self.args, format!("{} {dtype:?} {:?}", self.what, self.args));
        let bases = bases(&self.args, dtype).unwrap();
        let exact = run(false, args, &bases, DType::F64, &Device::Cpu, &self.oracle)
            .unwrap_or_else(|e| panic!("{what}: oracle: {e}"));
        let fused =
            run(true, args, &bases, dtype, device, &self.fused).unwrap_or_else(|e| panic!("{what}: {e}"));
        let reference = run(false, args, &bases, dtype, device, &self.reference)
            .unwrap_or_else(|e| panic!("{what}: reference: {e}"));
        assert_eq!(exact.tensors.len(), fused.tensors.len(), "{what}: gradients");
        for (i, ((exact, fused), reference)) in
            exact.tensors.iter().zip(&fused.tensors).zip(&reference.tensors).enumerate()
        {
            let which = if i == 0 { "result".into() } else { format!("gradient {i}") };
            assert_eq!(exact.len(), fused.len(), "{what}: {which}: elements");
            let scale = exact.iter().fold(0f64, |a, b| a.max(b.abs()));
            assert!(scale.is_finite(), "{what}: {which}: the oracle is {scale}");
            let error = |got: &[f64]| {
                exact.iter().zip(got).fold(0f64, |worst, (e, g)| {
                    let error = (e - g).abs();
                    if error.is_nan() { f64::INFINITY } else { worst.max(error) }
                })
            };
            let (fused, reference) = (error(fused), error(reference));
            // Below the smallest normal number of the dtype, an absolute step is all there is.
            let floor = (self.slack * floor(dtype) * scale).max(if dtype == DType::F16 {
                2f64.powi(-24)
            } else {
                1e-38
            });
            let allowed = if reference.is_finite() { 2.0 * reference + floor } else { 16.0 * floor };
            assert!(
                fused <= allowed,
                "{what}: {which}: error {fused:.3e}, allowed {allowed:.3e} (reference {reference:.3e}, scale {scale:.3e})"
            );
        }
    }

    /// A gradient arrives for every choice of the trackable arguments, exactly there.
    pub fn gradients_arrive(&self, device: &Device) {
        let trackable: Vec<usize> = (0..self.args.len()).filter(|&k| self.args[k].tracked).collect();
        for chosen in 1u32..1 << trackable.len() {
            let mut args = self.args.clone();
            for (bit, &k) in trackable.iter().enumerate() {
                args[k].tracked = chosen >> bit & 1 == 1;
            }
            let bases = bases(&args, DType::F32).unwrap();
            run(true, &args, &bases, DType::F32, device, &self.fused).unwrap();
        }
    }

    /// Gradients against central differences of the float64 oracle's `Σ c·y`, element by element.
    pub fn central_differences(&self, device: &Device) {
        let args = &self.args;
        let bases = bases(args, DType::F32).unwrap();
        let got = run(true, args, &bases, DType::F32, device, &self.fused).unwrap();
        let loss = |bases: &[Tensor]| -> Result<f64> {
            let views: Vec<Tensor> =
                args.iter().zip(bases).map(|(arg, base)| arg.view(base)).collect::<Result<_>>()?;
            let y = (self.oracle)(&views)?;
            let c = Tensor::from_vec(values(y.elem_count(), 99), y.shape(), &Device::Cpu)?;
            let c = c.to_dtype(DType::BF16)?.to_dtype(DType::F64)?;
            (y * c)?.sum_all()?.to_scalar()
        };
        let mut gradients = got.tensors.iter().skip(1);
        for (k, _) in args.iter().enumerate().filter(|(_, arg)| arg.tracked) {
            let gradient = gradients.next().unwrap();
            let start = to_f64(&bases[k]).unwrap();
            for i in 0..start.len() {
                let step = 1e-5;
                let at = |x: f64| {
                    let mut moved = start.clone();
                    moved[i] = x;
                    let mut bases = bases.clone();
                    bases[k] = Tensor::from_vec(moved, bases[k].shape(), &Device::Cpu).unwrap();
                    loss(&bases).unwrap()
                };
                let expected = (at(start[i] + step) - at(start[i] - step)) / (2.0 * step);
                let error = (gradient[i] - expected).abs();
                assert!(
                    error <= 1e-5 * (1.0 + expected.abs()),
                    "{}: gradient {k}, element {i}: {} instead of {expected}",
                    self.what,
                    gradient[i]
                );
            }
        }
    }
}
