//! One decoder for the Llama family: pre-norm blocks of grouped-query attention and a gated MLP.

use candle_core::{DType, Device, Tensor};
use candle_fused::{Mask, RopeLayout, SoftmaxOptions, view};
use candle_nn::kv_cache::KvCache as LayerCache;

use super::config::{Architecture, ModelConfig, to_f64};
use super::linear::Linear;
use super::rotary::Rotary;
use crate::{Error, Result};

/// Hands out the decoder's parameters by name and shape while it is built: read from files, or drawn.
pub trait ParameterSource {
    /// The parameter `name` of this shape.
    ///
    /// # Errors
    /// It is missing or has another shape.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// These parameters will not be asked for, and may be there all the same.
    fn forget(&mut self, _names: &[String]) {}
}

/// A decoder-only language model.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: ModelConfig,
    /// `[vocab, hidden]`
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    lm_head: Linear,
    rotary: Rotary,
}

#[derive(Debug, Clone)]
struct Layer {
    input_norm: Tensor,
    attention: Attention,
    post_attention_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Debug, Clone)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    /// Qwen3's norms over each head of q and k, `[head_dim]`.
    head_norms: Option<(Tensor, Tensor)>,
}

/// What the layers of one call share.
struct Call<'a> {
    config: &'a ModelConfig,
    cos: Tensor,
    sin: Tensor,
    dropout_seed: Option<u64>,
}

/// Keys and values of the tokens seen so far, for generation.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    length: usize,
}

impl KvCache {
    /// An empty cache for a model.
    #[must_use]
    pub fn new(config: &ModelConfig) -> Self {
        const GROWTH: usize = 256;
        let growth = GROWTH.min(config.max_position_embeddings);
        Self { layers: vec![LayerCache::new(2, growth); config.num_hidden_layers], length: 0 }
    }

    /// Tokens in the cache.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing was seen yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

impl Decoder {
    /// Builds the model from its parameters, asked for by transformers' names.
    ///
    /// # Errors
    /// A parameter is missing or has another shape.
    pub fn build(config: ModelConfig, source: &mut dyn ParameterSource) -> Result<Self> {
        let hidden = config.hidden_size;
        let embedding = source.take("model.embed_tokens.weight", &[config.vocab_size, hidden])?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::build(&config, index, source))
            .collect::<Result<Vec<_>>>()?;
        let norm = source.take("model.norm.weight", &[hidden])?;
        let lm_head = if config.tie_word_embeddings {
            Linear { path: "lm_head".into(), weight: embedding.clone(), bias: None, adapter: None }
        } else {
            linear(source, "lm_head".into(), hidden, config.vocab_size, false)?
        };
        Ok(Self { rotary: Rotary::new(&config), config, embedding, layers, norm, lm_head })
    }

