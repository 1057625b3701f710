//! What can go wrong when a model is read, built or written.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that reading, building or writing a model can refuse. Each message says what, where, and what to do next.
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
    /// A file is not what its name says, is cut short or contradicts itself.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The tensors of a checkpoint are not those of the model that its configuration describes. All differences at once.
    #[error("{}: the weights do not fit the model:\n{}", path.display(), problems.join("\n"))]
    Weights {
        /// Where the weights came from.
        path: PathBuf,
        /// One line a tensor: name, expected, found.
        problems: Vec<String>,
    },
    /// Known, but not supported.
    #[error("{what} is not supported: {hint}")]
    Unsupported {
        /// The thing.
        what: String,
        /// What to do instead.
        hint: String,
    },
    /// What goes into a model is not what it can read.
    #[error("input of the model: expected {expected}, found {found}")]
    Input {
        /// What the model reads.
        expected: String,
        /// What it was given.
        found: String,
    },
    /// The chat template does not compile or does not accept these messages.
    #[error("chat template: {0}")]
    Template(String),
    /// The tokenizer refused a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The model hub could not be reached or has no such model.
    #[error("model hub, {id}: {message}")]
    Hub {
        /// Hub id, `owner/name`.
        id: String,
        /// What the client said.
        message: String,
    },
    /// An adapter could not be attached, read or written.
    #[error(transparent)]
    Adapter(#[from] peft_core::Error),
}

impl Error {
    /// For `map_err` on file operations.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, source }
    }

    /// A malformed file.
    pub fn format(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Self::Format { path: path.as_ref().to_owned(), what: what.into() }
    }
}
