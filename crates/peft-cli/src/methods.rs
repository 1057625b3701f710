//! The methods that the command line offers by name. This table is the only place that lists them.

use std::path::Path;

use indexmap::IndexMap;
use peft_core::files::{CONFIG_FILE, peft_type};
use peft_core::{Method, Names, OneOrMany, Site, Targets, attach, base_fingerprint, load_adapter, merge};
use peft_lora::{LoraConfig, attach_factors};
use peft_models::CausalLm;
use peft_models::load::Packing;
use peft_quant::{Quantization, loftq_model};
use peft_train::{AdapterOf, Trained};

use crate::model::FrozenType;
use crate::rows::assignments;
use crate::settings::{Init, Settings};
use crate::{Error, Result};

/// A method by name.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What `--method` takes.
    pub name: &'static str,
    /// What adapter files call it.
    pub peft_type: &'static str,
    /// One line.
    pub about: &'static str,
    /// What an adapted layer computes.
    pub formula: &'static str,
    /// Trained parameters of an adapted layer.
    pub parameters: &'static str,
    build: fn(&Settings) -> Result<Box<dyn Adaptation>>,
    load: fn(CausalLm, &Path) -> Result<CausalLm>,
    merge: fn(CausalLm, &Path) -> Result<CausalLm>,
}

/// All methods.
pub const METHODS: &[Entry] = &[Entry {
    name: "lora",
    peft_type: LoraConfig::PEFT_TYPE,
    about: "a low-rank sum on frozen weights (Hu et al. 2021, arXiv:2106.09685)",
    formula: "y = x·W + b + (alpha / rank)·x·A·B",
    parameters: "rank · (d_in + d_out)",
    build: |settings| match settings.init {
        Init::Loftq => Ok(Box::new(loftq(settings)?)),
        _ => Ok(Box::new(lora(settings)?)),
    },
    load: load_as::<LoraConfig>,
    merge: merge_as::<LoraConfig>,
}];

/// A configured method, whichever it is.
pub trait Adaptation {
    /// Which layers it adapts.
    fn targets(&self) -> &Targets;

    /// Freezes the model and attaches the adapter.
    ///
    /// # Errors
    /// See [`attach`].
    fn attach(&self, model: CausalLm, seed: u64) -> Result<CausalLm>;

    /// How the adapter on `model` is saved; `base_model` is the name of the model it belongs to.
    ///
    /// # Errors
    /// When the device does not hand out what has to be saved.
    fn trained(&self, model: &CausalLm, base_model: &str) -> Result<Box<dyn Trained>>;

    /// In which form the model must be loaded for [`attach`](Self::attach), given what the user asked for.
    fn packing(&self, asked: Packing) -> Packing {
        asked
    }
}

impl<M: Method> Adaptation for M {
    fn targets(&self) -> &Targets {
        Method::targets(self)
    }

    fn attach(&self, model: CausalLm, seed: u64) -> Result<CausalLm> {
        Ok(attach(model, self, seed)?)
    }

    fn trained(&self, _model: &CausalLm, base_model: &str) -> Result<Box<dyn Trained>> {
        Ok(Box::new(AdapterOf::new(self.clone(), base_model)))
    }
}

/// `LoRA` that starts from what packing loses: the model is packed while the adapter is attached.
struct LoftQ {
    lora: LoraConfig,
    quantization: Quantization,
    /// How the model is loaded, before it is packed.
    stored: Packing,
}

impl Adaptation for LoftQ {
    fn targets(&self) -> &Targets {
        &self.lora.targets
    }

    fn attach(&self, model: CausalLm, seed: u64) -> Result<CausalLm> {
        let matcher = self.lora.targets.matcher()?;
        let rank_of = |site: &Site| {
            matcher.matches(&site.path, Some(site.kind)).then(|| self.lora.rank_of(&site.path)).transpose()
        };
        // One iteration, so that the base is the model as it is packed without an adapter: nothing but the adapter has to be saved.
        let (model, factors) = loftq_model(model, &self.quantization, 1, rank_of)?;
        Ok(attach_factors(model, &self.lora, &factors, seed)?)
    }

    fn trained(&self, model: &CausalLm, base_model: &str) -> Result<Box<dyn Trained>> {
        // On the unpacked model the adapter would add what that has never lost.
        let base_fingerprint = Some(base_fingerprint(model)?);
        Ok(Box::new(AdapterOf { base_fingerprint, ..AdapterOf::new(self.lora.clone(), base_model) }))
    }

    fn packing(&self, _asked: Packing) -> Packing {
        self.stored.clone()
    }
}

impl Entry {
    /// The method as the settings ask for it.
    ///
    /// # Errors
    /// When a setting makes no sense.
    pub fn build(&self, settings: &Settings) -> Result<Box<dyn Adaptation>> {
        (self.build)(settings)
    }

