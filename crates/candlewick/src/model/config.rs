//! `config.json`: the Llama family as Hugging Face's transformers describes it.

use std::path::Path;

use candle_core::DType;
use serde::Deserialize;

use crate::{Error, Result};

/// The architectures [`Decoder`](super::Decoder) knows, by `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Llama 1 to 3.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: a bias on q, k and v.
    Qwen2,
    /// Qwen3: an RMS norm on every head of q and k.
    Qwen3,
}

/// How positions beyond the pretraining length are mapped to rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// Every frequency divided by the factor.
    Linear {
        /// The factor, above 0.
        factor: f64,
    },
    /// Llama 3.1's rule: long wavelengths are divided by the factor, short ones kept, those between interpolated.
    Llama3 {
        /// The factor, above 0.
        factor: f64,
        /// Wavelengths above `original / low` are scaled.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// The length the base was pretrained with.
        original_max_position_embeddings: f64,
    },
}

/// A validated `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which member of the family.
    pub architecture: Architecture,
    /// Tokens in the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// The norms' epsilon.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Columns of a head that are rotated, an even number.
    pub rotary_dim: usize,
    /// The longest sequence: the position limit, or the sliding window if that is shorter (attention is exact within it).
    pub max_position_embeddings: usize,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Bias on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Bias on the MLP's projections.
    pub mlp_bias: bool,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Standard deviation of freshly drawn weights.
    pub initializer_range: f64,
    /// What the weights are stored in, where that is said and is f32, f16 or bf16.
    pub dtype: Option<DType>,
}

impl ModelConfig {
    /// Reads and validates the text of a `config.json`; `path` is only named in errors.
    ///
    /// # Errors
    /// Malformed JSON, an unknown `model_type`, activation or rope scaling, or sizes that do not fit together.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let raw: RawConfig = serde_json::from_str(text).map_err(|e| Error::model(path, e))?;
        raw.validate().map_err(|message| Error::model(path, message))
    }
}

/// `config.json` as it is written; what the family does not share is optional.
#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f32,
    #[serde(default = "default_activation")]
    hidden_act: String,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    /// Where transformers 5 keeps theta and scaling together.
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    attention_bias: Option<bool>,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    eos_token_id: Option<OneOrMany>,
    #[serde(default = "default_initializer_range")]
    initializer_range: f64,
    dtype: Option<serde_json::Value>,
    torch_dtype: Option<serde_json::Value>,
    quantization_config: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

fn default_eps() -> f32 {
    1e-6
}
fn default_activation() -> String {
    "silu".into()
}
fn default_positions() -> usize {
    2048
}
fn default_initializer_range() -> f64 {
    0.02
}

impl RawConfig {
    fn stored(&self) -> Option<DType> {
        match self.dtype.as_ref().or(self.torch_dtype.as_ref())?.as_str()? {
            "float32" => Some(DType::F32),
            "float16" => Some(DType::F16),
            "bfloat16" => Some(DType::BF16),
            _ => None,
        }
    }

