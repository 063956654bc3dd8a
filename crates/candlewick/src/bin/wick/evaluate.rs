//! `wick evaluate`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use candlewick::data::{Dataset, EncodeOptions, Rows, sequence_limit};
use candlewick::{Error, FineTune, embedded, train};
use clap::Args;

use crate::Outcome;
use crate::model_options::ModelOptions;

#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// An adapter folder to apply
    #[arg(long, value_name = "FOLDER")]
    adapter_path: Option<PathBuf>,
    /// A folder with test.jsonl or valid.jsonl, or one such file [default: the data that wick carries]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Sequences per forward pass
    #[arg(long, default_value_t = 4)]
    batch_size: usize,
    /// Batches to evaluate; -1 for all
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    test_batches: i64,
    /// The longest sequence, in tokens [default: 2048, or the model's limit]
    #[arg(long)]
    max_seq_length: Option<usize>,
    /// Cut longer sequences instead of refusing them
    #[arg(long)]
    truncate: bool,
    /// Count the completions only
    #[arg(long)]
    mask_prompt: bool,
}

pub fn run(options: &Options) -> Outcome {
    let opened = options.model.open(options.adapter_path.as_deref())?;
    let config = opened.decoder.config();
    let encode = EncodeOptions {
        eos: config.eos_token_ids.first().copied(),
        mask_prompt: options.mask_prompt,
        max_length: sequence_limit(options.max_seq_length, 2048, Some(config.max_position_embeddings))?,
        truncate: options.truncate,
    };
    let limit = match options.test_batches {
        -1 => None,
        batches => Some(usize::try_from(batches).ok().filter(|batches| *batches > 0).ok_or_else(|| {
            Error::Config(format!("test-batches must be at least 1, or -1 for all, got {batches}"))
        })?),
    };
    let rows = rows(options.data.as_deref())?;
    let dataset = Dataset::encode(&rows, &opened.tokenizer, encode)?;
    let device = opened.decoder.device().clone();
    let model = FineTune::new(opened.decoder, Vec::new());
    let never = AtomicBool::new(false);
    if let Some(result) = train::evaluate(&model, &dataset, options.batch_size, limit, &device, &never)? {
        println!(
            "{}: loss {:.4}, perplexity {:.2} over {} tokens in {:.1} s",
            rows.path.display(),
            result.loss,
            result.perplexity(),
            result.tokens,
            result.seconds,
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// The rows of a file, of a folder's test or validation split, or of the embedded validation split.
fn rows(data: Option<&Path>) -> Result<Rows, Error> {
    match data {
        None => Rows::from_reader(Path::new("(embedded)/valid.jsonl"), embedded::VALID),
        Some(folder) if folder.is_dir() => match Rows::read_optional(&folder.join("test.jsonl"))? {
            Some(rows) => Ok(rows),
            None => Rows::read(&folder.join("valid.jsonl")),
        },
        Some(file) => Rows::read(file),
    }
}
