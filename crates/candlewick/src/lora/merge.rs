//! An adapter folded into its base, and taken out again: `W ± scaling · B·A`, file by file.
//!
//! The sum is formed in f32 and rounded once to the base's dtype. Unmerging forms the same delta, so it restores an
//! f32 weight to within two roundings, and a 16-bit one to within two roundings of that format.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::adapter::{open, tensor_name};
use crate::files::{write_atomically, write_safetensors};
use crate::model::{Decoder, INDEX, Linear, ModelFiles, ParameterSource, TensorFile, load_config};
use crate::{Error, Result};

/// Whether the delta is added or taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Base and adapter in, merged model out.
    Merge,
    /// Merged model and adapter in, base out.
    Unmerge,
}

/// Writes a full model folder with the adapter folded in (or out) to `output`, which must not exist or be empty.
///
/// Everything else of the base folder (tokenizer, templates, generation settings) is copied. One weight file is held
/// in memory at a time.
///
/// # Errors
/// Files that do not fit together, or `output` is not empty; nothing is overwritten.
pub fn merge(base: &ModelFiles, adapter: &Path, output: &Path, direction: Direction) -> Result<()> {
    if std::fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::Config(format!(
            "{} is not empty; merge writes into a new folder",
            output.display()
        )));
    }
    let (deltas, weight_files) = deltas(base, adapter, direction)?;
    std::fs::create_dir_all(output).map_err(Error::io(output))?;
    let mut merged = 0;
    for name in &weight_files {
        let file = base.open(name)?;
        let tensors = file
            .names()
            .into_iter()
            .map(|name| {
                let tensor = file.load(&name, &Device::Cpu)?;
                let Some(delta) = deltas.get(&name) else {
                    return Ok((name, tensor));
                };
                merged += 1;
                let sum = (tensor.to_dtype(DType::F32)? + delta.tensor()?)?;
                Ok((name, sum.to_dtype(tensor.dtype())?))
            })
            .collect::<Result<Vec<_>>>()?;
        let header =
            file.header().unwrap_or_else(|| HashMap::from([("format".to_string(), "pt".to_string())]));
        write_safetensors(&output.join(name), tensors, header)?;
    }
    if merged != deltas.len() {
        return Err(Error::Adapter(format!(
            "{} of {} adapted weights are not in the base's files",
            deltas.len() - merged,
            deltas.len()
        )));
    }
    if weight_files.len() > 1 {
        write_atomically(&output.join(INDEX), &base.read(INDEX)?)?;
    }
    base.copy_texts(output)
}

/// Gives every parameter its shape and no memory: enough to ask a model for its projections.
struct Outline;

impl ParameterSource for Outline {
    fn take(&mut self, _name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
    }
}

/// One weight's low-rank change, multiplied out only when it is needed.
struct Delta {
    a: Tensor,
    b: Tensor,
    factor: f64,
}

impl Delta {
    /// `[out, in]` in f32.
    fn tensor(&self) -> Result<Tensor> {
        Ok((self.b.matmul(&self.a)? * self.factor)?)
    }
}

/// The changes by weight name, and the names of the base's weight files.
fn deltas(
    base: &ModelFiles,
    adapter: &Path,
    direction: Direction,
) -> Result<(BTreeMap<String, Delta>, Vec<String>)> {
    let (config, file) = open(adapter)?;
    let model = Decoder::build(load_config(base)?, &mut Outline)?;
    let linears: Vec<&Linear> = model.linears().collect();
    let selected = config.select(linears.iter().map(|linear| linear.path.as_str()))?;
    if model.config().tie_word_embeddings && selected.contains(&"lm_head") {
        return Err(Error::Adapter(
            "lm_head shares its weight with the embedding, so its adapter cannot be merged".into(),
        ));
    }
    let mut deltas = BTreeMap::new();
    for linear in linears.iter().filter(|linear| selected.contains(&linear.path.as_str())) {
        let (input, output) = linear.dims();
        let rank = config.rank(&linear.path)?;
        let factor = f64::from(config.scaling(&linear.path)?);
        let delta = Delta {
            a: take(&file, &tensor_name(&linear.path, 'A'), [rank, input])?,
            b: take(&file, &tensor_name(&linear.path, 'B'), [output, rank])?,
            factor: if direction == Direction::Merge { factor } else { -factor },
        };
        deltas.insert(format!("{}.weight", linear.path), delta);
    }
    if file.names().len() != 2 * deltas.len() {
        return Err(Error::model(file.path(), "holds tensors that belong to no target"));
    }
    Ok((deltas, base.weight_files()?))
}

fn take(file: &TensorFile, name: &str, shape: [usize; 2]) -> Result<Tensor> {
    let got = file.shape(name)?;
    if got != shape {
        return Err(Error::model(file.path(), format!("tensor {name} must be {shape:?}, got {got:?}")));
    }
    Ok(file.load(name, &Device::Cpu)?.to_dtype(DType::F32)?)
}
