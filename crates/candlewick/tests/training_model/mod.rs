//! A model small enough to see through: next-token logits from the present token alone, a frozen part and a LoRA
//! pair with dropout beside it.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::cell::Cell;
use std::fs;
use std::path::Path;

use candle_core::{D, DType, Device, Tensor, Var};
use candlewick::data::{Dataset, Sequence};
use candlewick::files::write_atomically;
use candlewick::train::{
    Artifacts, Batch, Event, OptimizerConfig, Parameter, Pass, Schedule, ScheduleKind, TrainConfig, Trainable,
};
use candlewick::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const VOCABULARY: usize = 16;
const WIDTH: usize = 12;
const RANK: usize = 4;

/// What the model does wrong on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// B's gradient is lost, as in an operation without backward.
    DetachB,
    /// B learns; A is never used.
    DetachA,
    /// The bias has a zero gradient.
    ZeroBias,
    /// From this training pass on (counted from one) the loss is NaN.
    NanLoss(usize),
    /// From this training pass on the loss is fine and the bias's gradient is not.
    NanGradient(usize),
}

pub struct Bigram {
    embedding: Tensor,
    head: Tensor,
    parameters: Vec<Parameter>,
    pub dropout: f32,
    pub fault: Fault,
    passes: Cell<usize>,
}

pub fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.random_range(-0.5..0.5)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

impl Bigram {
    pub fn new() -> Self {
        Self::with_dtype(DType::F32)
    }

    pub fn with_dtype(dtype: DType) -> Self {
        let parameter = |name: &str, value: Tensor, zero_first_gradient| Parameter {
            name: name.to_owned(),
            var: Var::from_tensor(&value.to_dtype(dtype).unwrap()).unwrap(),
            zero_first_gradient,
        };
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        Self {
            embedding: random(1, &[VOCABULARY, WIDTH]),
            head: random(2, &[VOCABULARY, WIDTH]),
            parameters: vec![
                parameter("head.lora_A", random(3, &[RANK, WIDTH]), true),
                parameter("head.lora_B", zeros(&[VOCABULARY, RANK]), false),
                parameter("head.bias", zeros(&[VOCABULARY]), false),
            ],
            dropout: 0.1,
            fault: Fault::None,
            passes: Cell::new(0),
        }
    }

    pub fn with_fault(fault: Fault) -> Self {
        Self { fault, ..Self::new() }
    }

    fn parameter(&self, index: usize) -> Tensor {
        self.parameters[index].var.as_tensor().to_dtype(DType::F32).unwrap()
    }

    /// Every parameter's bits.
    pub fn bits(&self) -> Vec<Vec<u32>> {
        let bits = |p: &Parameter| {
            let values = p.var.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        self.parameters.iter().map(bits).collect()
    }
}

impl Trainable for Bigram {
    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn loss(&self, batch: &Batch, pass: Pass) -> Result<Tensor> {
        let mut x = self.embedding.index_select(&batch.input_ids.flatten_all()?, 0)?;
        let base = x.matmul(&self.head.t()?)?;
        if let Pass::Train { seed } = pass {
            self.passes.set(self.passes.get() + 1);
            let keep = random(seed, x.dims()).ge(f64::from(self.dropout) - 0.5)?.to_dtype(DType::F32)?;
            x = (x * keep)?;
        }
        let (mut a, mut b, mut bias) = (self.parameter(0), self.parameter(1), self.parameter(2));
        match self.fault {
            Fault::DetachA => a = a.detach(),
            Fault::DetachB => b = b.detach(),
            Fault::ZeroBias => bias = (&bias * bias.zeros_like()?)?,
            _ => {}
        }
        let logits = (base + x.matmul(&a.t()?)?.matmul(&b.t()?)?)?.broadcast_add(&bias)?;
        let targets = batch.targets.flatten_all()?;
        let counted = targets.ge(0_i64)?.to_dtype(DType::F32)?;
        let chosen = logits.gather(&targets.maximum(0_i64)?.unsqueeze(1)?, 1)?.squeeze(1)?;
        let losses = ((logits.log_sum_exp(D::Minus1)? - chosen)? * counted)?;
        let loss = (losses.sum_all()? / batch.tokens as f64)?;
        match self.fault {
            Fault::NanLoss(at) if self.passes.get() >= at => Ok((loss * f64::NAN)?),
            // √(x − x) is zero, and its derivative ∞ − ∞.
            Fault::NanGradient(at) if self.passes.get() >= at => {
                let zero = (&bias - bias.copy()?)?;
                Ok((loss + zero.sqrt()?.sum_all()?)?)
            }
            _ => Ok(loss),
        }
    }
}

/// Writes one file with A, B and the bias as text.
pub struct TextFile<'a>(pub &'a Bigram);

impl Artifacts for TextFile<'_> {
    fn save(&self, folder: &Path) -> Result<()> {
        write_atomically(&folder.join("model.txt"), format!("{:?}", self.0.bits()).as_bytes())
    }
}

/// Sequences of differing lengths in which most tokens are followed by the one three further on.
pub fn dataset(seed: u64, rows: usize) -> Dataset {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let vocabulary = u32::try_from(VOCABULARY).unwrap();
    let sequences = (0..rows)
        .map(|_| {
            let length = random.random_range(2..12);
            let mut token = random.random_range(0..vocabulary);
            let tokens = (0..length)
                .map(|_| {
                    let noise = random.random_bool(0.1);
                    token = if noise { random.random_range(0..vocabulary) } else { (token + 3) % vocabulary };
                    token
                })
                .collect();
            Sequence { tokens, prompt: random.random_range(0..length) }
        })
        .collect();
    Dataset::from_sequences(sequences).unwrap()
}

pub fn config(iters: usize) -> TrainConfig {
    TrainConfig {
        iters,
        batch_size: 3,
        grad_accumulation_steps: 2,
        seed: 5,
        optimizer: OptimizerConfig::default(),
        schedule: Schedule {
            kind: ScheduleKind::Cosine,
            learning_rate: 0.05,
            min_learning_rate: 0.0,
            warmup: 3,
            total: iters,
        },
        clip_grad_norm: Some(1.0),
        steps_per_report: 4,
        steps_per_eval: 6,
        val_batches: None,
        save_every: 5,
        keep_checkpoints: 2,
    }
}

/// An event's numbers without those of the clock.
pub fn timeless(event: &Event) -> Option<(String, usize, u64)> {
    match event {
        Event::Step { iter, loss } => Some(("step".to_owned(), *iter, loss.to_bits())),
        Event::Report(report) => {
            Some((format!("report {}", report.trained_tokens), report.iter, report.loss.to_bits()))
        }
        Event::Validation { iter, evaluation } => {
            Some((format!("validation {}", evaluation.tokens), *iter, evaluation.loss.to_bits()))
        }
        _ => None,
    }
}

pub fn files(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What a killed save leaves.
pub fn leftovers(folder: &Path) -> usize {
    files(folder).iter().filter(|name| name.starts_with('.')).count()
}

pub fn message(result: Result<impl std::fmt::Debug>) -> String {
    result.map_err(|error: Error| error.to_string()).unwrap_err()
}
