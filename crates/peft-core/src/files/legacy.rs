//! What older versions of AdapterHub's library wrote into its layout and mean by it.

use serde_json::{Map, Value};

use super::HubFolder;

/// Names of modules, old and new.
const MODULES: [(&str, &str); 5] = [
    ("attention_text_task_adapters", "adapters"),
    ("attention_text_lang_adapters", "adapters"),
    ("layer_text_task_adapters", "adapters"),
    ("layer_text_lang_adapters", "adapters"),
    ("invertible_lang_adapters", "invertible_adapters"),
];

/// Nonlinearities, in a file without a version and in one with.
const NONLINEARITIES: [(&str, &str); 2] = [("gelu", "gelu_new"), ("gelu_orig", "gelu")];

/// What stands before the version of the library that is called `adapters`.
const LIBRARY: &str = "adapters.";

/// Brings what was read of a folder into today's form; `json` is the whole of its configuration file.
pub(super) fn renew(folder: &mut HubFolder, json: &Map<String, Value>) {
    let renamed = |key: String| MODULES.iter().fold(key, |key, (old, new)| key.replace(old, new));
    folder.tensors = std::mem::take(&mut folder.tensors).into_iter().map(|(k, v)| (renamed(k), v)).collect();
    let config = &mut folder.config;
    if let Some(Value::Object(mut nested)) = config.remove("invertible_adapter") {
        for (old, new) in [("block_type", "inv_adapter"), ("reduction_factor", "inv_adapter_reduction_factor")] {
            config.insert(new.to_owned(), nested.remove(old).unwrap_or_default());
        }
    }
    // Adapters of tasks named the invertible adapter of a language that they were trained with, and did not hold it.
    let of_task = json.get("type").and_then(Value::as_str) == Some("text_task");
    if of_task && !folder.tensors.keys().any(|key| key.contains("invertible_adapters.")) {
        config.remove("inv_adapter");
    }
    let version = json.get("version").and_then(Value::as_str);
    if let (None, Some(Value::String(found))) = (version, config.get_mut("non_linearity"))
        && let Some((_, new)) = NONLINEARITIES.iter().find(|(old, _)| *old == found.as_str())
    {
        (*new).clone_into(found);
    }
    // Before 1.1 LoRA was trained with a scale of one, whatever alpha was.
    if version.is_some_and(|version| is_before(version, [1, 1]))
        && let Some(rank) = config.get("r").cloned()
    {
        config.insert("alpha".to_owned(), rank);
    }
}

fn is_before(version: &str, [major, minor]: [u64; 2]) -> bool {
    let numbers = version.strip_prefix(LIBRARY).map(|version| version.split('.').map(str::parse::<u64>));
    match numbers.map(|numbers| numbers.flatten().take(2).collect::<Vec<_>>()) {
        Some(found) if found.len() == 2 => found < vec![major, minor],
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "everything here is a test")]

    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    fn config_of(json: Value, config: Value) -> Value {
        let (Value::Object(json), Value::Object(config)) = (json, config) else { unreachable!("both are objects") };
        let mut folder = HubFolder { config, name: "en".to_owned(), model: None, tensors: BTreeMap::new() };
        renew(&mut folder, &json);
        folder.config.into()
    }

    #[test]
    fn gelu_was_another_one_before_files_had_versions() {
        let found = |json, given: &str| config_of(json, json!({ "non_linearity": given }))["non_linearity"].clone();
        assert_eq!(found(json!({}), "gelu"), "gelu_new");
        assert_eq!(found(json!({}), "gelu_orig"), "gelu");
        assert_eq!(found(json!({}), "relu"), "relu");
        assert_eq!(found(json!({ "version": "3.2.1" }), "gelu"), "gelu");
    }

    #[test]
    fn lora_had_a_scale_of_one_before_1_1() {
        let found =
            |version: &str| config_of(json!({ "version": version }), json!({ "r": 4, "alpha": 8 }))["alpha"].clone();
        assert_eq!(found("adapters.1.0.1"), 4);
        assert_eq!(found("adapters.0.2.0"), 4);
        assert_eq!(found("adapters.1.1.0"), 8);
        assert_eq!(found("adapters.1.10.0"), 8);
        assert_eq!(found("3.2.1"), 8);
    }

    #[test]
    fn an_invertible_adapter_was_an_object_of_its_own() {
        let old = json!({ "invertible_adapter": { "block_type": "nice", "reduction_factor": 2 } });
        let new = json!({ "inv_adapter": "nice", "inv_adapter_reduction_factor": 2 });
        assert_eq!(config_of(json!({ "type": "text_lang" }), old.clone()), new);
        assert_eq!(config_of(json!({ "type": "text_task" }), old), json!({ "inv_adapter_reduction_factor": 2 }));
        assert_eq!(config_of(json!({}), json!({ "invertible_adapter": null })), json!({}));
    }
}
