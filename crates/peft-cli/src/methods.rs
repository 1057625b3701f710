//! The methods that the command line offers by name. This table is the only place that lists them.

mod configure;
mod llama_adapter;
mod mixture;
mod prompts;
mod published;
mod union;
mod whole;
mod xlora;

use std::fmt::Debug;
use std::marker::PhantomData;
use std::path::Path;

use burn::module::Module;
use configure::{bitfit, bottleneck, ia3, ln_tuning, lora, ssf};
use llama_adapter::llama_adapter;
use peft_adapter::{BitFitConfig, BottleneckConfig, Ia3Config, LnTuningConfig, SsfConfig};
use peft_core::files::{CONFIG_FILE, peft_type};
use peft_core::{AdapterFile, Method, Site, Targets, attach, base_fingerprint, load_adapter, merge};
use peft_lora::{LoraConfig, attach_factors};
use peft_models::load::Packing;
use peft_models::{CausalLm, Encoder, ModelFiles};
use peft_moe::{MixtureConfig, PillConfig, PolyConfig, XLoraConfig};
use peft_prompt::{
    LlamaAdapterConfig, MultitaskPromptTuningConfig, PTuningConfig, PrefixTuningConfig, PromptBankConfig,
    PromptTuningConfig,
};
use peft_quant::{Quantization, loftq_model};
use peft_train::{AdapterOf, Trained};
use peft_union::AnyUnion;
use prompts::{bank, multitask, p_tuning, prefix, prompt};
use union::{mam, unipelt};
use whole::Whole;

use crate::model::FrozenType;
use crate::settings::{Init, Settings};
use crate::{Error, Result};

/// A method by name.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What `--method` takes.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// What an adapted layer computes.
    pub formula: &'static str,
    /// Trained parameters of an adapted layer.
    pub parameters: &'static str,
    /// The learning rate where none is given.
    pub learning_rate: f64,
    /// Whether its adapters are parts of weights.
    pub merges: bool,
    build: fn(&Settings) -> Result<Box<dyn Adaptation>>,
    files: Option<&'static dyn AdapterFiles>,
}

