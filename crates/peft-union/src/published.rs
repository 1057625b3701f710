//! Mixtures of `LoRA` in the layout of `MixLoRA`'s and `MoE-PEFT`'s libraries: `adapter_config.json` with `peft_type` `MIXLORA`, `LORAMOE` or `MOLA`, and
//! `adapter_model.bin` or `.safetensors`.
//!
//! Keys there, with `K` the lower-case `peft_type`: `K.layers.N.self_attn.q_proj.lora_A.weight` of a plain `LoRA`, `K.layers.N.mlp.gate_proj.experts.E.lora_A.weight` of
//! an expert, and of routers `K.layers.N.mlp.moe_gate.weight` (`MixLoRA`) or `K.layers.N.mlp.gate_proj.moe_gate.weight`. The first releases of `MixLoRA` have
//! `layers.N.gate.weight` and `layers.N.experts.E.w1_proj.lora_A.weight`.
//!
//! The strategies `mixlora-dynamic` and `mixlora-switch` are refused, since `MoE-PEFT` computes them in other ways than papers do: the first divides probabilities by the temperature and
//! leaves their sum, the second gives its input back unchanged outside of training.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use peft_core::files::{CONFIG_FILE, Values, read_tensors};
use peft_core::{AdapterFile, Error, Problem, Result, Targets};
use peft_lora::{LoraConfig, join_factors};
use peft_moe::{Balance, MixLoraConfig, MixtureConfig, Projection, RouterConfig};
use serde::Deserialize;

use crate::{AnyUnion, Parts};

/// The `peft_type`s that [`read_published`] reads.
pub const PUBLISHED: [&str; 3] = ["MIXLORA", "LORAMOE", "MOLA"];

/// The module that `MixLoRA` mixes, and the projections of it by their names and those of the first releases.
const FEED_FORWARD: &str = "mlp";
const PROJECTIONS: [(&str, &str, &str, Projection); 3] = [
    ("gate_proj", "w1_proj", "gate", Projection::Gate),
    ("up_proj", "w3_proj", "up", Projection::Up),
    ("down_proj", "w2_proj", "down", Projection::Down),
];

/// The weight of the loss of balance where a file with one says nothing.
const LOAD: f64 = 0.001;

/// What is read of `adapter_config.json`.
#[derive(Deserialize)]
struct Published {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    bias: Option<String>,
    routing_strategy: String,
    num_experts: usize,
    top_k: Option<usize>,
    target_modules: Names,
    expert_lora: Option<ExpertLora>,
    router_aux_loss_coef: Option<f64>,
    router_loss: Option<bool>,
    jitter_noise: Option<f64>,
    base_model_name_or_path: Option<String>,
    task_type: Option<String>,
}

/// A list, or names with whether each is meant.
#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    List(Vec<String>),
    Map(BTreeMap<String, bool>),
}

/// What experts have instead of what is outside.
#[derive(Default, Deserialize)]
struct ExpertLora {
    r: Option<usize>,
    lora_alpha: Option<f64>,
    lora_dropout: Option<f64>,
    use_rslora: Option<bool>,
    use_dora: Option<bool>,
}

/// Reads a folder that a library of `MixLoRA`'s authors wrote, as a union of plain `LoRA` and of mixtures.
///
/// # Errors
/// When a file is missing or malformed, asks for something that is not built, or an expert is missing.
pub fn read_published(dir: &Path) -> Result<AdapterFile<AnyUnion>> {
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let config: Published = serde_json::from_str(&text).map_err(|e| Error::format(&path, e.to_string()))?;
    config.check()?;
    let (path, read) = read_tensors(dir)?;
    let mut tensors = Tensors::default();
    for (key, values) in read {
        tensors.take(&config, &key, values);
    }
    tensors.join_experts(config.num_experts);
    config.check_modules(&tensors)?;
    let Tensors { joined, plain, mixed, problems, .. } = tensors;
    if !problems.is_empty() {
        return Err(Error::Tensors { path, problems });
    }
    let method = config.parts(plain, mixed).union();
    let Published { base_model_name_or_path, task_type, .. } = config;
    Ok(AdapterFile { method, base_model: base_model_name_or_path, task_type, base_fingerprint: None, tensors: joined })
}

