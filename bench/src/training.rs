//! The training steps that are measured end to end: named model shapes with random weights.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::case::{DeviceName, Dtype};

/// A model shape and a batch.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Training {
    pub name: String,
    /// A `config.json` of transformers.
    pub config: Value,
    pub batch: usize,
    pub tokens: usize,
    pub dtype: Dtype,
    /// What the frozen weights come from, if that is narrower: their values are exact in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<Dtype>,
    pub rank: usize,
    pub alpha: f64,
    /// Of LoRA's input.
    #[serde(default)]
    pub dropout: f32,
    pub learning_rate: f64,
    /// Fresh processes of every engine.
    pub processes: usize,
    /// Steps outside the clock.
    pub warmup: usize,
    /// Steps in it.
    pub steps: usize,
    /// An engine that is not done with its first step after this many seconds, compiling included, is not waited for.
    pub first_step_seconds: f64,
    /// After this many seconds no further step begins. A first step that takes longer is timed itself: what warms up is
    /// little beside it.
    pub limit_seconds: f64,
}

impl Training {
    /// Its name in tables.
    pub fn id(&self) -> String {
        let stored = self.stored.map(|stored| format!(" of {} weights", stored.name())).unwrap_or_default();
        let dropout = if self.dropout > 0.0 { format!(" dropout {}", self.dropout) } else { String::new() };
        format!("{} {}x{} {}{stored}{dropout}", self.name, self.batch, self.tokens, self.dtype.name())
    }

    /// Part of the small set.
    pub fn is_small(&self) -> bool {
        self.name == "tiny" && self.dtype == Dtype::F32 && self.stored.is_none()
    }

    /// The size of the vocabulary.
    pub fn vocabulary(&self) -> u64 {
        self.config["vocab_size"].as_u64().unwrap_or(0)
    }
}

/// The steps measured on a device.
pub fn all(device: DeviceName) -> Vec<Training> {
    let llama = |vocab: u32, hidden: u32, inner: u32, layers: u32, heads: u32, kv_heads: u32, tied: bool| {
        json!({
            "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        })
    };
    let training = |name: &str, config: &Value, batch, tokens, dtype, rank: u32, (warmup, steps)| Training {
        name: name.to_owned(),
        config: config.clone(),
        batch,
        tokens,
        dtype,
        stored: None,
        rank: rank as usize,
        alpha: 2.0 * f64::from(rank),
        dropout: 0.0,
        learning_rate: 1e-3,
        processes: if name == "tiny" { 2 } else { 1 },
        warmup,
        steps,
        first_step_seconds: if device == DeviceName::Cuda { 75.0 } else { 600.0 },
        // Beside a GPU it is a compiler that a first step waits for.
        limit_seconds: if device == DeviceName::Cuda { 150.0 } else { 15.0 },
    };
    match device {
        DeviceName::Cpu => {
            let mut qwen = llama(151_936, 896, 4864, 24, 14, 2, true);
            qwen["model_type"] = json!("qwen2");
            let shapes = [
                ("tiny", llama(512, 256, 688, 6, 8, 4, false), 8, 128, (2, 10)),
                ("135m", llama(49_152, 576, 1536, 30, 9, 3, true), 2, 256, (1, 3)),
                ("0.5b", qwen, 1, 256, (1, 3)),
            ];
            let with = |dtype| {
                move |(name, config, batch, tokens, steps): &(&str, Value, usize, usize, (usize, usize))| {
                    training(name, config, *batch, *tokens, dtype, 8, *steps)
                }
            };
            // Most checkpoints are in bf16, also those that are trained in f32.
            let of_bf16 = |training: Training| {
                let mut config = training.config.clone();
                config["dtype"] = json!("bfloat16");
                Training { config, stored: Some(Dtype::Bf16), ..training }
            };
            shapes
                .iter()
                .flat_map(|shape| {
                    [with(Dtype::F32)(shape), of_bf16(with(Dtype::F32)(shape)), with(Dtype::Bf16)(shape)]
                })
                .collect()
        }
        DeviceName::Cuda => {
            let one = llama(128_256, 2048, 8192, 16, 32, 8, true);
            let eight = llama(128_256, 4096, 14_336, 32, 32, 8, false);
            vec![
                training("1b", &one, 4, 2048, Dtype::Bf16, 16, (2, 5)),
                training("8b", &eight, 2, 2048, Dtype::Bf16, 16, (2, 5)),
            ]
        }
    }
}

impl Training {
    /// Numbers in the frozen weights that every token is multiplied with, the output projection included.
    pub fn projected(&self) -> f64 {
        let size = |name: &str| self.config[name].as_f64().unwrap_or(0.0);
        let (hidden, heads) = (size("hidden_size"), size("num_attention_heads"));
        let kv = hidden * size("num_key_value_heads") / heads;
        let layer = hidden * (2.0 * hidden + 2.0 * kv + 3.0 * size("intermediate_size"));
        size("num_hidden_layers") * layer + hidden * size("vocab_size")
    }
}
