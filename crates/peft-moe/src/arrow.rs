//! Arrow: `LoRA`s that were trained one by one, mixed token by token by a router that nobody trains; general knowledge may be taken out of them first (`GenKnowSub`).
//!
//! - formula: `y = x·W + b + Σₑ cₑ·sₑ·x·Aₑ·Bₑ`, `c` the softmax of `|x·pₑ| / router_temperature` over the `top_k` largest; `pₑ`, of length one, is what the update `Aₑ·Bₑ` stretches most: its singular
//!   vector on the side of the input
//! - source: Ostapenko et al. 2024, arXiv:2405.11157, section 4; `GenKnowSub`: Bagherifard et al. 2025, ACL 2025 (short), 54
//! - trained: nothing
//!
//! What comes out is a mixture as any other, [`MixtureConfig`], with everything that it needs in one file. PEFT finds the vectors by 15 steps from a random start, which come the nearer to them the more
//! an update has one direction; here they are exact.

use std::collections::BTreeMap;
use std::path::Path;

use peft_core::files::{CONFIG_FILE, Values};
use peft_core::{AdapterFile, Error, Result};
use peft_lora::{Combination, LoraConfig, combine, join_factors};
use serde::{Deserialize, Serialize};

use crate::{MixtureConfig, RouterConfig};

/// How trained `LoRA`s are mixed; the field `arrow_config` of PEFT's router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ArrowConfig {
    /// How many a token goes through.
    pub top_k: usize,
    /// Scores are divided by this.
    pub router_temperature: f64,
    /// Whether the mean of general adapters is taken out of those of tasks.
    pub use_gks: bool,
}

impl Default for ArrowConfig {
    fn default() -> Self {
        Self { top_k: 3, router_temperature: 1.0, use_gks: false }
    }
}

impl ArrowConfig {
    /// What PEFT's router in `dir` says. Which adapters it mixes, it does not say; its own factors mean nothing.
    ///
    /// # Errors
    /// When there is no readable `adapter_config.json` with an `arrow_config`.
    pub fn read(dir: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Router {
            arrow_config: ArrowConfig,
        }
        let path = dir.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let router: Router =
            serde_json::from_str(&text).map_err(|e| Error::format(&path, format!("arrow_config: {e}")))?;
        Ok(router.arrow_config)
    }

    /// The mixture of `tasks`, without what the `general` ones know.
    ///
    /// # Errors
    /// When there are fewer tasks than [`top_k`](Self::top_k); when general adapters are there and not asked for, or the reverse; when two adapters differ in modules, shapes or base; and when one
    /// trains more than the factors of linear layers.
    pub fn mixture(
        &self,
        tasks: &[AdapterFile<LoraConfig>],
        general: &[AdapterFile<LoraConfig>],
    ) -> Result<AdapterFile<MixtureConfig<LoraConfig>>> {
        let first = tasks.first().ok_or_else(|| Error::config("tasks", "an adapter at least", "none"))?;
        self.check(tasks.len(), general.len())?;
        tasks.iter().chain(general).try_for_each(|file| check_alike(first, file))?;
        let (mut factors, mut prototypes) =
            (BTreeMap::<String, Vec<Values>>::new(), BTreeMap::<String, Vec<f32>>::new());
        for task in tasks {
            let task = without(task, general);
            for (path, prototype) in prototypes_of(&task)? {
                prototypes.entry(path).or_default().extend(prototype);
            }
            for (key, mut values) in task.tensors {
                let (path, factor) = split(&key)?;
                if factor == B {
                    // A task's own scale, so that experts need none.
                    let scale = task.method.scale_of(path)? as f32;
                    values.values.iter_mut().for_each(|value| *value *= scale);
                }
                factors.entry(format!("{path}.experts.{factor}")).or_default().push(values);
            }
        }
        let joined = |(key, parts): (String, Vec<Values>)| {
            let alike = || Error::config(&key, "matrices of one shape", "others");
            Ok((key.clone(), join_factors(&key, &parts).ok_or_else(alike)?))
        };
        let mut tensors = factors.into_iter().map(joined).collect::<Result<BTreeMap<_, _>>>()?;
        let weight = |(path, values): (String, Vec<f32>)| {
            let shape = vec![tasks.len(), values.len() / tasks.len()];
            (format!("{path}.router.weight"), Values { shape, values })
        };
        tensors.extend(prototypes.into_iter().map(weight));
        let LoraConfig { rank, rank_pattern, targets, .. } = first.method.clone();
        let alpha_pattern = rank_pattern.iter().map(|(name, rank)| (name.clone(), *rank as f64)).collect();
        let expert = LoraConfig { rank_pattern, alpha_pattern, ..LoraConfig::new(rank, targets) };
        let mixture = MixtureConfig::new(expert, tasks.len(), RouterConfig::Arrow { k: self.top_k });
        let method = MixtureConfig { temperature: self.router_temperature, ..mixture };
        Ok(AdapterFile {
            method,
            base_model: first.base_model.clone(),
            task_type: first.task_type.clone(),
            base_fingerprint: first.base_fingerprint.clone(),
            tensors,
        })
    }

