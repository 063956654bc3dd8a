//! Recording a computed result on Candle's graph.
//!
//! A `CustomOp` of Candle computes one output from at most three inputs while it is recorded. Here the result is
//! computed first, by whatever kernels it takes, and only then recorded: what the forward saves for the backward is a
//! plain field of the [`Backward`] value, frozen inputs are fields too, and one piece of code serves every device.
//!
//! Each recorded tensor is also known by its id as long as it lives, for [`backward`](crate::backward()), which goes over
//! the same graph without Candle's zeros and sums.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, Layout, MetalStorage, Result,
    Shape, Storage, Tensor, TensorId, bail,
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
    let recorded = Recorded::new([x], &output, backward)?;
    Ok(recorded.registered(x.apply_op1(Handle(recorded.clone()))?))
}

/// As [`record1`], for two differentiable arguments.
pub(crate) fn record2(x: &Tensor, y: &Tensor, output: Tensor, backward: impl Backward<2>) -> Result<Tensor> {
    if !(x.track_op() || y.track_op()) {
        return Ok(output);
    }
    let recorded = Recorded::new([x, y], &output, backward)?;
    Ok(recorded.registered(x.apply_op2(y, Handle(recorded.clone()))?))
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
    let recorded = Recorded::new([x, y, z], &output, backward)?;
    Ok(recorded.registered(x.apply_op3(y, z, Handle(recorded.clone()))?))
}

/// A tracked argument's gradient; an untracked one's is not computed.
pub(crate) fn tracked(arg: &Tensor, gradient: impl FnOnce() -> Result<Tensor>) -> Result<Option<Tensor>> {
    if arg.track_op() { gradient().map(Some) } else { Ok(None) }
}

/// A result computed beforehand, and how its gradient goes on to the arguments.
struct Recorded<B, const N: usize> {
    output: Slot,
    shape: Shape,
    backward: B,
    args: [Tensor; N],
    /// What is registered and has to go with this.
    ids: Mutex<Vec<TensorId>>,
}

impl<B: Backward<N>, const N: usize> Recorded<B, N> {
    fn new(args: [&Tensor; N], output: &Tensor, backward: B) -> Result<Arc<Self>> {
        let slot = Slot::default();
        // As one dimension: Candle sees overlap in the strides of an empty matrix.
        output.flatten_all()?.inplace_op1(&slot)?;
        Ok(Arc::new(Self {
            output: slot,
            shape: output.shape().clone(),
            backward,
            args: args.map(Tensor::clone),
            ids: Mutex::default(),
        }))
    }

    /// Makes the recorded tensor known to [`node`].
    fn registered(self: &Arc<Self>, tensor: Tensor) -> Tensor {
        let node: Arc<dyn Node> = self.clone();
        self.keep(tensor.id());
        lock(&ENTRIES).insert(tensor.id(), Entry::Op(Arc::downgrade(&node)));
        tensor
    }
}

impl<B, const N: usize> Drop for Recorded<B, N> {
    fn drop(&mut self) {
        let mut entries = lock(&ENTRIES);
        for id in lock(&self.ids).drain(..) {
            entries.remove(&id);
        }
    }
}

/// A recorded operation, whatever it is.
pub(crate) trait Node: Send + Sync {
    fn args(&self) -> &[Tensor];

    /// Those of the arguments, from the result and its own.
    fn gradients(&self, output: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>>;

    /// Forgets this entry together with the operation.
    fn keep(&self, id: TensorId);
}

impl<B: Backward<N>, const N: usize> Node for Recorded<B, N> {
    fn args(&self) -> &[Tensor] {
        &self.args
    }

    fn gradients(&self, output: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(self.backward.backward(self.args.each_ref(), output, grad)?.into())
    }

    fn keep(&self, id: TensorId) {
        lock(&self.ids).push(id);
    }
}

/// What is known of a tensor on the graph.
#[derive(Clone)]
pub(crate) enum Entry {
    /// It is the result of an operation.
    Op(Weak<dyn Node>),
    /// It is a view of another tensor.
    View(View, Weak<dyn Node>),
}

/// How a view's gradient becomes that of the tensor viewed.
#[derive(Clone)]
pub(crate) struct View {
    pub(crate) of: TensorId,
    pub(crate) undo: Undo,
}

/// The way back from a view.
#[derive(Clone)]
pub(crate) enum Undo {
    Reshape(Shape),
    Transpose(usize, usize),
}

/// The tensors of operations that are alive, and the views of these.
static ENTRIES: LazyLock<Mutex<HashMap<TensorId, Entry>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is known of a tensor.
pub(crate) fn entry(id: TensorId) -> Option<Entry> {
    lock(&ENTRIES).get(&id).cloned()
}

/// Makes a view of `x` known, if `x` is.
pub(crate) fn register_view(view: Tensor, x: &Tensor, undo: Undo) -> Tensor {
    let Some(Entry::Op(root) | Entry::View(_, root)) = entry(x.id()) else { return view };
    if let Some(node) = root.upgrade() {
        node.keep(view.id());
        lock(&ENTRIES).insert(view.id(), Entry::View(View { of: x.id(), undo }, root));
    }
    view
}

/// What Candle's graph holds of it.
struct Handle<B, const N: usize>(Arc<Recorded<B, N>>);

impl<B, const N: usize> Recorded<B, N> {
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
        impl<B: Backward<$n>> $trait for Handle<B, $n> {
            fn name(&self) -> &'static str {
                self.0.backward.op()
            }

            fn cpu_fwd(&self, $(_: &CpuStorage, $arg: &Layout),+) -> Result<(CpuStorage, Shape)> {
                $(let _ = $arg;)+
                self.0.cpu()
            }

            fn cuda_fwd(&self, $(_: &CudaStorage, $arg: &Layout),+) -> Result<(CudaStorage, Shape)> {
                $(let _ = $arg;)+
                self.0.cuda()
            }

            fn metal_fwd(&self, $(_: &MetalStorage, $arg: &Layout),+) -> Result<(MetalStorage, Shape)> {
                $(let _ = $arg;)+
                self.0.metal()
            }

            fn bwd(&self, $($arg: &Tensor,)+ output: &Tensor, grad: &Tensor) -> Result<$out> {
                let $gradients = self.0.backward.backward([$($arg),+], output, grad)?;
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
        *lock(&self.0) = Some(storage);
    }

    fn take(&self) -> Option<Storage> {
        lock(&self.0).take()
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