    fn validate(self) -> std::result::Result<ModelConfig, String> {
        let architecture = match self.model_type.as_str() {
            "llama" => Architecture::Llama,
            "mistral" => Architecture::Mistral,
            "qwen2" => Architecture::Qwen2,
            "qwen3" => Architecture::Qwen3,
            other => {
                return Err(format!("model_type must be llama, mistral, qwen2 or qwen3, got {other}"));
            }
        };
        if self.quantization_config.is_some() {
            return Err("quantized weights are not supported; use the full-precision model".into());
        }
        if !matches!(self.hidden_act.as_str(), "silu" | "swish") {
            return Err(format!("hidden_act must be silu, got {}", self.hidden_act));
        }
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if value == 0 || u32::try_from(value).is_err() {
                return Err(format!("{name} must be between 1 and {}, got {value}", u32::MAX));
            }
        }
        let heads = self.num_attention_heads;
        let kv_heads = self.num_key_value_heads.unwrap_or(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(format!(
                "num_key_value_heads must divide num_attention_heads = {heads}, got {kv_heads}"
            ));
        }
        let head_dim = match self.head_dim {
            Some(0) => return Err("head_dim must not be 0".into()),
            Some(head_dim) => head_dim,
            None if self.hidden_size.is_multiple_of(heads) => self.hidden_size / heads,
            None => {
                return Err(format!(
                    "hidden_size = {} must be a multiple of num_attention_heads = {heads}",
                    self.hidden_size
                ));
            }
        };
        let rope = self.rope_parameters.as_ref();
        let rotary_fraction =
            rope.and_then(|rope| rope.partial_rotary_factor).or(self.partial_rotary_factor).unwrap_or(1.0);
        let rotary_dim = rotary_dim(head_dim, rotary_fraction)?;
        let rope_theta = rope.and_then(|rope| rope.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        if !(rope_theta.is_finite() && rope_theta > 0.0) {
            return Err(format!("rope_theta must be above 0, got {rope_theta}"));
        }
        let rope_scaling = match rope.or(self.rope_scaling.as_ref()) {
            Some(rope) => rope.scaling()?,
            None => RopeScaling::None,
        };
        let dtype = self.stored();
        let window = match architecture {
            Architecture::Mistral => self.sliding_window,
            _ if self.use_sliding_window == Some(true) => self.sliding_window,
            _ => None,
        };
        let (qkv_bias, output_bias) = match architecture {
            Architecture::Qwen2 => (true, false),
            Architecture::Mistral => (false, false),
            Architecture::Llama | Architecture::Qwen3 => {
                let bias = self.attention_bias.unwrap_or(false);
                (bias, bias)
            }
        };
        Ok(ModelConfig {
            architecture,
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta,
            rope_scaling,
            rotary_dim,
            max_position_embeddings: window
                .map_or(self.max_position_embeddings, |window| window.min(self.max_position_embeddings)),
            tie_word_embeddings: self.tie_word_embeddings,
            qkv_bias,
            output_bias,
            mlp_bias: self.mlp_bias && architecture == Architecture::Llama,
            eos_token_ids: match self.eos_token_id {
                None => Vec::new(),
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
            initializer_range: self.initializer_range,
            dtype,
        })
    }
}

impl RawRope {
    fn scaling(&self) -> std::result::Result<RopeScaling, String> {
        let positive = |name: &str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(format!("rope scaling: {name} must be above 0, got {value}")),
            None => Err(format!("rope scaling: {name} is missing")),
        };
        match self.rope_type.as_deref() {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: positive("factor", self.factor)? }),
            Some("llama3") => {
                let low_freq_factor = positive("low_freq_factor", self.low_freq_factor)?;
                let high_freq_factor = positive("high_freq_factor", self.high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    return Err("rope scaling: high_freq_factor must be above low_freq_factor".into());
                }
                Ok(RopeScaling::Llama3 {
                    factor: positive("factor", self.factor)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: positive(
                        "original_max_position_embeddings",
                        self.original_max_position_embeddings,
                    )?,
                })
            }
            Some(other) => Err(format!("rope scaling must be default, linear or llama3, got {other}")),
        }
    }
}

/// `head_dim * fraction`, which must be a positive even integer.
fn rotary_dim(head_dim: usize, fraction: f64) -> std::result::Result<usize, String> {
    (2..=head_dim)
        .step_by(2)
        .take_while(|&dim| fraction <= 1.0 && to_f64(dim) <= to_f64(head_dim) * fraction)
        .last()
        .ok_or_else(|| {
            format!("head_dim = {head_dim} with partial_rotary_factor = {fraction} leaves nothing to rotate")
        })
}

/// Exact for every size a configuration can name: validated sizes fit 32 bits.
pub(crate) fn to_f64(value: usize) -> f64 {
    u32::try_from(value).map_or(f64::INFINITY, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(change: &str) -> Result<ModelConfig> {
        let base = r#"{"model_type":"llama","vocab_size":64,"hidden_size":32,"intermediate_size":48,"num_hidden_layers":2,"num_attention_heads":4"#;
        ModelConfig::parse(&format!("{base}{change}}}"), Path::new("config.json"))
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = parse("").unwrap();
        assert_eq!(config.num_key_value_heads, 4);
        assert_eq!((config.head_dim, config.rotary_dim), (8, 8));
        assert!(!config.tie_word_embeddings && !config.qkv_bias);
    }

    #[test]
    fn transformers_5_rope_parameters_are_read() {
        let config = parse(r#","rope_parameters":{"rope_type":"llama3","rope_theta":5e5,"factor":8,"low_freq_factor":1,"high_freq_factor":4,"original_max_position_embeddings":8192}"#).unwrap();
        assert!((config.rope_theta - 5e5).abs() < 1e-9);
        assert!(
            matches!(config.rope_scaling, RopeScaling::Llama3 { factor, .. } if (factor - 8.0).abs() < 1e-9)
        );
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (change, word) in [
            (r#","num_key_value_heads":3"#, "num_key_value_heads"),
            (r#","hidden_act":"gelu""#, "hidden_act"),
            (r#","rope_scaling":{"type":"yarn","factor":2}"#, "yarn"),
            (r#","head_dim":0"#, "head_dim"),
            (r#","quantization_config":{}"#, "quantized"),
        ] {
            let message = parse(change).unwrap_err().to_string();
            assert!(message.contains(word), "{change}: {message}");
        }
    }
}
