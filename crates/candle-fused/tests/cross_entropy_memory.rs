//! `cross_entropy` allocates no tensor of the logits' size forward, and nothing but the gradient backward. Alone in its
//! binary, for the allocator is the process's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Result, Shape, Tensor, Var};

/// Counts the bytes in use, and the most there ever were.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: both functions pass their arguments on to the system's allocator and return what it returns; the counters
// have no part in that.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(IN_USE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's obligations are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's obligations are the system allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `f` returns, and how much more than at its start it ever held.
fn peak<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = f();
    (result, PEAK.load(Relaxed) - before)
}

/// A scalar whose backward allocates the gradient of its argument, once, and nothing else: what Candle's graph itself
/// needs around an operation.
struct Control;

impl CustomOp1 for Control {
    fn name(&self) -> &'static str {
        "control"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &candle_core::Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        x.zeros_like().map(Some)
    }
}

#[test]
fn forward_holds_no_logits_and_backward_only_the_gradient() {
    let (n, v) = (64, 32_000);
    for (dtype, size) in [(DType::F32, 4), (DType::BF16, 2)] {
        let logits = Tensor::randn(0f32, 1.0, (n, v), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let logits = Var::from_tensor(&logits).unwrap();
        let targets = Tensor::zeros(n, DType::I64, &Device::Cpu).unwrap();
        // Starts the thread pool.
        candle_fused::cross_entropy(&logits, &targets, None).unwrap();

        let (loss, forward) = peak(|| candle_fused::cross_entropy(&logits, &targets, None).unwrap());
        let (_, backward) = peak(|| loss.backward().unwrap());
        let control = logits.apply_op1(Control).unwrap();
        let (_, control) = peak(|| control.backward().unwrap());

        // What remains is a row of f32 for each thread and each buffer, and a little for each row.
        let threads = rayon::current_num_threads();
        let rows = 3 * threads * v * 4 + n * 64;
        let logits = n * v * size;
        println!("{dtype:?}: logits {logits}, forward {forward}, backward {backward}, control {control}");
        assert!(forward <= rows, "{dtype:?}: forward held {forward} bytes beside logits of {logits}");
        assert!(
            backward <= control + rows,
            "{dtype:?}: backward held {backward} bytes, the graph alone {control}"
        );
    }
}
