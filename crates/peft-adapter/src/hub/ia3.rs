//! (IA)³ in AdapterHub's layout: a LoRA of rank one without `A`, whose `B` multiplies what the layer computes.

use std::collections::{BTreeMap, BTreeSet};

use peft_core::files::{HUB_TENSOR_FILE, HubFolder, Values, layers_config};
use peft_core::{AdapterFile, Error, Names, Problem, Result, Targets};
use serde_json::Value;

use crate::Ia3Config;

const CONTAINER: &str = "loras";
const FACTORS: &str = "lora_B";

/// What follows the adapter's name there, and the key here.
const PARTS: [(&str, &str); 3] =
    [(FACTORS, "ia3_l"), ("gate.weight", "ia3_gate.weight"), ("gate.bias", "ia3_gate.bias")];

pub(crate) fn read(folder: &HubFolder) -> Result<(Ia3Config, BTreeMap<String, Values>)> {
    let use_gating = folder.config.get("use_gating").is_some_and(|gating| *gating == Value::Bool(true));
    // What multiplies the output is the factor times this number, or times the gate.
    let alpha = folder.config.get("alpha").and_then(Value::as_f64).filter(|_| !use_gating).unwrap_or(1.0) as f32;
    let (mut tensors, mut modules, mut problems) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
    for (module, rest, values) in folder.parts(CONTAINER)? {
        if let Some((_, here)) = PARTS.iter().find(|(there, _)| *there == rest) {
            let factor = if rest == FACTORS { alpha } else { 1.0 };
            let scaled = values.values.iter().map(|value| factor * value).collect();
            tensors.insert(format!("{module}.{here}"), Values { shape: values.shape.clone(), values: scaled });
            modules.insert(module);
        } else {
            problems.push(Problem::Unknown { name: format!("{module}.{CONTAINER}.{}.{rest}", folder.name) });
        }
    }
    if problems.is_empty() {
        Ok((Ia3Config { use_gating, ..Ia3Config::new(Targets::modules(modules)) }, tensors))
    } else {
        Err(Error::Tensors { path: HUB_TENSOR_FILE.into(), problems })
    }
}

pub(crate) fn write(file: &AdapterFile<Ia3Config>, name: &str) -> Result<HubFolder> {
    if file.method.feedforward_modules != Names::List(Vec::new()) {
        let expected = "none: AdapterHub's (IA)³ multiplies what a layer computes";
        return Err(Error::config("feedforward_modules", expected, format!("{:?}", file.method.feedforward_modules)));
    }
    let (mut tensors, mut modules) = (BTreeMap::new(), BTreeSet::new());
    for (key, values) in &file.tensors {
        let part = PARTS.iter().find_map(|(there, here)| Some((key.strip_suffix(here)?.strip_suffix('.')?, *there)));
        let Some((module, part)) = part else {
            let what = format!("{key} is no factor of a layer; keep what is trained whole in PEFT's layout");
            return Err(Error::config("modules_to_save", "null", what));
        };
        tensors.insert(format!("{module}.{CONTAINER}.{name}.{part}"), values.clone());
        modules.insert(module);
    }
    let mut config = layers_config(modules)?;
    let fields: [(&str, Value); 6] = [
        ("r", 1.into()),
        ("alpha", 1.into()),
        ("dropout", 0.0.into()),
        ("init_weights", "ia3".into()),
        ("composition_mode", "scale".into()),
        ("use_gating", file.method.use_gating.into()),
    ];
    config.extend(fields.map(|(field, value)| (field.to_owned(), value)));
    Ok(HubFolder { config, name: name.to_owned(), model: file.base_model.clone(), tensors })
}
