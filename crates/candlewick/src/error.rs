//! What can go wrong, said so that the reader knows what to do about it.

use std::path::{Path, PathBuf};

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

/// The library's error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The system could not read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A row of a data set cannot be used.
    #[error("{}:{line}: {message}", path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// The row's line, counted from one.
        line: usize,
        /// What is wrong with it.
        message: String,
    },
    /// A model folder cannot be used.
    #[error("{}: {message}", path.display())]
    Model {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A setting, or a combination of settings, is not possible.
    #[error("{0}")]
    Config(String),
    /// A checkpoint cannot be used.
    #[error("{}: {message}", path.display())]
    Checkpoint {
        /// The checkpoint's file or folder.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The loss or a gradient is not a finite number any more.
    #[error("step {step}: {what} is not finite; the parameters were left as the step before made them")]
    NonFinite {
        /// The optimizer step, counted from one.
        step: usize,
        /// What was not finite: the loss, or a tensor by its name.
        what: String,
    },
    /// Some parameters do not learn.
    #[error("gradient audit: {}", .0.join("; "))]
    Audit(Vec<String>),
}

impl Error {
    /// For `map_err` on file operations.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }
}
