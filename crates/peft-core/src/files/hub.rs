//! AdapterHub's layout: `adapter_config.json` with an object `config`, and `adapter.safetensors` or `pytorch_adapter.bin`.

mod union;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};

use super::legacy::renew;
use super::torch::read_torch;
use super::{AdapterFile, CONFIG_FILE, Values, read_config, read_values, write_atomically, write_values};
use crate::{Error, Method, Problem, Result};

/// The tensors' file name.
pub const HUB_TENSOR_FILE: &str = "adapter.safetensors";
/// What older versions wrote: a pickle, of which tensors are read and nothing is run.
const HUB_TORCH_FILE: &str = "pytorch_adapter.bin";

/// What a folder in AdapterHub's layout holds.
#[derive(Clone, Debug, PartialEq)]
pub struct HubFolder {
    /// The object `config`: what the method is.
    pub config: Map<String, Value>,
    /// The adapter's name, which is part of each key.
    pub name: String,
    /// Name of the base model.
    pub model: Option<String>,
    /// Tensors by key.
    pub tensors: BTreeMap<String, Values>,
}

/// The `peft_type` of what the JSON of an AdapterHub folder describes; nothing for another layout.
pub(super) fn hub_type(json: &Map<String, Value>) -> Option<&'static str> {
    method_type(json.get("config").and_then(Value::as_object)?)
}

/// The field that says what kind of method a configuration is of; bottlenecks have none.
const ARCHITECTURE: &str = "architecture";

/// Keys by which a pickle names a prefix again under each block.
const REPEATED: &str = ".prefix_tuning.pool.";

/// What keys of a prefix begin with, or have behind the model's name.
const PREFIX_TUNING: &str = "prefix_tuning.";

/// What it says of a union.
const UNION: &str = "union";

fn method_type(config: &Map<String, Value>) -> Option<&'static str> {
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    match (text(ARCHITECTURE), text("composition_mode")) {
        (None, _) => Some("BOTTLENECK"),
        (Some(UNION), _) => Some("UNION"),
        (Some("prefix_tuning"), _) => Some("PREFIX_TUNING"),
        (Some("lora"), Some("scale")) => Some("IA3"),
        (Some("lora"), _) => Some("LORA"),
        _ => None,
    }
}

impl HubFolder {
    /// Reads a folder, of an older version too.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let mut json = read_config(&path)?;
        let text = |key: &str| json.get(key).and_then(Value::as_str).map(str::to_owned);
        let name = text("name").ok_or_else(|| Error::format(&path, "no `name` of the adapter"))?;
        let model = text("model_name");
        let Some(Value::Object(config)) = json.remove("config") else {
            return Err(Error::format(&path, "no object `config`"));
        };
        let safe = dir.join(HUB_TENSOR_FILE);
        let mut tensors = if safe.exists() { read_values(&safe)? } else { read_torch(&dir.join(HUB_TORCH_FILE))? };
        tensors.retain(|key, _| !key.contains(REPEATED));
        let mut folder = Self { config, name, model, tensors };
        renew(&mut folder, &json);
        Ok(folder)
    }

    /// Writes a folder; see [`write_atomically`].
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn write(&self, dir: &Path) -> Result<()> {
        // Keys of a prefix may begin with what the library finds in every model.
        let model_type = self.tensors.keys().find(|key| !key.starts_with(PREFIX_TUNING));
        let model_type = model_type.and_then(|key| key.split('.').next());
        let json = serde_json::json!({
            "config": self.config,
            "model_class": null,
            "model_name": self.model,
            "model_type": model_type,
            "name": self.name,
            "version": "adapters.1.3.0",
        });
        let json = serde_json::to_string_pretty(&json).map_err(|e| Error::format(dir, e.to_string()))?;
        let tensors = self.tensors.iter().map(|(key, values)| (key.clone(), values));
        let tensors = write_values(tensors, &dir.join(HUB_TENSOR_FILE))?;
        write_atomically(dir, &[(HUB_TENSOR_FILE, &tensors), (CONFIG_FILE, json.as_bytes())])
    }

    /// The tensors of one kind of adapter: each by the path of its module, and by what follows the adapter's name.
    ///
    /// # Errors
    /// [`Error::Tensors`] with every key that is of another kind; `dir` is for messages.
    pub fn parts(&self, container: &str) -> Result<Vec<(&str, &str, &Values)>> {
        let middle = format!(".{container}.{}.", self.name);
        let mut problems = Vec::new();
        let mut parts = Vec::new();
        for (key, values) in &self.tensors {
            match key.split_once(&middle) {
                Some((module, rest)) => parts.push((module, rest, values)),
                None => problems.push(Problem::Unknown { name: key.clone() }),
            }
        }
        if problems.is_empty() { Ok(parts) } else { Err(Error::Tensors { path: HUB_TENSOR_FILE.into(), problems }) }
    }
}

