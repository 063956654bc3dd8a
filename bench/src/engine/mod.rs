//! The engines that are part of this program: candlewick's operations and Candle's. Each runs as a process of its own,
//! `candlewick-bench engine NAME`, as the Python engines do.

mod call;
#[cfg(feature = "cuda")]
mod cuda;
mod library;
mod train;

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use candle_fused::telemetry::{self, Path as OpPath};

use crate::case::{Case, DeviceName};
use crate::protocol::{Hello, Limits, Paths, Reply, Request, Times, Way};
use crate::{Error, Result};

use call::{Outputs, Prepared};
pub use library::Library;

/// Serves requests until the input ends.
pub fn serve(library: Library, input: impl BufRead, mut output: impl Write) -> Result<()> {
    let mut engine = Engine { library, device: Device::Cpu, state: None };
    for line in input.lines() {
        let line = line.map_err(Error::stream)?;
        let reply = serde_json::from_str(&line)
            .map_err(|e| Error::Engine(format!("request {line}: {e}")))
            .and_then(|request| engine.answer(request))
            .unwrap_or_else(|e| Reply::Failed { reason: e.to_string() });
        let reply = serde_json::to_string(&reply).map_err(|e| Error::Engine(e.to_string()))?;
        writeln!(output, "{reply}").and_then(|()| output.flush()).map_err(Error::stream)?;
    }
    Ok(())
}

struct Engine {
    library: Library,
    device: Device,
    state: Option<State>,
}

/// A case under measurement.
struct State {
    case: Case,
    variant: String,
    copies: Vec<Prepared>,
    last: Option<Outputs>,
    /// The calls of a sample, or why they cannot be captured.
    #[cfg(feature = "cuda")]
    graph: Option<std::result::Result<cuda::Captured, String>>,
}

impl Engine {
    fn answer(&mut self, request: Request) -> Result<Reply> {
        match request {
            Request::Hello { device, threads: _ } => {
                self.device = open(device)?;
                Ok(Reply::Hello(self.hello()))
            }
            Request::Prepare { case, variant, .. } => {
                self.state = None;
                if let Some(reason) = self.library.lacks(&case, &variant) {
                    return Ok(Reply::Unsupported { reason });
                }
                self.state = Some(State {
                    case,
                    variant,
                    copies: Vec::new(),
                    last: None,
                    #[cfg(feature = "cuda")]
                    graph: None,
                });
                Ok(Reply::Done)
            }
            Request::Inputs { path, copies, warm } => self.inputs(&path, copies, warm),
            #[cfg(feature = "cuda")]
            Request::Ready { way: Way::Graph, calls } => {
                let device = self.device.clone();
                self.state()?.capture(&device, calls);
                Ok(Reply::Done)
            }
            Request::Ready { .. } => Ok(Reply::Done),
            Request::Time { way, samples, calls } => self.time(way, samples, calls),
            Request::Output { path, rows } => self.output(&path, &rows),
            Request::Limits => Ok(Reply::Limits(limits(&self.device)?)),
            Request::Train { training, variant: _ } => {
                Ok(Reply::Trained(train::run(self.library, &training, &self.device)?))
            }
        }
    }

    fn hello(&self) -> Hello {
        let versions = [("candlewick", env!("CARGO_PKG_VERSION")), ("candle-core", "0.11.1")];
        Hello {
            engine: self.library.name().to_owned(),
            variants: self.library.variants().iter().map(|&name| name.to_owned()).collect(),
            versions: versions.map(|(name, version)| (name.to_owned(), version.to_owned())).into(),
            threads: rayon::current_num_threads(),
            allocator: "mimalloc, keeping freed pages".to_owned(),
            notes: device_notes(&self.device),
        }
    }

    fn state(&mut self) -> Result<&mut State> {
        self.state.as_mut().ok_or_else(|| Error::Engine("no case was prepared".to_owned()))
    }

    fn inputs(&mut self, path: &Path, copies: usize, warm: bool) -> Result<Reply> {
        let (library, device) = (self.library, self.device.clone());
        let state = self.state()?;
        state.last = None;
        #[cfg(feature = "cuda")]
        {
            state.graph = None;
        }
        state.copies.clear();
        // A backward pass alone has its forward pass here.
        telemetry::reset();
        let tensors = candle_core::safetensors::load(path, &device)?;
        for _ in 0..copies.max(1) {
            let prepared = Prepared::new(library, state.case, &state.variant, &tensors)?;
            if warm {
                prepared.call()?;
            }
            state.copies.push(prepared);
        }
        device.synchronize()?;
        Ok(Reply::Done)
    }

    fn time(&mut self, way: Way, samples: usize, calls: usize) -> Result<Reply> {
        let (library, device) = (self.library, self.device.clone());
        let state = self.state()?;
        if state.copies.is_empty() {
            return Err(Error::Engine("no inputs were given".to_owned()));
        }
        let (samples_us, note) = match way {
            Way::Graph => state.time_on_device(&device, samples, calls)?,
            _ => (state.time_on_host(&device, way, samples, calls)?, None),
        };
        let paths = (library == Library::Ours && state.variant == "fused").then(paths);
        Ok(Reply::Times(Times { samples_us, paths, note }))
    }

