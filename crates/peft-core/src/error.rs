//! What attaching, loading and saving can refuse.

use std::path::{Path, PathBuf};

/// Result of this workspace's core.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that the core refuses. Each message says what, where, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration of a method is wrong.
    #[error("configuration field `{field}`: expected {expected}, found {found}")]
    Config {
        /// The field, by its name in `adapter_config.json`.
        field: String,
        /// What the field accepts.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// The method cannot be attached to this model; nothing was changed. All reasons at once.
    #[error("{method} cannot be attached:\n{}", list(problems))]
    Attach {
        /// The method, for instance `LORA`.
        method: &'static str,
        /// Every reason.
        problems: Vec<Problem>,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The adapter in the folder belongs to another method, or uses a part of it that does not exist here.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Method {
        /// The configuration file.
        path: PathBuf,
        /// What the caller can load.
        expected: String,
        /// What the file asks for.
        found: String,
    },
    /// The tensors of an adapter file are not those that its configuration asks for on this model. All differences at once.
    #[error("{}: the adapter does not fit the model:\n{}", path.display(), list(problems))]
    Tensors {
        /// The tensor file.
        path: PathBuf,
        /// Every difference.
        problems: Vec<Problem>,
    },
    /// The adapter was made on a changed base, which is not the model's.
    #[error("{}: made on another base: expected the fingerprint {expected}, found {found}", path.display())]
    Base {
        /// The tensor file.
        path: PathBuf,
        /// The fingerprint of the base that the adapter was made on.
        expected: String,
        /// The fingerprint of this model's base.
        found: String,
    },
    /// The base has no fingerprint: nothing carries an adapter, or a device does not hand out a weight. All reasons at once.
    #[error("the base has no fingerprint:\n{}", list(problems))]
    Fingerprint {
        /// Every reason.
        problems: Vec<Problem>,
    },
    /// A model and its merged form cannot be compared. All reasons at once.
    #[error("the merge cannot be judged:\n{}", list(problems))]
    Truth {
        /// Every reason.
        problems: Vec<Problem>,
    },
    /// Weights cannot be packed; nothing was changed. All reasons at once.
    #[error("cannot be packed:\n{}", list(problems))]
    Pack {
        /// Every reason.
        problems: Vec<Problem>,
    },
    /// Merging would write a value that is not finite, or has nowhere to put a bias.
    #[error("cannot merge:\n{}", list(problems))]
    Merge {
        /// Every reason.
        problems: Vec<Problem>,
    },
}

/// One reason among several.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The targets match no layer.
    #[error("{targets} matches no layer of this model; the nearest names are: {}", near.join(", "))]
    NoMatch {
        /// The targets as configured.
        targets: String,
        /// Names that exist, nearest first.
        near: Vec<String>,
    },
    /// The model has no layer of a kind that the method knows.
    #[error(
        "the model has no layer of the kinds {expected}; a SubLayer is a field of type `peft_core::SubLayer` in the model's blocks, which call its `end`, an \
         Embedded one of type `peft_core::Embedded` behind its embeddings, an Attended one of type `peft_core::Attended` in the attention of a decoder, and a FeedForward one of type \
         `peft_core::FeedForward` in a gated feed-forward part"
    )]
    NoPlace {
        /// Kinds that would do.
        expected: String,
    },
    /// A parameter carries an adapter already.
    #[error("{path} is adapted already; attach to the clone made before, or merge first")]
    AlreadyAdapted {
        /// Path of the parameter.
        path: String,
    },
    /// The matched module is of a kind that the method does not know.
    #[error("{path} is a {found}; expected {expected}")]
    Kind {
        /// Path of the module.
        path: String,
        /// Kinds that would do.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The method needs the activation seam, and the model calls `forward` on the layer itself.
    #[error(
        "{path}: {reason}, which a weight cannot express, and the model does not declare this layer adapter-aware; call \
         it through `peft_core` (`linear`, `layer_norm` and so on) and give the module an `AdapterAware` field"
    )]
    NotAware {
        /// Path of the module.
        path: String,
        /// What needs the activation seam.
        reason: String,
    },
    /// A tensor that must be there is not.
    #[error("{name}: missing; expected shape {expected:?}")]
    Missing {
        /// Key in the file.
        name: String,
        /// Shape that it should have.
        expected: Vec<usize>,
    },
    /// A tensor that nothing asks for.
    #[error("{name}: not part of this adapter on this model")]
    Unknown {
        /// Key in the file.
        name: String,
    },
    /// A tensor of another shape.
    #[error("{name}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// Key in the file.
        name: String,
        /// Shape that the model and the configuration ask for.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// Anything else about one place.
    #[error("{path}: {what}")]
    Other {
        /// Path of the module or key of the tensor.
        path: String,
        /// The reason.
        what: String,
    },
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

    /// A wrong value in a configuration.
    pub fn config(field: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Config { field: field.into(), expected: expected.into(), found: found.to_string() }
    }
}

/// Refuses a size that is zero, or that nobody means: it may be from a file, and others are multiplied by it.
///
/// # Errors
/// [`Error::Config`].
pub fn check_size(field: &str, size: usize) -> Result<()> {
    const MOST: usize = 1 << 24;
    match size {
        0 => Err(Error::config(field, "at least 1", size)),
        1..=MOST => Ok(()),
        _ => Err(Error::config(field, format!("at most {MOST}"), size)),
    }
}

fn list(problems: &[Problem]) -> String {
    const SHOWN: usize = 20;
    let mut lines: Vec<String> = problems.iter().take(SHOWN).map(|p| format!("  - {p}")).collect();
    if problems.len() > SHOWN {
        lines.push(format!("  - and {} more", problems.len() - SHOWN));
    }
    lines.join("\n")
}
