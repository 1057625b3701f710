//! Bottlenecks in AdapterHub's layout.
//!
//! Keys there: `{sub-layer}.adapters.{name}.adapter_down.0.weight`, where the sub-layer of BERT and RoBERTa is the module of its last projection
//! (`bert.encoder.layer.0.output`), and of every other model the place itself (`transformer.h.0.output_adapters`). A norm before the bottleneck is
//! part of `adapter_down` and stored twice. A rule that all of Compacter's layers share becomes one in each. What is behind the embeddings is called as here:
//! `bert.invertible_adapters.{name}.F.0.weight`.

mod fusion;
pub(crate) mod ia3;

use std::collections::{BTreeMap, BTreeSet};

use peft_core::files::{HubFolder, Values};
use peft_core::{AdapterFile, Error, Problem, Result, Targets};
use serde_json::{Map, Value, json};

use crate::config::{AFTER_ATTENTION, AFTER_FEED_FORWARD, BottleneckConfig};

pub use self::fusion::read_fusion;

const CONTAINER: &str = "adapters";
const SHARED: &str = "shared_parameters";
const INVERTIBLE: &str = "invertible_adapters";

/// Parts of bottlenecks that are not built: a field, and the value that does without.
const NOT_BUILT: [(&str, Value); 6] = [
    ("cross_adapter", Value::Bool(false)),
    ("shared_W_phm", Value::Bool(false)),
    ("factorized_phm_rule", Value::Bool(false)),
    ("factorized_phm_W", Value::Bool(true)),
    ("phm_bias", Value::Bool(true)),
    ("learn_phm", Value::Bool(true)),
];

pub(crate) fn read(folder: &HubFolder) -> Result<(BottleneckConfig, BTreeMap<String, Values>)> {
    let mut method = method_of(&folder.config)?;
    let shared = format!(".{SHARED}.{}.phm_rule", folder.name);
    let rule = folder.tensors.iter().find(|(key, _)| key.ends_with(&shared)).map(|(_, rule)| rule);
    let mut own = HubFolder { tensors: BTreeMap::new(), ..folder.clone() };
    let (mut tensors, mut places, mut problems) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
    let invertible = format!("{INVERTIBLE}.{}.", folder.name);
    for (key, values) in folder.tensors.iter().filter(|(key, _)| !key.ends_with(&shared)) {
        if key.contains(&invertible) {
            tensors.insert(key.replacen(&invertible, &format!("{INVERTIBLE}."), 1), values.clone());
        } else {
            own.tensors.insert(key.clone(), values.clone());
        }
    }
    for (module, rest, values) in own.parts(CONTAINER)? {
        match (place_of(module), key_of(rest, method.ln_before)) {
            (Some(place), Some(key)) => {
                if !key.is_empty() {
                    tensors.insert(format!("{place}.{key}"), values.clone());
                }
                places.insert(place);
            }
            _ => problems.push(Problem::Unknown { name: format!("{module}.{CONTAINER}.{}.{rest}", folder.name) }),
        }
    }
    if !problems.is_empty() {
        return Err(Error::Tensors { path: peft_core::files::HUB_TENSOR_FILE.into(), problems });
    }
    for (place, rule) in places.iter().flat_map(|place| rule.map(|rule| (place, rule))) {
        for projection in ["adapter_down", "adapter_up"] {
            tensors.insert(format!("{place}.{projection}.phm_rule"), rule.clone());
        }
    }
    let names = [AFTER_ATTENTION, AFTER_FEED_FORWARD];
    method.targets =
        Targets::modules(names.into_iter().filter(|name| places.iter().any(|place| place.ends_with(name))));
    Ok((method, tensors))
}

pub(crate) fn write(file: &AdapterFile<BottleneckConfig>, name: &str) -> Result<HubFolder> {
    let (method, mut tensors, mut places) = (&file.method, BTreeMap::new(), BTreeSet::new());
    for (key, values) in &file.tensors {
        if let Some(at) = key.find(INVERTIBLE) {
            let (module, rest) = key.split_at(at + INVERTIBLE.len());
            tensors.insert(format!("{module}.{name}{rest}"), values.clone());
            continue;
        }
        let split = [AFTER_ATTENTION, AFTER_FEED_FORWARD].iter().find_map(|place| {
            let (block, rest) = key.split_once(&format!(".{place}."))?;
            Some((block, *place, rest))
        });
        let Some((block, place, rest)) = split else {
            let what =
                format!("{key} is not at a place that AdapterHub knows; keep what is trained whole in PEFT's layout");
            return Err(Error::config("modules_to_save", "null", what));
        };
        places.insert(place);
        let module = format!("{}.{CONTAINER}.{name}", module_of(block, place));
        tensors.extend(keys_of(rest, method).into_iter().map(|key| (format!("{module}.{key}"), values.clone())));
    }
    let mut config = config_of(method)?;
    config.insert("mh_adapter".to_owned(), places.contains(AFTER_ATTENTION).into());
    config.insert("output_adapter".to_owned(), places.contains(AFTER_FEED_FORWARD).into());
    Ok(HubFolder { config, name: name.to_owned(), model: file.base_model.clone(), tensors })
}

