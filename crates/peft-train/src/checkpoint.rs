//! Checkpoints: `checkpoint-<step>/` with the trained part, the optimizer and where the run stands.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use peft_core::files::{Values, read_values, write_atomically, write_values};
use serde::{Deserialize, Serialize};

use crate::data::Position;
use crate::optimizer::Optimization;
use crate::{Error, Result, Trained};

const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";

/// Where a run stands. Everything random in it is a function of these numbers and the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    /// Optimizer steps done.
    pub step: usize,
    /// The next batch.
    pub position: Position,
    /// Lowest held-out loss so far, and its step.
    pub best: Option<(f64, usize)>,
    /// Evaluations since then.
    pub evaluations_since_best: usize,
}

/// Writes a checkpoint beside its place, renames it, and removes all but the newest `keep`.
pub(crate) fn save<T>(
    dir: &Path,
    state: &State,
    model: &T,
    trained: &dyn Trained<T>,
    optimization: &Optimization,
    keep: usize,
) -> Result<()> {
    let target = dir.join(format!("{PREFIX}{}", state.step));
    let partial = dir.join(format!(".{PREFIX}{}.peft-tmp", state.step));
    let result = write(&partial, state, model, trained, optimization).and_then(|()| {
        if target.exists() {
            fs::remove_dir_all(&target).map_err(Error::io(&target))?;
        }
        fs::rename(&partial, &target).map_err(Error::io(&target))
    });
    if result.is_err() {
        // A full disk is the likely reason: give the space back. The error to report is the first one.
        fs::remove_dir_all(&partial).ok();
        return result;
    }
    for (_, old) in list(dir)?.iter().rev().skip(keep.max(1)) {
        fs::remove_dir_all(old).map_err(Error::io(old))?;
    }
    Ok(())
}

fn write<T>(dir: &Path, state: &State, model: &T, trained: &dyn Trained<T>, optimization: &Optimization) -> Result<()> {
    trained.save(model, dir)?;
    let moments: BTreeMap<String, Values> =
        optimization.state().map_err(|e| Error::Device { step: state.step, message: format!("{e:?}") })?;
    let moments = write_values(moments.iter().map(|(k, v)| (k.clone(), v)), &dir.join(OPTIMIZER))?;
    let json = serde_json::to_string_pretty(state)
        .map_err(|e| Error::Checkpoint { path: dir.join(STATE), what: e.to_string() })?;
    Ok(write_atomically(dir, &[(OPTIMIZER, &moments), (STATE, json.as_bytes())])?)
}

/// The newest checkpoint in `dir`.
pub(crate) fn newest(dir: &Path) -> Result<Option<PathBuf>> {
    Ok(list(dir)?.pop().map(|(_, path)| path))
}

/// Puts a checkpoint into a model and an optimizer that were made as for a new run.
pub(crate) fn restore<T>(
    dir: &Path,
    model: T,
    trained: &dyn Trained<T>,
    optimization: &mut Optimization,
    device: &Device,
) -> Result<(T, State)> {
    let path = dir.join(STATE);
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let state = serde_json::from_str(&text)
        .map_err(|e| Error::Checkpoint { path, what: format!("not a training state: {e}") })?;
    let model = trained.restore(model, dir)?;
    let path = dir.join(OPTIMIZER);
    let restored = optimization.restore(read_values(&path)?, device);
    let what = || "not an optimizer state: a moment is missing or left over".to_owned();
    restored.ok_or_else(|| Error::Checkpoint { path, what: what() })?;
    Ok((model, state))
}

/// Checkpoints by step.
fn list(dir: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(Error::io(dir)(e)),
    };
    for entry in entries {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(step) = name.strip_prefix(PREFIX).and_then(|s| s.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}
