//! The path taken is counted. Alone in its binary, for the counts are the process's.

use candle_core::{DType, Device, Tensor};
use candle_fused::telemetry::{self, OpCount, Path};
use candle_fused::{
    DeviceKind, LoraLayout, LoraLinearOptions, RopeLayout, SoftmaxOptions, add, attention, cross_entropy,
    frozen_linear, fused_ops, gelu_mul, layer_norm, linear_cross_entropy, lora_delta, lora_linear, rms_norm,
    rope, silu_mul, softmax,
};

#[test]
fn every_operation_runs_fused_on_the_cpu_and_is_counted() {
    let device = &Device::Cpu;
    let t = |dims: &[usize]| Tensor::ones(dims, DType::BF16, device).unwrap();
    let x = t(&[2, 8]);
    let heads = t(&[1, 2, 2, 4]);
    let lora = LoraLinearOptions { scaling: 1.0, dropout: None };
    telemetry::reset();
    for _ in 0..2 {
        softmax(&x, SoftmaxOptions::default()).unwrap();
        rms_norm(&x, None, 1e-6).unwrap();
        layer_norm(&x, None, None, 1e-6).unwrap();
        rope(&t(&[1, 1, 2, 8]), &t(&[2, 4]), &t(&[2, 4]), RopeLayout::Half).unwrap();
        silu_mul(&x, &x).unwrap();
        gelu_mul(&x, &x).unwrap();
        cross_entropy(&x, &Tensor::new(&[0u32, 1], device).unwrap(), None).unwrap();
        linear_cross_entropy(&x, &t(&[5, 8]), &Tensor::new(&[0u32, 1], device).unwrap(), None).unwrap();
        attention(&heads, &heads, &heads, SoftmaxOptions::default()).unwrap();
        add(&x, &x).unwrap();
        lora_delta(&x, &t(&[3, 8]), &t(&[5, 3]), 1.0, LoraLayout::Peft).unwrap();
        lora_linear(&x, &t(&[5, 8]), None, &t(&[3, 8]), &t(&[5, 3]), lora).unwrap();
        frozen_linear(&x, &t(&[5, 8]), None).unwrap();
    }
    // A call with an error is not counted.
    rms_norm(&x, None, f32::NAN).unwrap_err();

    let mut expected: Vec<OpCount> = fused_ops(DeviceKind::Cpu)
        .map(|op| OpCount { op, device: DeviceKind::Cpu, dtype: DType::BF16, path: Path::Fused, count: 2 })
        .collect();
    expected.sort_by_key(|count| count.op);
    assert_eq!(expected.len(), 13);
    assert_eq!(telemetry::snapshot(), expected);

    telemetry::reset();
    assert!(telemetry::snapshot().is_empty());
}