impl<M: Method> AdapterFile<M> {
    /// What [`read`](Self::read) does in AdapterHub's layout.
    pub(super) fn read_hub(dir: &Path) -> Result<Self> {
        let folder = HubFolder::read(dir)?;
        let read = M::from_hub(&folder)?;
        let (method, tensors) = read.ok_or_else(|| Error::Method {
            path: dir.join(CONFIG_FILE),
            expected: format!("{} in AdapterHub's layout", M::PEFT_TYPE),
            found: "a method that is not read from it".to_owned(),
        })?;
        method.check()?;
        Ok(Self { method, base_model: folder.model, task_type: None, base_fingerprint: None, tensors })
    }

    /// Writes a folder in AdapterHub's layout, which its library loads by `load_adapter`.
    ///
    /// # Errors
    /// When the method, or what this adapter makes of it, does not exist there; and when the file system refuses.
    pub fn write_hub(&self, name: &str, dir: &Path) -> Result<()> {
        let written = M::to_hub(self, name)?;
        let folder = written.ok_or_else(|| Error::Method {
            path: dir.to_owned(),
            expected: "a method that AdapterHub's layout has".to_owned(),
            found: M::PEFT_TYPE.to_owned(),
        })?;
        folder.write(dir)
    }
}

const INTERMEDIATE: &str = "intermediate_lora";
const OUTPUT: &str = "output_lora";

/// By the end of a layer's name, what says that it has LoRA or (IA)³: `BERT`, `DistilBERT`, Llama. The library takes the feed-forward layers of Llama the other way round.
const LAYERS: [(&str, Option<&str>); 16] = [
    (".query", Some("q")),
    (".key", Some("k")),
    (".value", Some("v")),
    (".q_lin", Some("q")),
    (".k_lin", Some("k")),
    (".v_lin", Some("v")),
    (".self_attn.q_proj", Some("q")),
    (".self_attn.k_proj", Some("k")),
    (".self_attn.v_proj", Some("v")),
    (".intermediate.dense", Some(INTERMEDIATE)),
    (".attention.output.dense", None),
    (".output.dense", Some(OUTPUT)),
    (".ffn.lin1", Some(INTERMEDIATE)),
    (".ffn.lin2", Some(OUTPUT)),
    (".mlp.down_proj", Some(INTERMEDIATE)),
    (".mlp.up_proj", Some(OUTPUT)),
];

/// The fields of `config` that say which layers have LoRA or (IA)³ there: projections of the attention, and both of the feed-forward part.
///
/// # Errors
/// When one of the layers is none of these.
pub fn layers_config<'a>(modules: impl IntoIterator<Item = &'a str>) -> Result<Map<String, Value>> {
    let mut flags = BTreeSet::new();
    for module in modules {
        let flag = LAYERS.iter().find(|(end, _)| module.ends_with(end)).and_then(|(_, flag)| *flag);
        let expected =
            "projections q, k and v of attention, and both of the feed-forward part, which AdapterHub's layout has";
        flags.insert(flag.ok_or_else(|| Error::config("target_modules", expected, module))?);
    }
    let (intermediate, output) = (flags.remove(INTERMEDIATE), flags.remove(OUTPUT));
    let fields = serde_json::json!({
        "attn_matrices": flags,
        "selfattn_lora": !flags.is_empty(),
        "intermediate_lora": intermediate,
        "output_lora": output,
        "architecture": "lora",
        "leave_out": [],
        "use_dora": false,
        "use_gating": false,
    });
    let Value::Object(fields) = fields else { unreachable!("made as an object") };
    Ok(fields)
}