/// All methods.
pub const METHODS: &[Entry] = &[
    Entry {
        name: "lora",
        about: "a low-rank sum on frozen weights (Hu et al. 2021, arXiv:2106.09685)",
        formula: "y = x·W + b + (alpha / rank)·x·A·B",
        parameters: "rank · (d_in + d_out)",
        learning_rate: 2e-4,
        merges: true,
        build: |settings| match settings.init {
            Init::Loftq => Ok(Box::new(loftq(settings)?)),
            _ => Ok(Box::new(lora(settings)?)),
        },
        files: Some(&FilesOf::<LoraConfig>(PhantomData)),
    },
    Entry {
        name: "ia3",
        about: "factors on outputs, or on inputs of --feedforward modules (Liu et al. 2022, arXiv:2205.05638)",
        formula: "y = l ⊙ (x·W + b), or (l ⊙ x)·W + b",
        parameters: "d_out, or d_in",
        learning_rate: 3e-3,
        merges: true,
        build: |settings| Ok(Box::new(ia3(settings)?)),
        files: Some(&FilesOf::<Ia3Config>(PhantomData)),
    },
    Entry {
        name: "ssf",
        about: "scales and shifts of linear layers, norms, convolutions (Lian et al. 2022, arXiv:2210.08823)",
        formula: "y = γ ⊙ (x·W + b) + β",
        parameters: "2 · d_out",
        learning_rate: 1e-3,
        merges: true,
        build: |settings| Ok(Box::new(ssf(settings)?)),
        files: Some(&FilesOf::<SsfConfig>(PhantomData)),
    },
    Entry {
        name: "ln-tuning",
        about: "norms trained whole (Zhao et al. 2023, arXiv:2312.11420)",
        formula: "y = γ' ⊙ normed(x) + β'",
        parameters: "d_out, or 2 · d_out with β",
        learning_rate: 1e-3,
        merges: true,
        build: |settings| Ok(Box::new(ln_tuning(settings)?)),
        files: Some(&FilesOf::<LnTuningConfig>(PhantomData)),
    },
    Entry {
        name: "bitfit",
        about: "biases trained, of layers that have one (Ben Zaken et al. 2022, arXiv:2106.10199)",
        formula: "y = x·W + (b + β)",
        parameters: "d_out",
        learning_rate: 1e-3,
        merges: true,
        build: |settings| Ok(Box::new(bitfit(settings)?)),
        files: Some(&FilesOf::<BitFitConfig>(PhantomData)),
    },
    Entry {
        name: "houlsby",
        about: "bottlenecks after attention and after feed-forward (Houlsby et al. 2019, arXiv:1902.00751)",
        formula: "y = x + f(x·D + d)·U + u",
        parameters: "2 · width² / factor + width / factor + width",
        learning_rate: 3e-4,
        merges: false,
        build: |settings| Ok(Box::new(bottleneck(settings, "houlsby", BottleneckConfig::houlsby)?)),
        files: Some(&FilesOf::<BottleneckConfig>(PhantomData)),
    },
    Entry {
        name: "pfeiffer",
        about: "bottlenecks after feed-forward alone (Pfeiffer et al. 2021, arXiv:2005.00247)",
        formula: "y = x + f(x·D + d)·U + u",
        parameters: "2 · width² / factor + width / factor + width",
        learning_rate: 3e-4,
        merges: false,
        build: |settings| Ok(Box::new(bottleneck(settings, "pfeiffer", BottleneckConfig::pfeiffer)?)),
        files: Some(&FilesOf::<BottleneckConfig>(PhantomData)),
    },
    Entry {
        name: "parallel",
        about: "bottlenecks beside feed-forward (He et al. 2022, arXiv:2110.04366)",
        formula: "y = FFN(x) + 4·(f(x·D + d)·U + u)",
        parameters: "2 · width² / factor + width / factor + width",
        learning_rate: 3e-4,
        merges: false,
        build: |settings| Ok(Box::new(bottleneck(settings, "parallel", BottleneckConfig::parallel)?)),
        files: Some(&FilesOf::<BottleneckConfig>(PhantomData)),
    },
    Entry {
        name: "compacter",
        about: "Houlsby's, of sums of Kronecker products (Karimi Mahabadi et al. 2021, arXiv:2106.04647)",
        formula: "D = Σ Aᵢ ⊗ (sᵢ·tᵢ)",
        parameters: "2 · n³ + 2 · (width + width / factor) + width / factor + width",
        learning_rate: 1e-3,
        merges: false,
        build: |settings| Ok(Box::new(bottleneck(settings, "compacter", BottleneckConfig::compacter)?)),
        files: Some(&FilesOf::<BottleneckConfig>(PhantomData)),
    },
    Entry {
        name: "prompt",
        about: "virtual tokens in front of the input (Lester et al. 2021, arXiv:2104.08691)",
        formula: "x = [P; embed(ids)]",
        parameters: "in all: tokens · width",
        learning_rate: 1e-2,
        merges: false,
        build: |settings| Ok(Box::new(prompt(settings)?)),
        files: Some(&FilesOf::<PromptTuningConfig>(PhantomData)),
    },
    Entry {
        name: "prefix",
        about: "keys and values in front of those of every block (Li & Liang 2021, arXiv:2101.00190)",
        formula: "o = attention(q, [P; k], [P'; v])",
        parameters: "in all: 2 · tokens · blocks · kv_width",
        learning_rate: 2e-2,
        merges: false,
        build: |settings| Ok(Box::new(prefix(settings, "prefix")?)),
        files: Some(&FilesOf::<PrefixTuningConfig>(PhantomData)),
    },
    Entry {
        name: "p-tuning",
        about: "virtual tokens that an encoder makes during training (Liu et al. 2021, arXiv:2103.10385)",
        formula: "x = [encoder(E); embed(ids)]",
        parameters: "in all: tokens · width, and the encoder's",
        learning_rate: 1e-3,
        merges: false,
        build: |settings| Ok(Box::new(p_tuning(settings)?)),
        files: Some(&FilesOf::<PTuningConfig>(PhantomData)),
    },
    Entry {
        name: "p-tuning-v2",
        about: "prefix, by its name for understanding (Liu et al. 2022, arXiv:2110.07602)",
        formula: "o = attention(q, [P; k], [P'; v])",
        parameters: "in all: 2 · tokens · blocks · kv_width",
        learning_rate: 2e-2,
        merges: false,
        build: |settings| Ok(Box::new(prefix(settings, "p-tuning-v2")?)),
        files: Some(&FilesOf::<PrefixTuningConfig>(PhantomData)),
    },
    Entry {
        name: "multitask",
        about: "a prompt that tasks share, and a factor for each --data (Wang et al. 2023, arXiv:2303.02861)",
        formula: "x = [P ⊙ (C·R); embed(ids)]",
        parameters: "in all: tokens · width + tasks · ranks · (tokens + width)",
        learning_rate: 1e-2,
        merges: false,
        build: |settings| Ok(Box::new(multitask(settings)?)),
        files: Some(&FilesOf::<MultitaskPromptTuningConfig>(PhantomData)),
    },
    Entry {
        name: "prompt-bank",
        about: "a prompt for each --data, in one model (Lester et al. 2021, arXiv:2104.08691)",
        formula: "x = [Pₜ; embed(ids)]",
        parameters: "in all: tasks · tokens · width",
        learning_rate: 1e-2,
        merges: false,
        build: |settings| Ok(Box::new(bank(settings)?)),
        files: Some(&FilesOf::<PromptBankConfig>(PhantomData)),
    },
    Entry {
        name: "llama-adapter",
        about: "gated prompts in the attention of the last layers (Zhang et al. 2023, arXiv:2303.16199)",
        formula: "o = attention(q, k, v) + g·attention(q, A·Wk, A·Wv)",
        parameters: "a layer: tokens · width + 1",
        learning_rate: 1e-2,
        merges: false,
        build: |settings| Ok(Box::new(llama_adapter(settings)?)),
        files: Some(&FilesOf::<LlamaAdapterConfig>(PhantomData)),
    },
    Entry {
        name: "mam",
        about: "prefix and parallel bottlenecks at once (He et al. 2022, arXiv:2110.04366)",
        formula: "as prefix and parallel",
        parameters: "those of prefix with its encoder, and of parallel",
        learning_rate: 3e-4,
        merges: false,
        build: |settings| Ok(Box::new(mam(settings)?)),
        files: Some(&FilesOf::<AnyUnion>(PhantomData)),
    },
    Entry {
        name: "unipelt",
        about: "prefix, pfeiffer and lora at once, each with a gate; for encoders (Mao et al. 2022, arXiv:2110.07577)",
        formula: "as prefix, pfeiffer and lora, each times mean(σ(x·G + g))",
        parameters: "those of prefix with its encoder, of pfeiffer and of lora; d_in + 1 a gate",
        learning_rate: 3e-4,
        merges: false,
        build: |settings| Ok(Box::new(unipelt(settings)?)),
        files: Some(&FilesOf::<AnyUnion>(PhantomData)),
    },
    Entry {
        name: "molora",
        about: "LoRAs mixed token by token (Zadouri et al. 2023, arXiv:2309.05444)",
        formula: "y = x·W + b + Σ gₑ(x) · (alpha / rank)·x·Aₑ·Bₑ",
        parameters: "experts · (rank · (d_in + d_out) + d_in)",
        learning_rate: 2e-4,
        merges: false,
        build: |settings| Ok(Box::new(mixture::molora(settings)?)),
        files: Some(&FilesOf::<MixtureConfig<LoraConfig>>(PhantomData)),
    },
    Entry {
        name: "loramoe",
        about: "the same with a group of experts for each --data (Dou et al. 2023, arXiv:2312.09979)",
        formula: "y = x·W + b + Σ gₑ(x) · (alpha / rank)·x·Aₑ·Bₑ",
        parameters: "experts · (rank · (d_in + d_out) + d_in)",
        learning_rate: 2e-4,
        merges: false,
        build: |settings| Ok(Box::new(mixture::loramoe(settings)?)),
        files: Some(&FilesOf::<MixtureConfig<LoraConfig>>(PhantomData)),
    },
    Entry {
        name: "moelora",
        about: "LoRAs mixed by the task, one for each --data (Liu et al. 2023, arXiv:2310.18339)",
        formula: "y = x·W + b + Σ gₑ(task) · (alpha / rank)·x·Aₑ·Bₑ",
        parameters: "experts · (rank · (d_in + d_out) + 64) + 64 · tasks",
        learning_rate: 2e-4,
        merges: false,
        build: |settings| Ok(Box::new(mixture::moelora(settings)?)),
        files: Some(&FilesOf::<MixtureConfig<LoraConfig>>(PhantomData)),
    },
    Entry {
        name: "poly",
        about: "LoRAs as skills that tasks share, one task for each --data (Ponti et al. 2022, arXiv:2202.13914)",
        formula: "y = x·W + b + x·A·B / rank, A = Σ m(task)·Aₛ, B = Σ m(task)·Bₛ",
        parameters: "skills · (rank · (d_in + d_out) + tasks)",
        learning_rate: 1e-3,
        merges: false,
        build: |settings| Ok(Box::new(mixture::poly(settings)?)),
        files: Some(&FilesOf::<PolyConfig>(PhantomData)),
    },
    Entry {
        name: "mov",
        about: "vectors of (IA)³ mixed token by token (Zadouri et al. 2023, arXiv:2309.05444)",
        formula: "y = (Σ gₑ(x)·lₑ) ⊙ (x·W + b)",
        parameters: "experts · (d_out + d_in)",
        learning_rate: 3e-3,
        merges: false,
        build: |settings| Ok(Box::new(mixture::mov(settings)?)),
        files: Some(&FilesOf::<MixtureConfig<Ia3Config>>(PhantomData)),
    },
    Entry {
        name: "mixlora",
        about: "feed-forward parts mixed token by token, and lora on --targets (Li et al. 2024, arXiv:2404.15159)",
        formula: "y = Σ gₑ(x) · FFNₑ(x)",
        parameters: "a block: experts · (3 · rank · (d + d_ff) + d); and those of lora",
        learning_rate: 2e-4,
        merges: false,
        build: |settings| Ok(Box::new(union::mixlora(settings)?)),
        files: Some(&FilesOf::<AnyUnion>(PhantomData)),
    },
    Entry {
        name: "xlora",
        about: "trained LoRAs, --experts, mixed token by token by a classifier (Buehler 2024, arXiv:2402.07148)",
        formula: "y = x·W + b + Σ σₑ(h) · (alpha / rank)·x·Aₑ·Bₑ, h of a first pass",
        parameters: "in all: width · experts + experts; experts of each layer with --layerwise-scalings",
        learning_rate: 1e-4,
        merges: false,
        build: |settings| Ok(Box::new(xlora::xlora(settings)?)),
        files: Some(&FilesOf::<XLoraConfig>(PhantomData)),
    },
    Entry {
        name: "pill",
        about: "experts for text and images behind norms; here the text's (Zhang et al. 2023, arXiv:2311.02126)",
        formula: "y = x + (silu(x·G) ⊙ (x·D))·U",
        parameters: "3 · width · adapter_dim, twice where text and images differ; width · kv_heads at values",
        learning_rate: 2e-3,
        merges: false,
        build: |settings| Ok(Box::new(mixture::pill(settings)?)),
        files: Some(&FilesOf::<PillConfig>(PhantomData)),
    },
    Entry {
        name: "full",
        about: "every parameter; the result is a model, not an adapter",
        formula: "y = x·W' + b'",
        parameters: "all",
        learning_rate: 5e-5,
        merges: false,
        build: |settings| Ok(Box::new(Whole::all(settings)?)),
        files: None,
    },
    Entry {
        name: "head",
        about: "the head alone, a linear probe of an encoder; the result is a model",
        formula: "y = x·W + b",
        parameters: "0",
        learning_rate: 1e-3,
        merges: false,
        build: |settings| Ok(Box::new(Whole::head(settings)?)),
        files: None,
    },
];

