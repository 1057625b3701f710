//! Where a run goes: a folder that must not hold another run's work.

use std::path::{Path, PathBuf};

use peft_core::files::{CONFIG_FILE, ENCODER_FILE, TENSOR_FILE};
use peft_train::TASK_FILE;

use crate::settings::FILE;
use crate::{Error, Result};

/// What a run makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    Adapter,
    Model,
}

impl Made {
    /// Its own files.
    pub(super) fn files(self) -> &'static [&'static str] {
        match self {
            Self::Adapter => &[TENSOR_FILE, CONFIG_FILE, ENCODER_FILE, TASK_FILE],
            Self::Model => &["model.safetensors", "config.json"],
        }
    }
}

/// Where the run goes.
pub(super) struct Place<'a> {
    pub dir: &'a Path,
    pub resume: bool,
    pub overwrite: bool,
}

impl Place<'_> {
    /// Refuses a folder that holds another run's work, or `model` itself, before anything is read.
    pub(super) fn check(&self, model: Option<&str>) -> Result<()> {
        let place = std::fs::canonicalize(self.dir).ok();
        if place.is_some() && model.and_then(|model| std::fs::canonicalize(model).ok()) == place {
            let what = format!("--out {}: this is the folder of the model that is to be trained", self.dir.display());
            return Err(Error::usage(what, "give another folder"));
        }
        let checkpoints = self.checkpoints()?;
        if self.resume {
            let what = || format!("--resume: {} holds no checkpoint", self.dir.display());
            return if checkpoints.is_empty() {
                Err(Error::usage(what(), "leave --resume out to begin again"))
            } else {
                Ok(())
            };
        }
        let mut names = [Made::Adapter, Made::Model].into_iter().flat_map(Made::files);
        let made = names.any(|name| self.dir.join(name).exists());
        if (made || !checkpoints.is_empty()) && !self.overwrite {
            let what = format!("--out {}: there is an adapter, a model or a checkpoint already", self.dir.display());
            return Err(Error::usage(what, "--resume to go on, --overwrite to replace it, or another folder"));
        }
        Ok(())
    }

    /// Removes what would be mistaken for this run's; the adapter itself, or the model, stays until the new one replaces it. `made` is what the run makes.
    pub(super) fn prepare(&self, made: Made) -> Result<()> {
        if self.resume {
            return Ok(());
        }
        let best = self.dir.join("best");
        for old in self.checkpoints()?.into_iter().chain(best.is_dir().then_some(best)) {
            std::fs::remove_dir_all(&old).map_err(Error::io(&old))?;
        }
        // Only of an earlier run: whatever else is here is somebody's model.
        let others = if made == Made::Model { Made::Adapter } else { Made::Model };
        let others = others.files().iter().filter(|_| self.dir.join(FILE).is_file());
        for name in others.chain(&["confusion.svg", "experts.svg"]) {
            let old = self.dir.join(name);
            if old.is_file() {
                std::fs::remove_file(&old).map_err(Error::io(&old))?;
            }
        }
        Ok(())
    }

    fn checkpoints(&self) -> Result<Vec<PathBuf>> {
        let entries = match std::fs::read_dir(self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(self.dir)(e)),
        };
        let paths: std::io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
        let named =
            |path: &PathBuf| path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("checkpoint-"));
        Ok(paths.map_err(Error::io(self.dir))?.into_iter().filter(named).collect())
    }
}
