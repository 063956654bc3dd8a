//! What can go wrong between the programs.

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// A failed benchmark.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    #[error("{0}")]
    Engine(String),
    /// The engine is well, and has nothing for this case or way.
    #[error("{0}")]
    Unsupported(String),
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    #[error(transparent)]
    Candlewick(#[from] candlewick::Error),
}

impl Error {
    /// Something about a file.
    pub fn at(path: &Path, message: impl Display) -> Self {
        Self::File { path: path.to_owned(), message: message.to_string() }
    }

    /// The other program is gone.
    #[expect(clippy::needless_pass_by_value, reason = "for map_err")]
    pub fn stream(error: std::io::Error) -> Self {
        Self::Engine(format!("the other program: {error}"))
    }
}

pub type Result<T> = std::result::Result<T, Error>;
