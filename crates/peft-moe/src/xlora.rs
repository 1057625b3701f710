//! X-LoRA: trained `LoRA`s, frozen, of which a classifier says token by token how far each counts. It reads the hidden states of a first pass, so that a model is computed twice.
//!
//! - formula: `h` the last hidden states of the first pass; `σ = softmax(classifier(h) / softmax_temperature)`, for each adapted layer or one for all; in the second pass
//!   `y = x·W + b + Σₑ σₑ·sₑ·global_scaling_weight·x·Aₑ·Bₑ` in each. In the first pass all σ are `scaling_pass_value`: where that is 0, the plain model
//! - source: Buehler & Buehler 2024, arXiv:2402.07148
//! - trained: the classifier; experts with `use_trainable_adapters`
//! - at init: no identity
//!
//! The classifier sits at the place of [`Prompts`](peft_core::Prompts), where a model lets itself be computed twice. Layers are numbered in the order of the model. A folder has experts in folders of
//! their own, below it or where `adapters` says.

mod adapter;
mod classifier;
mod files;
mod scalings;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::module::Module;
use indexmap::IndexMap;
use peft_core::files::Values;
use peft_core::{
    Activation, AdapterFile, Bias, Error, FileTensor, LayerKind, Method, Problem, Result, Scan, Site, Strictness,
    Targets, attach, block_of,
};
use peft_lora::{LoraAdapter, LoraConfig};
use serde::{Deserialize, Serialize};

use self::adapter::Mix;
pub use self::adapter::XLoraAdapter;
use self::classifier::Classifier;
use crate::mixture::check_count;

/// Configuration of X-LoRA; its JSON is Hugging Face's `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct XLoraConfig {
    /// Width of the model's hidden states.
    pub hidden_size: usize,
    /// Where the experts are, by name. PEFT wants the names to be numbers from 0.
    pub adapters: IndexMap<String, String>,
    /// Whether scalings of all experts sum up to one.
    pub enable_softmax: bool,
    /// Whether those of the best do; it goes by the scalings, whatever these are.
    pub enable_softmax_topk: bool,
    /// What the classifier's output is divided by before its softmax.
    pub softmax_temperature: f64,
    /// Whether each adapted layer has scalings of its own.
    pub layerwise_scalings: bool,
    /// How many experts a token goes through: those with the largest scalings. All without it.
    pub top_k_lora: Option<usize>,
    /// Layers of the classifier.
    pub xlora_depth: usize,
    /// Width between them.
    pub xlora_size: usize,
    /// Dropout between them.
    pub xlora_dropout_p: f64,
    /// Whether experts are trained too.
    pub use_trainable_adapters: bool,
    /// All scalings in the first pass.
    pub scaling_pass_value: f64,
    /// What all updates are multiplied by.
    pub global_scaling_weight: f64,
    /// The experts themselves, in their order; a file has each in a folder of its own.
    #[serde(skip)]
    pub experts: Vec<LoraConfig>,
}

/// Experts have their own; nothing is trained besides.
static NO_TARGETS: Targets = Targets {
    target_modules: None,
    target_parameters: None,
    exclude_modules: None,
    layers_to_transform: None,
    layers_pattern: None,
    modules_to_save: None,
    bias: Bias::None,
};

impl Default for XLoraConfig {
    fn default() -> Self {
        Self {
            hidden_size: 4096,
            adapters: IndexMap::new(),
            enable_softmax: true,
            enable_softmax_topk: false,
            softmax_temperature: 1.0,
            layerwise_scalings: false,
            top_k_lora: None,
            xlora_depth: 1,
            xlora_size: 2048,
            xlora_dropout_p: 0.2,
            use_trainable_adapters: false,
            scaling_pass_value: 0.0,
            global_scaling_weight: 1.0,
            experts: Vec::new(),
        }
    }
}

impl XLoraConfig {
    /// One layer of classifier for a model of that width, the same scalings for all layers.
    pub fn new(hidden_size: usize) -> Self {
        Self { hidden_size, ..Self::default() }
    }

    /// `module` with these experts and a classifier that is still to be trained; and the method with them, by which it is saved.
    ///
    /// # Errors
    /// As [`attach`]; and when an expert does not fit, or trains more than linear layers' factors.
    pub fn attach_experts<T: Module>(
        mut self,
        module: T,
        experts: Vec<AdapterFile<LoraConfig>>,
        seed: u64,
    ) -> Result<(T, Self)> {
        let mut tensors = BTreeMap::new();
        experts.into_iter().try_for_each(|expert| self.add(expert, &mut tensors))?;
        let module = attach(module, &self, seed)?;
        let file =
            AdapterFile { method: self.clone(), base_model: None, task_type: None, base_fingerprint: None, tensors };
        let fresh = Strictness { allow_missing: true, ..Strictness::default() };
        Ok((file.fill(module, Path::new("the experts"), fresh)?, self))
    }

    /// What the experts adapt, in the order of the model.
    fn layers<'a>(&self, found: &'a Scan) -> Result<Vec<&'a Site>> {
        let mut ids = BTreeSet::new();
        for expert in &self.experts {
            ids.extend(expert.select(found)?.into_iter().map(|site| site.path.as_str()));
        }
        Ok(found.sites.iter().filter(|site| ids.contains(site.path.as_str())).collect())
    }
}

/// Why it is no part of a weight.
const BY_TOKEN: &str = "a classifier says token by token how far each expert counts";

/// As many layers as the classifier has at most.
const DEEPEST: usize = 64;

impl Method for XLoraConfig {
    const PEFT_TYPE: &'static str = "XLORA";
    type Adapter = XLoraAdapter;

