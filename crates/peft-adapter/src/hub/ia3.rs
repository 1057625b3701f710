//! (IA)³ in AdapterHub's layout: a LoRA of rank one without `A`, whose `B` multiplies what the layer computes.

use std::collections::{BTreeMap, BTreeSet};

use peft_core::files::{HUB_TENSOR_FILE, HubFolder, Values, layers_config};
use peft_core::{AdapterFile, Error, Names, Problem, Result, Targets};
use serde_json::Value;

use crate::Ia3Config;

const CONTAINER: &str = "loras";
const KEY: &str = "ia3_l";

pub(crate) fn read(folder: &HubFolder) -> Result<(Ia3Config, BTreeMap<String, Values>)> {
    if let Some(found) = folder.config.get("use_gating").filter(|found| **found != Value::Bool(false)) {
        return Err(Error::config("use_gating", "false: this part of (IA)³ is not built yet", found));
    }
    // What multiplies the output is the factor times this number.
    let alpha = folder.config.get("alpha").and_then(Value::as_f64).unwrap_or(1.0) as f32;
    let (mut tensors, mut modules, mut problems) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
    for (module, rest, values) in folder.parts(CONTAINER)? {
        if rest == "lora_B" {
            let scaled = values.values.iter().map(|value| alpha * value).collect();
            tensors.insert(format!("{module}.{KEY}"), Values { shape: values.shape.clone(), values: scaled });
            modules.insert(module);
        } else {
            problems.push(Problem::Unknown { name: format!("{module}.{CONTAINER}.{}.{rest}", folder.name) });
        }
    }
    if problems.is_empty() {
        Ok((Ia3Config::new(Targets::modules(modules)), tensors))
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
        let Some(module) = key.strip_suffix(&format!(".{KEY}")) else {
            let what = format!("{key} is no factor of a layer; keep what is trained whole in PEFT's layout");
            return Err(Error::config("modules_to_save", "null", what));
        };
        tensors.insert(format!("{module}.{CONTAINER}.{name}.lora_B"), values.clone());
        modules.insert(module);
    }
    let mut config = layers_config(modules)?;
    let fields: [(&str, Value); 5] = [
        ("r", 1.into()),
        ("alpha", 1.into()),
        ("dropout", 0.0.into()),
        ("init_weights", "ia3".into()),
        ("composition_mode", "scale".into()),
    ];
    config.extend(fields.map(|(field, value)| (field.to_owned(), value)));
    Ok(HubFolder { config, name: name.to_owned(), model: file.base_model.clone(), tensors })
}
