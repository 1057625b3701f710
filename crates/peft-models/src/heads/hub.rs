//! Heads in AdapterHub's layout: `head_config.json`, and `model_head.safetensors` or `pytorch_model_head.bin`.
//!
//! - two layers: `output(tanh(dense(h₀)))`, one layer: `output(h₀)`; `h₀` is the last hidden state of the first token
//! - keys: `heads.{name}.1` and `heads.{name}.4`, the places of the linear layers between dropout and activation

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use peft_core::Named;
use peft_core::files::{Values, read_torch, read_values, transpose, write_atomically, write_values};
use serde_json::{Map, Value, json};

use super::{Head, Reads, Task};
use crate::config::Family;
use crate::{Encoder, Error, Result};

const CONFIG_FILE: &str = "head_config.json";
const TENSOR_FILE: &str = "model_head.safetensors";
const TORCH_FILE: &str = "pytorch_model_head.bin";

/// The files of a head.
pub const HUB_HEAD_FILES: [&str; 3] = [CONFIG_FILE, TENSOR_FILE, TORCH_FILE];

/// Whether the folder has a head in AdapterHub's layout.
pub fn has_hub_head(dir: &Path) -> bool {
    dir.join(CONFIG_FILE).exists()
}

impl Encoder {
    /// The same encoder with the classification head that AdapterHub's library saved in `dir` beside an adapter.
    ///
    /// # Errors
    /// When a file is missing or malformed, the head is of another kind, or a tensor is of another shape than the configuration and this encoder ask for.
    pub fn with_hub_head(self, dir: &Path, device: &Device) -> Result<Self> {
        let (path, json) = config_of(dir)?;
        let (name, labels, layers) = described(&json, &path)?;
        let (file, mut tensors) = tensors_of(dir)?;
        let hidden = self.config().hidden_size;
        let mut layer = |place: usize, d_out: usize| -> Result<Linear> {
            let mut take = |part: &str, shape: &[usize]| {
                let key = format!("heads.{name}.{place}.{part}");
                let found = tensors.remove(&key).filter(|values| values.shape == shape);
                found.ok_or_else(|| Error::format(&file, format!("{key}: expected a tensor of shape {shape:?}")))
            };
            let weight = take("weight", &[d_out, hidden])?;
            let bias = take("bias", &[d_out])?.values;
            let weight = TensorData::new(transpose(&weight.values, d_out, hidden), [hidden, d_out]);
            Ok(Linear {
                weight: Param::from_tensor(Tensor::from_data(weight, device)),
                bias: Some(Param::from_tensor(Tensor::from_data(bias.as_slice(), device))),
            })
        };
        let dense = match layers {
            1 => None,
            _ => Some(Named::new("classifier.dense", layer(1, hidden)?)),
        };
        let output = layer(if layers == 1 { 1 } else { 4 }, labels.len())?;
        let name = if dense.is_some() { "classifier.out_proj" } else { "classifier" };
        let head = Head { dense, output: Named::new(name, output), reads: Reads::First };
        Ok(self.with_head(Task::classification(labels), head))
    }

    /// Writes the head as AdapterHub's library reads it, under the adapter's name.
    ///
    /// # Errors
    /// When the head reads anything but the first token's state, as BERT's own does; the device hands out no tensor; or the file system refuses.
    pub fn save_hub_head(&self, name: &str, dir: &Path) -> Result<()> {
        let (Some(head), Task::Classification { labels, .. }) = (self.head(), &self.config().task) else {
            return Err(not_there("a model without a classification head"));
        };
        let Some(class) = class_of(self.config().family) else {
            return Err(not_there("the head of a model for images"));
        };
        if !head.reads_first(self.config().family) {
            return Err(not_there("a head behind the model's own pooler"));
        }
        let mut tensors: BTreeMap<String, Values> = BTreeMap::new();
        let mut put = |place: usize, layer: &Linear| -> Result<()> {
            let read = |data: burn::tensor::TensorData| data.iter::<f32>().collect::<Vec<f32>>();
            let failed = |e| Error::format(name, format!("the device could not hand out the head: {e:?}"));
            let [d_in, d_out] = layer.weight.dims();
            let weight = read(layer.weight.base().try_into_data().map_err(failed)?);
            let weight = Values { shape: vec![d_out, d_in], values: transpose(&weight, d_in, d_out) };
            tensors.insert(format!("heads.{name}.{place}.weight"), weight);
            if let Some(bias) = &layer.bias {
                let values = read(bias.base().try_into_data().map_err(failed)?);
                tensors.insert(format!("heads.{name}.{place}.bias"), Values { shape: vec![d_out], values });
            }
            Ok(())
        };
        if let Some(dense) = &head.dense {
            put(1, dense)?;
        }
        put(if head.dense.is_some() { 4 } else { 1 }, &head.output)?;
        let ids: Map<String, Value> = labels.iter().enumerate().map(|(id, label)| (label.clone(), json!(id))).collect();
        let config = json!({
            "config": {
                "activation_function": "tanh", "bias": true, "dropout_prob": null, "head_type": "classification", "label2id": ids,
                "layers": if head.dense.is_some() { 2 } else { 1 }, "num_labels": labels.len(), "use_pooler": false,
            },
            "hidden_size": self.config().hidden_size, "model_class": class, "model_name": null,
            "name": name, "version": "adapters.1.3.0",
        });
        write(&config, &tensors, dir)
    }
}

