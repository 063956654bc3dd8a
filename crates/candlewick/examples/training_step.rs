//! Times LoRA training steps on random weights and random tokens, and prints tokens per second and peak memory:
//!
//! ```sh
//! MIMALLOC_ARENA_EAGER_COMMIT=0 MIMALLOC_PURGE_DELAY=-1 cargo run --release --example training_step -- tiny|135m|0.5b f32|bf16 [STEPS]
//! ```
//!
//! The shapes: `tiny` a Llama of hidden size 256 on 8×128 tokens, `135m` `SmolLM2`'s on 2×256, `0.5b` `Qwen2.5`'s on
//! 1×256; adapters of rank 8 beside every projection, `AdamW`, gradients clipped at 1.

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candlewick::lora::{self, LoraConfig};
use candlewick::model::{Decoder, ModelConfig, ParameterSource};
use candlewick::train::{Batch, Optimizer, OptimizerConfig, Trainable, accumulate, peak_resident_bytes};
use candlewick::{Error, FineTune, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Weights uniform in ±0.03, norms one, biases zero.
struct Random(ChaCha8Rng, DType);

impl ParameterSource for Random {
    fn take(&mut self, _: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = match shape {
            [_, _] => {
                let values = (0..shape.iter().product()).map(|_| self.0.random_range(-0.03f32..0.03));
                Tensor::from_vec(values.collect::<Vec<_>>(), shape, &Device::Cpu)?
            }
            _ => Tensor::ones(shape, DType::F32, &Device::Cpu)?,
        };
        Ok(tensor.to_dtype(self.1)?)
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = || Error::Config("usage: training_step tiny|135m|0.5b f32|bf16 [STEPS]".into());
    let [name, dtype, rest @ ..] = arguments.as_slice() else { return Err(usage()) };
    let dtype = match dtype.as_str() {
        "f32" => DType::F32,
        "bf16" => DType::BF16,
        _ => return Err(usage()),
    };
    let (config, rows, tokens, steps) = match name.as_str() {
        "tiny" => (
            r#"{"model_type":"llama","vocab_size":512,"hidden_size":256,"intermediate_size":688,"num_hidden_layers":6,
                "num_attention_heads":8,"num_key_value_heads":4,"max_position_embeddings":512}"#,
            8,
            128,
            20,
        ),
        "135m" => (
            r#"{"model_type":"llama","vocab_size":49152,"hidden_size":576,"intermediate_size":1536,
                "num_hidden_layers":30,"num_attention_heads":9,"num_key_value_heads":3,"tie_word_embeddings":true}"#,
            2,
            256,
            3,
        ),
        "0.5b" => (
            r#"{"model_type":"qwen2","vocab_size":151936,"hidden_size":896,"intermediate_size":4864,
                "num_hidden_layers":24,"num_attention_heads":14,"num_key_value_heads":2,"tie_word_embeddings":true}"#,
            1,
            256,
            3,
        ),
        _ => return Err(usage()),
    };
    // As `wick` does: this thread works too.
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    let steps = match rest {
        [] => steps,
        [steps] => steps.parse().map_err(|_| usage())?,
        _ => return Err(usage()),
    };
    let config = ModelConfig::parse(config, Path::new("config.json"))?;
    let vocabulary = u32::try_from(config.vocab_size).map_err(|_| usage())?;
    let mut decoder = Decoder::build(config, &mut Random(ChaCha8Rng::seed_from_u64(0), dtype))?;
    let lora = LoraConfig::parse(
        r#"{"peft_type":"LORA","r":8,"lora_alpha":16,"target_modules":"all-linear"}"#,
        Path::new("adapter_config.json"),
    )?;
    let parameters = lora::attach(&mut decoder, &lora, 0)?;
    let model = FineTune::new(decoder, parameters);
    let mut optimizer = Optimizer::new(OptimizerConfig::default(), model.parameters())?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let ids: Vec<u32> = (0..rows * tokens).map(|_| rng.random_range(0..vocabulary)).collect();
    // As transformers shifts them: every token but a sequence's first is a target.
    let targets: Vec<i64> = (0..rows * tokens)
        .map(|i| if (i + 1) % tokens == 0 { -100 } else { i64::from(ids[i + 1]) })
        .collect();
    let batch = Batch {
        input_ids: Tensor::from_vec(ids, (rows, tokens), &Device::Cpu)?,
        targets: Tensor::from_vec(targets, (rows, tokens), &Device::Cpu)?,
        tokens: rows * (tokens - 1),
    };
    let mut step = |number| -> Result<f64> {
        let (loss, mut gradients) = accumulate(&model, std::slice::from_ref(&batch), number, |_| 0)?;
        let norms = gradients.norms()?;
        gradients.clip(&norms, 1.0)?;
        optimizer.step(model.parameters(), &gradients, 1e-4)?;
        Ok(loss)
    };
    let mut loss = step(1)?;
    let clock = Instant::now();
    for number in 0..steps {
        loss = step(number + 2)?;
    }
    #[expect(clippy::cast_precision_loss, reason = "small counts")]
    {
        let seconds = clock.elapsed().as_secs_f64() / steps as f64;
        let rate = (rows * tokens) as f64 / seconds;
        let peak = peak_resident_bytes().unwrap_or_default() as f64 / 1e9;
        println!(
            "{name} {} step {seconds:.3} s tokens/s {rate:.1} loss {loss:.4} peak RSS {peak:.2} GB",
            dtype.as_str()
        );
    }
    Ok(())
}
