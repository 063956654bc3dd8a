//! LoRA training steps of a model with random weights, through candlewick's public training API.

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_fused::telemetry;
use candlewick::FineTune;
use candlewick::lora::{self, LoraConfig, Modules};
use candlewick::model::{Decoder, ModelConfig, RandomWeights};
use candlewick::train::{Batch, Optimizer, OptimizerConfig, Trainable, accumulate};

use super::{Library, paths};
use crate::case::Dtype;
use crate::protocol::Trained;
use crate::training::Training;
use crate::{Error, Result};

const SEED: u64 = 0;
const CLIP: f64 = 1.0;

/// The steps of `training`, each waited for.
pub fn run(library: Library, training: &Training, device: &Device) -> Result<Trained> {
    if library != Library::Ours {
        return Err(Error::Engine("Candle has no LoRA".to_owned()));
    }
    let model = model(training, device)?;
    let batch = batch(training, device)?;
    let mut optimizer = Optimizer::new(OptimizerConfig::default(), model.parameters())?;
    let mut trained = Trained::default();
    candle_fused::reset_peak_memory(device)?;
    telemetry::reset();
    let begun = Instant::now();
    for step in 0..training.warmup + training.steps {
        device.synchronize()?;
        let start = Instant::now();
        let (loss, mut gradients) = accumulate(&model, std::slice::from_ref(&batch), step, |_| step as u64)?;
        let norms = gradients.norms()?;
        gradients.clip(&norms, CLIP)?;
        optimizer.step(model.parameters(), &gradients, training.learning_rate)?;
        device.synchronize()?;
        let seconds = start.elapsed().as_secs_f64();
        if step >= training.warmup || seconds > training.limit_seconds {
            trained.step_seconds.push(seconds);
        }
        trained.losses.push(loss);
        if begun.elapsed().as_secs_f64() > training.limit_seconds && !trained.step_seconds.is_empty() {
            break;
        }
    }
    trained.paths = Some(paths());
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let bytes = |bytes: u64| bytes as f64;
    trained.peak_device_bytes = candle_fused::peak_memory(device)?.map(bytes);
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        trained.driver_device_bytes = super::cuda::used_memory(device);
    }
    Ok(trained)
}

fn model(training: &Training, device: &Device) -> Result<FineTune> {
    let config = ModelConfig::parse(&training.config.to_string(), Path::new("config.json"))?;
    let dtype = match training.dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::Bf16 => DType::BF16,
    };
    let mut weights = RandomWeights::new(&config, SEED, dtype, device).narrow_matrices();
    let mut decoder = Decoder::build(config, &mut weights)?;
    let config = LoraConfig {
        r: training.rank,
        lora_alpha: training.alpha,
        lora_dropout: training.dropout,
        target_modules: Some(Modules::from_option("all-linear")),
        ..LoraConfig::default()
    };
    let config = lora::expand_all_linear(config, &decoder);
    let parameters = lora::attach(&mut decoder, &config, SEED)?;
    Ok(FineTune::new(decoder, parameters))
}

/// One batch of random tokens; the target of a position is its next token, and the last has none, as in transformers.
fn batch(training: &Training, device: &Device) -> Result<Batch> {
    let (rows, tokens) = (training.batch, training.tokens);
    let vocabulary = u32::try_from(training.vocabulary()).unwrap_or(u32::MAX).max(1);
    let mut state = 1u32;
    let mut draw = || {
        // A linear congruential generator; its high bits are random enough for tokens.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % vocabulary
    };
    let ids: Vec<u32> = (0..rows * tokens).map(|_| draw()).collect();
    let target = |i: usize| {
        if (i + 1).is_multiple_of(tokens) { candlewick::data::IGNORED } else { i64::from(ids[i + 1]) }
    };
    let targets: Vec<i64> = (0..rows * tokens).map(target).collect();
    Ok(Batch {
        targets: Tensor::from_vec(targets, (rows, tokens), device)?,
        input_ids: Tensor::from_vec(ids, (rows, tokens), device)?,
        tokens: rows * (tokens - 1),
    })
}
