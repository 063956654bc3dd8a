//! `wick`: LoRA fine-tuning from the command line.

mod doctor;
mod evaluate;
mod generate;
mod merge;
mod model_options;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What a command that ends by itself returns: its exit code, or an error to print.
type Outcome = Result<ExitCode, candlewick::Error>;

#[derive(Parser)]
#[command(version, about = "LoRA fine-tuning for Candle, on every device Candle has", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt, with or without an adapter
    Generate(generate::Options),
    /// Loss and perplexity over a dataset
    Evaluate(evaluate::Options),
    /// Fold an adapter into its base model, or take it out again
    Merge(merge::Options),
    /// What this build can use: devices, fused ops, threads, allocator
    Doctor,
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("WICK_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    let outcome = match Cli::parse().command {
        Command::Generate(options) => generate::run(&options),
        Command::Evaluate(options) => evaluate::run(&options),
        Command::Merge(options) => merge::run(&options),
        Command::Doctor => doctor::run(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        if let Some(hint) = error.hint() {
            eprintln!("  help: {hint}");
        }
        ExitCode::FAILURE
    })
}
