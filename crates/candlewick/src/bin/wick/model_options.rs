//! The options that name a model, shared by every command that opens one.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use candle_fused::DeviceKind;
use candlewick::model::{self, Decoder, ModelFiles};
use candlewick::{Error, Result, embedded, lora};
use clap::{Args, ValueEnum};
use tokenizers::Tokenizer;

#[derive(Debug, Clone, Args)]
pub struct ModelOptions {
    /// A Hugging Face model folder [default: the small base that wick carries]
    #[arg(long, value_name = "FOLDER")]
    pub model: Option<PathBuf>,
    /// Type of the weights and activations (frozen matrices stored in 16 bits stay so beside f32 on a CPU)
    #[arg(long, value_enum, default_value_t = Precision::Auto)]
    pub dtype: Precision,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Place::Auto)]
    pub device: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 for the embedded base and for random weights, otherwise as the files have it
    Auto,
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// CUDA where this build and machine have it, else the CPU; Metal has not been run on a Mac yet
    Auto,
    Cpu,
    Metal,
    Cuda,
}

/// A model, ready to use.
pub struct Opened {
    pub decoder: Decoder,
    pub tokenizer: Tokenizer,
}

impl ModelOptions {
    /// The folder, or the embedded base.
    pub fn files(&self) -> ModelFiles {
        self.model.clone().map_or(embedded::BASE, ModelFiles::Folder)
    }

    /// How messages and checkpoints call the model.
    pub fn name(&self) -> String {
        self.model.as_ref().map_or_else(|| "(embedded)".to_owned(), |folder| folder.display().to_string())
    }

    /// The dtype to load, `None` for the files' own.
    pub fn dtype(&self) -> Option<DType> {
        match self.dtype {
            Precision::Auto => self.model.is_none().then_some(DType::F32),
            Precision::F32 => Some(DType::F32),
            Precision::F16 => Some(DType::F16),
            Precision::Bf16 => Some(DType::BF16),
        }
    }

    /// Opens the device.
    pub fn device(&self) -> Result<Device> {
        let unavailable = |name: &str, error: &dyn std::fmt::Display| {
            Error::Config(format!("no {name} device: {error}; `wick doctor` shows what there is"))
        };
        match self.device {
            Place::Metal if !DeviceKind::Metal.is_available() => {
                Err(unavailable("Metal", &"not in this build or on this machine"))
            }
            Place::Metal => Device::new_metal(0).map_err(|e| unavailable("Metal", &e)),
            Place::Cuda => cuda().map_err(|e| unavailable("CUDA", &e)),
            Place::Auto if candle_core::utils::cuda_is_available() => Ok(cuda().unwrap_or_else(|error| {
                tracing::warn!(%error, "no CUDA device: computing on the CPU");
                Device::Cpu
            })),
            Place::Cpu | Place::Auto => Ok(Device::Cpu),
        }
    }

    /// The model's shape with random weights, frozen. Where the folder has no tokenizer, the embedded base's serves.
    pub fn draw(&self, seed: u64) -> Result<Opened> {
        let files = self.files();
        let words = if files.has("tokenizer.json") { &files } else { &embedded::BASE };
        let tokenizer = model::load_tokenizer(words, &model::load_config(&files)?)?;
        let decoder = model::draw_frozen(&files, self.dtype(), &self.device()?, seed)?;
        Ok(Opened { decoder, tokenizer })
    }

    /// Loads the model with its weights frozen, and the adapter if one is named.
    pub fn open(&self, adapter: Option<&Path>) -> Result<Opened> {
        let files = self.files();
        let tokenizer = model::load_tokenizer(&files, &model::load_config(&files)?)?;
        let mut decoder = model::load_frozen(&files, self.dtype(), &self.device()?)?;
        if let Some(adapter) = adapter {
            lora::load(&mut decoder, adapter)?;
        }
        Ok(Opened { decoder, tokenizer })
    }
}

/// The first NVIDIA GPU.
fn cuda() -> candle_core::Result<Device> {
    let device = Device::new_cuda(0)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = &device {
        // Every tensor would be created with two events, by which streams wait for each other: a tenth of an operation's
        // time on the host.
        // SAFETY: the device's stream is each thread's own, and one thread alone uses the device.
        unsafe { cuda.disable_event_tracking() };
    }
    Ok(device)
}
