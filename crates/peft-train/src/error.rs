//! What can go wrong between a data file and a trained adapter.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that reading data and training can refuse. Each message says what, where, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A data file is not what its name says, or one of its rows has no known format.
    #[error("{}, {place}: {what}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What is wrong there.
        what: String,
    },
    /// A row that was read correctly cannot be turned into tokens.
    #[error("row {row}: {what}")]
    Row {
        /// Its number, from 1, among the rows that were given.
        row: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A file or folder of pictures is not what its name says.
    #[error("{}: {what}", path.display())]
    Pictures {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The labels of all rows together make no sense.
    #[error("labels: {what}")]
    Labels {
        /// What is wrong with them.
        what: String,
    },
    /// A setting that cannot work.
    #[error("{name}: {what}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// What is wrong with its value.
        what: String,
    },
    /// The loss is not a number any more; the last checkpoint is from before.
    #[error(
        "step {step}: the loss is {loss}; lower the learning rate (now {learning_rate:e}) or raise the warm-up, and resume from the last checkpoint"
    )]
    Diverged {
        /// Optimizer step, from 1.
        step: usize,
        /// The loss.
        loss: f32,
        /// Of that step.
        learning_rate: f64,
    },
    /// The device failed while computing.
    #[error("step {step}: the device failed: {message}")]
    Device {
        /// Optimizer step, from 1.
        step: usize,
        /// What it said.
        message: String,
    },
    /// A checkpoint cannot be resumed from.
    #[error("{}: {what}", path.display())]
    Checkpoint {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The model or its tokenizer.
    #[error(transparent)]
    Model(#[from] peft_models::Error),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] peft_core::Error),
}

/// A place in a data file, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line.
    Line(usize),
    /// A line and a column in it, in bytes.
    Column(usize, usize),
    /// An element of the file's one JSON array.
    Row(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Column(line, column) => write!(f, "line {line}, column {column}"),
            Self::Row(row) => write!(f, "row {row}"),
        }
    }
}

impl Error {
    /// For `map_err` on file operations.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, source }
    }

    /// A setting that cannot work.
    pub fn setting(name: &'static str, what: impl Into<String>) -> Self {
        Self::Setting { name, what: what.into() }
    }
}