/// A configured method, whichever it is, on either kind of model.
pub trait Adaptation: Adapts<CausalLm> + Adapts<Encoder> {
    /// Which layers it adapts; nothing for what makes no adapter.
    fn targets(&self) -> Option<&Targets>;

    /// Whether a row can be of one sequence only.
    fn reads_ahead(&self) -> bool {
        false
    }

    /// In which form the model must be loaded for [`attach`](Adapts::attach), given what the user asked for.
    fn packing(&self, asked: Packing) -> Packing {
        asked
    }
}

/// What a configured method does to a model of type `T`.
pub trait Adapts<T> {
    /// Freezes the model and attaches the adapter; `files` are those of the model.
    ///
    /// # Errors
    /// See [`attach`].
    fn attach(&self, model: T, files: &ModelFiles, seed: u64) -> Result<T>;

    /// How what is trained of `model` is saved; `files` are those of the model, with its task.
    ///
    /// # Errors
    /// When the device does not hand out what has to be saved.
    fn trained(&self, model: &T, files: &ModelFiles) -> Result<Box<dyn Trained<T>>>;
}

impl<M: Method> Adaptation for M {
    fn targets(&self) -> Option<&Targets> {
        Some(Method::targets(self))
    }

    fn reads_ahead(&self) -> bool {
        self.takes_whole_rows()
    }
}

