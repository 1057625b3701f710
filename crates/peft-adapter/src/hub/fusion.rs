//! AdapterFusion in AdapterHub's layout: `adapter_fusion_config.json` and `model_adapter_fusion.safetensors`, beside the folders of its adapters.
//!
//! Keys: `{sub-layer}.adapter_fusion_layer.{name}.query.weight`.

use std::collections::BTreeMap;
use std::path::Path;

use peft_core::files::read_values;
use peft_core::{AdapterFile, ComposedConfig, Composition, Error, Problem, Result, composed};
use serde_json::{Value, json};

use super::place_of;
use crate::BottleneckConfig;

const CONFIG_FILE: &str = "adapter_fusion_config.json";
const TENSOR_FILE: &str = "model_adapter_fusion.safetensors";
const CONTAINER: &str = ".adapter_fusion_layer.";

/// The one form that is built, which is AdapterHub's own default and the paper's.
const FORM: [(&str, bool); 6] = [
    ("query", true),
    ("key", true),
    ("value", true),
    ("query_before_ln", false),
    ("residual_before", false),
    ("value_before_softmax", true),
];

/// Reads the fusion in `dir` over the adapters in `adapters`, in the order in which it was made.
///
/// # Errors
/// When a file is missing or malformed, the fusion is of a form that is not built, or a tensor belongs nowhere.
pub fn read_fusion(dir: &Path, adapters: &[&Path]) -> Result<AdapterFile<ComposedConfig<BottleneckConfig>>> {
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| Error::format(&path, e.to_string()))?;
    let config = json.get("config").ok_or_else(|| Error::format(&path, "no object `config`"))?;
    let temperature = ("temperature", false);
    for (field, built) in FORM.into_iter().chain([temperature]) {
        if let Some(found) = config.get(field).filter(|found| **found != json!(built)) {
            return Err(Error::config(field, format!("{built}: no other form of fusion is built"), found));
        }
    }
    let path = dir.join(TENSOR_FILE);
    let (mut tensors, mut problems) = (BTreeMap::new(), Vec::new());
    for (key, values) in read_values(&path)? {
        let place = key.split_once(CONTAINER).and_then(|(module, rest)| {
            // The name is those of the adapters, in which there may be dots.
            let (at, _) = rest.rmatch_indices('.').nth(1)?;
            Some(format!("{}.adapter_fusion{}", place_of(module)?, &rest[at..]))
        });
        match place {
            Some(place) => drop(tensors.insert(place, values)),
            None => problems.push(Problem::Unknown { name: key }),
        }
    }
    if !problems.is_empty() {
        return Err(Error::Tensors { path, problems });
    }
    let files = adapters.iter().map(|adapter| AdapterFile::read(adapter)).collect::<Result<Vec<_>>>()?;
    let mut file = composed(files, Composition::Fuse((0..adapters.len()).collect()))?;
    file.tensors.extend(tensors);
    Ok(file)
}