    /// The validated configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The dtype of the activations, and of the parameters, but for matrices that stay narrower beside f32.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.norm.dtype()
    }

    /// The device of the parameters.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Every projection, in the order of the layers, the output projection last.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers
            .iter()
            .flat_map(|layer| {
                let Attention { q, k, v, o, .. } = &layer.attention;
                [q, k, v, o, &layer.gate, &layer.up, &layer.down]
            })
            .chain(std::iter::once(&self.lm_head))
    }

    /// Every projection, mutably, in the order of [`Decoder::linears`].
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers
            .iter_mut()
            .flat_map(|layer| {
                let Attention { q, k, v, o, .. } = &mut layer.attention;
                [q, k, v, o, &mut layer.gate, &mut layer.up, &mut layer.down]
            })
            .chain(std::iter::once(&mut self.lm_head))
    }

    /// Next-token logits `[batch, tokens, vocab]` for token ids `[batch, tokens]` (u32), in the model's dtype.
    ///
    /// With a cache, the ids continue what it holds. `dropout_seed` turns LoRA dropout on.
    ///
    /// # Errors
    /// More positions than the model has, an id outside the vocabulary, or a failed tensor operation.
    pub fn forward(
        &self,
        ids: &Tensor,
        cache: Option<&mut KvCache>,
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        let x = self.hidden(ids, cache, dropout_seed)?;
        self.lm_head.forward(&x, dropout_seed)
    }

    /// The mean negative log-likelihood, a differentiable f32 scalar, of `targets [batch, tokens]` (i64) that are not
    /// `ignored` after the ids `[batch, tokens]`. A frozen output projection's logits are never held all at once.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; a target outside the vocabulary.
    pub fn loss(
        &self,
        ids: &Tensor,
        targets: &Tensor,
        ignored: i64,
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        let x = self.hidden(ids, None, dropout_seed)?;
        let targets = targets.flatten_all()?;
        if let Some(weight) = self.lm_head.frozen_weight() {
            return Ok(candle_fused::linear_cross_entropy(&x, weight, &targets, Some(ignored))?);
        }
        let logits = self.lm_head.forward(&x, dropout_seed)?;
        let vocabulary = self.config.vocab_size;
        let logits = view::reshape(&logits, (targets.elem_count(), vocabulary))?;
        Ok(candle_fused::cross_entropy(&logits, &targets, Some(ignored))?)
    }

    /// Logits `[batch, 1, vocab]` of the last position only, which is all that sampling needs.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn next_logits(&self, ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let x = self.hidden(ids, Some(cache), None)?;
        let last = x.narrow(1, x.dim(1)? - 1, 1)?.contiguous()?;
        self.lm_head.forward(&last, None)
    }

    /// The residual stream after the last norm, `[batch, tokens, hidden]`.
    fn hidden(
        &self,
        ids: &Tensor,
        mut cache: Option<&mut KvCache>,
        dropout_seed: Option<u64>,
    ) -> Result<Tensor> {
        let (batch, tokens) = ids.dims2()?;
        let start = cache.as_ref().map_or(0, |cache| cache.len());
        let limit = self.config.max_position_embeddings;
        if start + tokens > limit {
            return Err(Error::Config(format!(
                "a sequence of {} tokens is longer than the model's {limit} positions",
                start + tokens
            )));
        }
        let (cos, sin) = self.rotary.tables(start, tokens, self.device())?;
        let call = Call { config: &self.config, cos, sin, dropout_seed };
        let embedded = self.embedding.index_select(&ids.flatten_all()?, 0)?.to_dtype(self.dtype())?;
        let mut x = embedded.reshape((batch, tokens, self.config.hidden_size))?;
        for (index, layer) in self.layers.iter().enumerate() {
            let cache = cache.as_mut().and_then(|cache| cache.layers.get_mut(index));
            x = layer.forward(&x, &call, cache)?;
        }
        if let Some(cache) = cache {
            cache.length += tokens;
        }
        Ok(candle_fused::rms_norm(&x, Some(&self.norm), self.config.rms_norm_eps)?)
    }
}

impl Layer {
    fn build(config: &ModelConfig, index: usize, source: &mut dyn ParameterSource) -> Result<Self> {
        let prefix = format!("model.layers.{index}");
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q_width, kv_width) =
            (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let attention = |name: &str| format!("{prefix}.self_attn.{name}_proj");
        let mlp = |name: &str| format!("{prefix}.mlp.{name}_proj");
        let head_norms = if config.architecture == Architecture::Qwen3 {
            let mut norm = |name: &str| {
                source.take(&format!("{prefix}.self_attn.{name}_norm.weight"), &[config.head_dim])
            };
            Some((norm("q")?, norm("k")?))
        } else {
            None
        };
        Ok(Self {
            input_norm: source.take(&format!("{prefix}.input_layernorm.weight"), &[hidden])?,
            attention: Attention {
                q: linear(source, attention("q"), hidden, q_width, config.qkv_bias)?,
                k: linear(source, attention("k"), hidden, kv_width, config.qkv_bias)?,
                v: linear(source, attention("v"), hidden, kv_width, config.qkv_bias)?,
                o: linear(source, attention("o"), q_width, hidden, config.output_bias)?,
                head_norms,
            },
            post_attention_norm: source
                .take(&format!("{prefix}.post_attention_layernorm.weight"), &[hidden])?,
            gate: linear(source, mlp("gate"), hidden, inner, config.mlp_bias)?,
            up: linear(source, mlp("up"), hidden, inner, config.mlp_bias)?,
            down: linear(source, mlp("down"), inner, hidden, config.mlp_bias)?,
        })
    }