/// Copies the head in `from` to `to` under another name: the library looks for that of the adapter.
///
/// # Errors
/// When a file is missing or malformed, or the file system refuses.
pub fn rename_hub_head(from: &Path, name: &str, to: &Path) -> Result<()> {
    let ((path, mut config), (_, tensors)) = (config_of(from)?, tensors_of(from)?);
    let old = format!("heads.{}.", name_of(&config, &path)?);
    let renamed = |key: String| match key.strip_prefix(&old) {
        Some(rest) => format!("heads.{name}.{rest}"),
        None => key,
    };
    let tensors = tensors.into_iter().map(|(key, values)| (renamed(key), values)).collect();
    config["name"] = name.into();
    write(&config, &tensors, to)
}

/// What the library calls a text model with heads; it looks at no head of another class.
fn class_of(family: Family) -> Option<&'static str> {
    match family {
        Family::Bert => Some("BertAdapterModel"),
        Family::Roberta => Some("RobertaAdapterModel"),
        Family::DistilBert => Some("DistilBertAdapterModel"),
        Family::Vit | Family::Dinov2 => None,
    }
}

fn config_of(dir: &Path) -> Result<(PathBuf, Value)> {
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let json = serde_json::from_str(&text).map_err(|e| Error::format(&path, e.to_string()))?;
    Ok((path, json))
}

fn tensors_of(dir: &Path) -> Result<(PathBuf, BTreeMap<String, Values>)> {
    let (safe, torch) = (dir.join(TENSOR_FILE), dir.join(TORCH_FILE));
    Ok(if safe.exists() { (safe.clone(), read_values(&safe)?) } else { (torch.clone(), read_torch(&torch)?) })
}

fn write(config: &Value, tensors: &BTreeMap<String, Values>, dir: &Path) -> Result<()> {
    let config = serde_json::to_string_pretty(config).map_err(|e| Error::format(dir, e.to_string()))?;
    let tensors = tensors.iter().map(|(key, values)| (key.clone(), values));
    let tensors = write_values(tensors, &dir.join(TENSOR_FILE))?;
    Ok(write_atomically(dir, &[(TENSOR_FILE, &tensors), (CONFIG_FILE, config.as_bytes())])?)
}

fn name_of<'a>(json: &'a Value, path: &Path) -> Result<&'a str> {
    json.get("name").and_then(Value::as_str).ok_or_else(|| Error::format(path, "no `name` of the head"))
}

fn not_there(what: &str) -> Error {
    Error::Unsupported {
        what: format!("{what} in AdapterHub's layout"),
        hint: "save the adapter in PEFT's layout, which holds any head".to_owned(),
    }
}

/// Name, labels and number of layers of a head.
fn described(json: &Value, path: &Path) -> Result<(String, Vec<String>, usize)> {
    let name = name_of(json, path)?;
    let config = json.get("config").ok_or_else(|| Error::format(path, "no object `config`"))?;
    let expect = |field: &str, expected: &[Value]| match config.get(field) {
        Some(found) if expected.contains(found) => Ok(()),
        found => {
            let found = found.map_or_else(|| "nothing".to_owned(), Value::to_string);
            Err(Error::format(path, format!("`{field}`: expected one of {expected:?}, found {found}")))
        }
    };
    expect("head_type", &[json!("classification")])?;
    expect("layers", &[json!(1), json!(2)])?;
    expect("use_pooler", &[json!(false)])?;
    expect("bias", &[json!(true)])?;
    expect("activation_function", &[json!("tanh")])?;
    let wrong = || Error::format(path, "`label2id`: expected the ids 0, 1, … by label");
    let ids = config.get("label2id").and_then(Value::as_object).ok_or_else(wrong)?;
    let label = |id: usize| ids.iter().find(|(_, found)| **found == json!(id)).map(|(label, _)| label.clone());
    let labels = (0..ids.len()).map(label).collect::<Option<Vec<_>>>().filter(|labels| !labels.is_empty());
    let layers = if config.get("layers") == Some(&json!(1)) { 1 } else { 2 };
    Ok((name.to_owned(), labels.ok_or_else(wrong)?, layers))
}