impl Published {
    fn check(&self) -> Result<()> {
        if !PUBLISHED.contains(&self.peft_type.as_str()) {
            return Err(Error::config("peft_type", PUBLISHED.join(", "), &self.peft_type));
        }
        // The first releases of `MixLoRA` named it after Mixtral's.
        let strategy = if self.routing_strategy == "mixtral" { "mixlora" } else { &self.routing_strategy };
        if strategy != self.peft_type.to_lowercase() {
            let expected = format!("{}: no other way of routing is read", self.peft_type.to_lowercase());
            return Err(Error::config("routing_strategy", expected, &self.routing_strategy));
        }
        let in_experts = self.expert_lora.as_ref().and_then(|expert| expert.use_dora);
        if self.use_dora || in_experts == Some(true) {
            let field = if self.use_dora { "use_dora" } else { "expert_lora.use_dora" };
            return Err(Error::config(field, "false: DoRA is not built", true));
        }
        match self.bias.as_deref() {
            None | Some("none") => Ok(()),
            Some(bias) => Err(Error::config("bias", "none", bias)),
        }
    }

    /// Refuses a file that lacks a module whose name the configuration gives.
    fn check_modules(&self, found: &Tensors) -> Result<()> {
        let named: Vec<&str> = match &self.target_modules {
            Names::List(names) => names.iter().map(String::as_str).collect(),
            Names::Map(names) => names.iter().filter(|(_, meant)| **meant).map(|(name, _)| name.as_str()).collect(),
        };
        let is_there = |name: &&str| {
            let field =
                PROJECTIONS.iter().find(|(new, old, ..)| new == name || old == name).map(|(_, _, field, _)| *field);
            [Some(*name), field]
                .into_iter()
                .flatten()
                .any(|name| found.plain.contains(name) || found.mixed.contains(name))
        };
        match named.iter().find(|name| !is_there(name)) {
            Some(missing) => {
                let there: Vec<&str> = found.plain.iter().chain(&found.mixed).map(String::as_str).collect();
                let expected = format!("modules of which the file has tensors ({})", there.join(", "));
                Err(Error::config("target_modules", expected, missing))
            }
            None => Ok(()),
        }
    }

    fn mixes_whole_parts(&self) -> bool {
        self.peft_type == "MIXLORA"
    }

    /// The weight of the loss of balance.
    fn load(&self) -> f64 {
        // What the libraries take where nothing is said: MixLoRA's alone has the loss.
        let balanced = self.router_loss.unwrap_or(self.mixes_whole_parts());
        if balanced { self.router_aux_loss_coef.unwrap_or(LOAD) } else { 0.0 }
    }

    /// The methods, on layers of these names.
    fn parts(&self, plain: BTreeSet<String>, mixed: BTreeSet<String>) -> Parts {
        let lora = |own: &ExpertLora, names: BTreeSet<String>| LoraConfig {
            use_rslora: own.use_rslora.unwrap_or(self.use_rslora),
            ..LoraConfig::new(own.r.unwrap_or(self.r), Targets::modules(names))
                .with_alpha(own.lora_alpha.unwrap_or(self.lora_alpha))
                .with_dropout(own.lora_dropout.unwrap_or(self.lora_dropout))
        };
        let outside = ExpertLora::default();
        let expert = self.expert_lora.as_ref().unwrap_or(&outside);
        let router = match self.peft_type.as_str() {
            "LORAMOE" => RouterConfig::Soft,
            _ => RouterConfig::TopK { k: self.top_k.unwrap_or(2) },
        };
        let balance = Balance { load: self.load(), ..Balance::default() };
        let mixture = |names| MixtureConfig {
            jitter: self.jitter_noise.unwrap_or(0.0),
            ..MixtureConfig::new(lora(expert, names), self.num_experts, router.clone()).with_balance(balance.clone())
        };
        let mut parts = Parts::default();
        if !plain.is_empty() {
            parts.lora = Some(lora(&outside, plain));
        }
        if self.mixes_whole_parts() {
            let named =
                |(_, _, field, projection): &(_, _, &str, Projection)| mixed.contains(*field).then_some(*projection);
            let projections = PROJECTIONS.iter().filter_map(named).collect();
            let mixture = mixture(BTreeSet::from([FEED_FORWARD.to_owned()]));
            parts.mixlora = Some(MixLoraConfig { mixture, projections });
        } else {
            parts.mixture = Some(mixture(mixed));
        }
        parts
    }
}

