//! `wick generate`

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candlewick::Error;
use candlewick::generate::{GenerateOptions, Sampling, StopReason, generate};
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
    /// The text to continue; `-` reads it from standard input
    #[arg(long, short)]
    prompt: String,
    /// At most this many new tokens
    #[arg(long, short, default_value_t = 100)]
    max_tokens: usize,
    /// 0 always takes the likeliest token
    #[arg(long, visible_alias = "temperature", default_value_t = 0.0)]
    temp: f32,
    /// Draw from the k likeliest tokens only; 0 for all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw from the likeliest tokens that together reach this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub fn run(options: &Options) -> Outcome {
    let opened = options.model.open(options.adapter_path.as_deref())?;
    let mut prompt = options.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).map_err(Error::io("standard input"))?;
    }
    let generate_options = GenerateOptions {
        max_tokens: options.max_tokens,
        sampling: Sampling {
            temperature: options.temp,
            top_k: options.top_k,
            top_p: options.top_p,
            seed: options.seed,
        },
    };
    let mut out = std::io::stdout().lock();
    let mut broken = None;
    let mut print = |text: &str| match write!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => ControlFlow::Continue(()),
        Err(e) => {
            broken = Some(e);
            ControlFlow::Break(())
        }
    };
    let start = Instant::now();
    if print(&prompt).is_break() {
        return Ok(ExitCode::FAILURE);
    }
    let generated = generate(&opened.decoder, &opened.tokenizer, &prompt, generate_options, &mut print)?;
    if let Some(e) = broken {
        // A reader that has seen enough, as `head` has, is no error.
        return match e.kind() {
            std::io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
            _ => Err(Error::io("standard output")(e)),
        };
    }
    drop(writeln!(out));
    let seconds = start.elapsed().as_secs_f64();
    let end = match generated.stop {
        StopReason::EndOfText => "end of text",
        StopReason::Length => "length",
        StopReason::Cancelled => "cancelled",
    };
    eprintln!(
        "{} prompt tokens, {} new tokens, {:.1} tokens/s, stopped by {end}",
        generated.prompt_tokens,
        generated.new_tokens,
        f64::from(u32::try_from(generated.new_tokens).unwrap_or(u32::MAX)) / seconds,
    );
    Ok(ExitCode::SUCCESS)
}