    fn output(&mut self, path: &Path, rows: &BTreeMap<String, Vec<usize>>) -> Result<Reply> {
        let state = self.state()?;
        let outputs = state.last.as_ref().ok_or_else(|| Error::Engine("nothing was timed".to_owned()))?;
        let chosen = |(name, tensor): &(String, Tensor)| -> Result<(String, Tensor)> {
            let tensor = match rows.get(name) {
                Some(rows) => {
                    let width = tensor.dims().last().copied().unwrap_or(1);
                    let rows = rows
                        .iter()
                        .map(|&row| u32::try_from(row))
                        .collect::<std::result::Result<Vec<_>, _>>();
                    let rows = Tensor::new(rows.map_err(candle_core::Error::wrap)?, tensor.device())?;
                    tensor.contiguous()?.reshape(((), width))?.index_select(&rows, 0)?
                }
                None => tensor.contiguous()?,
            };
            Ok((name.clone(), tensor.to_device(&Device::Cpu)?))
        };
        let tensors = outputs.iter().map(chosen).collect::<Result<_>>()?;
        candle_core::safetensors::save(&tensors, path)?;
        Ok(Reply::Done)
    }
}

impl State {
    /// Calls the operation on the copies in turn; the last call's outputs are kept.
    fn time_on_host(&mut self, device: &Device, way: Way, samples: usize, calls: usize) -> Result<Vec<f64>> {
        let mut copies = self.copies.iter().cycle();
        let mut samples_us = Vec::with_capacity(samples);
        for _ in 0..samples {
            let start = Instant::now();
            for copy in copies.by_ref().take(calls) {
                self.last = Some(copy.call()?);
                if way == Way::Synced {
                    device.synchronize()?;
                }
            }
            device.synchronize()?;
            samples_us.push(start.elapsed().as_secs_f64() * 1e6);
        }
        Ok(samples_us)
    }

    /// Captures a sample's calls as a graph.
    #[cfg(feature = "cuda")]
    fn capture(&mut self, device: &Device, calls: usize) {
        self.last = None;
        self.graph = None;
        let mut copies = self.copies.iter().cycle();
        let mut next =
            || copies.next().map_or_else(|| Err(Error::Engine("no copies".to_owned())), Prepared::call);
        self.graph = Some(cuda::capture(device, calls, &mut next).map_err(|error| error.to_string()));
    }

    #[cfg(feature = "cuda")]
    fn time_on_device(
        &mut self,
        device: &Device,
        samples: usize,
        calls: usize,
    ) -> Result<(Vec<f64>, Option<String>)> {
        let (timed, note) = match &self.graph {
            Some(Ok(graph)) => (graph.time(samples)?, None),
            Some(Err(error)) => {
                let mut copies = self.copies.iter().cycle();
                let mut next = || {
                    copies.next().map_or_else(|| Err(Error::Engine("no copies".to_owned())), Prepared::call)
                };
                let error = error.clone();
                let reason = error.lines().next().unwrap_or_default();
                let note = format!("no graph ({reason}): events around launches, which the host may hold up");
                (cuda::time_launches(device, samples, calls, &mut next)?, Some(note))
            }
            None => return Err(Error::Engine("no graph was captured".to_owned())),
        };
        self.last = timed.1;
        Ok((timed.0, note))
    }

    #[cfg(not(feature = "cuda"))]
    fn time_on_device(&mut self, _: &Device, _: usize, _: usize) -> Result<(Vec<f64>, Option<String>)> {
        Err(Error::Engine(format!("{}: this build has no GPU", self.case.id())))
    }
}

/// What the fused operations counted since the last reset.
fn paths() -> Paths {
    let mut paths = Paths::default();
    for count in telemetry::snapshot() {
        match count.path {
            OpPath::Fused => paths.fused += count.count,
            OpPath::Fallback { reason } => {
                paths.fallback += count.count;
                paths.reasons.push(format!("{}: {reason}", count.op));
            }
        }
    }
    paths
}

fn open(device: DeviceName) -> Result<Device> {
    let device = match device {
        DeviceName::Cpu => Device::Cpu,
        DeviceName::Cuda => Device::new_cuda(0)?,
    };
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = &device {
        // As `wick` does: without the events that every tensor is created with, for streams to wait for each other.
        // SAFETY: the device's stream is each thread's own, and one thread alone uses the device.
        unsafe { cuda.disable_event_tracking() };
    }
    Ok(device)
}

fn device_notes(device: &Device) -> Vec<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::notes(device),
        _ => Vec::new(),
    }
}

/// The best of several large products, Candle's or ours, and on a GPU of several copies of 1 GiB into 1 GiB.
fn limits(device: &Device) -> Result<Limits> {
    let (m, k, n) = if device.is_cpu() { (1024, 1024, 1024) } else { (8192, 4096, 4096) };
    let mut limits = Limits::default();
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let a = Tensor::randn(0f32, 1.0, (m, k), device)?.to_dtype(dtype)?;
        let b = Tensor::randn(0f32, 1.0, (n, k), device)?.to_dtype(dtype)?;
        let ours = best_of(device, || Ok(candle_fused::frozen_linear(&a, &b, None)?))?;
        let b = b.t()?;
        let seconds = best_of(device, || Ok(a.matmul(&b)?))?.min(ours);
        let operations = 2.0 * crate::ops::as_f64(m * k * n);
        limits.product_operations_per_second.insert(name.to_owned(), operations / seconds);
    }
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        limits.copy_bytes_per_second = Some(cuda::copy_rate(device)?);
    }
    Ok(limits)
}

/// Seconds per call: the best mean of many batches of calls, each batch waited for.
fn best_of(device: &Device, mut call: impl FnMut() -> Result<Tensor>) -> Result<f64> {
    let mut best = f64::INFINITY;
    call()?;
    let enough = Instant::now() + Duration::from_millis(600);
    while Instant::now() < enough {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..4 {
            call()?;
        }
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64() / 4.0);
    }
    Ok(best)
}