fn method_of(config: &Map<String, Value>) -> Result<BottleneckConfig> {
    if let Some(found) = config.get("inv_adapter").filter(|found| ![Value::Null, json!("nice")].contains(found)) {
        let expected = "null or \"nice\": the library's \"glow\" fails on any input";
        return Err(Error::config("inv_adapter", expected, found));
    }
    for (field, without) in NOT_BUILT {
        if let Some(found) = config.get(field).filter(|found| **found != without) {
            return Err(Error::config(field, format!("{without}: this part of bottlenecks is not built yet"), found));
        }
    }
    let given = config.iter().filter(|(_, value)| !value.is_null());
    let given: Map<_, _> = given.map(|(key, value)| (key.clone(), value.clone())).collect();
    serde_json::from_value(Value::Object(given)).map_err(|e| Error::config("config", "a bottleneck's fields", e))
}

fn config_of(method: &BottleneckConfig) -> Result<Map<String, Value>> {
    let invalid = |e: serde_json::Error| Error::config("config", "values that JSON can hold", e);
    let Value::Object(mut config) = serde_json::to_value(method).map_err(invalid)? else {
        return Err(Error::config("config", "a struct of named fields", "another type"));
    };
    let targets = serde_json::to_value(Targets::default()).map_err(invalid)?;
    config.retain(|field, _| targets.get(field).is_none());
    config.extend(NOT_BUILT.map(|(field, without)| (field.to_owned(), without)));
    // Each layer has a rule of its own here.
    config.insert("shared_phm_rule".to_owned(), json!(false));
    Ok(config)
}

/// The place that a module of AdapterHub's keys stands for.
fn place_of(module: &str) -> Option<String> {
    if let Some(block) = module.strip_suffix(".attention.output") {
        return Some(format!("{block}.{AFTER_ATTENTION}"));
    }
    if let Some(block) = module.strip_suffix(".output") {
        return Some(format!("{block}.{AFTER_FEED_FORWARD}"));
    }
    [AFTER_ATTENTION, AFTER_FEED_FORWARD].iter().any(|place| module.ends_with(place)).then(|| module.to_owned())
}

/// The reverse. BERT and RoBERTa are those whose blocks are at `encoder.layer` of no vision model.
fn module_of(block: &str, place: &str) -> String {
    let vision = ["vit.", "dinov2."].iter().any(|family| block.starts_with(family));
    match (block.contains("encoder.layer.") && !vision, place) {
        (false, _) => format!("{block}.{place}"),
        (true, AFTER_ATTENTION) => format!("{block}.attention.output"),
        (true, _) => format!("{block}.output"),
    }
}

/// The key in PEFT's layout of what follows the adapter's name; empty for the second copy of a norm.
fn key_of(rest: &str, ln_before: bool) -> Option<String> {
    let Some((projection, field)) = rest.split_once('.') else { return (rest == "scaling").then(|| rest.to_owned()) };
    let field = match (projection, field.split_once('.')) {
        ("adapter_down", Some(("0", _))) if ln_before => return Some(String::new()),
        ("adapter_down", Some((number, field))) if number == if ln_before { "1" } else { "0" } => field,
        ("adapter_up" | "adapter_norm_before" | "adapter_norm_after" | "gate", None) => field,
        _ => return None,
    };
    Some(format!("{projection}.{}", if field == "b" { "bias" } else { field }))
}

/// The reverse: one key, or two for a norm that is stored twice.
fn keys_of(key: &str, method: &BottleneckConfig) -> Vec<String> {
    let Some((projection, field)) = key.split_once('.') else { return vec![key.to_owned()] };
    let projects = matches!(projection, "adapter_down" | "adapter_up");
    let field = if method.phm_layer && projects && field == "bias" { "b" } else { field };
    match projection {
        "adapter_down" => vec![format!("adapter_down.{}.{field}", u8::from(method.ln_before))],
        "adapter_norm_before" => vec![key.to_owned(), format!("adapter_down.0.{field}")],
        _ => vec![format!("{projection}.{field}")],
    }
}