    fn check(&self, tasks: usize, general: usize) -> Result<()> {
        if !(1..=tasks).contains(&self.top_k) {
            return Err(Error::config("top_k", format!("from 1 to {tasks}, the number of tasks"), self.top_k));
        }
        if !(self.router_temperature.is_finite() && self.router_temperature > 0.0) {
            return Err(Error::config("router_temperature", "a number above 0", self.router_temperature));
        }
        if self.use_gks != (general > 0) {
            let expected = if self.use_gks { "general adapters" } else { "true, for general adapters to be used" };
            return Err(Error::config("use_gks", expected, general));
        }
        Ok(())
    }
}

/// The factors in the file, `[rank, d_in]` and `[d_out, rank]`.
const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";

/// The module and the factor of a key.
fn split(key: &str) -> Result<(&str, &'static str)> {
    let found = [A, B].into_iter().find_map(|factor| Some((key.strip_suffix(factor)?.strip_suffix('.')?, factor)));
    found.ok_or_else(|| Error::config("adapters", "the factors of linear layers and nothing else", key))
}

fn check_alike(first: &AdapterFile<LoraConfig>, other: &AdapterFile<LoraConfig>) -> Result<()> {
    if other.method.use_gating {
        return Err(Error::config("use_gating", "false: Arrow's gates are the router's", true));
    }
    if first.base_fingerprint != other.base_fingerprint {
        return Err(Error::config("adapters", "one base", "adapters of two"));
    }
    for key in first.tensors.keys().chain(other.tensors.keys()) {
        split(key)?;
        let shape = |file: &AdapterFile<LoraConfig>| file.tensors.get(key).map(|values| values.shape.clone());
        let (expected, found) = (shape(first), shape(other));
        if expected != found {
            let shown = |shape: Option<Vec<usize>>| shape.map_or("none".to_owned(), |shape| format!("{shape:?}"));
            return Err(Error::config(key, format!("{}, as in the first adapter", shown(expected)), shown(found)));
        }
    }
    Ok(())
}

/// `A` without the mean of the general `A`s, and `B` without that of the `B`s: each factor for itself, as in PEFT.
fn without(task: &AdapterFile<LoraConfig>, general: &[AdapterFile<LoraConfig>]) -> AdapterFile<LoraConfig> {
    let mut task = task.clone();
    for (key, values) in &mut task.tensors {
        for other in general.iter().filter_map(|file| file.tensors.get(key)) {
            for (value, general_value) in values.values.iter_mut().zip(&other.values) {
                *value -= general_value / general.len() as f32;
            }
        }
    }
    task
}

/// What the update of each module stretches most, of length one: its best approximation of rank one multiplies by nothing else.
fn prototypes_of(task: &AdapterFile<LoraConfig>) -> Result<BTreeMap<String, Vec<f32>>> {
    let direction = combine(&[(task.clone(), 1.0)], Combination::Svd { rank: 1 })?;
    let prototype = |(key, values): (String, Values)| {
        let path = key.strip_suffix(A)?.strip_suffix('.')?.to_owned();
        let length = values.values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        // An update of nothing has no direction.
        let length = if length > 0.0 { length } else { 1.0 };
        Some((path, values.values.iter().map(|value| (f64::from(*value) / length) as f32).collect()))
    };
    Ok(direction.tensors.into_iter().filter_map(prototype).collect())
}