    fn forward(&self, x: &Tensor, call: &Call, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let eps = call.config.rms_norm_eps;
        let normed = candle_fused::rms_norm(x, Some(&self.input_norm), eps)?;
        let x = residual(x, self.attention.forward(&normed, call, cache)?)?;
        let normed = candle_fused::rms_norm(&x, Some(&self.post_attention_norm), eps)?;
        let gate = self.gate.forward(&normed, call.dropout_seed)?;
        let up = self.up.forward(&normed, call.dropout_seed)?;
        let gated = candle_fused::silu_mul(&gate, &up)?;
        let mlp = self.down.forward(&gated, call.dropout_seed)?;
        // SAFETY: the projection alone has read it.
        unsafe { candle_fused::release(gated, &mlp) }?;
        residual(&x, mlp)
    }
}

impl Attention {
    /// Causal attention; query heads share key and value heads in groups, without repeating them.
    fn forward(&self, x: &Tensor, call: &Call, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let config = call.config;
        let (batch, tokens, _) = x.dims3()?;
        let (heads, kv_heads, width) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let split = |projection: &Linear, heads: usize| -> Result<Tensor> {
            let y = projection.forward(x, call.dropout_seed)?;
            Ok(view::reshape(&y, (batch, tokens, heads, width))?)
        };
        let (mut q, mut k, v) =
            (split(&self.q, heads)?, split(&self.k, kv_heads)?, split(&self.v, kv_heads)?);
        if let Some((q_norm, k_norm)) = &self.head_norms {
            q = candle_fused::rms_norm(&q, Some(q_norm), config.rms_norm_eps)?;
            k = candle_fused::rms_norm(&k, Some(k_norm), config.rms_norm_eps)?;
        }
        let rotate = |x: Tensor| -> Result<Tensor> {
            let x = view::transpose(&x, 1, 2)?;
            let y = candle_fused::rope(&x, &call.cos, &call.sin, RopeLayout::Half)?;
            // SAFETY: a projection or a norm has just made it, and nothing else has read it.
            unsafe { candle_fused::release(x, &y) }?;
            Ok(y)
        };
        let (q, k) = (view::transpose(&rotate(q)?, 1, 2)?, rotate(k)?);
        let (k, v) = match cache {
            Some(cache) => {
                let (k, v) = cache.append(&k, &v.transpose(1, 2)?.contiguous()?)?;
                (k.transpose(1, 2)?, v.transpose(1, 2)?)
            }
            None => (view::transpose(&k, 1, 2)?, v),
        };
        #[expect(clippy::cast_possible_truncation, reason = "rounding the scale to f32")]
        let scale = to_f64(width).sqrt().recip() as f32;
        let options = SoftmaxOptions { scale, mask: Mask::Causal };
        let y = candle_fused::attention(&q, &k, &v, options)?;
        let y = view::reshape(&y, (batch, tokens, heads * width))?;
        self.o.forward(&y, call.dropout_seed)
    }
}

/// `x + y`, after which nothing needs the values of `y`.
fn residual(x: &Tensor, y: Tensor) -> Result<Tensor> {
    let sum = candle_fused::add(x, &y)?;
    // SAFETY: a projection has just made it, and the sum alone has read it.
    unsafe { candle_fused::release(y, &sum) }?;
    Ok(sum)
}

fn linear(
    source: &mut dyn ParameterSource,
    path: String,
    input: usize,
    output: usize,
    bias: bool,
) -> Result<Linear> {
    let weight = source.take(&format!("{path}.weight"), &[output, input])?;
    let bias = bias.then(|| source.take(&format!("{path}.bias"), &[output])).transpose()?;
    Ok(Linear { path, weight, bias, adapter: None })
}
