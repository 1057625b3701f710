//! What a command can refuse: one line that says what is wrong and where, and one that says what to do.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Result of a command.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that a command can refuse.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The command line or the configuration file asks for something that cannot be.
    #[error("{what}")]
    Usage {
        /// What is wrong, and where.
        what: String,
        /// What to do.
        hint: String,
    },
    /// The command is right, but the machine or a file does not allow it.
    #[error("{what}")]
    Refused {
        /// What is wrong, and where.
        what: String,
        /// What to do.
        hint: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The model, its tokenizer or its files.
    #[error(transparent)]
    Model(#[from] peft_models::Error),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] peft_core::Error),
    /// Data or training.
    #[error(transparent)]
    Train(#[from] peft_train::Error),
}

impl Error {
    /// A wrong command line or configuration.
    pub fn usage(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { what: what.into(), hint: hint.into() }
    }

    /// Something that the machine or a file does not allow.
    pub fn refused(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Refused { what: what.into(), hint: hint.into() }
    }

    /// For `map_err` on file operations.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, source }
    }

    /// What to do about it.
    pub fn hint(&self) -> &str {
        match self {
            Self::Usage { hint, .. } | Self::Refused { hint, .. } => hint,
            Self::Io { source, .. } => io_hint(source),
            Self::Model(error) => model_hint(error),
            Self::Adapter(error) => adapter_hint(error),
            Self::Train(error) => train_hint(error),
        }
    }

    /// 2 for a wrong command line or configuration, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        use peft_core::Error as Core;
        use peft_train::Error as Train;
        match self {
            Self::Usage { .. }
            | Self::Adapter(Core::Config { .. })
            | Self::Train(Train::Setting { .. } | Train::Adapter(Core::Config { .. })) => 2,
            _ => 1,
        }
    }

    /// Prints the error and what to do about it on standard error.
    pub fn report(&self) -> ExitCode {
        let closed = |source: &std::io::Error| source.kind() == ErrorKind::BrokenPipe;
        if matches!(self, Self::Io { source, .. } if closed(source)) {
            // Whoever read our output has seen enough, as with `peft methods | head -1`.
            return ExitCode::SUCCESS;
        }
        eprintln!("error: {self}");
        if !self.hint().is_empty() {
            eprintln!("  try: {}", self.hint());
        }
        ExitCode::from(self.exit_code())
    }
}

fn io_hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        ErrorKind::NotFound => "check the path; it is relative to the folder in which `peft` was started",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "choose a place that you may write to, or change its permissions"
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free some space and run it again; what was saved before is intact"
        }
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "a part of the path is a file; choose another place",
        _ => "check the path, its permissions and the space on the disk; what was saved before is intact",
    }
}

fn model_hint(error: &peft_models::Error) -> &'static str {
    use peft_models::Error as E;
    match error {
        E::Io { source, .. } => io_hint(source),
        E::Format { .. } => "`peft inspect MODEL` shows what a model holds; download the file again if it is cut short",
        E::Weights { .. } => "the weights and config.json must come from the same model; download it again",
        E::Unsupported { .. } => "`peft inspect MODEL` shows what a model is made of",
        E::Template(_) => "use --prompt with the text as the model expects it",
        E::Tokenizer(_) => "give another text, or other token ids",
        E::Hub { .. } => "check the id and the network; if you meant a folder or a file, check its path",
        E::Adapter(error) => adapter_hint(error),
        _ => "",
    }
}

fn adapter_hint(error: &peft_core::Error) -> &'static str {
    use peft_core::Error as E;
    match error {
        E::Config { .. } => "`peft train --help` explains every setting",
        E::Attach { .. } => {
            "`peft inspect MODEL` lists the names that can be adapted; --targets all-linear takes every linear layer but the head"
        }
        E::Io { source, .. } => io_hint(source),
        E::Format { .. } => "an adapter is a folder with adapter_config.json and adapter_model.safetensors, both whole",
        E::Method { .. } => "`peft methods` lists the methods that are known",
        E::Tensors { .. } => "use the model that the adapter was trained on; `peft inspect ADAPTER` names it",
        E::Merge { .. } => "use the adapter without merging: every command takes --adapter",
        _ => "",
    }
}

fn train_hint(error: &peft_train::Error) -> &'static str {
    use peft_train::Error as E;
    match error {
        E::Io { source, .. } => io_hint(source),
        E::Data { .. } | E::Row { .. } => "correct the file there; `peft train --help` shows the formats of rows",
        E::Setting { .. } => "`peft train --help` explains every setting",
        E::Diverged { .. } => "every checkpoint that was saved is intact",
        E::Device { .. } => "try a smaller --batch-size or --max-len, or --device cpu",
        E::Checkpoint { .. } => "delete that checkpoint; --resume then continues from the one before",
        E::Model(error) => model_hint(error),
        E::Adapter(error) => adapter_hint(error),
        _ => "",
    }
}
