//! The crate's one error type. Every variant says where it happened and what was wrong; [`Error::hint`] says what to do.

use std::path::{Path, PathBuf};

/// What can go wrong between a model folder and a trained adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error("{0}")]
    Candle(#[from] candle_core::Error),
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A data file has a row that cannot be used.
    #[error("{}:{line}: {message}", path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// The row's line, counted from 1.
        line: usize,
        /// What is wrong with it.
        message: String,
    },
    /// A model folder is incomplete, damaged, or of a kind that is not supported.
    #[error("{}: {message}", path.display())]
    Model {
        /// The file to blame.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// An adapter's files or its configuration do not fit.
    #[error("adapter: {0}")]
    Adapter(String),
    /// Options that contradict each other or the model.
    #[error("{0}")]
    Config(String),
    /// A tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A checkpoint is damaged or belongs to another run.
    #[error("{}: {message}", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A loss or a gradient stopped being a number.
    #[error("step {step}: {what} is not finite; the parameters are those of the step before")]
    NonFinite {
        /// The optimizer step, counted from 1.
        step: usize,
        /// `loss`, or the gradient's tensor.
        what: String,
    },
    /// The first step left trainable tensors without a usable gradient.
    #[error("gradient audit failed:\n  {}", .0.join("\n  "))]
    Audit(Vec<String>),
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] about `path`, for `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// An [`Error::Model`] about `path`.
    pub fn model(path: impl AsRef<Path>, message: impl std::fmt::Display) -> Self {
        Self::Model { path: path.as_ref().to_path_buf(), message: message.to_string() }
    }

    /// What the user can do about it, where there is something to say.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => Some("check the path; nothing was written"),
                std::io::ErrorKind::PermissionDenied => {
                    Some("check the permissions of the file and of its folder")
                }
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::FileTooLarge => {
                    Some("free some space and run again; the files written before are whole")
                }
                _ => None,
            },
            Self::Data { .. } => Some(
                r#"rows are {"text": "…"} or {"prompt": "…", "completion": "…"}, one JSON object a line"#,
            ),
            Self::NonFinite { .. } => Some(
                "lower --learning-rate, add --warmup, or train in --dtype f32; the last checkpoint is intact",
            ),
            Self::Checkpoint { .. } => {
                Some("go on with --resume and the options of the first run, or start anew with --overwrite")
            }
            _ => None,
        }
    }
}
