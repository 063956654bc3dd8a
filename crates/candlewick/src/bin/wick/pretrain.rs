//! `wick pretrain`: all parameters of a model.

use std::path::PathBuf;

use candle_core::DType;
use candlewick::data::{Dataset, EncodeOptions, sequence_limit};
use candlewick::train::{Job, Start};
use candlewick::{FineTune, ModelArtifacts, model};
use clap::Args;

use crate::Outcome;
use crate::model_options::{ModelOptions, Precision};
use crate::training::{self, Defaults, LoopOptions, ScheduleName};

const DEFAULTS: Defaults = Defaults {
    iters: 1000,
    batch_size: 4,
    learning_rate: 3e-4,
    schedule: ScheduleName::Cosine,
    warmup: 50,
    val_batches: 25,
    steps_per_report: 10,
    steps_per_eval: 200,
};

#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// A folder with train.jsonl and, for validation, valid.jsonl. Rows are joined and cut into blocks
    #[arg(long, value_name = "FOLDER")]
    data: PathBuf,
    /// Where the model, its checkpoints, metrics.jsonl and loss.svg go
    #[arg(long, value_name = "FOLDER", default_value = "pretrained")]
    save_path: PathBuf,
    /// Type of the weights in the files [default: the one trained in]
    #[arg(long, value_enum, default_value_t = Precision::Auto, hide_default_value = true)]
    save_dtype: Precision,

    #[command(flatten)]
    training: LoopOptions,
}

pub fn run(options: &Options) -> Outcome {
    let config = options.training.train_config(&DEFAULTS)?;
    let files = options.model.files();
    let shape = model::load_config(&files)?;
    let tokenizer = model::load_tokenizer(&files, &shape)?;
    let eos = shape.eos_token_ids.first().copied();
    let length = sequence_limit(options.training.max_seq_length, 2048, Some(shape.max_position_embeddings))?;
    // Rows of any length: they are packed.
    let encode = EncodeOptions { eos, mask_prompt: false, max_length: usize::MAX, truncate: false };
    let (train, valid) = training::rows(Some(&options.data))?;
    let train = Dataset::encode(&train, &tokenizer, encode)?.pack(length)?;
    let valid = valid
        .map(|rows| Dataset::encode(&rows, &tokenizer, encode).and_then(|dataset| dataset.pack(length)))
        .transpose()?;

    let device = options.model.device()?;
    let (decoder, parameters) =
        model::load_trainable(&files, options.model.dtype(), &device, options.training.seed)?;
    let settings = [
        ("model".to_owned(), options.model.name()),
        ("dtype".to_owned(), format!("{:?}", options.model.dtype)),
    ];
    let dtype = match options.save_dtype {
        Precision::Auto => None,
        Precision::F32 => Some(DType::F32),
        Precision::F16 => Some(DType::F16),
        Precision::Bf16 => Some(DType::BF16),
    };
    let artifacts = ModelArtifacts { files, parameters: parameters.clone(), dtype };
    let model = FineTune::new(decoder, parameters);
    let job = Job {
        model: &model,
        artifacts: &artifacts,
        train: &train,
        valid: valid.as_ref(),
        folder: &options.save_path,
        settings: &settings,
        start: Start::New,
    };
    let prompt = options.training.sample_prompt.as_deref();
    training::run(&options.training, &config, &model, &tokenizer, prompt, &job)
}
