//! Models and adapters as the command line names them.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use peft_core::files::tensors_of;
use peft_core::{LayerKind, Targets, for_tasks, scan};
use peft_models::config::Architecture;
use peft_models::encoder::Naming;
use peft_models::heads::has_hub_head;
use peft_models::load::{Packing, Precision};
use peft_models::{CausalLm, Encoder, EncoderOptions, ModelFiles, ModelSource, Pretrained, PretrainedEncoder};
use peft_train::task_of_adapter;
use serde::{Deserialize, Serialize};

use crate::methods::{AdapterFiles, FilesOn};
use crate::packing::PackingArgs;
use crate::{Error, Result, methods};

/// The model of a command that only reads.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// Hugging Face directory, .gguf file, hub id (owner/name), or `tiny`, the model inside this program
    #[arg(long)]
    pub model: String,
    /// Folder with `adapter_config.json` and `adapter_model.safetensors`, as `peft train` or Hugging Face PEFT writes it
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The task that an adapter for several is used for, from 0
    #[arg(long, value_name = "N")]
    pub task_id: Option<usize>,
    /// Type of the frozen matrices and of the products with them; sums and all else are f32
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    pub precision: FrozenType,
    /// In which form the model comes into memory
    #[command(flatten)]
    pub packing: PackingArgs,
}

/// The type of frozen matrices, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FrozenType {
    /// 32 bits
    #[default]
    F32,
    /// bfloat16: half the memory, and the processor's own instructions where it has them
    Bf16,
}

impl From<FrozenType> for Precision {
    fn from(kind: FrozenType) -> Self {
        match kind {
            FrozenType::F32 => Self::F32,
            FrozenType::Bf16 => Self::Bf16,
        }
    }
}

/// A model of either kind.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one a process")]
pub enum Loaded {
    /// A language model.
    Decoder(Pretrained),
    /// An encoder, with the head of its adapter if there is one.
    Encoder(PretrainedEncoder),
}

impl ModelArgs {
    /// Loads the model, with the adapter attached if there is one.
    ///
    /// # Errors
    /// When either cannot be read, or they do not fit each other; and for an encoder with a head that nobody has trained.
    pub fn load(&self, device: &Device) -> Result<Loaded> {
        let files = open(&self.model)?;
        let (packing, precision) = (self.packing.packing()?, self.precision.into());
        Ok(match files.architecture()? {
            Architecture::Decoder(_) => {
                Loaded::Decoder(self.adapted(Pretrained::from_files(files, &packing, precision, device)?)?)
            }
            Architecture::Encoder(_) => {
                let adapter = self.adapter.as_deref();
                let mut encoder = load_encoder(files, adapter, packing, precision, device)?;
                if let Some(dir) = adapter {
                    encoder.model = self.attach(encoder.model, dir)?;
                }
                Loaded::Encoder(encoder)
            }
        })
    }

    /// Loads a language model; what is no language model is refused.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_decoder(&self, device: &Device) -> Result<Pretrained> {
        self.adapted(load(&self.model, &self.packing.packing()?, self.precision.into(), device)?)
    }

    fn adapted(&self, mut pretrained: Pretrained) -> Result<Pretrained> {
        if let Some(adapter) = &self.adapter {
            // Before its tensors are looked at: a method that is not known may have other files.
            methods::of_adapter(adapter)?;
            pretrained.model = self.attach(for_adapter(pretrained.model, adapter)?, adapter)?;
        }
        Ok(pretrained)
    }

    fn attach<T>(&self, model: T, dir: &Path) -> Result<T>
    where
        dyn AdapterFiles: FilesOn<T>,
    {
        let (model, tasks) = methods::of_adapter(dir)?.load(model, dir)?;
        match (self.task_id, tasks) {
            (Some(id), None) => Err(Error::usage(
                format!("--task-id {id}: the adapter in {} has no tasks", dir.display()),
                "leave it out",
            )),
            (id, Some(tasks)) if id.map_or(tasks > 1, |id| id >= tasks) => {
                let given = id.map_or("is missing".to_owned(), |id| format!("{id}: there is no such task"));
                let what = format!("--task-id {given}; the adapter in {} has {tasks}", dir.display());
                Err(Error::usage(what, format!("a number from 0 to {}", tasks - 1)))
            }
            _ => Ok(model),
        }
    }

    /// The task that was asked for; the first of those that tell none apart.
    pub fn task(&self) -> usize {
        self.task_id.unwrap_or_default()
    }

    /// What `run` computes, as of that task.
    pub fn for_task<R>(&self, run: impl FnOnce() -> R) -> R {
        for_tasks(&[self.task()], run)
    }
}

/// Reads everything but the weights of a model by the name that the user gave.
///
/// # Errors
/// When there is no such model or it cannot be read.
pub fn open(name: &str) -> Result<ModelFiles> {
    Ok(name.parse::<ModelSource>()?.open()?)
}

/// Loads a language model by the name that the user gave.
///
/// # Errors
/// When there is no such model or it cannot be read.
pub fn load(name: &str, packing: &Packing, precision: Precision, device: &Device) -> Result<Pretrained> {
    Ok(Pretrained::from_files(open(name)?, packing, precision, device)?)
}

