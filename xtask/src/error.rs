//! The one error type of the commands: what failed, where, and what to do next.

use std::path::{Path, PathBuf};

/// The result of every command.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file or directory could not be read, written or moved.
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// A program is not on this machine.
    #[error("cannot start `{program}`: {source}; {hint}")]
    Start { program: String, source: std::io::Error, hint: String },
    /// A program ran and failed.
    #[error("`{command}` failed ({status}){}", indented(output))]
    Command { command: String, status: String, output: String },
    /// Packages are missing and this user may not install them.
    #[error("needs the packages {packages}, and {why}; install them and run the command again")]
    Packages { packages: String, why: String },
    /// A file has other bytes than the pinned ones.
    #[error("{what}: expected {expected}, found {found}; nothing was unpacked")]
    Mismatch { what: String, expected: String, found: String },
    /// A file has not the form that its reader expects.
    #[error("{}: {problem}", path.display())]
    Malformed { path: PathBuf, problem: String },
    /// The caller asked for something that does not exist.
    #[error("there is no {kind} `{name}`; there are: {known}")]
    Unknown { kind: &'static str, name: String, known: String },
    /// A check did its work and found something.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// An I/O error with the action and the path that it belongs to.
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }
}

/// The output of a failed program, set off from the message; nothing when it printed nothing.
fn indented(output: &str) -> String {
    output.trim().lines().map(|line| format!("\n    {line}")).collect()
}
