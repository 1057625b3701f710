//! Models and adapters as the command line names them.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use peft_core::files::{TENSOR_FILE, read_values};
use peft_core::{LayerKind, Targets};
use peft_models::load::{Packing, Precision};
use peft_models::{CausalLm, ModelSource, Pretrained};
use serde::{Deserialize, Serialize};

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

impl ModelArgs {
    /// Loads the model, with the adapter attached if there is one.
    ///
    /// # Errors
    /// When either cannot be read, or they do not fit each other.
    pub fn load(&self, device: &Device) -> Result<Pretrained> {
        let mut pretrained = load(&self.model, &self.packing.packing()?, self.precision.into(), device)?;
        if let Some(adapter) = &self.adapter {
            pretrained.model = methods::of_adapter(adapter)?.load(for_adapter(pretrained.model, adapter)?, adapter)?;
        }
        Ok(pretrained)
    }
}

/// Loads a model by the name that the user gave.
///
/// # Errors
/// When there is no such model or it cannot be read.
pub fn load(name: &str, packing: &Packing, precision: Precision, device: &Device) -> Result<Pretrained> {
    let source: ModelSource = name.parse()?;
    Ok(Pretrained::load_with(&source, packing, precision, device)?)
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

/// The keys of an adapter's tensors as paths in the model, for instance `lm_head.lora_A.weight`.
///
/// # Errors
/// When the adapter cannot be read.
pub fn adapted_keys(dir: &Path) -> Result<Vec<String>> {
    let strip = |key: String| key.strip_prefix("base_model.model.").map_or(key.clone(), str::to_owned);
    Ok(read_values(&dir.join(TENSOR_FILE))?.into_keys().map(strip).collect())
}

/// Whether `path` is that of something below `module`.
pub fn is_inside(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'))
}

/// The family's name in `config.json`.
pub fn architecture(pretrained_config: &serde_json::Value) -> &str {
    pretrained_config.get("model_type").and_then(serde_json::Value::as_str).unwrap_or("unknown")
}
