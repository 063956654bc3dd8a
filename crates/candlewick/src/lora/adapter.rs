//! Adapters on a model: attached fresh, read from PEFT's files, and written to them.

use std::path::Path;

use candle_core::{DType, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::{LoraConfig, Modules};
use crate::files::{write_atomically, write_safetensors};
use crate::model::{Adapter, Decoder, Linear, TensorFile, to_f64};
use crate::train::Parameter;
use crate::{Error, Result};

/// The weights' file in an adapter folder.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// The configuration's file in an adapter folder.
pub const CONFIG: &str = "adapter_config.json";

/// PEFT's name of one adapter tensor; `matrix` is `A` or `B`.
pub(super) fn tensor_name(path: &str, matrix: char) -> String {
    format!("base_model.model.{path}.lora_{matrix}.weight")
}

/// Puts a fresh adapter beside every targeted projection and returns its trainable tensors, in f32 whatever the
/// model's dtype: A is uniform in `±1/√in` (PyTorch's `kaiming_uniform_(a=√5)`), B is zero.
///
/// # Errors
/// An invalid configuration, or targets that match nothing.
pub fn attach(decoder: &mut Decoder, config: &LoraConfig, seed: u64) -> Result<Vec<Parameter>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    attach_with(decoder, config, |linear, rank| {
        let (input, output) = linear.dims();
        #[expect(clippy::cast_possible_truncation, reason = "rounding the bound to f32")]
        let bound = to_f64(input).sqrt().recip() as f32;
        let a: Vec<f32> = (0..rank * input).map(|_| rng.random_range(-bound..bound)).collect();
        let device = linear.weight.device();
        Ok((Tensor::from_vec(a, (rank, input), device)?, Tensor::zeros((output, rank), DType::F32, device)?))
    })
}

/// Reads an adapter folder that PEFT or this crate wrote, puts it on the model, and returns its configuration and
/// trainable tensors.
///
/// # Errors
/// Missing or malformed files, an unsupported kind of adapter, or tensors that are missing, unknown, or of a shape
/// that does not fit the model.
pub fn load(decoder: &mut Decoder, folder: &Path) -> Result<(LoraConfig, Vec<Parameter>)> {
    let (config, file) = open(folder)?;
    let device = decoder.device().clone();
    let mut taken = 0;
    let parameters = attach_with(decoder, &config, |linear, rank| {
        let (input, output) = linear.dims();
        let mut take = |matrix, shape: [usize; 2]| -> Result<Tensor> {
            let name = tensor_name(&linear.path, matrix);
            let got = file.shape(&name)?;
            if got != shape {
                let message = format!("tensor {name} must be {shape:?}, got {got:?}");
                return Err(Error::model(file.path(), message));
            }
            taken += 1;
            Ok(file.load(&name, &device)?.to_dtype(DType::F32)?)
        };
        Ok((take('A', [rank, input])?, take('B', [output, rank])?))
    })?;
    let known: Vec<_> = parameters.iter().map(|parameter| parameter.name.as_str()).collect();
    if let Some(unknown) = file.names().iter().find(|name| !known.contains(&name.as_str())) {
        let message = format!("tensor {unknown} belongs to no target of {CONFIG}");
        return Err(Error::model(file.path(), message));
    }
    debug_assert_eq!(taken, parameters.len());
    Ok((config, parameters))
}

/// Opens an adapter folder's configuration and weights.
pub(super) fn open(folder: &Path) -> Result<(LoraConfig, TensorFile)> {
    let path = folder.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let config = LoraConfig::parse(&text, &path)?;
    Ok((config, TensorFile::open(&folder.join(WEIGHTS))?))
}

/// Writes an adapter folder as PEFT does. Each file appears whole or not at all; the weights come last.
///
/// # Errors
/// A file cannot be written; what was there before stays.
pub fn save(folder: &Path, config: &LoraConfig, parameters: &[Parameter]) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let json = serde_json::to_value(config)
        .and_then(|value| {
            // PEFT writes its fields sorted.
            let sorted: std::collections::BTreeMap<_, _> = value.as_object().into_iter().flatten().collect();
            serde_json::to_string_pretty(&sorted)
        })
        .map_err(|e| Error::Adapter(format!("{CONFIG}: {e}")))?;
    write_atomically(&folder.join(CONFIG), json.as_bytes())?;
    let tensors = parameters
        .iter()
        .map(|parameter| (parameter.name.clone(), parameter.var.as_detached_tensor()))
        .collect();
    let header = [("format".to_string(), "pt".to_string())];
    write_safetensors(&folder.join(WEIGHTS), tensors, header)
}

/// Attaches adapters whose tensors `make` gives for a projection and a rank.
fn attach_with(
    decoder: &mut Decoder,
    config: &LoraConfig,
    mut make: impl FnMut(&Linear, usize) -> Result<(Tensor, Tensor)>,
) -> Result<Vec<Parameter>> {
    config.validate()?;
    let selected: Vec<String> = config
        .select(decoder.linears().map(|linear| linear.path.as_str()))?
        .into_iter()
        .map(String::from)
        .collect();
    let mut parameters = Vec::new();
    let targets = decoder.linears_mut().filter(|linear| selected.contains(&linear.path));
    for (index, linear) in (0..).zip(targets) {
        let (a, b) = make(linear, config.rank(&linear.path)?)?;
        let (a, b) = (Var::from_tensor(&a)?, Var::from_tensor(&b)?);
        let b_is_zero = b.abs()?.sum_all()?.to_scalar::<f32>()? == 0.0;
        for (matrix, var, zero_first_gradient) in [('A', &a, b_is_zero), ('B', &b, false)] {
            parameters.push(Parameter {
                name: tensor_name(&linear.path, matrix),
                var: var.clone(),
                zero_first_gradient,
            });
        }
        linear.adapter = Some(Adapter {
            a,
            b,
            scaling: config.scaling(&linear.path)?,
            dropout: config.lora_dropout,
            index,
        });
    }
    Ok(parameters)
}

/// The module names that `all-linear` stands for in this model, as PEFT writes them into its configuration.
#[must_use]
pub fn expand_all_linear(config: LoraConfig, decoder: &Decoder) -> LoraConfig {
    if !matches!(&config.target_modules, Some(Modules::Pattern(pattern)) if pattern == "all-linear") {
        return config;
    }
    let mut names: Vec<String> = decoder
        .linears()
        .filter(|linear| linear.path != "lm_head")
        .filter_map(|linear| linear.path.rsplit('.').next().map(String::from))
        .collect();
    names.sort_unstable();
    names.dedup();
    LoraConfig { target_modules: Some(Modules::Names(names)), ..config }
}
