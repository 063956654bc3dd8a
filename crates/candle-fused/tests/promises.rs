//! What the operations promise beside their values: rows that are not finite, constants without gradients, messages.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
#![expect(clippy::float_cmp, clippy::cast_precision_loss, reason = "exact results; small integers")]

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused::{
    CustomMetalOps, Dropout, LoraLayout, LoraLinearOptions, Mask, RopeLayout, SoftmaxOptions, TrainingError,
    cross_entropy, frozen_linear, layer_norm, lora_delta, lora_linear, ops, rms_norm, rope, silu_mul,
    softmax,
};
use common::{devices, values, with_less_instructions};

const INF: f32 = f32::INFINITY;

fn tensor(dims: &[usize], seed: u64, device: &Device) -> Tensor {
    let values = values(dims.iter().product(), seed);
    Tensor::from_vec(values, dims, &Device::Cpu)
        .unwrap()
        .to_dtype(DType::F32)
        .unwrap()
        .to_device(device)
        .unwrap()
}

fn var(dims: &[usize], seed: u64, device: &Device) -> Var {
    Var::from_tensor(&tensor(dims, seed, device)).unwrap()
}

/// Four rows of 40: one plain, one all `-inf`, one with a NaN, one plain.
fn odd_rows(device: &Device) -> Var {
    let mut rows = tensor(&[4, 40], 1, &Device::Cpu).to_vec2::<f32>().unwrap();
    rows[1].fill(-INF);
    rows[2][17] = f32::NAN;
    Var::from_tensor(&Tensor::new(rows, device).unwrap()).unwrap()
}

fn rows(t: &Tensor) -> Vec<Vec<f32>> {
    t.to_vec2().unwrap()
}

fn all_nan(row: &[f32]) -> bool {
    row.iter().all(|x| x.is_nan())
}

fn all_finite(row: &[f32]) -> bool {
    row.iter().all(|x| x.is_finite())
}

/// Both the result and the gradient of `y` with respect to `x`, by rows.
fn both(y: &Tensor, x: &Var) -> [Vec<Vec<f32>>; 2] {
    let gradients = (y * tensor(y.dims(), 5, y.device())).unwrap().sum_all().unwrap().backward().unwrap();
    [rows(y), rows(gradients.get(x).unwrap())]
}

#[test]
fn softmax_and_norms_spoil_an_odd_row_alone() {
    for device in devices() {
        let x = odd_rows(&device);
        let results = [
            softmax(&x, SoftmaxOptions::default()),
            rms_norm(&x, None, 1e-6),
            layer_norm(&x, None, None, 1e-6),
        ];
        for y in results {
            for rows in both(&y.unwrap(), &x) {
                assert!(all_finite(&rows[0]) && all_finite(&rows[3]));
                assert!(all_nan(&rows[1]) && all_nan(&rows[2]));
            }
        }
    }
}

