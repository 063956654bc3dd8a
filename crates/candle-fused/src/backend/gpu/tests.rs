//! What an executor is asked to do, recorded by one that does nothing. The tensors are the processor's.

use std::cell::RefCell;
use std::collections::HashSet;

use candlewick_kernels::PlanError;
use candlewick_kernels::lora::{FactorStrides, Lora, LoraGradients};
use candlewick_kernels::ops;
use candlewick_kernels::rms_norm::{RmsNorm, RmsNormGradients};

use super::*;
use crate::backend::Failure;

/// A device that allows some kernels fewer threads than others, or refuses one.
#[derive(Default)]
struct Recorder {
    limit: Option<(&'static str, u32)>,
    refused: Option<&'static str>,
    asked: RefCell<Vec<(&'static str, u32)>>,
    dispatched: RefCell<Vec<Dispatched>>,
    prepared: Prepared<Ready<(&'static str, u32)>>,
}

struct Dispatched {
    launch: Launch,
    bound: Vec<Bound>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Bound {
    /// The address of the storage.
    storage: usize,
    offset: usize,
    writes: bool,
}

impl Executor for Recorder {
    type Pipeline = (&'static str, u32);

    fn pipeline(&self, launch: &Launch) -> std::result::Result<Self::Pipeline, DeviceError> {
        assert!(self.dispatched.borrow().is_empty(), "compiled after a dispatch");
        self.asked.borrow_mut().push((launch.kernel, launch.threads));
        if self.refused == Some(launch.kernel) {
            return Err(refusal());
        }
        let limit = self.limit.filter(|(kernel, _)| *kernel == launch.kernel);
        Ok((launch.kernel, limit.map_or(1024, |(_, threads)| threads)))
    }

    fn max_threads(pipeline: &Self::Pipeline) -> u32 {
        pipeline.1
    }

    fn prepared(&self) -> &Prepared<Ready<Self::Pipeline>> {
        &self.prepared
    }

    fn dispatch(&self, launches: &[(Launch, Self::Pipeline)], buffers: &[Argument]) -> Result<()> {
        for (launch, pipeline) in launches {
            assert_eq!(pipeline.0, launch.kernel, "another kernel's pipeline");
            assert!(launch.threads <= pipeline.1);
            let bound = launch.arguments.iter().map(|&index| &buffers[index]).map(|argument| Bound {
                storage: storage_address(argument.tensor),
                offset: argument.offset,
                writes: argument.writes,
            });
            self.dispatched.borrow_mut().push(Dispatched { launch: launch.clone(), bound: bound.collect() });
        }
        Ok(())
    }
}

fn refusal() -> DeviceError {
    DeviceError::Compilation { name: "column_sum".into(), log: "line 7".into() }
}

fn storage_address(tensor: &Tensor) -> usize {
    use candle_core::{CpuStorage, Storage};
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(CpuStorage::F32(values)) => values.as_ptr().addr(),
        Storage::Cpu(CpuStorage::F16(values)) => values.as_ptr().addr(),
        Storage::Cpu(CpuStorage::BF16(values)) => values.as_ptr().addr(),
        Storage::Cpu(CpuStorage::I64(values)) => values.as_ptr().addr(),
        Storage::Cpu(CpuStorage::U32(values)) => values.as_ptr().addr(),
        Storage::Cpu(CpuStorage::U8(values)) => values.as_ptr().addr(),
        _ => unreachable!("a storage of the kernels"),
    }
}

fn tensor(shape: impl Into<Shape>, dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

type Planned = std::result::Result<Plan, PlanError>;

#[expect(clippy::needless_pass_by_value, reason = "as closures are passed")]
fn record(
    recorder: &Recorder,
    inputs: &[&Tensor],
    in_place: bool,
    shapes: &[&Shape],
    recipe: impl Recipe,
) -> Attempt<Vec<Tensor>> {
    let replaced = inputs.last().copied().filter(|_| in_place);
    Work { inputs, replaced, shapes, recipe: &recipe }.on(recorder).map(|outputs| outputs.0.collect())
}

const NORM: RmsNorm = RmsNorm { rows: 300, columns: 1024, storage: Storage::F32, weight: true, eps: 1e-6 };

fn norm_backward(tuning: Tuning) -> Planned {
    NORM.backward(RmsNormGradients { x: true, weight: true }, tuning)
}

/// x, grad and weight of [`NORM`], and the shapes of the gradients.
fn norm_tensors() -> ([Tensor; 3], [Shape; 2]) {
    let x = tensor((300, 1024), DType::F32);
    ([x.copy().unwrap(), x, tensor(1024, DType::F32)], [Shape::from((300, 1024)), Shape::from(1024)])
}

/// What a caller reads, but for Candle's backtrace below it.
fn message<T>(attempt: Attempt<T>) -> String {
    match attempt {
        Ok(_) => "ran".into(),
        Err(failure) => {
            candle_core::Error::from(failure).to_string().lines().next().unwrap_or_default().into()
        }
    }
}

#[test]
fn launches_are_the_plans_and_arguments_are_in_their_order() {
    let ([x, grad, weight], [x_shape, weight_shape]) = norm_tensors();
    let recorder = Recorder::default();
    let outputs =
        record(&recorder, &[&x, &grad, &weight], false, &[&x_shape, &weight_shape], norm_backward).unwrap();
    let [grad_x, grad_weight] = outputs.try_into().unwrap();
    assert_eq!([grad_x.shape(), grad_weight.shape()], [&x_shape, &weight_shape]);

    let dispatched = recorder.dispatched.take();
    let launches: Vec<_> = dispatched.iter().map(|dispatched| dispatched.launch.clone()).collect();
    // Threadgroups, threads and the bytes of the parameters among it.
    assert_eq!(launches, norm_backward(Tuning::default()).unwrap().launches);

    let [backward, sum] = dispatched.try_into().ok().unwrap();
    let read = |tensor| Bound { storage: storage_address(tensor), offset: 0, writes: false };
    let written = |tensor| Bound { writes: true, ..read(tensor) };
    // The kernel takes x, weight, grad, grad_x and the partial sums.
    let partial = backward.bound[4];
    assert_eq!(backward.bound, [read(&x), read(&weight), read(&grad), written(&grad_x), partial]);
    // The kernel of two sums, the second of which nobody computes.
    let pair = [partial, written(&grad_weight)];
    assert_eq!(sum.bound, [pair, pair].concat());
    // Declared as written where it is read, too: that is what orders the two launches.
    assert!(partial.writes);
    let all = [&x, &grad, &weight, &grad_x, &grad_weight].map(storage_address);
    assert!(!all.contains(&partial.storage));
}

#[test]
fn a_view_is_bound_at_its_offset_which_decides_the_width() {
    let vector = |tuning| NORM.forward(tuning).unwrap().launches[0].defines.clone();
    let [wide, narrow] = [true, false].map(|aligned| vector(Tuning { aligned, ..Tuning::default() }));
    assert_ne!(wide, narrow);
    let weight = tensor(1024, DType::F32);
    for (dtype, storage, rows, expected_offset, aligned) in [
        (DType::F32, Storage::F32, 0, 0, true),
        (DType::F32, Storage::F32, 1, 5 * 4, false),
        (DType::F32, Storage::F32, 4, 20 * 4, true),
        (DType::F16, Storage::F16, 4, 20 * 2, false),
        (DType::BF16, Storage::BF16, 8, 40 * 2, true),
    ] {
        let op = RmsNorm { rows: 6, columns: 5, storage, weight: false, eps: 0.0 };
        let x = tensor((16, 5), dtype).narrow(0, rows, 6).unwrap();
        let recorder = Recorder::default();
        let outputs = record(&recorder, &[&x], false, &[x.shape()], |tuning: Tuning| {
            assert_eq!(tuning.aligned, aligned, "{dtype:?} from row {rows}");
            op.forward(tuning)
        });
        let outputs = outputs.unwrap();
        let dispatched = recorder.dispatched.take();
        let x_bound = Bound { storage: storage_address(&x), offset: expected_offset, writes: false };
        // x stands in the absent weight's place.
        let y_bound = Bound { storage: storage_address(&outputs[0]), offset: 0, writes: true };
        assert_eq!(dispatched[0].bound, [x_bound, x_bound, y_bound]);
    }
    // One argument off is enough.
    let recorder = Recorder::default();
    let x = tensor((300, 1024), DType::F32);
    let weight = Tensor::cat(&[&weight, &weight], 0).unwrap().narrow(0, 1, 1024).unwrap();
    record(&recorder, &[&x, &weight], false, &[x.shape()], |tuning| NORM.forward(tuning)).unwrap();
    assert_eq!(recorder.dispatched.take()[0].launch.defines, narrow);
}

#[test]
fn strides_reach_the_kernel_and_the_buffer_reaches_the_last_element() {
    // A factor given as a transposed view is read where it lies.
    let op = Lora {
        rows: 3,
        inputs: 40,
        outputs: 24,
        rank: 4,
        storage: Storage::F32,
        adapter: Storage::F32,
        a: FactorStrides { rank: 1, column: 6 },
        b: FactorStrides::rank_major(24),
        scaling: 0.5,
        dropout: None,
        base: false,
    };
    let (x, b) = (tensor((3, 40), DType::F32), tensor((4, 24), DType::F32));
    let a = tensor((40, 6), DType::F32).narrow(1, 2, 4).unwrap().t().unwrap();
    assert_eq!((a.stride(), reach(&a)), (&[1, 6][..], 39 * 6 + 4));
    let recorder = Recorder::default();
    let shape = Shape::from((3, 24));
    record(&recorder, &[&x, &a, &b], false, &[&shape], |tuning| op.forward(tuning)).unwrap();
    let [update] = recorder.dispatched.take().try_into().ok().unwrap();
    assert_eq!((update.bound[1].storage, update.bound[1].offset), (storage_address(&a), 2 * 4));
    let words: Vec<u32> =
        update.launch.params.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
    // rows, inputs, outputs, a's and b's strides along ranks and columns, the scaling; without dropout the rest is idle.
    assert_eq!(words[..8], [3, 40, 24, 1, 6, 24, 1, 0.5f32.to_bits()]);
}

/// Rows in another order, of every width and dtype, some with an offset; what no kernel serves is left to Candle.
#[test]
fn copies_are_those_of_candle() {
    for (columns, dtype) in [(8, DType::F32), (7, DType::F32), (16, DType::BF16), (9, DType::F16)] {
        let x = Tensor::randn(0f32, 1.0, (3, 4, 5, columns), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let turned = x.transpose(1, 2).unwrap();
        let views = [
            (turned.clone(), true),
            (turned.narrow(0, 1, 2).unwrap(), true),
            (x.narrow(3, 1, columns - 1).unwrap(), true),
            (x.narrow(2, 2, 3).unwrap(), true),
            (x.get(1).unwrap().transpose(0, 1).unwrap(), true),
            (x.transpose(2, 3).unwrap(), false),
        ];
        for (view, by_kernel) in views {
            assert_eq!(Rows::of(&view).unwrap().is_some(), by_kernel, "{:?}", view.layout());
            let copy = crate::backend::simulate(|| contiguous(&view).unwrap());
            assert!(copy.is_contiguous() && copy.dims() == view.dims());
            let values = |x: &Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>();
            assert_eq!(values(&copy).unwrap(), values(&view).unwrap(), "{:?}", view.layout());
        }
    }
}

#[test]
fn a_kernel_that_allows_fewer_threads_is_planned_again() {
    let ([x, grad, weight], [x_shape, weight_shape]) = norm_tensors();
    let run = |recorder: &Recorder| {
        record(recorder, &[&x, &grad, &weight], false, &[&x_shape, &weight_shape], norm_backward)
    };
    let threads = |recorder: &Recorder| -> Vec<u32> {
        recorder.dispatched.borrow().iter().map(|dispatched| dispatched.launch.threads).collect()
    };
    let free = Recorder::default();
    run(&free).unwrap();
    let [backward, sum] = threads(&free).try_into().unwrap();
    for (kernel, planned, limit) in [("rms_norm_backward", backward, 33), ("column_sum", sum, 97)] {
        assert!(planned > limit, "nothing to cut: {kernel} has {planned} threads");
        let tight = Recorder { limit: Some((kernel, limit)), ..Recorder::default() };
        run(&tight).unwrap();
        assert!(threads(&tight).iter().all(|&threads| threads <= limit), "{:?}", threads(&tight));
        // Both kernels, once as planned first and once again.
        assert_eq!(tight.asked.borrow().len(), 4, "{:?}", tight.asked);
        let again = norm_backward(Tuning { max_threads: limit, ..Tuning::default() }).unwrap();
        let launches: Vec<_> =
            tight.dispatched.take().into_iter().map(|dispatched| dispatched.launch).collect();
        assert_eq!(launches, again.launches);
    }

    // Less than a simdgroup is no threadgroup.
    let hopeless = Recorder { limit: Some(("column_sum", 31)), ..Recorder::default() };
    let attempt = run(&hopeless);
    assert!(matches!(attempt, Err(Failure::Device(DeviceError::Unsupported { .. }))));
    assert_eq!(
        message(attempt),
        "the device does not support a threadgroup of the 31 threads that the kernel allows"
    );
    assert!(hopeless.dispatched.borrow().is_empty());
}

#[test]
fn a_refused_kernel_stops_the_plan_before_its_first_launch() {
    let ([x, grad, weight], [x_shape, weight_shape]) = norm_tensors();
    let recorder = Recorder { refused: Some("column_sum"), ..Recorder::default() };
    let attempt = record(&recorder, &[&x, &grad, &weight], false, &[&x_shape, &weight_shape], norm_backward);
    assert!(matches!(&attempt, Err(Failure::Device(error)) if *error == refusal()));
    assert_eq!(message(attempt), "compiling the kernel \"column_sum\" failed: line 7");
    assert!(recorder.dispatched.borrow().is_empty());
}

#[test]
fn a_result_takes_the_place_of_the_last_input() {
    let (rows, inputs, outputs, rank) = (70, 40, 24, 4);
    let op = Lora {
        rows,
        inputs,
        outputs,
        rank,
        storage: Storage::F16,
        adapter: Storage::F32,
        a: FactorStrides::rank_major(inputs),
        b: FactorStrides::column_major(rank),
        scaling: 2.0,
        dropout: None,
        base: true,
    };
    let (x, grad) = (tensor((rows, inputs), DType::F16), tensor((rows, outputs), DType::F16));
    let (a, b) = (tensor((rank, inputs), DType::F32), tensor((outputs, rank), DType::F32));

    let base = tensor((rows, outputs), DType::F16);
    let shape = Shape::from((2, 35, outputs));
    let recorder = Recorder::default();
    let y = record(&recorder, &[&x, &a, &b, &base], true, &[&shape], |tuning| op.forward(tuning)).unwrap();
    assert_eq!((y[0].shape(), storage_address(&y[0])), (&shape, storage_address(&base)));
    let [update] = recorder.dispatched.take().try_into().ok().unwrap();
    let place = Bound { storage: storage_address(&base), offset: 0, writes: false };
    assert_eq!(update.bound[3..5], [place, Bound { writes: true, ..place }]);

    // Of several results the first one alone.
    let base = tensor((rows, inputs), DType::F16);
    let shapes = [Shape::from((rows, inputs)), Shape::from((rank, inputs)), Shape::from((outputs, rank))];
    let wanted = LoraGradients { x: true, a: true, b: true };
    let gradients = record(&recorder, &[&x, &a, &b, &grad, &base], true, &shapes.each_ref(), |tuning| {
        op.backward(wanted, tuning)
    });
    let places: Vec<_> = gradients.unwrap().iter().map(storage_address).collect();
    assert_eq!(places[0], storage_address(&base));
    let others = [&x, &a, &b, &grad, &base].map(storage_address);
    assert!(places[1..].iter().all(|place| !others.contains(place)));
    for dispatched in recorder.dispatched.take() {
        for bound in dispatched.bound.iter().filter(|bound| bound.writes) {
            assert!(bound.storage == places[0] || !others.contains(&bound.storage), "an input is written");
        }
    }
}

#[test]
fn tensors_that_are_not_the_plans_are_refused() {
    let (x, weight) = (tensor((300, 1024), DType::F32), tensor(1024, DType::F32));
    let short = tensor((299, 1024), DType::F32);
    let half = x.to_dtype(DType::F16).unwrap();
    let (shape, other) = (x.shape().clone(), Shape::from((300, 1023)));
    let attempt = |inputs: &[&Tensor], shapes: &[&Shape]| {
        let recorder = Recorder::default();
        let message = message(record(&recorder, inputs, false, shapes, |tuning| NORM.forward(tuning)));
        assert_eq!(recorder.dispatched.borrow().is_empty(), message != "ran");
        message
    };
    assert_eq!(attempt(&[&x, &weight], &[&shape]), "ran");
    for (inputs, shapes, expected) in [
        (&[&short, &weight][..], &[&shape][..], "x must hold 307200 elements of f32, got 306176 of f32"),
        (&[&half, &weight], &[&shape], "x must hold 307200 elements of f32, got 307200 of f16"),
        (&[&x], &[&shape], "weight has no tensor"),
        (&[&x, &weight, &weight], &[&shape], "the plan has 3 buffers, fewer than its tensors"),
        (&[&x, &weight], &[&other], "y has no shape of 307200 elements"),
        (&[&x, &weight], &[], "y has no shape of 307200 elements"),
        (&[&x, &weight], &[&shape, &shape], "the plan has 3 buffers, fewer than its tensors"),
        (&[], &[&shape], "a plan has at least one input"),
    ] {
        assert_eq!(attempt(inputs, shapes), expected);
    }
}

#[test]
fn a_plan_that_breaks_a_limit_or_cannot_be_made_is_refused() {
    let x = tensor((300, 1024), DType::F32);
    let weight = tensor(1024, DType::F32);
    let attempt = |plan: &dyn Fn(Tuning) -> Planned| {
        let recorder = Recorder::default();
        let message = message(record(&recorder, &[&x, &weight], false, &[x.shape()], plan));
        assert!(recorder.asked.borrow().is_empty(), "compiled");
        message
    };
    let oversized = attempt(&|tuning| {
        let mut plan = NORM.forward(tuning)?;
        plan.launches[0].threads = 2048;
        Ok(plan)
    });
    assert_eq!(oversized, "rms_norm: threads must be a multiple of 32 in 32..=1024, got 2048");
    let huge = RmsNorm { rows: usize::MAX, ..NORM };
    assert!(attempt(&|tuning| huge.forward(tuning)).starts_with("rms_norm: x must be below 2^64"));
}

#[test]
fn nothing_is_launched_for_nothing() {
    let x = tensor((0, 1024), DType::F32);
    let recorder = Recorder::default();
    let op = RmsNorm { rows: 0, weight: false, ..NORM };
    let y = record(&recorder, &[&x], false, &[x.shape()], |tuning| op.forward(tuning)).unwrap();
    assert_eq!(y[0].dims(), [0, 1024]);
    assert!(recorder.asked.borrow().is_empty() && recorder.dispatched.borrow().is_empty());
}

/// Candle's rule for its concurrent Metal encoder (`ComputeCommandEncoder::auto_barrier`): what a launch bound since
/// the last barrier, and what of it was declared as written.
#[derive(Default)]
struct Hazards {
    inputs: HashSet<usize>,
    outputs: HashSet<usize>,
}

impl Hazards {
    /// Whether a barrier is set before a launch that binds these.
    fn barrier(&mut self, bound: &[Bound]) -> bool {
        let clash = |bound: &Bound| {
            self.outputs.contains(&bound.storage) || (bound.writes && self.inputs.contains(&bound.storage))
        };
        let barrier = bound.iter().any(clash);
        if barrier {
            *self = Self::default();
        }
        for bound in bound {
            let set = if bound.writes { &mut self.outputs } else { &mut self.inputs };
            set.insert(bound.storage);
        }
        barrier
    }
}

/// For every op: a launch that binds what an earlier one of its plan wrote is behind a barrier after that one.
#[test]
fn launches_that_share_a_written_buffer_are_in_order_on_a_concurrent_encoder() {
    let mut ordered = 0;
    for plan in ops().iter().flat_map(|op| op.sample_plans(Storage::F32).unwrap()) {
        let of_role = |role| plan.with_role(role).map(|(_, buffer)| buffer);
        let inputs: Vec<Tensor> =
            of_role(Role::Input).map(|buffer| tensor(buffer.len, dtype(buffer.element))).collect();
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let shapes: Vec<Shape> = of_role(Role::Output).map(|buffer| Shape::from(buffer.len)).collect();
        let shapes: Vec<&Shape> = shapes.iter().collect();
        let recorder = Recorder::default();
        record(&recorder, &inputs, false, &shapes, |_| Ok(plan.clone())).unwrap();

        let (mut hazards, mut barriers, mut written) = (Hazards::default(), 0, Vec::new());
        for (dispatched, launch) in recorder.dispatched.take().iter().zip(&plan.launches) {
            barriers += u32::from(hazards.barrier(&dispatched.bound));
            let earlier = written.len();
            for (&buffer, bound) in launch.arguments.iter().zip(&dispatched.bound) {
                if plan.buffers[buffer].role == Role::Input {
                    continue;
                }
                for &(storage, before, kernel) in &written[..earlier] {
                    if storage == bound.storage {
                        assert!(before < barriers, "{} and {kernel} overlap", launch.kernel);
                        ordered += 1;
                    }
                }
                written.push((bound.storage, barriers, launch.kernel));
            }
        }
    }
    assert!(ordered > 0);
}

#[test]
fn a_kept_plan_is_made_once_and_bound_to_what_each_call_has() {
    let recorder = Recorder::default();
    let run = |x: &Tensor, eps: f32| {
        let op = RmsNorm { rows: 6, columns: 8, weight: false, eps, ..NORM };
        let y = record(&recorder, &[x], false, &[x.shape()], kept(op, RmsNorm::forward)).unwrap();
        let [dispatched] = recorder.dispatched.take().try_into().ok().unwrap();
        let words = dispatched.launch.params.as_chunks::<4>().0;
        assert_eq!(words[3], eps.to_le_bytes());
        let bound = |tensor, offset, writes| Bound { storage: storage_address(tensor), offset, writes };
        let offset = x.layout().start_offset() * 4;
        assert_eq!(dispatched.bound[1..], [bound(x, offset, false), bound(&y[0], 0, true)]);
        (recorder.asked.take().len(), dispatched.launch.defines)
    };
    let (x, rows) = (tensor((6, 8), DType::F32), tensor((9, 8), DType::F32).narrow(0, 1, 6).unwrap());
    let odd = tensor(6 * 8 + 1, DType::F32).narrow(0, 1, 48).unwrap().reshape((6, 8)).unwrap();
    let [(1, wide), (1, _), (1, narrow)] = [run(&x, 1e-6), run(&x, 1e-5), run(&odd, 1e-6)] else {
        panic!("each was prepared")
    };
    assert_ne!(wide, narrow);
    for (x, defines) in [(&x, &wide), (&rows, &wide), (&odd, &narrow), (&x, &wide)] {
        assert_eq!(run(x, 1e-6), (0, defines.clone()));
    }
    // What is kept is checked as what is made.
    let half = x.to_dtype(DType::F16).unwrap();
    let op = RmsNorm { rows: 6, columns: 8, weight: false, eps: 1e-6, ..NORM };
    let attempt = record(&recorder, &[&half], false, &[half.shape()], kept(op, RmsNorm::forward));
    assert_eq!(message(attempt), "x must hold 48 elements of f32, got 48 of f16");
}

#[test]
fn scratch_is_one_allocation_of_parts_that_do_not_overlap() {
    let op = Lora {
        rows: 33,
        inputs: 40,
        outputs: 24,
        rank: 4,
        storage: Storage::F32,
        adapter: Storage::F32,
        a: FactorStrides::rank_major(40),
        b: FactorStrides::column_major(4),
        scaling: 2.0,
        dropout: None,
        base: false,
    };
    let wanted = LoraGradients { x: true, a: true, b: true };
    let plan = op.backward(wanted, Tuning::default()).unwrap();
    let tensors = plan.with_role(Role::Input).map(|(_, buffer)| tensor(buffer.len, dtype(buffer.element)));
    let (tensors, shapes): (Vec<Tensor>, Vec<Shape>) = (
        tensors.collect(),
        plan.with_role(Role::Output).map(|(_, buffer)| Shape::from(buffer.len)).collect(),
    );
    let recorder = Recorder::default();
    let (inputs, shapes): (Vec<_>, Vec<_>) = (tensors.iter().collect(), shapes.iter().collect());
    record(&recorder, &inputs, false, &shapes, |tuning| op.backward(wanted, tuning)).unwrap();
    let mut parts: Vec<(usize, usize, usize)> = Vec::new();
    for (dispatched, launch) in recorder.dispatched.take().iter().zip(&plan.launches) {
        for (bound, &index) in dispatched.bound.iter().zip(&launch.arguments) {
            if plan.buffers[index].role == Role::Scratch {
                assert!(bound.writes && bound.offset.is_multiple_of(SCRATCH_ALIGNMENT));
                parts.push((bound.storage, bound.offset, plan.buffers[index].bytes()));
            }
        }
    }
    parts.sort_unstable();
    parts.dedup();
    assert_eq!(parts.len(), plan.with_role(Role::Scratch).count());
    assert!(parts.len() > 2);
    for pair in parts.windows(2) {
        assert!(pair[0].0 == pair[1].0 && pair[0].1 + pair[0].2 <= pair[1].1, "{pair:?}");
    }
}
