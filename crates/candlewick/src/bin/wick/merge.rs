//! `wick merge`

use std::path::PathBuf;
use std::process::ExitCode;

use candlewick::embedded;
use candlewick::lora::{Direction, merge};
use candlewick::model::ModelFiles;
use clap::Args;

use crate::Outcome;

#[derive(Debug, Args)]
pub struct Options {
    /// The base model's folder; with --unmerge, the merged model's [default: the small base that wick carries]
    #[arg(long, value_name = "FOLDER")]
    model: Option<PathBuf>,
    /// The adapter folder
    #[arg(long, value_name = "FOLDER", default_value = "adapters")]
    adapter_path: PathBuf,
    /// The new model's folder, which must not exist or be empty
    #[arg(long, value_name = "FOLDER", default_value = "fused_model")]
    save_path: PathBuf,
    /// Take the adapter out of a merged model
    #[arg(long, requires = "model")]
    unmerge: bool,
}

pub fn run(options: &Options) -> Outcome {
    let files = options.model.clone().map_or(embedded::BASE, ModelFiles::Folder);
    let direction = if options.unmerge { Direction::Unmerge } else { Direction::Merge };
    merge(&files, &options.adapter_path, &options.save_path, direction)?;
    println!("Saved the model to {}", options.save_path.display());
    Ok(ExitCode::SUCCESS)
}