impl<T: Module, M: Method> Adapts<T> for M {
    fn attach(&self, model: T, _files: &ModelFiles, seed: u64) -> Result<T> {
        Ok(attach(model, self, seed)?)
    }

    fn trained(&self, _model: &T, files: &ModelFiles) -> Result<Box<dyn Trained<T>>> {
        Ok(Box::new(AdapterOf::on(self.clone(), files)?))
    }
}

/// The files of a method's adapters, on either kind of model.
pub trait AdapterFiles: FilesOn<CausalLm> + FilesOn<Encoder> + Debug + Sync {
    /// What the files call the method.
    fn peft_type(&self) -> &'static str;

    /// Whether they are written too, and not only read.
    fn is_written(&self) -> bool {
        true
    }

    /// Writes the adapter in `dir` to `out`: in AdapterHub's layout under a name, or in PEFT's.
    ///
    /// # Errors
    /// When it cannot be read, has no form in that layout, or cannot be written.
    fn convert(&self, dir: &Path, name: Option<&String>, out: &Path) -> Result<()>;
}

/// What is done with the file of an adapter on a model of type `T`.
pub trait FilesOn<T> {
    /// `model` with the adapter in `dir`, and how many tasks that tells apart.
    ///
    /// # Errors
    /// When the adapter cannot be read or is not one of this model.
    fn load(&self, model: T, dir: &Path) -> Result<(T, Option<usize>)>;