/// Tensors under way to their own keys.
#[derive(Default)]
struct Tensors {
    joined: BTreeMap<String, Values>,
    /// Factors of experts by their key and by number.
    experts: BTreeMap<String, BTreeMap<usize, Values>>,
    /// Layers that have a plain `LoRA`.
    plain: BTreeSet<String>,
    /// Layers, or projections, that have experts.
    mixed: BTreeSet<String>,
    problems: Vec<Problem>,
}

impl Tensors {
    fn take(&mut self, config: &Published, key: &str, values: Values) {
        let kind = config.peft_type.to_lowercase();
        let parts: Vec<&str> = key.split('.').collect();
        let [first, "layers", layer, inner @ ..] = &parts[..] else { return self.unknown(key) };
        let layer = format!("model.layers.{layer}");
        let whole = config.mixes_whole_parts();
        let field = |name: &str| {
            let named = PROJECTIONS.iter().find(|(new, old, ..)| *new == name || *old == name);
            named.map(|(_, _, field, _)| (*field).to_owned())
        };
        match inner {
            _ if *first != kind => self.unknown(key),
            ["gate", "weight"] | [FEED_FORWARD, "moe_gate", "weight"] if whole => {
                self.joined.insert(format!("{layer}.{FEED_FORWARD}.router.weight"), values);
            }
            [block, name, "moe_gate", "weight"] if !whole => {
                self.joined.insert(format!("{layer}.{block}.{name}.router.weight"), values);
            }
            ["experts", number, name, factor, "weight"] | [FEED_FORWARD, name, "experts", number, factor, "weight"]
                if whole =>
            {
                let Some(field) = field(name) else { return self.unknown(key) };
                let to = format!("{layer}.{FEED_FORWARD}.experts.{field}.{factor}.weight");
                self.expert(key, to, number, values);
                self.mixed.insert(field);
            }
            [block, name, "experts", number, factor, "weight"] if !whole => {
                self.expert(key, format!("{layer}.{block}.{name}.experts.{factor}.weight"), number, values);
                self.mixed.insert((*name).to_owned());
            }
            [block, name, factor @ ("lora_A" | "lora_B"), "weight"] => {
                self.joined.insert(format!("{layer}.{block}.{name}.{factor}.weight"), values);
                self.plain.insert((*name).to_owned());
            }
            _ => self.unknown(key),
        }
    }

    fn unknown(&mut self, key: &str) {
        self.problems.push(Problem::Unknown { name: key.to_owned() });
    }

    fn expert(&mut self, key: &str, to: String, number: &str, values: Values) {
        match number.parse() {
            Ok(number) => drop(self.experts.entry(to).or_default().insert(number, values)),
            Err(_) => self.unknown(key),
        }
    }

    /// Puts the factors of experts side by side: `A` by rows, `B` by columns, as a file has them.
    fn join_experts(&mut self, count: usize) {
        for (key, experts) in std::mem::take(&mut self.experts) {
            let found: Vec<String> =
                experts.iter().map(|(number, values)| format!("{number} {:?}", values.shape)).collect();
            let whole = experts.keys().copied().eq(0..count);
            let factors: Vec<Values> = experts.into_values().collect();
            match join_factors(&key, &factors).filter(|_| whole) {
                Some(joined) => drop(self.joined.insert(key, joined)),
                None => {
                    let what = format!("expected {count} experts of one shape, found {}", found.join(", "));
                    self.problems.push(Problem::Other { path: key, what });
                }
            }
        }
    }
}
