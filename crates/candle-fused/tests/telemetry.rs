//! The path taken is counted. Alone in its binary, for the counts are the process's.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_fused::telemetry::{self, OpCount, Path};
use candle_fused::{
    DeviceKind, LoraLayout, LoraLinearOptions, RopeLayout, SoftmaxOptions, add, attention, cross_entropy,
    frozen_linear, fused_ops, gelu_mul, layer_norm, linear_cross_entropy, lora_delta, lora_linear, rms_norm,
    rope, silu_mul, softmax,
};

/// Calls every operation, and goes back through each.
fn call_all(device: &Device, dtype: DType) {
    let t = |dims: &[usize]| Var::ones(dims, dtype, device).unwrap();
    let x = t(&[2, 8]);
    let heads = t(&[1, 2, 2, 4]);
    let lora = LoraLinearOptions { scaling: 1.0, dropout: None };
    let results = [
        softmax(&x, SoftmaxOptions::default()),
        rms_norm(&x, None, 1e-6),
        layer_norm(&x, None, None, 1e-6),
        rope(&t(&[1, 1, 2, 8]), &t(&[2, 4]), &t(&[2, 4]), RopeLayout::Half),
        silu_mul(&x, &x),
        gelu_mul(&x, &x),
        cross_entropy(&x, &Tensor::new(&[0u32, 1], device).unwrap(), None),
        linear_cross_entropy(&x, &t(&[5, 8]), &Tensor::new(&[0u32, 1], device).unwrap(), None),
        attention(&heads, &heads, &heads, SoftmaxOptions::default()),
        add(&x, &x),
        lora_delta(&x, &t(&[3, 8]), &t(&[5, 3]), 1.0, LoraLayout::Peft),
        lora_linear(&x, &t(&[5, 8]), None, &t(&[3, 8]), &t(&[5, 3]), lora),
        frozen_linear(&x, &t(&[5, 8]), None),
    ];
    for y in results {
        y.unwrap().sum_all().unwrap().backward().unwrap();
    }
}

/// A backward has no other path: where its kernels do not run it is an error. On a GPU attention calls softmax, which
/// counts for itself.
#[test]
fn every_op_runs_fused_on_every_device_of_this_machine() {
    for device in common::devices() {
        let kind = DeviceKind::of(&device);
        let fused: Vec<_> = fused_ops(kind).collect();
        assert_eq!(fused.len(), 13, "{kind} has no kernels for some ops");
        for dtype in common::DTYPES {
            telemetry::reset();
            call_all(&device, dtype);
            call_all(&device, dtype);
            let counts = telemetry::snapshot();
            for OpCount { op, path, .. } in &counts {
                assert_eq!(*path == Path::Fused, fused.contains(op), "{op} on {kind}: {path:?}");
            }
            for &op in &fused {
                let of_op = |count: &&OpCount| count.op == op && count.device == kind && count.dtype == dtype;
                let count = counts.iter().find(of_op).map_or(0, |count| count.count);
                assert!(count == 2 || count > 2 && !device.is_cpu(), "{op} on {kind}: {count} times");
            }
        }
        println!("{kind}: {} ops, forward and backward, fused in {:?}", fused.len(), common::DTYPES);
    }
    telemetry::reset();
    assert!(telemetry::snapshot().is_empty());

    // A call with an error is not counted.
    rms_norm(&Tensor::ones(8, DType::F32, &Device::Cpu).unwrap(), None, f32::NAN).unwrap_err();
    assert!(telemetry::snapshot().is_empty());
}