    /// `model` with the adapter in `dir` folded into its weights.
    ///
    /// # Errors
    /// As [`load`](Self::load); and when it cannot be merged.
    fn merge(&self, model: T, dir: &Path) -> Result<T>;
}

#[derive(Debug)]
struct FilesOf<M>(PhantomData<fn() -> M>);

impl<M: Method> AdapterFiles for FilesOf<M> {
    fn peft_type(&self) -> &'static str {
        M::PEFT_TYPE
    }

    fn convert(&self, dir: &Path, name: Option<&String>, out: &Path) -> Result<()> {
        let file = AdapterFile::<M>::read(dir)?;
        match name {
            Some(name) => file.write_hub(name, out)?,
            None => file.write(out)?,
        }
        Ok(())
    }
}

impl<T: Module, M: Method> FilesOn<T> for FilesOf<M> {
    fn load(&self, model: T, dir: &Path) -> Result<(T, Option<usize>)> {
        let (model, method) = load_adapter::<_, M>(model, dir)?;
        Ok((model, method.num_tasks()))
    }

    fn merge(&self, model: T, dir: &Path) -> Result<T> {
        let (model, method) = load_adapter::<_, M>(model, dir)?;
        Ok(merge(model, &method)?)
    }
}

/// `LoRA` that starts from what packing loses: the model is packed while the adapter is attached.
struct LoftQ {
    lora: LoraConfig,
    quantization: Quantization,
    /// How the model is loaded, before it is packed.
    stored: Packing,
}

impl<T: Module> Adapts<T> for LoftQ {
    fn attach(&self, model: T, _files: &ModelFiles, seed: u64) -> Result<T> {
        let matcher = self.lora.targets.matcher()?;
        let rank_of = |site: &Site| {
            matcher.matches(&site.path, Some(site.kind)).then(|| self.lora.rank_of(&site.path)).transpose()
        };
        // One iteration, so that the base is the model as it is packed without an adapter: nothing but the adapter has to be saved.
        let (model, factors) = loftq_model(model, &self.quantization, 1, rank_of)?;
        Ok(attach_factors(model, &self.lora, &factors, seed)?)
    }

    fn trained(&self, model: &T, files: &ModelFiles) -> Result<Box<dyn Trained<T>>> {
        // On the unpacked model the adapter would add what that has never lost.
        let base_fingerprint = Some(base_fingerprint(model)?);
        Ok(Box::new(AdapterOf { base_fingerprint, ..AdapterOf::on(self.lora.clone(), files)? }))
    }
}

impl Adaptation for LoftQ {
    fn targets(&self) -> Option<&Targets> {
        Some(&self.lora.targets)
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

    /// What adapter files call it; nothing for what makes no adapter.
    pub fn peft_type(&self) -> Option<&'static str> {
        self.files.map(AdapterFiles::peft_type)
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
            format!("one of {}", names(|entry| Some(entry.name))),
        )
    };
    METHODS.iter().find(|entry| entry.name == name).ok_or_else(unknown)
}

/// What reads the adapter in `dir`.
///
/// # Errors
/// When there is no adapter, or its method is not known.
pub fn of_adapter(dir: &Path) -> Result<&'static dyn AdapterFiles> {
    let found = peft_type(dir)?;
    let published = published::FILES.iter().map(|files| files as &dyn AdapterFiles);
    let mut known = METHODS.iter().filter_map(|entry| entry.files).chain(published);
    known.find(|files| files.peft_type() == found).ok_or_else(|| {
        let expected = format!("a method that is known ({})", names(Entry::peft_type));
        peft_core::Error::Method { path: dir.join(CONFIG_FILE), expected, found }.into()
    })
}

fn names(of: fn(&Entry) -> Option<&'static str>) -> String {
    let mut names: Vec<&str> = METHODS.iter().filter_map(of).collect();
    names.dedup();
    names.join(", ")
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
