//! Recording a computed result on Candle's graph.
//!
//! A `CustomOp` of Candle computes one output from at most three inputs while it is recorded. Here the result is
//! computed first, by whatever kernels it takes, and only then recorded: what the forward saves for the backward is a
//! plain field of the [`Backward`] value, frozen inputs are fields too, and one piece of code serves every device.

use std::mem;
use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, Layout, MetalStorage, Result,
    Shape, Storage, Tensor, bail,
};

/// The gradient half of an operation with `N` differentiable arguments.
pub(crate) trait Backward<const N: usize>: Send + Sync + 'static {
    /// The operation's name, for messages.
    fn op(&self) -> &'static str;

    /// One gradient for each argument, in its shape and dtype: `Some` exactly where the argument is tracked
    /// (Candle panics later if a tracked one stays without, and an untracked one would be wasted work).
    fn backward(&self, args: [&Tensor; N], output: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; N]>;
}

/// Records `output`, computed from `args`, on the graph. `output` must be fresh: contiguous from offset 0, owned by
/// nobody else, and itself off the graph; its storage moves into the returned tensor.
pub(crate) fn record1(x: &Tensor, output: Tensor, backward: impl Backward<1>) -> Result<Tensor> {
    if !x.track_op() {
        return Ok(output);
    }
    x.apply_op1(Recorded::new(&output, backward)?)
}

/// As [`record1`], for two differentiable arguments.
pub(crate) fn record2(x: &Tensor, y: &Tensor, output: Tensor, backward: impl Backward<2>) -> Result<Tensor> {
    if !(x.track_op() || y.track_op()) {
        return Ok(output);
    }
    x.apply_op2(y, Recorded::new(&output, backward)?)
}

/// As [`record1`], for three differentiable arguments.
pub(crate) fn record3(
    x: &Tensor,
    y: &Tensor,
    z: &Tensor,
    output: Tensor,
    backward: impl Backward<3>,
) -> Result<Tensor> {
    if !(x.track_op() || y.track_op() || z.track_op()) {
        return Ok(output);
    }
    x.apply_op3(y, z, Recorded::new(&output, backward)?)
}

/// A tracked argument's gradient; an untracked one's is not computed.
pub(crate) fn tracked(arg: &Tensor, gradient: impl FnOnce() -> Result<Tensor>) -> Result<Option<Tensor>> {
    if arg.track_op() { gradient().map(Some) } else { Ok(None) }
}

/// A custom operation whose forward hands out the result computed beforehand.
struct Recorded<B> {
    output: Slot,
    shape: Shape,
    backward: B,
}

impl<B> Recorded<B> {
    fn new(output: &Tensor, backward: B) -> Result<Self> {
        let slot = Slot::default();
        output.inplace_op1(&slot)?;
        Ok(Self { output: slot, shape: output.shape().clone(), backward })
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.output.take() {
            Some(Storage::Cpu(storage)) => Ok((storage, self.shape.clone())),
            _ => bail!("a result can be recorded once, on the device that computed it"),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.output.take() {
            Some(Storage::Cuda(storage)) => Ok((storage, self.shape.clone())),
            _ => bail!("a result can be recorded once, on the device that computed it"),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.output.take() {
            Some(Storage::Metal(storage)) => Ok((storage, self.shape.clone())),
            _ => bail!("a result can be recorded once, on the device that computed it"),
        }
    }
}

macro_rules! custom_op {
    ($trait:ident, $n:literal, [$($arg:ident),+], $gradients:ident => $out:ty, $pack:expr) => {
        impl<B: Backward<$n>> $trait for Recorded<B> {
            fn name(&self) -> &'static str {
                self.backward.op()
            }

            fn cpu_fwd(&self, $(_: &CpuStorage, $arg: &Layout),+) -> Result<(CpuStorage, Shape)> {
                $(let _ = $arg;)+
                self.cpu()
            }

            fn cuda_fwd(&self, $(_: &CudaStorage, $arg: &Layout),+) -> Result<(CudaStorage, Shape)> {
                $(let _ = $arg;)+
                self.cuda()
            }

            fn metal_fwd(&self, $(_: &MetalStorage, $arg: &Layout),+) -> Result<(MetalStorage, Shape)> {
                $(let _ = $arg;)+
                self.metal()
            }

            fn bwd(&self, $($arg: &Tensor,)+ output: &Tensor, grad: &Tensor) -> Result<$out> {
                let $gradients = self.backward.backward([$($arg),+], output, grad)?;
                Ok($pack)
            }
        }
    };
}

custom_op!(CustomOp1, 1, [x], g => Option<Tensor>, { let [x] = g; x });
custom_op!(CustomOp2, 2, [x, y], g => (Option<Tensor>, Option<Tensor>), g.into());
custom_op!(CustomOp3, 3, [x, y, z], g => (Option<Tensor>, Option<Tensor>, Option<Tensor>), g.into());

/// Takes a tensor's storage out of it, through the one public door to it: an in-place operation.
#[derive(Default)]
struct Slot(Mutex<Option<Storage>>);

impl Slot {
    fn put(&self, storage: Storage) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(storage);
    }

    fn take(&self) -> Option<Storage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl InplaceOp1 for Slot {
    fn name(&self) -> &'static str {
        "record"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        self.put(Storage::Cpu(mem::replace(storage, CpuStorage::U8(Vec::new()))));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let empty = storage.device().zeros_impl(&Shape::from(0), storage.dtype())?;
        self.put(Storage::Cuda(mem::replace(storage, empty)));
        Ok(())
    }

    /// A Metal storage is a handle to its buffer.
    #[cfg(target_os = "macos")]
    fn metal_fwd(&self, storage: &mut MetalStorage, _: &Layout) -> Result<()> {
        self.put(Storage::Metal(storage.clone()));
        Ok(())
    }
}
