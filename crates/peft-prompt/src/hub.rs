//! Prefixes in AdapterHub's layout.
//!
//! Keys there: `{model}.prefix_tuning.prefix_tunings.{name}.self_prefix.…`; where no key begins with the model's name the library finds the prefix too. A gate is in its block: `{model}.encoder.layer.0.attention.self.prefix_tuning.prefix_gates.{name}.weight`.
//! What is learned has the same order as here, block by block, keys first.

use std::collections::{BTreeMap, BTreeSet};

use peft_core::files::{ENCODER_PREFIX, HUB_TENSOR_FILE, HubFolder, Values};
use peft_core::{AdapterFile, Error, Method as _, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::{GATES, KEY, holds};
use crate::{Between, Gating, PrefixTuningConfig};

/// What models here call the place of prompts.
const PLACE: &str = "prompts";

/// The prefix where it is learned itself.
const FLAT: &str = "control_trans";

/// What is learned of an encoder, there and here.
const ENCODER: [(&str, &str); 5] = [
    ("wte.weight", "embedding.weight"),
    ("control_trans.0.weight", "transform.0.weight"),
    ("control_trans.0.bias", "transform.0.bias"),
    ("control_trans.2.weight", "transform.2.weight"),
    ("control_trans.2.bias", "transform.2.bias"),
];

/// More than any model has: the number of a block is from a file.
const MOST_BLOCKS: usize = 1 << 16;

/// By the model's name: what is before the number of a block, and what the self-attention in it is called.
const BLOCKS: [(&str, &str, &str); 3] = [
    ("bert", ".encoder.layer.", ".attention.self"),
    ("roberta", ".encoder.layer.", ".attention.self"),
    ("distilbert", ".transformer.layer.", ".attention"),
];

/// The object `config` of a prefix.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Config {
    architecture: String,
    encoder_prefix: bool,
    cross_prefix: bool,
    leave_out: Vec<usize>,
    flat: bool,
    prefix_length: usize,
    bottleneck_size: usize,
    non_linearity: Between,
    dropout: f64,
    use_gating: bool,
    shared_gating: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            architecture: "prefix_tuning".to_owned(),
            encoder_prefix: true,
            cross_prefix: true,
            leave_out: Vec::new(),
            flat: false,
            prefix_length: 30,
            bottleneck_size: 512,
            non_linearity: Between::Tanh,
            dropout: 0.0,
            use_gating: false,
            shared_gating: true,
        }
    }
}

pub(crate) fn read(folder: &HubFolder) -> Result<(PrefixTuningConfig, BTreeMap<String, Values>)> {
    let method = method_of(&folder.config)?;
    let (prefix, gate) =
        (format!(".prefix_tunings.{}.self_prefix.", folder.name), format!(".prefix_gates.{}.", folder.name));
    let (mut tensors, mut problems) = (BTreeMap::new(), Vec::new());
    for (key, values) in &folder.tensors {
        let here = if let Some((_, rest)) = key.split_once(&prefix) {
            let encoder = ENCODER.iter().find(|(there, _)| *there == rest);
            encoder
                .map(|(_, here)| format!("{ENCODER_PREFIX}{here}"))
                .or_else(|| (rest == FLAT).then(|| KEY.to_owned()))
        } else {
            key.split_once(&gate).and_then(|(module, rest)| gate_here(&method, module, rest))
        };
        match here {
            Some(here) => drop(tensors.insert(here.clone(), shaped(values, &here, method.num_virtual_tokens))),
            None => problems.push(Problem::Unknown { name: key.clone() }),
        }
    }
    if let Some(values) = encoded(&tensors, method.non_linearity) {
        tensors.insert(KEY.to_owned(), values);
    }
    if problems.is_empty() {
        Ok((method, tensors))
    } else {
        Err(Error::Tensors { path: HUB_TENSOR_FILE.into(), problems })
    }
}

/// What the encoder in a file makes, which our own layout holds too; nothing where there is none, or its shapes fit nothing, which is refused later.
fn encoded(tensors: &BTreeMap<String, Values>, between: Between) -> Option<Values> {
    let part = |name: &str| tensors.get(&format!("{ENCODER_PREFIX}{name}"));
    let layer = |x: &Values, number: usize| {
        let weight = part(&format!("transform.{number}.weight"))?;
        let bias = part(&format!("transform.{number}.bias"))?;
        let ([n, d_in], [d_out, same]) = (x.shape[..].try_into().ok()?, weight.shape[..].try_into().ok()?);
        let fits: bool = d_in == same && d_in > 0 && bias.values.len() == d_out;
        let row = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        let of_token = |x: &[f32]| -> Vec<f32> {
            let products = weight.values.chunks(d_in).zip(&bias.values);
            products.map(|(w, b)| (row(x, w) + f64::from(*b)) as f32).collect()
        };
        fits.then(|| Values { shape: vec![n, d_out], values: x.values.chunks(d_in).flat_map(of_token).collect() })
    };
    let mut inner = layer(part("embedding.weight")?, 0)?;
    inner.values.iter_mut().for_each(|value| {
        *value = match between {
            Between::Tanh => value.tanh(),
            Between::Relu => value.max(0.0),
        };
    });
    layer(&inner, 2)
}

