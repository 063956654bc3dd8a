//! Models: a Hugging Face folder in, a [`Decoder`] out, with its parameters frozen or trainable.

mod config;
mod decoder;
mod linear;
mod rotary;
mod weights;

pub use config::{Architecture, ModelConfig, RopeScaling};
pub use decoder::{Decoder, KvCache, ParameterSource};
pub use linear::{Adapter, Linear};
pub use weights::{ModelFiles, TensorFile, Weights};

pub(crate) use config::to_f64;
pub(crate) use weights::INDEX;

use candle_core::{DType, Device, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;

use crate::train::Parameter;
use crate::{Error, Result};

/// Reads `config.json`.
///
/// # Errors
/// The file is missing, or describes a model outside the family.
pub fn load_config(files: &ModelFiles) -> Result<ModelConfig> {
    ModelConfig::parse(&files.text("config.json")?, &files.path("config.json"))
}

/// Reads `tokenizer.json`, which must not have more tokens than the model's embedding.
///
/// # Errors
/// The file is missing or malformed, or its vocabulary is too large for the model.
pub fn load_tokenizer(files: &ModelFiles, config: &ModelConfig) -> Result<tokenizers::Tokenizer> {
    let name = "tokenizer.json";
    let tokenizer = tokenizers::Tokenizer::from_bytes(files.read(name)?)
        .map_err(|e| Error::model(files.path(name), e))?;
    let size = tokenizer.get_vocab_size(true);
    if size > config.vocab_size {
        return Err(Error::model(
            files.path(name),
            format!("{size} tokens, but the model's vocab_size is {}", config.vocab_size),
        ));
    }
    Ok(tokenizer)
}

/// Reads a model whose parameters are frozen: no gradient is ever computed for them.
///
/// `dtype` is f32, f16 or bf16; `None` keeps the dtype of the files.
///
/// # Errors
/// Files that are missing, truncated or malformed; tensors that are missing, unknown, or of another shape.
pub fn load_frozen(files: &ModelFiles, dtype: Option<DType>, device: &Device) -> Result<Decoder> {
    let mut source = Weights::open(files, dtype, device)?;
    let decoder = build(load_config(files)?, &mut source)?;
    source.finish()?;
    Ok(decoder)
}

/// A model of this folder's `config.json` with frozen parameters that are drawn as [`RandomWeights`] does, whatever weights
/// the folder has: for what does not depend on them, such as the speed and memory of a step.
///
/// # Errors
/// As [`load_config`].
pub fn draw_frozen(files: &ModelFiles, dtype: Option<DType>, device: &Device, seed: u64) -> Result<Decoder> {
    let config = load_config(files)?;
    let mut source = RandomWeights::new(&config, seed, dtype.unwrap_or(DType::F32), device);
    Decoder::build(config, &mut source)
}

/// Reads a model whose parameters are all trainable, or draws them as [`RandomWeights`] does where the folder has no
/// weights.
///
/// # Errors
/// As [`load_frozen`].
pub fn load_trainable(
    files: &ModelFiles,
    dtype: Option<DType>,
    device: &Device,
    seed: u64,
) -> Result<(Decoder, Vec<Parameter>)> {
    let config = load_config(files)?;
    let mut parameters = Vec::new();
    let decoder = if files.weight_files()?.is_empty() {
        let init = RandomWeights::new(&config, seed, dtype.unwrap_or(DType::F32), device);
        build(config, &mut Trainable(init, &mut parameters))?
    } else {
        let mut source = Trainable(Weights::open(files, dtype, device)?, &mut parameters);
        let decoder = build(config, &mut source)?;
        source.0.finish()?;
        decoder
    };
    Ok((decoder, parameters))
}

/// Builds the decoder; a source of files may also hold what older exports carried and nothing needs.
fn build<S: ParameterSource>(config: ModelConfig, source: &mut S) -> Result<Decoder> {
    let redundant = (0..config.num_hidden_layers)
        .map(|layer| format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"))
        .chain(config.tie_word_embeddings.then(|| "lm_head.weight".to_string()))
        .collect::<Vec<_>>();
    let decoder = Decoder::build(config, source)?;
    source.forget(&redundant);
    Ok(decoder)
}

/// Makes every parameter of another source trainable, and lists them.
struct Trainable<'a, S>(S, &'a mut Vec<Parameter>);

impl<S: ParameterSource> ParameterSource for Trainable<'_, S> {
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let var = Var::from_tensor(&self.0.take(name, shape)?)?;
        let tensor = var.as_tensor().clone();
        self.1.push(Parameter { name: name.into(), var, zero_first_gradient: false });
        Ok(tensor)
    }
    fn forget(&mut self, names: &[String]) {
        self.0.forget(names);
    }
}

/// Draws fresh parameters as transformers does: matrices are normal with the configuration's `initializer_range`, norms
/// one, biases zero. The same seed gives the same values, whatever the number of threads.
pub struct RandomWeights {
    seed: u64,
    /// Blocks drawn so far; each has a stream of its own.
    blocks: u64,
    std: f64,
    dtype: DType,
    device: Device,
}

impl RandomWeights {
    /// Parameters for a model of this configuration, in f32, f16 or bf16.
    #[must_use]
    pub fn new(config: &ModelConfig, seed: u64, dtype: DType, device: &Device) -> Self {
        Self { seed, blocks: 0, std: config.initializer_range, dtype, device: device.clone() }
    }

    fn matrix(&mut self, shape: &[usize]) -> Result<Tensor> {
        const BLOCK: usize = 1 << 16;
        let normal =
            Normal::new(0.0, self.std).map_err(|e| Error::Config(format!("initializer_range: {e}")))?;
        let mut values = vec![0f32; shape.iter().product()];
        let first = self.blocks;
        self.blocks += values.len().div_ceil(BLOCK) as u64;
        values.par_chunks_mut(BLOCK).enumerate().for_each(|(index, block)| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(first + index as u64);
            #[expect(clippy::cast_possible_truncation, reason = "drawn in f64, kept in f32")]
            block.fill_with(|| normal.sample(&mut rng) as f32);
        });
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }
}

impl ParameterSource for RandomWeights {
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = if shape.len() == 2 {
            self.matrix(shape)?
        } else if name.rsplit('.').next() == Some("bias") {
            Tensor::zeros(shape, DType::F32, &self.device)?
        } else {
            Tensor::ones(shape, DType::F32, &self.device)?
        };
        Ok(tensor.to_dtype(self.dtype)?)
    }
}