    fn targets(&self) -> &Targets {
        &NO_TARGETS
    }

    fn check(&self) -> Result<()> {
        for (field, count) in [
            ("hidden_size", self.hidden_size),
            ("xlora_size", self.xlora_size),
            ("top_k_lora", self.top_k_lora.unwrap_or(1)),
        ] {
            if count == 0 {
                return Err(Error::config(field, "at least 1", 0));
            }
        }
        check_count("xlora_depth", 1..=DEEPEST, self.xlora_depth)?;
        if self.experts.iter().any(|expert| expert.use_gating) {
            return Err(Error::config("use_gating", "false: the classifier opens gates", true));
        }
        if !(0.0..1.0).contains(&self.xlora_dropout_p) {
            return Err(Error::config("xlora_dropout_p", "a probability in 0..1", self.xlora_dropout_p));
        }
        if !(self.softmax_temperature.is_finite() && self.softmax_temperature > 0.0) {
            return Err(Error::config("softmax_temperature", "a number above 0", self.softmax_temperature));
        }
        for (field, value) in
            [("scaling_pass_value", self.scaling_pass_value), ("global_scaling_weight", self.global_scaling_weight)]
        {
            if !value.is_finite() {
                return Err(Error::config(field, "a finite number", value));
            }
        }
        Ok(())
    }

    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::Linear, LayerKind::Conv1D, LayerKind::Prompts]
    }

    /// The layers of all experts in the order of the model, and the place of the classifier.
    fn select<'a>(&self, found: &'a Scan) -> Result<Vec<&'a Site>> {
        self.check()?;
        let count = self.experts.len();
        if count == 0 || self.top_k_lora.is_some_and(|k| k > count) {
            let expected = format!("at least {}", self.top_k_lora.unwrap_or(1));
            return Err(Error::config("adapters", expected, count));
        }
        let mut sites = self.layers(found)?;
        let mut problems = Vec::new();
        for site in &sites {
            let (path, reason) = (site.path.clone(), BY_TOKEN.to_owned());
            if !site.kind.multiplies() {
                let (expected, found) = (format!("{:?}", self.kinds()), format!("{:?}", site.kind));
                problems.push(Problem::Kind { path, expected, found });
            } else if !site.aware {
                problems.push(Problem::NotAware { path, reason });
            } else if block_of(&path).is_none() {
                // Heads and poolers come when the passes are over.
                let what = "it is in no block, and so computed outside of the model's passes".to_owned();
                problems.push(Problem::Other { path, what });
            }
        }
        match found.sites.iter().find(|site| site.kind == LayerKind::Prompts) {
            Some(place) if place.d_in != self.hidden_size => {
                return Err(Error::config("hidden_size", format!("{}, the model's", place.d_in), self.hidden_size));
            }
            Some(place) => sites.push(place),
            None => problems.push(Problem::NoPlace { expected: format!("{:?}", LayerKind::Prompts) }),
        }
        if problems.is_empty() { Ok(sites) } else { Err(Error::Attach { method: Self::PEFT_TYPE, problems }) }
    }

    fn init(&self, site: &Site, seed: u64) -> Result<XLoraAdapter> {
        let alone = self.init_all(&[site], seed)?;
        alone.into_iter().next().ok_or_else(|| Error::config("adapters", "an adapter for each place", "none"))
    }

    fn init_all(&self, sites: &[&Site], seed: u64) -> Result<Vec<XLoraAdapter>> {
        let layers = sites.iter().filter(|site| site.kind != LayerKind::Prompts).count();
        let mix = Mix {
            top_k: self.top_k_lora,
            softmax: self.enable_softmax_topk,
            weight: self.global_scaling_weight,
            first: self.scaling_pass_value,
        };
        let adapter = |(layer, site): (usize, &&Site)| -> Result<XLoraAdapter> {
            let path = site.path.clone();
            if site.kind == LayerKind::Prompts {
                let classifier = Classifier::new(self, site, layers, &mut site.rng(seed))?;
                return Ok(XLoraAdapter { classifier: Some(classifier), experts: Vec::new(), layer, path, mix });
            }
            let expert = |(number, expert): (usize, &LoraConfig)| -> Result<Option<LoraAdapter>> {
                let here =
                    expert.takes(site).then(|| expert.init(site, seed.wrapping_add(number as u64))).transpose()?;
                Ok(here.map(|expert| if self.use_trainable_adapters { expert } else { expert.no_grad() }))
            };
            let experts = self.experts.iter().enumerate().map(expert).collect::<Result<_>>()?;
            Ok(XLoraAdapter { classifier: None, experts, layer, path, mix })
        };
        sites.iter().enumerate().map(adapter).collect()
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &[]
    }

    fn key(kind: LayerKind, field: &str) -> Option<(String, bool)> {
        files::key(kind, field)
    }

    fn is_of_model(key: &str) -> bool {
        files::is_of_classifier(key)
    }

    fn read_parts(self, dir: &Path, tensors: &mut BTreeMap<String, Values>) -> Result<Self> {
        files::read_experts(self, dir, tensors)
    }

    fn write_parts(file: &AdapterFile<Self>, dir: &Path) -> Result<Option<AdapterFile<Self>>> {
        files::write_experts(file, dir).map(Some)
    }

    fn activation(adapter: &XLoraAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, _site: &Site) -> Option<String> {
        Some(BY_TOKEN.to_owned())
    }

    fn unmergeable(&self, _site: &Site) -> Option<String> {
        Some(BY_TOKEN.to_owned())
    }
}
