//! A folder of a union, and the folders that its parts would have alone.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{ARCHITECTURE, HUB_TENSOR_FILE, HubFolder, PREFIX_TUNING, UNION, method_type};
use crate::{Error, Problem, Result};

const CONFIGS: &str = "configs";

/// What stands before the adapter's name in the keys of a method.
fn containers(method: &str) -> &'static [&'static str] {
    match method {
        "LORA" | "IA3" => &["loras"],
        "BOTTLENECK" => &["adapters", "invertible_adapters", "shared_parameters"],
        "PREFIX_TUNING" => &["prefix_tunings", "prefix_gates"],
        _ => &[],
    }
}

/// The model's name that the key of something in a block begins with; those of an encoder without a head have none.
fn model_of(key: &str) -> Option<&str> {
    let headless = ["encoder.layer.", "transformer.layer.", PREFIX_TUNING];
    if headless.iter().any(|start| key.starts_with(start)) { None } else { key.split('.').next() }
}

impl HubFolder {
    /// The `peft_type` of its method; nothing for one that is not read from this layout.
    pub fn method_type(&self) -> Option<&'static str> {
        method_type(&self.config)
    }

    /// The parts of a union, each with its configuration and its tensors.
    ///
    /// # Errors
    /// When a part is of no known method, two have their tensors under the same keys, or a tensor belongs to none.
    pub fn parts_of_union(&self) -> Result<Vec<Self>> {
        let configs = self.config.get(CONFIGS).and_then(Value::as_array);
        let configs = configs.ok_or_else(|| Error::config(CONFIGS, "a list of configurations", "none"))?;
        let mut parts: Vec<Self> = Vec::new();
        for config in configs {
            let Value::Object(config) = config.clone() else {
                return Err(Error::config(CONFIGS, "objects", config));
            };
            let part = Self { config, tensors: BTreeMap::new(), ..self.clone() };
            let architecture = || part.config.get(ARCHITECTURE).unwrap_or(&Value::Null).to_string();
            let own = part.method_type().map(containers).filter(|own| !own.is_empty());
            let own = own.ok_or_else(|| Error::config(CONFIGS, "methods that are read", architecture()))?;
            if parts.iter().any(|other| other.containers() == own) {
                return Err(Error::config(CONFIGS, "parts with keys of their own", architecture()));
            }
            parts.push(part);
        }
        let mut problems = Vec::new();
        for (key, values) in &self.tensors {
            let belongs = |part: &&mut Self| {
                let named = |container: &&str| key.contains(&format!(".{container}.{}.", self.name));
                part.containers().iter().any(named)
            };
            match parts.iter_mut().find(belongs) {
                Some(part) => drop(part.tensors.insert(key.clone(), values.clone())),
                None => problems.push(Problem::Unknown { name: key.clone() }),
            }
        }
        if problems.is_empty() { Ok(parts) } else { Err(Error::Tensors { path: HUB_TENSOR_FILE.into(), problems }) }
    }

    /// The reverse; a part that is a union gives its own parts.
    ///
    /// # Errors
    /// When there is no part.
    pub fn union(parts: Vec<Self>) -> Result<Self> {
        let (mut configs, mut whole) = (Vec::new(), None::<Self>);
        for part in parts {
            match part.config.get(CONFIGS) {
                Some(Value::Array(own)) => configs.extend(own.clone()),
                _ => configs.push(Value::Object(part.config.clone())),
            }
            match &mut whole {
                Some(whole) => whole.tensors.extend(part.tensors),
                None => whole = Some(part),
            }
        }
        let mut whole = whole.ok_or_else(|| Error::config(CONFIGS, "a configuration at least", "none"))?;
        let config = Map::from_iter([(ARCHITECTURE.to_owned(), json!(UNION)), (CONFIGS.to_owned(), configs.into())]);
        // The library finds a prefix by itself where no key begins with the model's name; where others do, so must its own.
        if let Some(model) = whole.tensors.keys().find_map(|key| model_of(key)).map(str::to_owned) {
            let named = |key: String| if key.starts_with(PREFIX_TUNING) { format!("{model}.{key}") } else { key };
            whole.tensors = whole.tensors.into_iter().map(|(key, values)| (named(key), values)).collect();
        }
        Ok(Self { config, ..whole })
    }

    fn containers(&self) -> &'static [&'static str] {
        self.method_type().map_or(&[], containers)
    }
}
