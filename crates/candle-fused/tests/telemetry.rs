//! The path taken is counted. Alone in its binary, for the counts are the process's.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_fused::telemetry::{self, OpCount, Path};
use candle_fused::{
    DeviceKind, LoraLayout, LoraLinearOptions, RopeLayout, SoftmaxOptions, cross_entropy, frozen_linear,
    fused_ops, gelu_mul, layer_norm, lora_delta, lora_linear, rms_norm, rope, silu_mul, softmax,
};

/// Calls every operation, and goes back through each.
fn call_all(device: &Device, dtype: DType) {
    let t = |dims: &[usize]| Var::ones(dims, dtype, device).unwrap();
    let x = t(&[2, 8]);
    let lora = LoraLinearOptions { scaling: 1.0, dropout: None };
    let results = [
        softmax(&x, SoftmaxOptions::default()),
        rms_norm(&x, None, 1e-6),
        layer_norm(&x, None, None, 1e-6),
        rope(&t(&[1, 1, 2, 8]), &t(&[2, 4]), &t(&[2, 4]), RopeLayout::Half),
        silu_mul(&x, &x),
        gelu_mul(&x, &x),
        cross_entropy(&x, &Tensor::new(&[0u32, 1], device).unwrap(), None),
        lora_delta(&x, &t(&[3, 8]), &t(&[5, 3]), 1.0, LoraLayout::Peft),
        lora_linear(&x, &t(&[5, 8]), None, &t(&[3, 8]), &t(&[5, 3]), lora),
        frozen_linear(&x, &t(&[5, 8]), None),
    ];
    for y in results {
        y.unwrap().sum_all().unwrap().backward().unwrap();
    }
}

/// A backward has no other path: where its kernels do not run it is an error.
#[test]
fn every_op_runs_fused_on_every_device_of_this_machine() {
    let expected = |kind: DeviceKind, dtype, count| -> Vec<OpCount> {
        let fused = |op| OpCount { op, device: kind, dtype, path: Path::Fused, count };
        let mut expected: Vec<_> = fused_ops(kind).map(fused).collect();
        expected.sort_by_key(|count| count.op);
        expected
    };
    for device in common::devices() {
        let kind = DeviceKind::of(&device);
        for dtype in common::DTYPES {
            telemetry::reset();
            call_all(&device, dtype);
            call_all(&device, dtype);
            assert_eq!(expected(kind, dtype, 2).len(), 10, "{kind} has no kernels for some ops");
            assert_eq!(telemetry::snapshot(), expected(kind, dtype, 2));
        }
        println!("{kind}: 10 ops, forward and backward, fused in {:?}", common::DTYPES);
    }
    telemetry::reset();
    assert!(telemetry::snapshot().is_empty());

    // A call with an error is not counted.
    rms_norm(&Tensor::ones(8, DType::F32, &Device::Cpu).unwrap(), None, f32::NAN).unwrap_err();
    assert!(telemetry::snapshot().is_empty());
}
