//! Writing Hugging Face directories: a whole model, or a checkpoint with some tensors replaced, shard by shard.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::module::Module;
use peft_core::files::{encode, write_atomically};
pub use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, INDEX, SINGLE};
use crate::load::{HfTensor, export_weights};
use crate::stacked::as_usual;
use crate::tokenizer::Tokenizer;
use crate::weights::{TensorInfo, Weights as _};
use crate::{Error, Result};

/// Writes `module` as a Hugging Face directory with all tensors in `dtype`, which must be a float type.
///
/// # Errors
/// When the file system or the device refuses.
pub fn save_model<M: Module>(
    module: &M,
    config: &Value,
    tokenizer: Option<&Tokenizer>,
    dtype: Dtype,
    dir: &Path,
) -> Result<()> {
    let tensors = as_usual(config, export_weights(module, |_| true)?);
    let tensors = tensors.into_iter().map(|(name, t)| to_raw(name, dtype, t, dir)).collect::<Result<_>>()?;
    save_shard(dir, "model.safetensors", tensors)?;
    save_extras(config, tokenizer, dir)
}

/// Writes `base` again with some tensors `replaced`, each in the type that it has there; all others byte for byte. One shard is in memory at a
/// time. Tensors that `base` does not have go into the last shard, in the type of its first tensor.
///
/// # Errors
/// When the file system refuses, or a replaced tensor has another shape.
pub fn rewrite(
    base: &Checkpoint,
    mut replaced: BTreeMap<String, HfTensor>,
    config: &Value,
    tokenizer: Option<&Tokenizer>,
    dir: &Path,
) -> Result<()> {
    if base.is_packed() {
        return Err(Error::Unsupported {
            what: format!("{}: replacing tensors beside packed ones", base.path().display()),
            hint: "write the whole model dense".to_owned(),
        });
    }
    let files = base.files().count();
    write_files(base.out_files(), config, tokenizer, dir, |shard| {
        let mut tensors = Vec::new();
        for (info, dtype) in &shard.tensors {
            tensors.push(match replaced.remove(&info.name) {
                Some(new) if new.shape == info.shape => to_raw(info.name.clone(), *dtype, new, dir)?,
                Some(new) => {
                    return Err(Error::format(
                        dir,
                        format!("{}: expected shape {:?}, found {:?}", info.name, info.shape, new.shape),
                    ));
                }
                None => Raw::copy(base, info, *dtype)?,
            });
        }
        if shard.at + 1 == files {
            let dtype = tensors.first().map_or(Dtype::F32, |t| t.dtype);
            for (name, tensor) in std::mem::take(&mut replaced) {
                tensors.push(to_raw(name, dtype, tensor, dir)?);
            }
        }
        Ok(tensors)
    })
}

/// A file of a checkpoint that is written.
pub(crate) struct OutFile<'a> {
    pub(crate) at: usize,
    pub(crate) file: String,
    /// What the file of the same name at the source holds.
    pub(crate) tensors: Vec<(&'a TensorInfo, Dtype)>,
}

/// Writes a checkpoint file by file, each with the tensors that `tensors_of` gives for it; then the index, if there are several, and the rest of the
/// directory.
pub(crate) fn write_files(
    files: Vec<OutFile<'_>>,
    config: &Value,
    tokenizer: Option<&Tokenizer>,
    dir: &Path,
    mut tensors_of: impl FnMut(&OutFile<'_>) -> Result<Vec<Raw>>,
) -> Result<()> {
    let mut weight_map: BTreeMap<String, Value> = BTreeMap::new();
    let mut total = 0;
    for shard in &files {
        let tensors = tensors_of(shard)?;
        total += tensors.iter().map(|t| t.bytes.len()).sum::<usize>();
        weight_map.extend(tensors.iter().map(|t| (t.name.clone(), Value::from(shard.file.as_str()))));
        save_shard(dir, &shard.file, tensors)?;
    }
    // What another model has left here must not be taken for a part of this one.
    for stale in [SINGLE, INDEX] {
        let kept = (stale == INDEX && files.len() > 1) || files.iter().any(|file| file.file == stale);
        if !kept && dir.join(stale).is_file() {
            std::fs::remove_file(dir.join(stale)).map_err(Error::io(dir.join(stale)))?;
        }
    }
    if files.len() > 1 {
        let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_atomically(dir, &[(INDEX, pretty(&index, dir)?.as_bytes())])?;
    }
    save_extras(config, tokenizer, dir)
}

/// A tensor as a file holds it.
pub(crate) struct Raw {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Raw {
    /// A tensor of `base`, byte for byte.
    pub(crate) fn copy(base: &Checkpoint, info: &TensorInfo, dtype: Dtype) -> Result<Self> {
        Ok(Self { name: info.name.clone(), dtype, shape: info.shape.clone(), bytes: base.bytes(info)? })
    }
}

pub(crate) fn to_raw(name: String, dtype: Dtype, tensor: HfTensor, dir: &Path) -> Result<Raw> {
    let bytes = encode(dtype, &tensor.values);
    let bytes = bytes
        .ok_or_else(|| Error::format(dir, format!("{name}: {dtype:?} is not a type that a float can be rounded to")))?;
    if dtype == Dtype::F16 && tensor.values.iter().any(|v| v.abs() > half::f16::MAX.to_f32()) {
        return Err(Error::format(dir, format!("{name}: a value is out of the range of F16")));
    }
    Ok(Raw { name, dtype, shape: tensor.shape, bytes })
}

fn save_shard(dir: &Path, file: &str, tensors: Vec<Raw>) -> Result<()> {
    let format = |e: safetensors::SafeTensorError| Error::format(dir.join(file), e.to_string());
    let views = tensors
        .iter()
        .map(|t| Ok((t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).map_err(format)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(format)?;
    drop(tensors);
    Ok(write_atomically(dir, &[(file, &bytes)])?)
}

fn save_extras(config: &Value, tokenizer: Option<&Tokenizer>, dir: &Path) -> Result<()> {
    write_atomically(dir, &[("config.json", pretty(config, dir)?.as_bytes())])?;
    tokenizer.map_or(Ok(()), |tokenizer| tokenizer.save(dir))
}

fn pretty(json: &Value, dir: &Path) -> Result<String> {
    serde_json::to_string_pretty(json).map_err(|e| Error::format(dir, e.to_string()))
}
