//! The kernel simulator in a GPU's place: the tests run every op's GPU path on CPU tensors, and any bug that the
//! simulator sees fails them.

use std::cell::Cell;
use std::sync::LazyLock;

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor};
use candlewick_kernels::{Plan, Role};
use kernel_simulator::Simulator;

use super::gpu::{Outputs, dtype};
use super::{Attempt, Place};
use crate::shared_tests::cases::{all_cases, frozen_linear_cases, lora_delta_cases, lora_linear_cases};
use crate::shared_tests::{Case, DTYPES, LAYOUTS, Lies};

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static ADDS_PRODUCTS: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread's CPU tensors are a GPU's.
pub(super) fn is_on() -> bool {
    ON.get()
}

/// Whether the simulated GPU's products add to what is there, as an NVIDIA GPU's do.
pub(super) fn adds_products() -> bool {
    is_on() && ADDS_PRODUCTS.get()
}

/// What such a GPU computes.
pub(super) fn product_onto(left: &Tensor, right: &Tensor, scale: f32, place: Place) -> Result<Tensor> {
    assert_eq!(left.dtype(), right.dtype());
    let [l, r] = [left, right].map(|factor| factor.to_dtype(DType::F32)?.contiguous());
    let product = (l?.matmul(&r?)? * f64::from(scale))?;
    match place {
        Place::Fresh(dtype) => product.to_dtype(dtype),
        Place::Onto(sum) => {
            assert!(sum.is_contiguous());
            (product + sum.to_dtype(DType::F32)?)?.to_dtype(sum.dtype())
        }
    }
}

/// [`simulate`], on a GPU whose products add to what is there.
fn simulate_with_products<R>(f: impl FnOnce() -> R) -> R {
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            ADDS_PRODUCTS.set(false);
        }
    }
    let _off = Off;
    ADDS_PRODUCTS.set(true);
    simulate(f)
}

/// Runs `f` with this thread's CPU tensors on a GPU.
pub(crate) fn simulate<R>(f: impl FnOnce() -> R) -> R {
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            ON.set(false);
        }
    }
    let _off = Off;
    ON.set(true);
    f()
}

/// Runs a plan on what its inputs hold from their offsets on. The outputs have these shapes; the first is left in the place of
/// `replaced`.
pub(super) fn run(
    plan: &Plan,
    inputs: &[&Tensor],
    shapes: &[&Shape],
    replaced: Option<&Tensor>,
) -> Attempt<Outputs> {
    static SIMULATOR: LazyLock<Simulator> = LazyLock::new(|| Simulator::new().unwrap());
    let inputs = plan.with_role(Role::Input).zip(inputs).map(|((_, buffer), input)| bytes(input, buffer.len));
    let inputs: Vec<Vec<u8>> = inputs.collect();
    let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    let run = SIMULATOR.run(plan, &inputs).unwrap();
    assert!(run.reports.is_empty(), "{run}");
    let outputs =
        plan.with_role(Role::Output).zip(shapes).zip(&run.outputs).map(|(((_, buffer), &shape), bytes)| {
            Tensor::from_raw_buffer(bytes, dtype(buffer.element), shape.dims(), &Device::Cpu)
        });
    let mut outputs = outputs.collect::<Result<Vec<_>>>()?;
    if let (Some(replaced), Some(first)) = (replaced, outputs.first_mut())
        && first.elem_count() > 0
    {
        replaced.slice_set(&first.reshape(replaced.shape())?, 0, 0)?;
        *first = replaced.reshape(first.shape())?;
    }
    Ok(Outputs::new(outputs))
}

/// `len` elements of a tensor's storage, from the tensor's first on.
fn bytes(tensor: &Tensor, len: usize) -> Vec<u8> {
    macro_rules! bytes {
        ($values:expr, $start:expr) => {
            $values[$start..$start + len].iter().flat_map(|value| value.to_le_bytes()).collect()
        };
    }
    if len == 0 {
        return Vec::new();
    }
    let (storage, layout) = tensor.storage_and_layout();
    let start = layout.start_offset();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => bytes!(values, start),
        Storage::Cpu(CpuStorage::F16(values)) => bytes!(values, start),
        Storage::Cpu(CpuStorage::BF16(values)) => bytes!(values, start),
        Storage::Cpu(CpuStorage::U32(values)) => bytes!(values, start),
        Storage::Cpu(CpuStorage::I64(values)) => bytes!(values, start),
        _ => unreachable!("an input of another kind"),
    }
}

/// Every op, forward and backward, in every dtype and layout, as a GPU would run it, by the error rule. Sizes are few:
/// those of the kernels have tests of their own.
#[test]
fn ops_on_a_simulated_gpu() {
    let run = |n, lies, dtypes: &[DType]| {
        for case in all_cases(n, lies) {
            for &dtype in dtypes {
                simulate(|| case.error_rule(dtype, &Device::Cpu));
            }
        }
    };
    for lies in LAYOUTS {
        run(33, lies, &[DType::F32]);
    }
    for n in [0, 1, 64] {
        run(n, Lies::Contiguous, &DTYPES);
    }
    run(40, Lies::Window, &[DType::BF16]);
}

fn linear_cases(n: usize, lies: Lies) -> Vec<Case> {
    [lora_delta_cases, lora_linear_cases, frozen_linear_cases]
        .iter()
        .flat_map(|cases| cases(n, lies))
        .collect()
}

/// LoRA by products that add to what is there, in every dtype and layout, by the error rule.
#[test]
fn linear_ops_by_products_that_add() {
    for lies in LAYOUTS {
        for (n, dtypes) in [(1, &DTYPES[..]), (33, &DTYPES), (0, &DTYPES[..1])] {
            for case in linear_cases(n, lies) {
                for &dtype in dtypes {
                    simulate_with_products(|| case.error_rule(dtype, &Device::Cpu));
                }
            }
        }
    }
    for case in linear_cases(6, Lies::Contiguous) {
        simulate_with_products(|| case.gradients_arrive(&Device::Cpu));
    }
}

/// As on a device, a gradient arrives exactly where an argument is tracked.
#[test]
fn gradients_arrive_from_a_simulated_gpu() {
    for case in all_cases(6, Lies::Contiguous) {
        simulate(|| case.gradients_arrive(&Device::Cpu));
    }
}

/// A GPU would have to be waited for to name the row.
#[test]
fn a_target_out_of_range_makes_the_loss_nan() {
    let x = Tensor::zeros((2, 8), DType::F32, &Device::Cpu).unwrap();
    for (target, valid) in [(7, true), (8, false), (-1, false), (-100, true)] {
        let targets = Tensor::new(&[0i64, target], &Device::Cpu).unwrap();
        let loss = simulate(|| crate::cross_entropy(&x, &targets, Some(-100)).unwrap());
        assert_eq!(loss.to_scalar::<f32>().unwrap().is_finite(), valid, "{target}");
    }
}
