//! `LoRA` in AdapterHub's layout: `{module}.loras.{name}.lora_A`, and a configuration that says which layers by flags.

use std::collections::{BTreeMap, BTreeSet};

use peft_core::files::{HubFolder, Values, layers_config};
use peft_core::{AdapterFile, Error, Problem, Result, Targets};
use serde_json::Value;

use crate::LoraConfig;
use crate::combine::one_layer_each;

const CONTAINER: &str = "loras";

/// What follows the adapter's name there, and the key here.
const PARTS: [(&str, &str); 4] = [
    ("lora_A", "lora_A.weight"),
    ("lora_B", "lora_B.weight"),
    ("gate.weight", "lora_gate.weight"),
    ("gate.bias", "lora_gate.bias"),
];

pub(crate) fn read(folder: &HubFolder) -> Result<(LoraConfig, BTreeMap<String, Values>)> {
    if let Some(found) = folder.config.get("use_dora").filter(|found| **found != Value::Bool(false)) {
        return Err(Error::config("use_dora", "false: this part of LoRA is not built yet", found));
    }
    let number = |field: &str, default: f64| match folder.config.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(found) => found.as_f64().ok_or_else(|| Error::config(field, "a number", found)),
    };
    let (mut tensors, mut modules, mut problems) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
    for (module, rest, values) in folder.parts(CONTAINER)? {
        match PARTS.iter().find(|(there, _)| *there == rest) {
            Some((_, here)) => {
                tensors.insert(format!("{module}.{here}"), values.clone());
                modules.insert(module);
            }
            None => problems.push(Problem::Unknown { name: format!("{module}.{CONTAINER}.{}.{rest}", folder.name) }),
        }
    }
    if !problems.is_empty() {
        return Err(Error::Tensors { path: peft_core::files::HUB_TENSOR_FILE.into(), problems });
    }
    let rank = number("r", 8.0)?;
    let method = LoraConfig {
        rank: rank as usize,
        alpha: number("alpha", rank)?,
        dropout: number("dropout", 0.0)?,
        use_gating: folder.config.get("use_gating").is_some_and(|gating| *gating == Value::Bool(true)),
        targets: Targets::modules(modules),
        ..LoraConfig::default()
    };
    Ok((method, tensors))
}

pub(crate) fn write(file: &AdapterFile<LoraConfig>, name: &str) -> Result<HubFolder> {
    let method = &file.method;
    one_layer_each(method)?;
    if method.use_rslora || method.lora_bias || !method.rank_pattern.is_empty() || !method.alpha_pattern.is_empty() {
        let found = "rsLoRA, a bias, or ranks that differ from layer to layer";
        return Err(Error::config("config", "one rank and one scale, which AdapterHub's layout has", found));
    }
    let (mut tensors, mut modules) = (BTreeMap::new(), BTreeSet::new());
    for (key, values) in &file.tensors {
        let part = PARTS.iter().find_map(|(there, here)| Some((key.strip_suffix(here)?.strip_suffix('.')?, *there)));
        let Some((module, part)) = part else {
            let what = format!("{key} is no factor of a linear layer; keep what is trained whole in PEFT's layout");
            return Err(Error::config("modules_to_save", "null", what));
        };
        tensors.insert(format!("{module}.{CONTAINER}.{name}.{part}"), values.clone());
        modules.insert(module);
    }
    let mut config = layers_config(modules)?;
    let fields: [(&str, Value); 6] = [
        ("r", method.rank.into()),
        ("alpha", method.alpha.into()),
        ("dropout", method.dropout.into()),
        ("init_weights", "lora".into()),
        ("composition_mode", "add".into()),
        ("use_gating", method.use_gating.into()),
    ];
    config.extend(fields.map(|(field, value)| (field.to_owned(), value)));
    Ok(HubFolder { config, name: name.to_owned(), model: file.base_model.clone(), tensors })
}
