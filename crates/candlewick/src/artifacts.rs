//! What a training run is for: an adapter folder, or a model folder.

use std::path::Path;

use candle_core::DType;

use crate::files::{write_atomically, write_safetensors};
use crate::lora::{self, LoraConfig};
use crate::model::ModelFiles;
use crate::train::{Artifacts, Parameter};
use crate::{Error, Result};

/// Writes an adapter as PEFT does.
pub struct AdapterArtifacts {
    /// What `adapter_config.json` will say.
    pub config: LoraConfig,
    /// The adapter's tensors.
    pub parameters: Vec<Parameter>,
}

impl Artifacts for AdapterArtifacts {
    fn save(&self, folder: &Path) -> Result<()> {
        lora::save(folder, &self.config, &self.parameters)
    }
}

/// Writes a whole model folder: the weights as they are now, everything else as in the folder it came from.
pub struct ModelArtifacts {
    /// Where configuration and tokenizer come from.
    pub files: ModelFiles,
    /// All tensors of the model.
    pub parameters: Vec<Parameter>,
    /// The dtype to write, `None` for the one trained in.
    pub dtype: Option<DType>,
}

impl Artifacts for ModelArtifacts {
    fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        self.files.copy_texts(folder)?;
        let dtype = self
            .dtype
            .or_else(|| self.parameters.first().map(|parameter| parameter.var.dtype()))
            .unwrap_or(DType::F32);
        write_atomically(&folder.join("config.json"), self.config(dtype)?.as_bytes())?;
        let tensors = self
            .parameters
            .iter()
            .map(|parameter| {
                Ok((parameter.name.clone(), parameter.var.as_detached_tensor().to_dtype(dtype)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let header = [("format".to_string(), "pt".to_string())];
        write_safetensors(&folder.join("model.safetensors"), tensors, header)
    }
}

impl ModelArtifacts {
    /// `config.json` with the dtype that is written, under the names that transformers 4 and 5 read.
    fn config(&self, dtype: DType) -> Result<String> {
        let name = match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        let path = self.files.path("config.json");
        let mut config: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&self.files.text("config.json")?).map_err(|e| Error::model(&path, e))?;
        let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        config.insert(key.into(), name.into());
        serde_json::to_string_pretty(&config).map_err(|e| Error::model(&path, e))
    }
}