/// Loads an encoder for the task of the adapter in `adapter`, which is not attached yet, or for its own.
///
/// # Errors
/// When something cannot be read, or the head is neither in the model's files nor in the adapter's.
pub fn load_encoder(
    files: ModelFiles,
    adapter: Option<&Path>,
    packing: Packing,
    precision: Precision,
    device: &Device,
) -> Result<PretrainedEncoder> {
    let Architecture::Encoder(config) = files.architecture()? else {
        let what = format!("{}: a language model, where an encoder is needed", files.name);
        return Err(Error::usage(what, "bert, roberta, distilbert, vit and dinov2 are encoders"));
    };
    let task = adapter.map(|dir| task_of_adapter(dir, &config)).transpose()?;
    let options = EncoderOptions { task, packing, precision, seed: 0 };
    let mut pretrained = PretrainedEncoder::from_files(files, &options, device)?;
    if let Some(dir) = adapter.filter(|dir| has_hub_head(dir)) {
        pretrained.model = pretrained.model.with_hub_head(dir, device)?;
    }
    let trained = adapter.map_or(Ok(Vec::new()), adapted_keys)?;
    let head = pretrained.model.config().head_modules();
    let is_head = |name: &&String| head.iter().any(|module| is_inside(name, module));
    if let Some(name) = pretrained.unmatched.fresh.iter().filter(is_head).find(|name| !trained.contains(name)) {
        let what = format!("{}: {name} is not there: the head of this model is not trained", pretrained.files.name);
        return Err(Error::refused(what, "train it: peft train --model … --data …; or name its --adapter"));
    }
    pretrained.model = named_for(pretrained.model, &trained);
    Ok(pretrained)
}

/// `model` under the names that an adapter with these keys has for its layers: those of `transformers` 5, or of 4.
fn named_for(model: Encoder, keys: &[String]) -> Encoder {
    let fitting = |model: &Encoder| {
        let sites = scan(model).sites;
        keys.iter().filter(|key| sites.iter().any(|site| is_inside(key, &site.path))).count()
    };
    let old = model.clone().renamed(Naming::Files);
    if fitting(&old) > fitting(&model) { old } else { model }
}

/// Refuses a folder that is one of `sources`, or holds a model and must not be overwritten.
///
/// # Errors
/// [`Error::Usage`].
pub fn check_new_model(out: &Path, overwrite: bool, sources: &[&Path]) -> Result<()> {
    let place = std::fs::canonicalize(out).ok();
    if place.is_some() && sources.iter().any(|source| std::fs::canonicalize(source).ok() == place) {
        let what = format!("--out {}: this would overwrite what is to be read", out.display());
        return Err(Error::usage(what, "give another folder"));
    }
    let taken = ["config.json", "model.safetensors", "model.safetensors.index.json"];
    match taken.iter().find(|name| out.join(name).exists()) {
        Some(name) if !overwrite => {
            let what = format!("--out {}: there is a {name} already", out.display());
            Err(Error::usage(what, "give another folder, or --overwrite"))
        }
        _ => Ok(()),
    }
}

/// Copies the file that names the tokens at which generation ends, which the other files of a model need not do.
///
/// # Errors
/// When it is there and cannot be copied.
pub fn copy_generation_config(from: &Path, to: &Path) -> Result<()> {
    let name = "generation_config.json";
    if from.join(name).is_file() {
        std::fs::copy(from.join(name), to.join(name)).map_err(Error::io(to.join(name)))?;
    }
    Ok(())
}

/// Where the families keep what a tied model shares: the output head and the embedding table.
const HEAD: &str = "lm_head";
const EMBEDDING: &str = "model.embed_tokens";

/// `model` as the adapter in `dir` needs it: with a head of its own where the adapter tells head and embedding apart.
///
/// # Errors
/// When the adapter cannot be read.
pub fn for_adapter(model: CausalLm, dir: &Path) -> Result<CausalLm> {
    let parted = adapted_keys(dir)?.iter().any(|key| [HEAD, EMBEDDING].iter().any(|module| is_inside(key, module)));
    Ok(if parted { model.untied() } else { model })
}

/// `model` as an adapter on `targets` needs it, by the same rule.
///
/// # Errors
/// When the targets make no sense.
pub fn for_targets(model: CausalLm, targets: &Targets) -> Result<CausalLm> {
    let matcher = targets.matcher()?;
    let named = |path, kind| matcher.matches(path, Some(kind)) || matcher.saves_module(path);
    let parted = named(HEAD, LayerKind::Linear) || named(EMBEDDING, LayerKind::Embedding);
    Ok(if parted { model.untied() } else { model })
}

/// What Mixtral's feed-forward parts were called before `transformers` 5, and are.
const MIXTRAL: (&str, &str) = (".block_sparse_moe.", ".mlp.");

/// The keys of an adapter's tensors as paths in the model, for instance `lm_head.lora_A.weight`.
///
/// # Errors
/// When the adapter cannot be read.
pub fn adapted_keys(dir: &Path) -> Result<Vec<String>> {
    Ok(tensors_of(dir)?.into_keys().map(|key| key.replace(MIXTRAL.0, MIXTRAL.1)).collect())
}

/// Whether `path` is that of something below `module`.
pub fn is_inside(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'))
}

/// The family's name in `config.json`.
pub fn architecture(pretrained_config: &serde_json::Value) -> &str {
    pretrained_config.get("model_type").and_then(serde_json::Value::as_str).unwrap_or("unknown")
}
