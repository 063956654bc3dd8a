//! `wick`: LoRA fine-tuning from the command line.

mod allocator;
mod config;
mod doctor;
mod evaluate;
mod generate;
mod kernels;
mod merge;
mod metrics;
mod model_options;
mod plot;
mod pretrain;
mod progress;
mod train;
mod training;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

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
    /// Train a LoRA adapter
    Train(train::Options),
    /// Train all parameters of a model, from scratch where its folder has no weights
    Pretrain(pretrain::Options),
    /// Continue a prompt, with or without an adapter
    Generate(generate::Options),
    /// Loss and perplexity over a dataset
    Evaluate(evaluate::Options),
    /// Fold an adapter into its base model, or take it out again
    Merge(merge::Options),
    /// Print the kernels as a device gets them
    Kernels(kernels::Options),
    /// What this build can use: devices, fused ops, threads, allocator
    Doctor,
}

/// Makes this thread one of rayon's: it does its part of the work it hands out, instead of sleeping until others have
/// done it. A training step has hundreds of parallel operations, many of them shorter than waking a thread takes.
fn work_on_this_thread() {
    // A pool that is there already serves as well.
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
}

fn main() -> ExitCode {
    allocator::keep_pages();
    work_on_this_thread();
    let filter = EnvFilter::try_from_env("WICK_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
    let outcome = config::parse::<Cli>().and_then(|cli| match cli.command {
        Command::Train(options) => train::run(&options),
        Command::Pretrain(options) => pretrain::run(&options),
        Command::Generate(options) => generate::run(&options),
        Command::Evaluate(options) => evaluate::run(&options),
        Command::Merge(options) => merge::run(&options),
        Command::Kernels(options) => kernels::run(&options),
        Command::Doctor => {
            doctor::run();
            Ok(ExitCode::SUCCESS)
        }
    });
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        if let Some(hint) = error.hint() {
            eprintln!("  help: {hint}");
        }
        ExitCode::FAILURE
    })
}