#[test]
fn what_the_causal_mask_hides_is_not_read() {
    for device in devices() {
        let mut values = tensor(&[3, 5], 1, &Device::Cpu).to_vec2::<f32>().unwrap();
        values[0][3] = f32::NAN;
        values[1][4] = INF;
        let x = Var::from_tensor(&Tensor::new(values, &device).unwrap()).unwrap();
        let [y, dx] =
            both(&softmax(&x, SoftmaxOptions { mask: Mask::Causal, ..Default::default() }).unwrap(), &x);
        for rows in [&y, &dx] {
            assert!(rows.iter().all(|row| all_finite(row)));
            assert_eq!([rows[0][3], rows[0][4], rows[1][4]], [0.0; 3]);
        }
        for row in y {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }
}

#[test]
fn rope_and_silu_mul_spoil_what_depends_on_a_nan_alone() {
    for device in devices() {
        let x = odd_rows(&device);
        let [y, dx] = both(&silu_mul(&x, &x).unwrap(), &x);
        for rows in [y, dx] {
            assert!(all_finite(&rows[0]) && all_nan(&rows[1]) && all_finite(&rows[3]));
            assert_eq!(rows[2].iter().filter(|x| x.is_nan()).count(), 1);
        }
        let table = tensor(&[4, 20], 2, &device);
        let y = rope(&x.reshape((1, 1, 4, 40)).unwrap(), &table, &table, RopeLayout::Half).unwrap();
        let y = rows(&y.reshape((4, 40)).unwrap());
        let spoilt: Vec<usize> = (0..40).filter(|&i| y[2][i].is_nan()).collect();
        assert_eq!(spoilt, [17, 37]);
    }
}

#[test]
fn cross_entropy_counts_only_what_counts() {
    for device in devices() {
        let x = odd_rows(&device);
        let loss = |targets: &[i64]| {
            let targets = Tensor::new(targets, &device).unwrap();
            let loss = cross_entropy(&x, &targets, Some(-100)).unwrap();
            let gradients = loss.backward().unwrap();
            (loss.to_scalar::<f32>().unwrap(), rows(gradients.get(&x).unwrap()))
        };
        let (plain, gradient) = loss(&[3, -100, -100, 39]);
        assert!(plain.is_finite());
        assert!(all_finite(&gradient[0]) && all_finite(&gradient[3]));
        assert_eq!([&gradient[1], &gradient[2]], [&vec![0.0; 40]; 2]);

        let (none, gradient) = loss(&[-100; 4]);
        assert_eq!(none, 0.0);
        assert_eq!(gradient, vec![vec![0.0; 40]; 4]);

        for odd in [[3, 0, -100, 39], [3, -100, 0, 39]] {
            let (loss, gradient) = loss(&odd);
            assert!(loss.is_nan());
            assert!(all_finite(&gradient[0]) && all_finite(&gradient[3]));
        }
    }
}

/// The processor names the row; a GPU is not waited for.
#[test]
fn a_target_out_of_range_is_an_error_or_makes_the_loss_nan() {
    for device in devices() {
        let x = tensor(&[2, 8], 1, &device);
        for target in [8, -1] {
            let targets = Tensor::new(&[0i64, target], &device).unwrap();
            match cross_entropy(&x, &targets, Some(-100)) {
                Err(_) => assert!(device.is_cpu()),
                Ok(loss) => assert!(!device.is_cpu() && loss.to_scalar::<f32>().unwrap().is_nan()),
            }
        }
    }
}

#[test]
fn cross_entropy_takes_u32_targets_and_keeps_the_mean_of_large_logits() {
    for device in devices() {
        let logits = Tensor::new(&[[1e18f32, 1e18, -1e18], [5.0, 5.0, 5.0]], &device).unwrap();
        let targets = Tensor::new(&[0u32, 2], &device).unwrap();
        let loss = cross_entropy(&logits, &targets, None).unwrap().to_scalar::<f32>().unwrap();
        assert!((loss - 6f32.ln() / 2.0).abs() < 1e-6, "{loss}");
    }
}

/// Mean square minus squared mean has no digits of such a row's variance.
#[test]
fn layer_norm_keeps_the_digits_of_rows_far_from_zero() {
    const COLUMNS: usize = 1000;
    for device in devices() {
        let means = [0f32, 0.3, 10.0, 300.0, -300.0];
        let plain = tensor(&[means.len(), COLUMNS], 1, &Device::Cpu).to_vec2::<f32>().unwrap();
        let shifted: Vec<Vec<f32>> = plain
            .into_iter()
            .zip(means)
            .map(|(row, mean)| row.into_iter().map(|x| x + mean).collect())
            .collect();
        let x = Var::from_tensor(&Tensor::new(shifted.clone(), &device).unwrap()).unwrap();
        let [y, dx] = both(&layer_norm(&x, None, None, 1e-5).unwrap(), &x);
        let g = rows(&tensor(&[means.len(), COLUMNS], 5, &Device::Cpu));
        let average = |row: &[f64]| row.iter().sum::<f64>() / COLUMNS as f64;
        for (row, (x, g)) in shifted.iter().zip(&g).enumerate() {
            let [x, g] = [x, g].map(|row| row.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>());
            let mean = average(&x);
            let variance = average(&x.iter().map(|x| (x - mean).powi(2)).collect::<Vec<_>>());
            let r = (variance + 1e-5).sqrt().recip();
            let unit: Vec<f64> = x.iter().map(|x| (x - mean) * r).collect();
            let (shift, along) =
                (average(&g), average(&g.iter().zip(&unit).map(|(g, u)| g * u).collect::<Vec<_>>()));
            for i in 0..COLUMNS {
                let gradient = r * (g[i] - shift - unit[i] * along);
                for (got, exact) in [(y[row][i], unit[i]), (dx[row][i], gradient)] {
                    let error = (f64::from(got) - exact).abs();
                    assert!(error < 2e-4, "{device:?} mean {}: {got}, {exact}", means[row]);
                }
            }
        }
    }
}

#[test]
fn constants_get_no_gradient() {
    for device in devices() {
        let x = var(&[2, 3, 4, 6], 1, &device);
        let (weight, bias) = (var(&[5, 6], 2, &device), var(&[5], 3, &device));
        let (a, b) = (var(&[2, 6], 4, &device), var(&[5, 2], 5, &device));
        let options = LoraLinearOptions { scaling: 1.0, dropout: Some(Dropout { p: 0.5, seed: 1 }) };
        let table = var(&[4, 3], 6, &device);
        let results = [
            frozen_linear(&x, &weight, Some(&bias)),
            lora_linear(&x, &weight, Some(&bias), &a, &b, options),
            rope(&x, &table, &table, RopeLayout::Interleaved),
        ];
        for y in results {
            let gradients = y.unwrap().sum_all().unwrap().backward().unwrap();
            assert!(gradients.get(&x).is_some());
            for constant in [&weight, &bias, &table] {
                assert!(gradients.get(constant).is_none());
            }
        }
    }
}

/// Few ranks and many go different ways on a processor, and so does a factor that learns alone.
#[test]
fn lora_learns_as_its_reference_at_every_rank() {
    let rows = |y: &Tensor| y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let close = |what: &str, fused: &Tensor, reference: &Tensor| {
        let (fused, reference) = (rows(fused), rows(reference));
        let greatest = reference.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (fused, reference) in fused.iter().zip(&reference) {
            assert!((fused - reference).abs() <= 1e-4 * greatest, "{what}: {fused}, {reference}");
        }
    };
    for device in devices() {
        let (weight, grad) = (tensor(&[260, 256], 4, &device), tensor(&[50, 260], 5, &device));
        // A weight of 16 bits beside f32 is a way of its own on some processors, and so is one of f32, if both are large.
        let weights = [DType::F32, DType::BF16, DType::F16];
        for (rank, dtype) in [7, 32, 33, 40].into_iter().flat_map(|rank| weights.map(|dtype| (rank, dtype))) {
            let weight = weight.to_dtype(dtype).unwrap();
            let vars = [(&[50, 256][..], 1), (&[rank, 256], 2), (&[260, rank], 3)]
                .map(|(dims, seed)| var(dims, seed, &device));
            for dropout in [None, Some(Dropout { p: 0.3, seed: 7 })] {
                let options = LoraLinearOptions { scaling: 0.5, dropout };
                for tracked in 1..8 {
                    let args: Vec<Tensor> = (vars.iter().enumerate())
                        .map(|(i, var)| {
                            if tracked >> i & 1 == 1 {
                                var.as_tensor().clone()
                            } else {
                                var.as_detached_tensor()
                            }
                        })
                        .collect();
                    let [x, a, b] = &args[..] else { panic!("three") };
                    let pairs = [
                        (
                            lora_linear(x, &weight, None, a, b, options),
                            ops::lora_linear::reference(x, &weight, None, a, b, options),
                        ),
                        (
                            lora_delta(x, a, b, 0.5, LoraLayout::Peft),
                            ops::lora_delta::reference(x, a, b, 0.5, LoraLayout::Peft),
                        ),
                    ];
                    for (op, (fused, reference)) in pairs.into_iter().enumerate() {
                        let what =
                            format!("op {op}, {dtype:?}, rank {rank}, {dropout:?}, tracked {tracked:03b}");
                        let (fused, reference) = (fused.unwrap(), reference.unwrap());
                        close(&what, &fused, &reference);
                        let [fused, reference] = [fused, reference]
                            .map(|y| (y * &grad).unwrap().sum_all().unwrap().backward().unwrap());
                        for (i, var) in vars.iter().enumerate().filter(|(i, _)| tracked >> i & 1 == 1) {
                            let [Some(fused), Some(reference)] = [fused.get(var), reference.get(var)] else {
                                panic!("{what}: no gradient of {i}")
                            };
                            close(&format!("{what}, of {i}"), fused, reference);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn dropout_keeps_its_share() {
    for device in devices() {
        let count = 100_000;
        let x = Tensor::ones((1, count), DType::F32, &device).unwrap();
        let (weight, a) =
            (Tensor::zeros((1, count), DType::F32, &device).unwrap(), var(&[1, count], 1, &device));
        let b = Tensor::ones((1, 1), DType::F32, &device).unwrap();
        let gradient = |p, seed| {
            let options = LoraLinearOptions { scaling: 1.0, dropout: Some(Dropout { p, seed }) };
            let y = lora_linear(&x, &weight, None, &a, &b, options).unwrap();
            rows(y.sum_all().unwrap().backward().unwrap().get(&a).unwrap()).remove(0)
        };
        // The gradient of A is the dropped x, here the mask.
        let mask = gradient(0.25, 9);
        let kept = mask.iter().filter(|&&x| x != 0.0).count();
        assert!(mask.iter().all(|&x| x == 0.0 || x == 1.0 / 0.75));
        assert!((kept as f64 - 0.75 * count as f64).abs() < 1000.0, "{kept}");
        assert_eq!(mask, gradient(0.25, 9));
        assert_ne!(mask, gradient(0.25, 10));
        assert!(gradient(0.0, 9).iter().all(|&x| x == 1.0));
    }
}

#[test]
fn methods_of_a_tensor() -> std::result::Result<(), TrainingError> {
    for device in devices() {
        let x = tensor(&[2, 6], 1, &device);
        let same = |a: &Tensor, b: Result<Tensor>| assert_eq!(rows(a), rows(&b.unwrap()));
        same(&x.softmax_fused()?, softmax(&x, SoftmaxOptions::default()));
        same(&x.rms_norm_fused(1e-6)?, rms_norm(&x, None, 1e-6));
        same(&x.layer_norm_fused(1e-6)?, layer_norm(&x, None, None, 1e-6));
        let seed = [tensor(&[6, 2], 2, &device), tensor(&[2, 5], 3, &device)];
        let peft = [tensor(&[2, 6], 2, &device), tensor(&[5, 2], 3, &device)];
        let square = [tensor(&[6, 6], 2, &device), tensor(&[6, 6], 3, &device)];
        for ([a, b], layout) in
            [(&seed, LoraLayout::Seed), (&peft, LoraLayout::Peft), (&square, LoraLayout::Seed)]
        {
            same(&x.lora_forward_fused(a, b, 0.5)?, lora_delta(&x, a, b, 0.5, layout));
        }
        assert!(matches!(x.lora_forward_fused(&seed[0], &peft[1], 0.5), Err(TrainingError::Operation(_))));
    }
    Ok(())
}

#[test]
fn bad_input_is_an_error_that_says_what_and_why() {
    let device = Device::Cpu;
    let t = |dims: &[usize]| tensor(dims, 1, &device);
    let x = t(&[2, 8]);
    let options = SoftmaxOptions::default();
    let causal = SoftmaxOptions { mask: Mask::Causal, ..options };
    let lora = |p, scaling| LoraLinearOptions { scaling, dropout: Some(Dropout { p, seed: 0 }) };
    let targets = |targets: &[i64]| Tensor::new(targets, &device).unwrap();
    let cases = [
        (rms_norm(&x, Some(&t(&[4])), 1e-6), "rms_norm: weight must be [8], got [4]"),
        (rms_norm(&x, None, -1.0), "rms_norm: eps must be finite and at least 0, got -1"),
        (
            rms_norm(&x.to_dtype(DType::F64).unwrap(), None, 1e-6),
            "rms_norm: x must be f32, f16 or bf16, got f64",
        ),
        (
            layer_norm(&x, None, Some(&t(&[8]).to_dtype(DType::F16).unwrap()), 1e-6),
            "layer_norm: bias must be f32, got f16",
        ),
        (softmax(&t(&[]), options), "softmax: x must have at least 1 dimension, got a scalar"),
        (softmax(&t(&[8, 2]), causal), "softmax: a causal x must be [..., q, k] with q <= k, got [8, 2]"),
        (
            softmax(&x, SoftmaxOptions { scale: f32::NAN, ..options }),
            "softmax: scale must be finite, got NaN",
        ),
        (rope(&x, &x, &x, RopeLayout::Half), "rope: x must have 4 dimensions, got [2, 8]"),
        (
            rope(&t(&[1, 2, 3, 4]), &t(&[3, 3]), &t(&[3, 3]), RopeLayout::Half),
            "rope: x has 4 columns, got tables that rotate 6",
        ),
        (
            rope(&t(&[1, 2, 3, 4]), &t(&[5, 2]), &t(&[5, 2]), RopeLayout::Half),
            "rope: cos must be [3, 2], got [5, 2]",
        ),
        (
            frozen_linear(&x.to_dtype(DType::F16).unwrap(), &t(&[4, 8]).to_dtype(DType::BF16).unwrap(), None),
            "frozen_linear: weight must be f16, got bf16",
        ),
        (
            frozen_linear(&x.to_dtype(DType::BF16).unwrap(), &t(&[4, 8]), None),
            "frozen_linear: weight must be bf16, got f32",
        ),
        (silu_mul(&x, &t(&[8, 2])), "silu_mul: up must be [2, 8], got [8, 2]"),
        (
            cross_entropy(&x, &targets(&[0, 8]), None),
            "cross_entropy: the target of row 1 must be in 0..8, got 8",
        ),
        (
            cross_entropy(&x, &targets(&[-1, 0]), Some(-100)),
            "cross_entropy: the target of row 0 must be in 0..8, got -1",
        ),
        (cross_entropy(&x, &targets(&[0]), None), "cross_entropy: targets must be [2], got [1]"),
        (cross_entropy(&x, &t(&[2]), None), "cross_entropy: targets must be i64 or u32, got f32"),
        (
            lora_delta(&x, &t(&[3, 7]), &t(&[5, 3]), 1.0, LoraLayout::Peft),
            "lora_delta: a must be [3, 8], got [3, 7]",
        ),
        (
            lora_delta(&x, &t(&[3, 8]), &t(&[5, 4]), 1.0, LoraLayout::Peft),
            "lora_delta: b must be [5, 3], got [5, 4]",
        ),
        (
            lora_linear(&x, &t(&[5, 8]), None, &t(&[3, 8]), &t(&[6, 3]), lora(0.1, 1.0)),
            "lora_linear: b must have the weight's 5 rows, got 6",
        ),
        (
            lora_linear(&x, &t(&[5, 8]), None, &t(&[3, 8]), &t(&[5, 3]), lora(1.0, 1.0)),
            "lora_linear: dropout must be in 0..1, got 1",
        ),
        (
            lora_linear(&x, &t(&[5, 8]), None, &t(&[3, 8]), &t(&[5, 3]), lora(0.0, INF)),
            "lora_linear: scaling must be finite, got inf",
        ),
        (frozen_linear(&x, &t(&[5, 7]), None), "frozen_linear: weight must be [5, 8], got [5, 7]"),
        (frozen_linear(&x, &t(&[5, 8]), Some(&t(&[4]))), "frozen_linear: bias must be [5], got [4]"),
    ];
    for (result, expected) in cases {
        let message = result.map(|y| format!("{y}")).unwrap_err().to_string();
        assert_eq!(message.lines().next(), Some(expected));
    }
}

#[test]
fn less_instructions_keep_the_promises() {
    with_less_instructions(&["spoil", "mask", "cross_entropy"]);
}
