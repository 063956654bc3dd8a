//! Recording a computed result on Candle's graph.
//!
//! A `CustomOp` of Candle computes one output from at most three inputs while it is recorded. Here the result is
//! computed first, by whatever kernels it takes, and only then recorded: what the forward saves for the backward is a
//! plain field of the [`Backward`] value, frozen inputs are fields too, and one piece of code serves every device.
//!
//! Each recorded tensor is also known by its id as long as it lives, for [`backward`](crate::backward()), which goes over
//! the same graph without Candle's zeros and sums, and for [`release`].

use std::collections::HashMap;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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

    /// How [`Self::backward`] comes to the values of an argument.
    fn reads(&self, _arg: usize) -> Reads {
        Reads::Directly
    }

    /// Whether [`Self::backward`] reads the output.
    fn reads_output(&self) -> bool {
        true
    }

    /// Whether [`Self::again`] computes the output.
    fn is_repeatable(&self) -> bool {
        false
    }

    /// The output, computed once more.
    fn again(&self, _args: [&Tensor; N]) -> Result<Tensor> {
        bail!("{} is not computed twice", self.op())
    }
}

/// How a backward comes to the values of an argument.
pub(crate) enum Reads {
    Directly,
    /// By [`value`].
    Again,
    Never,
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
    /// How often it, or a view of it, is an argument.
    uses: AtomicUsize,
    /// Whether the recorded tensor has lost its values.
    is_released: AtomicBool,
    /// What is registered and has to go with this.
    ids: Mutex<Vec<TensorId>>,
}

