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
/// `dtype` is f32, f16 or bf16, that of the activations; `None` keeps the dtype of the files. Matrices that the files have in
/// 16 bits stay so on a CPU beside f32 activations, which changes memory and speed, and results
/// by the order of additions alone.
///
/// # Errors
/// Files that are missing, truncated or malformed; tensors that are missing, unknown, or of another shape.
pub fn load_frozen(files: &ModelFiles, dtype: Option<DType>, device: &Device) -> Result<Decoder> {
    let mut source = Weights::open(files, dtype, device)?.narrow_matrices();
    let decoder = build(load_config(files)?, &mut source)?;
    source.finish()?;
    Ok(decoder)
}

/// A model of this folder's `config.json` with frozen parameters that are drawn as [`RandomWeights`] does, whatever weights
/// the folder has: for what does not depend on them, such as the speed and memory of a step. As from files in the dtype that
/// the configuration names, which is also what `None` keeps: see [`load_frozen`].
///
/// # Errors
/// As [`load_config`].
pub fn draw_frozen(files: &ModelFiles, dtype: Option<DType>, device: &Device, seed: u64) -> Result<Decoder> {
    let config = load_config(files)?;
    let mut source = RandomWeights::new(&config, seed, dtype.or(config.dtype).unwrap_or(DType::F32), device)
        .narrow_matrices();
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
    /// That of matrices.
    matrices: DType,
    /// What the configuration says that weights are stored in.
    stored: Option<DType>,
    device: Device,
}

impl RandomWeights {
    /// Parameters for a model of this configuration, in f32, f16 or bf16.
    #[must_use]
    pub fn new(config: &ModelConfig, seed: u64, dtype: DType, device: &Device) -> Self {
        let (std, stored) = (config.initializer_range, config.dtype);
        Self { seed, blocks: 0, std, dtype, matrices: dtype, stored, device: device.clone() }
    }

    /// As [`Weights::narrow_matrices`], for weights that would be stored as the configuration says.
    #[must_use]
    pub fn narrow_matrices(self) -> Self {
        let narrow = self.stored.filter(|_| self.device.is_cpu() && self.dtype == DType::F32);
        Self { matrices: narrow.unwrap_or(self.matrices), ..self }
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
        if shape.len() == 2 {
            return Ok(self.matrix(shape)?.to_dtype(self.matrices)?);
        }
        let tensor = if name.rsplit('.').next() == Some("bias") {
            Tensor::zeros(shape, DType::F32, &self.device)?
        } else {
            Tensor::ones(shape, DType::F32, &self.device)?
        };
        Ok(tensor.to_dtype(self.dtype)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::embedded::BASE;

    /// The loss of some tokens, and the gradients of all adapters' B.
    fn loss_of(decoder: &mut Decoder) -> (f32, Vec<f32>) {
        let config = crate::lora::LoraConfig {
            target_modules: Some(crate::lora::Modules::from_option("all-linear")),
            ..Default::default()
        };
        let config = crate::lora::expand_all_linear(config, decoder);
        let parameters = crate::lora::attach(decoder, &config, 7).unwrap();
        let ids =
            Tensor::from_vec((0..40u32).map(|i| i * 37 % 2048).collect(), (2, 20), &Device::Cpu).unwrap();
        let targets = ids.to_dtype(DType::I64).unwrap();
        let loss = decoder.loss(&ids, &targets, -100, None).unwrap();
        let gradients = loss.backward().unwrap();
        let of_b = parameters.iter().filter(|parameter| parameter.name.contains("lora_B"));
        let values = of_b
            .flat_map(|b| gradients.get(&b.var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect();
        (loss.to_scalar().unwrap(), values)
    }

    /// The embedded base is stored in bf16: beside f32 its matrices stay so, and nothing else differs.
    #[test]
    fn frozen_matrices_stay_narrow() {
        let mut narrow = load_frozen(&BASE, Some(DType::F32), &Device::Cpu).unwrap();
        assert!(narrow.linears().all(|linear| linear.weight.dtype() == DType::BF16));
        assert_eq!(narrow.dtype(), DType::F32);
        let mut source = Weights::open(&BASE, Some(DType::F32), &Device::Cpu).unwrap();
        let mut wide = build(load_config(&BASE).unwrap(), &mut source).unwrap();
        assert!(wide.linears().all(|linear| linear.weight.dtype() == DType::F32));
        let ((loss, gradients), (expected, expected_gradients)) = (loss_of(&mut narrow), loss_of(&mut wide));
        assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
        assert!(gradients.iter().any(|x| x.abs() > 1e-2), "gradients of 0 would be equal");
        for (x, y) in gradients.iter().zip(&expected_gradients) {
            assert!((x - y).abs() < 1e-6 + 1e-5 * y.abs(), "{x} {y}");
        }
        // What is trained is in the dtype that is asked for.
        let (_, parameters) = load_trainable(&BASE, Some(DType::F32), &Device::Cpu, 0).unwrap();
        assert!(parameters.iter().all(|parameter| parameter.var.dtype() == DType::F32));
    }

    /// Drawn matrices are what a file in the configuration's dtype would hold.
    #[test]
    fn drawn_matrices_are_as_stored() {
        let as_stored = draw_frozen(&BASE, None, &Device::Cpu, 3).unwrap();
        assert_eq!(as_stored.dtype(), DType::BF16);
        let drawn = draw_frozen(&BASE, Some(DType::F32), &Device::Cpu, 3).unwrap();
        let mut source = RandomWeights::new(drawn.config(), 3, DType::F32, &Device::Cpu);
        let wide = Decoder::build(drawn.config().clone(), &mut source).unwrap();
        for (narrow, wide) in drawn.linears().zip(wide.linears()) {
            assert_eq!((narrow.weight.dtype(), wide.weight.dtype()), (DType::BF16, DType::F32));
            let rounded = wide.weight.to_dtype(DType::BF16).unwrap();
            let [got, expected] = [&narrow.weight, &rounded].map(|weight| {
                weight.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            });
            assert!(got == expected, "{}", narrow.path);
        }
    }
}