    /// `model` with the adapter in `dir`.
    ///
    /// # Errors
    /// When the adapter cannot be read or is not one of this model.
    pub fn load(&self, model: CausalLm, dir: &Path) -> Result<CausalLm> {
        (self.load)(model, dir)
    }

    /// `model` with the adapter in `dir` folded into its weights.
    ///
    /// # Errors
    /// As [`load`](Self::load); and when it cannot be merged.
    pub fn merge(&self, model: CausalLm, dir: &Path) -> Result<CausalLm> {
        (self.merge)(model, dir)
    }
}

/// The method called `name`.
///
/// # Errors
/// When there is none; the hint lists them.
pub fn by_name(name: &str) -> Result<&'static Entry> {
    let unknown = || {
        Error::usage(
            format!("--method {name}: there is no such method"),
            format!("one of {}", names(|entry| entry.name)),
        )
    };
    METHODS.iter().find(|entry| entry.name == name).ok_or_else(unknown)
}

/// The method of the adapter in `dir`.
///
/// # Errors
/// When there is no adapter, or its method is not known.
pub fn of_adapter(dir: &Path) -> Result<&'static Entry> {
    let found = peft_type(dir)?;
    METHODS.iter().find(|entry| entry.peft_type == found).ok_or_else(|| {
        let expected = format!("a method that is known ({})", names(|entry| entry.peft_type));
        peft_core::Error::Method { path: dir.join(CONFIG_FILE), expected, found }.into()
    })
}

fn names(of: fn(&Entry) -> &'static str) -> String {
    METHODS.iter().map(of).collect::<Vec<_>>().join(", ")
}

fn load_as<M: Method>(model: CausalLm, dir: &Path) -> Result<CausalLm> {
    Ok(load_adapter::<_, M>(model, dir)?.0)
}

fn merge_as<M: Method>(model: CausalLm, dir: &Path) -> Result<CausalLm> {
    let (model, method) = load_adapter::<_, M>(model, dir)?;
    Ok(merge(model, &method)?)
}

fn loftq(settings: &Settings) -> Result<LoftQ> {
    if settings.precision != FrozenType::F32 {
        return Err(Error::usage("--init loftq: packing makes up for weights in f32", "--precision f32"));
    }
    let stored = if settings.packing.unpack { Packing::Dense } else { Packing::AsStored };
    match settings.packing.packing()? {
        Packing::Quantize(quantization) | Packing::Requantize(quantization) => {
            Ok(LoftQ { lora: lora(settings)?, quantization, stored })
        }
        Packing::AsStored | Packing::Dense => {
            Err(Error::usage("--init loftq: there is nothing to make up for without --quantize", "--quantize nf4"))
        }
    }
}

fn lora(settings: &Settings) -> Result<LoraConfig> {
    Ok(LoraConfig {
        rank: settings.rank,
        alpha: settings.alpha.unwrap_or(settings.rank as f64),
        dropout: settings.dropout,
        use_rslora: settings.rslora,
        lora_bias: settings.lora_bias,
        init_lora_weights: settings.init.into(),
        rank_pattern: pattern("rank-pattern", &settings.rank_pattern)?,
        alpha_pattern: pattern("alpha-pattern", &settings.alpha_pattern)?,
        targets: targets(settings)?,
        ..LoraConfig::default()
    })
}

fn pattern<T: std::str::FromStr>(flag: &str, pairs: &[String]) -> Result<IndexMap<String, T>> {
    let parse = |(name, value): (&str, &str)| {
        let bad = |_| {
            Error::usage(
                format!("--{flag} {name}={value}: {value} is not a number that fits"),
                format!("--{flag} {name}=16"),
            )
        };
        Ok((name.to_owned(), value.parse().map_err(bad)?))
    };
    assignments(flag, pairs)?.into_iter().map(parse).collect()
}

fn targets(settings: &Settings) -> Result<Targets> {
    let target_modules = match (&settings.targets[..], &settings.target_regex) {
        ([_, ..], Some(_)) => {
            return Err(Error::usage("--targets and --target-regex are both given", "give one of them"));
        }
        (_, Some(regex)) => Some(Names::Pattern(regex.clone())),
        ([all], None) if all.eq_ignore_ascii_case("all-linear") => Some(Names::Pattern(all.clone())),
        ([], None) => None,
        (list, None) => Some(Names::List(list.to_vec())),
    };
    let list = |names: &[String]| (!names.is_empty()).then(|| names.to_vec());
    Ok(Targets {
        target_modules,
        exclude_modules: list(&settings.exclude).map(Names::List),
        layers_to_transform: (!settings.layers.is_empty()).then(|| OneOrMany::Many(settings.layers.clone())),
        layers_pattern: None,
        modules_to_save: list(&settings.modules_to_save),
        bias: settings.bias,
    })
}
