//! Twenty steps of LoRA training, as PEFT and torch's AdamW took them (tests/golden/README.md).

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candlewick::FineTune;
use candlewick::lora;
use candlewick::model::{ModelFiles, TensorFile, load_frozen};
use candlewick::train::{Batch, Optimizer, OptimizerConfig, OptimizerKind, Trainable, accumulate};

const CASES: [&str; 4] = ["llama-all-linear", "llama-qv-rslora", "qwen2-all-linear", "qwen2-qv"];
/// Relative, for every loss and for every element of the final tensors against the tensor's largest.
const TOLERANCE: f64 = 1e-4;

#[derive(serde::Deserialize)]
struct Trajectory {
    base: String,
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    max_gradient_norm: Option<f64>,
    losses: Vec<f64>,
    gradient_norms: Vec<f64>,
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn load(file: &TensorFile, name: &str) -> Tensor {
    file.load(name, &Device::Cpu).unwrap()
}

fn largest(tensor: &Tensor) -> f64 {
    let flat = tensor.abs().unwrap().flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    flat.max(0).unwrap().to_scalar().unwrap()
}

fn batch(file: &TensorFile, step: usize) -> Batch {
    let at = |name| load(file, name).get(step).unwrap().contiguous().unwrap();
    let targets = at("targets");
    let counted = targets.ne(-100i64).unwrap().to_dtype(DType::U32).unwrap();
    let tokens = counted.sum_all().unwrap().to_scalar::<u32>().unwrap();
    Batch {
        input_ids: at("input_ids").to_dtype(DType::U32).unwrap(),
        targets,
        tokens: usize::try_from(tokens).unwrap(),
    }
}

#[test]
fn training_follows_peft() {
    for case in CASES {
        let folder = golden().join("lora").join(case);
        let text = std::fs::read_to_string(folder.join("trajectory.json")).unwrap();
        let trajectory: Trajectory = serde_json::from_str(&text).unwrap();
        let base = ModelFiles::Folder(golden().join(&trajectory.base));
        let mut decoder = load_frozen(&base, None, &Device::Cpu).unwrap();
        let (config, parameters) = lora::load(&mut decoder, &folder.join("adapter_init")).unwrap();
        let model = FineTune::new(decoder, parameters);
        let optimizer = OptimizerConfig {
            kind: OptimizerKind::AdamW,
            beta1: trajectory.beta1,
            beta2: trajectory.beta2,
            eps: trajectory.epsilon,
            weight_decay: trajectory.weight_decay,
        };
        let mut optimizer = Optimizer::new(optimizer, model.parameters()).unwrap();
        let batches = TensorFile::open(&folder.join("batches.safetensors")).unwrap();
        let mut worst_loss = 0f64;
        for (step, (&want, &norm)) in trajectory.losses.iter().zip(&trajectory.gradient_norms).enumerate() {
            let (loss, mut gradients) =
                accumulate(&model, &[batch(&batches, step)], step + 1, |_| 0).unwrap();
            worst_loss = worst_loss.max((loss - want).abs() / want);
            let norms = gradients.norms().unwrap();
            let total = norms.iter().flatten().map(|norm| norm * norm).sum::<f64>().sqrt();
            assert!((total - norm).abs() / norm < TOLERANCE, "{case}, step {step}: norm {total}, {norm}");
            if let Some(limit) = trajectory.max_gradient_norm {
                gradients.clip(&norms, limit).unwrap();
            }
            optimizer.step(model.parameters(), &gradients, trajectory.learning_rate).unwrap();
        }
        let last = TensorFile::open(&folder.join("adapter_final").join(lora::WEIGHTS)).unwrap();
        let mut worst_tensor = 0f64;
        for parameter in model.parameters() {
            let want = load(&last, &parameter.name);
            let difference = (parameter.var.as_tensor() - &want).unwrap();
            worst_tensor = worst_tensor.max(largest(&difference) / largest(&want));
        }
        println!("{case}: losses within {worst_loss:.1e}, final tensors within {worst_tensor:.1e}, relative");
        assert!(
            worst_loss < TOLERANCE && worst_tensor < TOLERANCE,
            "{case}: {worst_loss:e} {worst_tensor:e}"
        );

        // What we save is what PEFT saved: names, shapes, and a configuration that reads back the same.
        let saved = tempfile::tempdir().unwrap();
        lora::save(saved.path(), &config, model.parameters()).unwrap();
        let ours = TensorFile::open(&saved.path().join(lora::WEIGHTS)).unwrap();
        assert_eq!(ours.names(), last.names(), "{case}");
        assert_eq!(ours.header(), last.header(), "{case}");
        for name in ours.names() {
            assert_eq!(ours.shape(&name).unwrap(), last.shape(&name).unwrap(), "{case}: {name}");
        }
        let mut again = load_frozen(&base, None, &Device::Cpu).unwrap();
        assert_eq!(lora::load(&mut again, saved.path()).unwrap().0, config, "{case}");
    }
}

#[test]
fn adapters_of_peft_give_its_logits_applied_and_merged() {
    for case in CASES {
        let folder = golden().join("lora").join(case);
        let text = std::fs::read_to_string(folder.join("trajectory.json")).unwrap();
        let trajectory: Trajectory = serde_json::from_str(&text).unwrap();
        let base = ModelFiles::Folder(golden().join(&trajectory.base));
        let expected = TensorFile::open(&folder.join("expected.safetensors")).unwrap();
        let ids = load(&expected, "input_ids").to_dtype(DType::U32).unwrap();
        let adapter = folder.join("adapter_final");

        let mut decoder = load_frozen(&base, None, &Device::Cpu).unwrap();
        let plain = decoder.forward(&ids, None, None).unwrap();
        lora::load(&mut decoder, &adapter).unwrap();
        let applied = decoder.forward(&ids, None, None).unwrap();
        let difference = largest(&(&applied - load(&expected, "adapter_logits")).unwrap());
        assert!(difference <= 1e-5, "{case}: applied {difference:e}");
        // The adapter matters, or the comparison would prove nothing.
        assert!(largest(&(&applied - &plain).unwrap()) > 0.1, "{case}");

        let (merged, unmerged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        lora::merge(&base, &adapter, merged.path(), lora::Direction::Merge).unwrap();
        let merged = ModelFiles::Folder(merged.path().to_path_buf());
        let logits = |files: &ModelFiles| {
            load_frozen(files, None, &Device::Cpu).unwrap().forward(&ids, None, None).unwrap()
        };
        let difference = largest(&(logits(&merged) - load(&expected, "merged_logits")).unwrap());
        assert!(difference <= 1e-5, "{case}: merged {difference:e}");

        lora::merge(&merged, &adapter, unmerged.path(), lora::Direction::Unmerge).unwrap();
        let unmerged = ModelFiles::Folder(unmerged.path().to_path_buf());
        let difference = largest(&(logits(&unmerged) - &plain).unwrap());
        assert!(difference <= 1e-5, "{case}: unmerged {difference:e}");
    }
}
