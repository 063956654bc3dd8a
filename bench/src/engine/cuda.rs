//! A GPU's own time, and its memory.

use std::sync::Arc;

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, DriverError};
use candle_core::{Device, Storage, Tensor};

use super::call::Outputs;
use crate::{Error, Result};

/// Calls the operation once.
pub type Next<'a> = &'a mut dyn FnMut() -> Result<Outputs>;

/// Samples by the GPU's clock, and what the last call computed.
pub type Timed = (Vec<f64>, Option<Outputs>);

/// A graph of calls.
pub struct Captured {
    graph: CudaGraph,
    stream: Arc<CudaStream>,
    last: Option<Outputs>,
}

impl Captured {
    /// The GPU time of whole graphs.
    pub fn time(&self, samples: usize) -> Result<Timed> {
        let launch = || self.graph.launch().map_err(driver);
        let samples_us = (0..samples).map(|_| between_events(&self.stream, launch)).collect::<Result<_>>()?;
        Ok((samples_us, self.last.clone()))
    }
}

/// The GPU time between two events around so many launches back to back, which the host may hold up.
pub fn time_launches(device: &Device, samples: usize, calls: usize, next: Next<'_>) -> Result<Timed> {
    let stream = cuda(device)?.cuda_stream();
    let mut last = None;
    let mut launch = || {
        for _ in 0..calls {
            last = Some(next()?);
        }
        Ok(())
    };
    let samples_us = (0..samples).map(|_| between_events(&stream, &mut launch)).collect::<Result<_>>()?;
    Ok((samples_us, last))
}

fn cuda(device: &Device) -> Result<&CudaDevice> {
    match device {
        Device::Cuda(cuda) => Ok(cuda),
        _ => Err(Error::Engine("only a GPU has a clock of its own".to_owned())),
    }
}

/// Microseconds of the GPU between two events around `launch`.
fn between_events(stream: &Arc<CudaStream>, launch: impl FnOnce() -> Result<()>) -> Result<f64> {
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver);
    let (start, end) = (event()?, event()?);
    start.record(stream).map_err(driver)?;
    launch()?;
    end.record(stream).map_err(driver)?;
    Ok(f64::from(start.elapsed_ms(&end).map_err(driver)?) * 1e3)
}

/// A graph of so many calls.
pub fn capture(device: &Device, calls: usize, next: Next<'_>) -> Result<Captured> {
    let cuda = cuda(device)?;
    let stream = cuda.cuda_stream();
    // Candle uploads shapes and strides; what is captured must find them uploaded.
    let _uploads = cuda.enable_cuda_graph_htod_cache();
    for _ in 0..calls.min(64) {
        next()?;
    }
    stream.synchronize().map_err(driver)?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(driver)?;
    let mut last = None;
    let mut called = Ok(());
    for _ in 0..calls {
        match next() {
            Ok(outputs) => last = Some(outputs),
            Err(error) => {
                called = Err(error);
                // Its memory is part of the capture, and goes with it.
                last = None;
                break;
            }
        }
    }
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags);
    called?;
    let Some(graph) = graph.map_err(driver)? else {
        return Err(Error::Engine("nothing was captured".to_owned()));
    };
    graph.launch().map_err(driver)?;
    stream.synchronize().map_err(driver)?;
    Ok(Captured { graph, stream, last })
}

fn driver(error: DriverError) -> Error {
    Error::Engine(format!("CUDA: {error}"))
}

/// The device by name.
pub fn notes(cuda: &CudaDevice) -> Vec<String> {
    let stream = cuda.cuda_stream();
    let context = stream.context();
    let name = context.name().unwrap_or_default();
    let capability =
        context.compute_capability().map(|(major, minor)| format!("compute capability {major}.{minor}"));
    [name].into_iter().chain(capability).chain(["TF32 off".to_owned()]).collect()
}

/// Bytes read and written per second by copies between two buffers of 1 GiB, the best of several.
///
/// The buffers are there beforehand. A fresh one for each copy would have the driver map its memory in the measured time.
pub fn copy_rate(device: &Device) -> Result<f64> {
    const ELEMENTS: usize = 1 << 28;
    let stream = cuda(device)?.cuda_stream();
    let from = Tensor::randn(0f32, 1.0, ELEMENTS, device)?;
    let (storage, _) = from.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::Engine("only a GPU has memory of its own".to_owned()));
    };
    let from = storage.as_cuda_slice::<f32>()?;
    let mut to = stream.alloc_zeros::<f32>(ELEMENTS).map_err(driver)?;
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let copy = || (0..4).try_for_each(|_| stream.memcpy_dtod(from, &mut to)).map_err(driver);
        best = best.min(between_events(&stream, copy)? / 4.0);
    }
    Ok(2.0 * 4.0 * crate::ops::as_f64(ELEMENTS) / best * 1e6)
}

/// The device's memory in use as its driver counts it, contexts and caches included.
pub fn used_memory(device: &Device) -> Option<f64> {
    let (free, total) = cuda(device).ok()?.cuda_stream().context().mem_get_info().ok()?;
    Some(crate::ops::as_f64(total - free))
}
