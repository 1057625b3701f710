//! The folders of X-LoRA: the classifier in its own, each expert in one that is `LoRA`'s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peft_core::files::{CONFIG_FILE, Values};
use peft_core::{AdapterFile, Error, LayerKind, Method, Result};
use peft_lora::LoraConfig;

use super::XLoraConfig;

/// What the classifier's keys begin with.
const CLASSIFIER: &str = "base_model.internal_xlora_classifier.";

/// The fields of an adapter.
const FIELD: &str = "classifier.";
const EXPERTS: &str = "experts.";

pub(super) fn is_of_classifier(key: &str) -> bool {
    key.starts_with(CLASSIFIER)
}

/// The key of a field of an adapter.
pub(super) fn key(kind: LayerKind, field: &str) -> Option<(String, bool)> {
    if let Some(field) = field.strip_prefix(FIELD) {
        return Some((format!("{CLASSIFIER}{field}"), field.ends_with(".weight")));
    }
    let (number, field) = field.strip_prefix(EXPERTS)?.split_once('.')?;
    let (key, transposed) = LoraConfig::key(kind, field)?;
    Some((format!("{EXPERTS}{number}.{key}"), transposed))
}

impl XLoraConfig {
    /// Adds an expert, and its tensors to those of the file.
    pub(super) fn add(
        &mut self,
        expert: AdapterFile<LoraConfig>,
        tensors: &mut BTreeMap<String, Values>,
    ) -> Result<()> {
        let number = self.experts.len();
        if let Some(base) = &expert.base_fingerprint {
            return Err(Error::config(
                "adapters",
                "experts for the model as others have it",
                format!("one for {base}"),
            ));
        }
        for (key, values) in expert.tensors {
            let of = LoraConfig::tensors(LayerKind::Linear).iter().map(|tensor| tensor.key);
            let split = of.filter_map(|factor| Some((key.strip_suffix(factor)?.strip_suffix('.')?, factor))).next();
            let other =
                || Error::config("adapters", format!("factors of linear layers alone in expert {number}"), &key);
            let (path, factor) = split.ok_or_else(other)?;
            tensors.insert(format!("{path}.{EXPERTS}{number}.{factor}"), values);
        }
        self.experts.push(expert.method);
        Ok(())
    }
}

/// The method with the experts that lie where `adapters` says.
pub(super) fn read_experts(
    mut method: XLoraConfig,
    dir: &Path,
    tensors: &mut BTreeMap<String, Values>,
) -> Result<XLoraConfig> {
    for (name, path) in in_order(&method) {
        let folder = find(dir, &name, &path)?;
        method.add(AdapterFile::read(&folder)?, tensors)?;
    }
    Ok(method)
}

/// Names and paths in the order of the experts. PEFT calls the experts by the numbers of their places, and then looks for the names.
fn in_order(method: &XLoraConfig) -> Vec<(String, String)> {
    let adapters: Vec<_> = method.adapters.iter().map(|(name, path)| (name.clone(), path.clone())).collect();
    let named = adapters.iter().map(|(name, _)| name.parse::<usize>().ok().and_then(|at| adapters.get(at).cloned()));
    named.collect::<Option<Vec<_>>>().unwrap_or_else(|| adapters.clone())
}

/// The folder of an expert: its own below `dir`, so that a copy has experts of its own too. Else a path is as its writer saw it: from where that program ran, which may be a folder above.
fn find(dir: &Path, name: &str, path: &str) -> Result<PathBuf> {
    let above = dir.ancestors().map(|above| above.join(path));
    let places = [dir.join(name), PathBuf::from(path)].into_iter().chain(above);
    let found = places.into_iter().find(|place| place.join(CONFIG_FILE).is_file());
    let expected = format!("a folder of LoRA, in {} or from here or a folder above", dir.display());
    found.ok_or_else(|| Error::config(format!("adapters.{name}"), expected, path))
}

/// Writes each expert below `dir`, and gives what goes into `dir` itself.
pub(super) fn write_experts(file: &AdapterFile<XLoraConfig>, dir: &Path) -> Result<AdapterFile<XLoraConfig>> {
    let mut own = file.clone();
    own.tensors.retain(|key, _| is_of_classifier(key));
    own.method.adapters.clear();
    for (number, method) in file.method.experts.iter().enumerate() {
        let infix = format!(".{EXPERTS}{number}.");
        let part = |(key, values): (&String, &Values)| {
            let (path, factor) = key.split_once(&infix)?;
            Some((format!("{path}.{factor}"), values.clone()))
        };
        let expert = AdapterFile {
            method: method.clone(),
            base_model: file.base_model.clone(),
            task_type: file.task_type.clone(),
            base_fingerprint: None,
            tensors: file.tensors.iter().filter_map(part).collect(),
        };
        let folder = dir.join(number.to_string());
        expert.write(&folder)?;
        own.method.adapters.insert(number.to_string(), folder.display().to_string());
    }
    Ok(own)
}
