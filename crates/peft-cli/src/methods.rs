//! The methods that the command line offers by name. This table is the only place that lists them.

mod configure;

use std::path::Path;

use configure::{bitfit, ia3, ln_tuning, lora, ssf};
use peft_adapter::{BitFitConfig, Ia3Config, LnTuningConfig, SsfConfig};
use peft_core::files::{CONFIG_FILE, peft_type};
use peft_core::{Method, Site, Targets, attach, base_fingerprint, load_adapter, merge};
use peft_lora::{LoraConfig, attach_factors};
use peft_models::CausalLm;
use peft_models::load::Packing;
use peft_quant::{Quantization, loftq_model};
use peft_train::{AdapterOf, Trained};

use crate::model::FrozenType;
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
pub const METHODS: &[Entry] = &[
    Entry {
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
    },
    Entry {
        name: "ia3",
        peft_type: Ia3Config::PEFT_TYPE,
        about: "factors on outputs, or on inputs of --feedforward modules (Liu et al. 2022, arXiv:2205.05638)",
        formula: "y = l ⊙ (x·W + b), or (l ⊙ x)·W + b",
        parameters: "d_out, or d_in",
        build: |settings| Ok(Box::new(ia3(settings)?)),
        load: load_as::<Ia3Config>,
        merge: merge_as::<Ia3Config>,
    },
    Entry {
        name: "ssf",
        peft_type: SsfConfig::PEFT_TYPE,
        about: "scales and shifts of linear layers, norms, convolutions (Lian et al. 2022, arXiv:2210.08823)",
        formula: "y = γ ⊙ (x·W + b) + β",
        parameters: "2 · d_out",
        build: |settings| Ok(Box::new(ssf(settings)?)),
        load: load_as::<SsfConfig>,
        merge: merge_as::<SsfConfig>,
    },
    Entry {
        name: "ln-tuning",
        peft_type: LnTuningConfig::PEFT_TYPE,
        about: "norms trained whole (Zhao et al. 2023, arXiv:2312.11420)",
        formula: "y = γ' ⊙ normed(x) + β'",
        parameters: "d_out, or 2 · d_out with β",
        build: |settings| Ok(Box::new(ln_tuning(settings)?)),
        load: load_as::<LnTuningConfig>,
        merge: merge_as::<LnTuningConfig>,
    },
    Entry {
        name: "bitfit",
        peft_type: BitFitConfig::PEFT_TYPE,
        about: "biases trained, of layers that have one (Ben Zaken et al. 2022, arXiv:2106.10199)",
        formula: "y = x·W + (b + β)",
        parameters: "d_out",
        build: |settings| Ok(Box::new(bitfit(settings)?)),
        load: load_as::<BitFitConfig>,
        merge: merge_as::<BitFitConfig>,
    },
];

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