impl<B: Backward<N>, const N: usize> Recorded<B, N> {
    fn new(args: [&Tensor; N], output: &Tensor, backward: B) -> Result<Arc<Self>> {
        let slot = Slot::of(output)?;
        for (maker, _) in args.iter().filter_map(|arg| node(arg)) {
            maker.uses().fetch_add(1, Ordering::AcqRel);
        }
        Ok(Arc::new(Self {
            output: slot,
            shape: output.shape().clone(),
            backward,
            args: args.map(Tensor::clone),
            uses: AtomicUsize::new(0),
            is_released: AtomicBool::new(false),
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

/// The storage of a fresh, contiguous tensor on the processor, which is left without.
pub(crate) fn take_storage(tensor: &Tensor) -> Result<Storage> {
    match Slot::of(tensor)?.take() {
        Some(storage) if tensor.is_contiguous() => Ok(storage),
        _ => bail!("a tensor that is written over must be contiguous"),
    }
}

/// A recorded operation, whatever it is.
pub(crate) trait Node: Send + Sync {
    fn args(&self) -> &[Tensor];

    /// Those of the arguments, from the result and its own.
    fn gradients(&self, output: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>>;

    /// How these come to the values of an argument.
    fn reads(&self, arg: usize) -> Reads;

    /// Whether these read the result.
    fn reads_output(&self) -> bool;

    /// How often the result, or a view of it, is an argument.
    fn uses(&self) -> &AtomicUsize;

    /// The flag that says whether the result has lost its values; `None` where they cannot be computed again.
    fn releasable(&self) -> Option<&AtomicBool>;

    /// The result, computed once more.
    fn again(&self) -> Result<Tensor>;

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

    fn reads(&self, arg: usize) -> Reads {
        self.backward.reads(arg)
    }

    fn reads_output(&self) -> bool {
        self.backward.reads_output()
    }

    fn uses(&self) -> &AtomicUsize {
        &self.uses
    }

    fn releasable(&self) -> Option<&AtomicBool> {
        self.backward.is_repeatable().then_some(&self.is_released)
    }

    fn again(&self) -> Result<Tensor> {
        self.backward.again(self.args.each_ref())
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

/// Frees the values of `x`, which no operation but the one that made `y` has read. On the graph `x` stays: its gradient goes on
/// to what it was computed from.
///
/// Candle's graph holds every argument of every operation, so that a training step keeps, for instance, both terms of each
/// residual sum beside the sum. Where both `x` and `y` are results of this crate's operations (`x` may be a
/// [`view`](crate::view) of one), no other of them has read `x`, and no gradient needs what it holds, or it costs little to
/// compute it again from what is kept anyway (`silu_mul` and `gelu_mul`, when a layer with LoRA asks for it), it is freed;
/// else `x` is left as it is.
///
/// # Safety
/// Nobody reads `x`, a clone or a view of it afterwards, and no operation but this crate's has read it on the graph: they
/// share the storage that is gone, and Candle reads it without asking for its length.
///
/// # Errors
/// A failed allocation.
#[expect(clippy::needless_pass_by_value, reason = "nobody is to read it afterwards")]
pub unsafe fn release(x: Tensor, y: &Tensor) -> Result<()> {
    let (Some((maker, is_view)), Some((user, false))) = (node(&x), node(y)) else { return Ok(()) };
    let Some(arg) = user.args().iter().position(|arg| arg.id() == x.id()) else { return Ok(()) };
    if maker.reads_output() || maker.uses().load(Ordering::Acquire) != 1 || x.elem_count() == 0 {
        return Ok(());
    }
    match (user.reads(arg), maker.releasable()) {
        (Reads::Never, None) => {}
        (Reads::Never | Reads::Again, Some(is_released)) if !is_view => {
            is_released.store(true, Ordering::Release);
        }
        _ => return Ok(()),
    }
    x.inplace_op1(&Nothing)
}

/// The operation that made a tensor, or that of which it is a view.
fn node(tensor: &Tensor) -> Option<(Arc<dyn Node>, bool)> {
    match entry(tensor.id())? {
        Entry::Op(node) => Some((node.upgrade()?, false)),
        Entry::View(_, root) => Some((root.upgrade()?, true)),
    }
}

/// The values of an argument: itself, or computed again where [`release`] has freed them.
pub(crate) fn value(arg: &Tensor) -> Result<Tensor> {
    match node(arg) {
        Some((node, false)) if node.releasable().is_some_and(|released| released.load(Ordering::Acquire)) => {
            node.again()
        }
        _ => Ok(arg.clone()),
    }
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
    fn of(tensor: &Tensor) -> Result<Self> {
        let slot = Self::default();
        // As one dimension: Candle sees overlap in the strides of an empty matrix.
        tensor.flatten_all()?.inplace_op1(&slot)?;
        Ok(slot)
    }

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

/// Leaves a tensor without storage.
struct Nothing;

impl InplaceOp1 for Nothing {
    fn name(&self) -> &'static str {
        "release"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        *storage = CpuStorage::U8(Vec::new());
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        *storage = storage.device().zeros_impl(&Shape::from(0), storage.dtype())?;
        Ok(())
    }

    #[cfg(target_os = "macos")]
    fn metal_fwd(&self, storage: &mut MetalStorage, _: &Layout) -> Result<()> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        *storage = storage.device().zeros_impl(&Shape::from(1), storage.dtype())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::backward::tests::{tensor, var};
    use crate::{LoraLinearOptions, RopeLayout, SoftmaxOptions, view};

    fn is_released(tensor: &Tensor) -> bool {
        matches!(&*tensor.storage_and_layout().0, Storage::Cpu(CpuStorage::U8(bytes)) if bytes.is_empty())
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// A layer's MLP and what turns, with its arguments let go or not: the loss, and what was let go.
    fn layer(vars: &[Var], weight: &Tensor, releases: bool) -> (Tensor, Vec<Tensor>) {
        let [x, gate, up, a, b] = vars else { panic!("five variables") };
        let (cos, sin) =
            (Tensor::ones((5, 4), DType::F32, &Device::Cpu).unwrap(), weight.narrow(1, 0, 4).unwrap());
        let mut let_go = Vec::new();
        let mut release = |tensor: Tensor, user: &Tensor| {
            let_go.push(tensor.clone());
            if releases {
                // SAFETY: the clone beside it is asked for its storage alone.
                unsafe { release(tensor, user) }.unwrap();
            }
        };
        let gate = crate::add(gate, gate).unwrap();
        let gated = crate::silu_mul(&gate, up).unwrap();
        let options = LoraLinearOptions { scaling: 0.5, dropout: None };
        let y = crate::lora_linear(&gated, weight, None, a, b, options).unwrap();
        release(gated, &y);
        let sum = crate::add(x, &y).unwrap();
        release(y, &sum);
        let norm = crate::rms_norm(&sum, None, 1e-6).unwrap();
        let turned = view::reshape(&norm, (1, 5, 1, 8)).unwrap();
        let turned = view::transpose(&turned, 1, 2).unwrap();
        let sin = sin.narrow(0, 0, 5).unwrap().contiguous().unwrap();
        let z = crate::rope(&turned, &cos, &sin, RopeLayout::Half).unwrap();
        release(turned, &z);
        let z = view::reshape(&view::transpose(&z, 1, 2).unwrap(), (5, 8)).unwrap();
        (
            crate::cross_entropy(&z, &Tensor::new(&[1u32, 7, 0, 3, 2], &Device::Cpu).unwrap(), None).unwrap(),
            let_go,
        )
    }

    #[test]
    fn what_is_released_has_the_same_gradients() {
        let vars = [var(&[5, 8]), var(&[5, 8]), var(&[5, 8]), var(&[2, 8]), var(&[8, 2])];
        let weight = tensor(&[8, 8]);
        let (kept, all) = layer(&vars, &weight, false);
        assert!(all.iter().all(|tensor| !is_released(tensor)));
        let expected = crate::backward(&kept, 1.0).unwrap();
        let (loss, released) = layer(&vars, &weight, true);
        assert_eq!(released.iter().map(is_released).collect::<Vec<_>>(), [true; 3]);
        assert_eq!(values(&loss), values(&kept));
        let (ours, candles) = (crate::backward(&loss, 1.0).unwrap(), loss.backward().unwrap());
        for var in &vars {
            let expected = values(expected.get(var).unwrap());
            assert!(expected.iter().any(|&g| g != 0.0));
            assert_eq!(values(ours.get(var).unwrap()), expected);
            assert_eq!(values(candles.get(var).unwrap()), expected);
        }
    }

    #[test]
    fn what_is_needed_is_kept() {
        let (x, w) = (var(&[3, 8]), var(&[8]));
        let kept = |tensor: &Tensor, user: &Tensor| {
            // SAFETY: it is not read where it was released.
            unsafe { release(tensor.clone(), user) }.unwrap();
            assert!(!is_released(tensor));
        };
        // Its own gradient needs the result.
        let softmax = crate::softmax(&x, SoftmaxOptions::default()).unwrap();
        kept(&softmax, &crate::add(&softmax, &x).unwrap());
        // The user's gradient needs it, and nothing computes it again.
        let norm = crate::rms_norm(&x, None, 1e-6).unwrap();
        kept(&norm, &crate::rms_norm(&norm, Some(&w), 1e-6).unwrap());
        kept(&norm, &crate::silu_mul(&norm, &x).unwrap());
        // Another operation has read it, or a view of it.
        let norm = crate::rms_norm(&x, None, 1e-6).unwrap();
        let _reader = crate::silu_mul(&norm, &x).unwrap();
        kept(&norm, &crate::add(&norm, &x).unwrap());
        let norm = crate::rms_norm(&x, None, 1e-6).unwrap();
        let view = view::reshape(&norm, (1, 3, 8)).unwrap();
        let _reader = crate::silu_mul(&view, &view).unwrap();
        kept(&norm, &crate::add(&norm, &x).unwrap());
        let norm = crate::rms_norm(&x, None, 1e-6).unwrap();
        // It is used twice; by another crate; by an operation that was not recorded; it is a variable; it is no argument.
        kept(&norm, &crate::add(&norm, &norm).unwrap());
        kept(&norm, &(&norm + x.as_tensor()).unwrap());
        let plain = norm.detach();
        kept(&plain, &crate::add(&plain, &plain).unwrap());
        kept(&x, &crate::add(&x, &norm).unwrap());
        kept(&softmax, &crate::add(&norm, &x).unwrap());
        // A view of what would be computed again is not known by it.
        let gated = view::reshape(&crate::silu_mul(&norm, &x).unwrap(), (1, 3, 8)).unwrap();
        let (a, b) = (var(&[2, 8]), var(&[8, 2]));
        let options = LoraLinearOptions { scaling: 1.0, dropout: None };
        kept(&gated, &crate::lora_linear(&gated, &tensor(&[8, 8]), None, &a, &b, options).unwrap());
    }
}
