//! `wick kernels`

use std::io::Write;
use std::process::ExitCode;

use candlewick::Error;
use candlewick_kernels::launch::{Storage, Target};
use candlewick_kernels::ops::ops;
use clap::{Args, ValueEnum};

use crate::Outcome;

#[derive(Debug, Args)]
pub struct Options {
    /// The language to print
    #[arg(long, value_enum, default_value_t = TargetName::Metal)]
    target: TargetName,
    /// Only this op
    #[arg(long, value_name = "NAME")]
    op: Option<String>,
    /// Only this storage type
    #[arg(long, value_enum)]
    dtype: Option<StorageName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TargetName {
    Metal,
    Cuda,
    Simulator,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StorageName {
    F32,
    F16,
    Bf16,
}

pub fn run(options: &Options) -> Outcome {
    let target = match options.target {
        TargetName::Metal => Target::Metal,
        TargetName::Cuda => Target::Cuda,
        TargetName::Simulator => Target::Simulator,
    };
    let storages = match options.dtype {
        None => Storage::ALL.to_vec(),
        Some(StorageName::F32) => vec![Storage::F32],
        Some(StorageName::F16) => vec![Storage::F16],
        Some(StorageName::Bf16) => vec![Storage::BF16],
    };
    let wanted = |name: &str| options.op.as_deref().is_none_or(|op| op == name);
    if !ops().iter().any(|op| wanted(op.name)) {
        let names: Vec<_> = ops().iter().map(|op| op.name).collect();
        let op = options.op.as_deref().unwrap_or_default();
        return Err(Error::Config(format!("op must be one of {}, got {op}", names.join(", "))));
    }
    let mut out = std::io::stdout().lock();
    for op in ops().iter().filter(|op| wanted(op.name)) {
        for storage in &storages {
            let texts = op.texts(target, *storage).map_err(|e| Error::Config(format!("{}: {e}", op.name)))?;
            if texts.is_empty() && options.op.is_some() && options.dtype.is_some() {
                let (name, word) = (op.name, storage.word());
                return Err(Error::Config(format!("{name} has no kernels for {word}")));
            }
            for (launch, text) in texts {
                let heading = format!("// {}: {} for {}", op.name, launch.kernel, storage.word());
                if writeln!(out, "{heading}\n{text}").is_err() {
                    // The reader has seen enough, as `head` has.
                    return Ok(ExitCode::SUCCESS);
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