/// A prefix as a matrix with a row for each token; everything else as it is.
fn shaped(values: &Values, key: &str, n: usize) -> Values {
    let mut values = values.clone();
    if key == KEY && n > 0 && values.values.len().is_multiple_of(n) {
        values.shape = vec![n, values.values.len() / n];
    }
    values
}

fn gate_here(method: &PrefixTuningConfig, module: &str, parameter: &str) -> Option<String> {
    BLOCKS.iter().find_map(|(model, layers, attention)| {
        let block = module.strip_prefix(model)?.strip_prefix(layers)?.strip_suffix(".prefix_tuning")?;
        let block: usize = block.strip_suffix(attention)?.parse().ok()?;
        let number = block - method.leave_out.iter().filter(|out| **out < block).count();
        Some(format!("{model}.{PLACE}.{GATES}.{number}.{parameter}"))
    })
}

/// The reverse.
fn gate_there(method: &PrefixTuningConfig, key: &str, name: &str) -> Option<String> {
    let (model, rest) = key.split_once(&format!(".{PLACE}.{GATES}."))?;
    let (number, parameter) = rest.split_once('.')?;
    let block = (0..MOST_BLOCKS).filter(|block| !method.leave_out.contains(block)).nth(number.parse().ok()?)?;
    let (_, layers, attention) = BLOCKS.iter().find(|(known, _, _)| *known == model)?;
    Some(format!("{model}{layers}{block}{attention}.prefix_tuning.prefix_gates.{name}.{parameter}"))
}

fn method_of(config: &Map<String, Value>) -> Result<PrefixTuningConfig> {
    let given = config.iter().filter(|(_, value)| !value.is_null());
    let given: Map<_, _> = given.map(|(key, value)| (key.clone(), value.clone())).collect();
    let config: Config =
        serde_json::from_value(Value::Object(given)).map_err(|e| Error::config("config", "a prefix' fields", e))?;
    if !config.encoder_prefix {
        return Err(Error::config("encoder_prefix", "true: there is no other attention here", false));
    }
    let leave_out = config.leave_out.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    let gating = if config.shared_gating { Gating::Shared } else { Gating::Own };
    let method = PrefixTuningConfig {
        non_linearity: config.non_linearity,
        dropout: config.dropout,
        gating: config.use_gating.then_some(gating),
        leave_out,
        ..PrefixTuningConfig::new(config.prefix_length).without_shift()
    };
    Ok(if config.flat { method } else { method.with_projection(config.bottleneck_size) })
}

pub(crate) fn write(file: &AdapterFile<PrefixTuningConfig>, name: &str) -> Result<HubFolder> {
    let method = &file.method;
    if !method.unshifted {
        return Err(Error::config("unshifted", "true: AdapterHub's prefixes take no positions", false));
    }
    if let Some(layers) = &method.layers_to_transform {
        let expected = "null, and `leave_out` in its place, which AdapterHub's layout has";
        return Err(Error::config("layers_to_transform", expected, format!("{layers:?}")));
    }
    // What an encoder computes is not kept there.
    let encoded = file.tensors.keys().any(|key| key.starts_with(ENCODER_PREFIX));
    let model = file.tensors.keys().find_map(|key| Some(key.split_once(&format!(".{PLACE}.{GATES}."))?.0));
    let model = model.map_or_else(String::new, |model| format!("{model}."));
    let mut tensors = BTreeMap::new();
    for (key, values) in file.tensors.iter().filter(|(key, _)| !(encoded && *key == KEY)) {
        let of_prefix = |rest: &str| format!("{model}prefix_tuning.prefix_tunings.{name}.self_prefix.{rest}");
        let encoder = key.strip_prefix(ENCODER_PREFIX);
        let there = match encoder.and_then(|key| ENCODER.iter().find(|(_, here)| *here == key)) {
            Some((there, _)) => Some(of_prefix(there)),
            None if key == KEY => Some(of_prefix(FLAT)),
            None => gate_there(method, key, name),
        };
        let there = there.ok_or_else(|| homeless(key))?;
        let shape = if key == KEY { vec![values.values.len()] } else { values.shape.clone() };
        tensors.insert(there, Values { shape, values: values.values.clone() });
    }
    let usual = Config::default();
    let config = Config {
        leave_out: method.leave_out.clone(),
        flat: !encoded,
        prefix_length: method.num_virtual_tokens,
        bottleneck_size: method.encoder_hidden_size.unwrap_or(usual.bottleneck_size),
        non_linearity: method.non_linearity,
        dropout: method.dropout,
        use_gating: method.gating.is_some(),
        shared_gating: method.gating != Some(Gating::Own),
        ..usual
    };
    let Ok(Value::Object(config)) = serde_json::to_value(config) else { unreachable!("a struct of numbers and words") };
    Ok(HubFolder { config, name: name.to_owned(), model: file.base_model.clone(), tensors })
}

/// What is refused of a tensor that has no key there.
fn homeless(key: &str) -> Error {
    if holds(key) {
        let known: Vec<_> = BLOCKS.iter().map(|(model, _, _)| *model).collect();
        let expected = format!("gates in a model with a head, of the families {}", known.join(", "));
        return Error::config("gating", expected, key);
    }
    let what =
        format!("{key} is no part of a {}; keep what is trained whole in PEFT's layout", PrefixTuningConfig::PEFT_TYPE);
    Error::config("modules_to_save", "null", what)
}
