//! `wick train`: a LoRA adapter.

use std::path::PathBuf;

use candlewick::data::{Dataset, EncodeOptions, sequence_limit};
use candlewick::lora::{self, Layers, LoraConfig, Modules};
use candlewick::model::Decoder;
use candlewick::train::{Job, Parameter, Start};
use candlewick::{AdapterArtifacts, Error, FineTune, Result};
use clap::Args;

use crate::Outcome;
use crate::model_options::ModelOptions;
use crate::training::{self, Defaults, LoopOptions, ScheduleName};

/// As `mlx_lm.lora` has them.
const DEFAULTS: Defaults = Defaults {
    iters: 1000,
    batch_size: 4,
    learning_rate: 1e-5,
    schedule: ScheduleName::Constant,
    warmup: 0,
    val_batches: 25,
    steps_per_report: 10,
    steps_per_eval: 200,
};

/// For the embedded base on the embedded data.
const EMBEDDED: Defaults = Defaults {
    iters: 80,
    batch_size: 8,
    learning_rate: 1e-2,
    schedule: ScheduleName::Cosine,
    warmup: 5,
    val_batches: -1,
    steps_per_report: 10,
    steps_per_eval: 20,
};

/// A dish that is not among the embedded training rows.
const EMBEDDED_PROMPT: &str = "Beef and onion stew with thyme, for six.";

#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// Draw the model's weights instead of reading them, to measure speed and memory: its folder needs config.json alone
    #[arg(long)]
    random_weights: bool,
    /// A folder with train.jsonl and, for validation, valid.jsonl [default: the data that wick carries]
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Where the adapter, its checkpoints, metrics.jsonl and loss.svg go
    #[arg(long, value_name = "FOLDER", default_value = "adapters")]
    adapter_path: PathBuf,
    /// Learn completions only, not their prompts
    #[arg(long)]
    mask_prompt: bool,
    /// Cut longer sequences instead of refusing them
    #[arg(long)]
    truncate: bool,

    /// Rank of the adapter's matrices
    #[arg(long, visible_alias = "lora-rank", default_value_t = 8)]
    rank: usize,
    /// The adapter is scaled by alpha / rank
    #[arg(long, visible_alias = "lora-alpha", default_value_t = 16.0)]
    alpha: f64,
    /// Share of the adapter's input that is dropped in training
    #[arg(long, visible_alias = "lora-dropout", default_value_t = 0.0)]
    dropout: f32,
    /// Scale by alpha / √rank instead
    #[arg(long, visible_alias = "use-rslora")]
    rslora: bool,
    /// Projections that get an adapter: names with commas, a regular expression, or all-linear [default: q and v;
    /// all-linear for the base that wick carries]
    #[arg(long, value_name = "MODULES")]
    target_modules: Option<String>,
    /// Only the last so many layers; -1 for all
    #[arg(long, allow_negative_numbers = true, default_value_t = -1)]
    num_layers: i64,
    /// Start from an adapter's weights and shape: its folder, or a file in it
    #[arg(long, value_name = "PATH")]
    resume_adapter_file: Option<PathBuf>,

    #[command(flatten)]
    training: LoopOptions,
}

pub fn run(options: &Options) -> Outcome {
    let is_embedded = options.model.model.is_none() && options.data.is_none();
    if options.model.model.is_some() && options.data.is_none() && !options.random_weights {
        return Err(Error::Config("--model needs --data: a folder with train.jsonl".to_owned()));
    }
    let defaults = if is_embedded { &EMBEDDED } else { &DEFAULTS };
    let config = options.training.train_config(defaults)?;
    let mut opened = if options.random_weights {
        options.model.draw(options.training.seed)?
    } else {
        options.model.open(None)?
    };
    let shape = opened.decoder.config();
    let encode = EncodeOptions {
        eos: shape.eos_token_ids.first().copied(),
        mask_prompt: options.mask_prompt,
        max_length: sequence_limit(
            options.training.max_seq_length,
            2048,
            Some(shape.max_position_embeddings),
        )?,
        truncate: options.truncate,
    };
    let (train, valid) = training::rows(options.data.as_deref())?;
    let train = Dataset::encode(&train, &opened.tokenizer, encode)?;
    let valid = valid.map(|rows| Dataset::encode(&rows, &opened.tokenizer, encode)).transpose()?;
    training::tell_truncation(&train);

    let (lora, parameters) = options.adapter(&mut opened.decoder)?;
    let settings = settings(options, &lora);
    let artifacts = AdapterArtifacts { config: lora, parameters: parameters.clone() };
    let model = FineTune::new(opened.decoder, parameters);
    let job = Job {
        model: &model,
        artifacts: &artifacts,
        train: &train,
        valid: valid.as_ref(),
        folder: &options.adapter_path,
        settings: &settings,
        start: Start::New,
    };
    let prompt = options.training.sample_prompt.as_deref().or(is_embedded.then_some(EMBEDDED_PROMPT));
    training::run(&options.training, &config, &model, &opened.tokenizer, prompt, &job)
}

impl Options {
    /// A new adapter of the shape that the flags give, or the one to start from.
    fn adapter(&self, decoder: &mut Decoder) -> Result<(LoraConfig, Vec<Parameter>)> {
        if let Some(path) = &self.resume_adapter_file {
            let folder = if path.is_file() { path.parent().unwrap_or(path) } else { path };
            return lora::load(decoder, folder);
        }
        let targets = self.target_modules.as_deref().or(self.model.model.is_none().then_some("all-linear"));
        let config = LoraConfig {
            base_model_name_or_path: self.model.model.as_ref().map(|folder| folder.display().to_string()),
            r: self.rank,
            lora_alpha: self.alpha,
            lora_dropout: self.dropout,
            use_rslora: self.rslora,
            target_modules: targets.map(Modules::from_option),
            layers_to_transform: self.layers(decoder.config().num_hidden_layers)?,
            ..LoraConfig::default()
        };
        let config = lora::expand_all_linear(config, decoder);
        let parameters = lora::attach(decoder, &config, self.training.seed)?;
        Ok((config, parameters))
    }

    /// The last `num_layers` layers of a model that has `all`.
    fn layers(&self, all: usize) -> Result<Option<Layers>> {
        match usize::try_from(self.num_layers) {
            Ok(0) | Err(_) if self.num_layers != -1 => {
                let got = self.num_layers;
                Err(Error::Config(format!("num-layers must be at least 1, or -1 for all, got {got}")))
            }
            Ok(layers) if layers < all => Ok(Some(Layers::Many((all - layers..all).collect()))),
            _ => Ok(None),
        }
    }
}

/// What a resumed run must have the same, by the flags' names.
fn settings(options: &Options, lora: &LoraConfig) -> Vec<(String, String)> {
    let model = &options.model;
    let targets = lora.target_modules.as_ref().and_then(|modules| serde_json::to_string(modules).ok());
    [
        ("model", if options.random_weights { format!("{} (random)", model.name()) } else { model.name() }),
        ("dtype", format!("{:?}", model.dtype)),
        ("rank", lora.r.to_string()),
        ("alpha", lora.lora_alpha.to_string()),
        ("dropout", lora.lora_dropout.to_string()),
        ("rslora", lora.use_rslora.to_string()),
        ("target-modules", targets.unwrap_or_else(|| "q_proj,v_proj".to_owned())),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}
