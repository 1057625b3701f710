//! A model with all that belongs to it, from a Hugging Face directory, a GGUF file, the model hub, or the one in this crate.

mod encoder;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use burn::tensor::Device;
use serde_json::Value;

pub use self::encoder::{EncoderOptions, PretrainedEncoder};
use crate::checkpoint::Checkpoint;
use crate::config::{Architecture, ModelConfig};
use crate::gguf::Gguf;
use crate::load::{Packing, Precision, load_weights};
use crate::stacked::Stacked;
use crate::tokenizer::{SpecialTokens, Tokenizer};
use crate::weights::Weights;
use crate::{CausalLm, Error, Result, tiny};

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder with `config.json`, safetensors and `tokenizer.json`.
    Dir(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
    /// `owner/name` on the model hub.
    Hub(String),
    /// The small model in this crate.
    Tiny,
}

impl FromStr for ModelSource {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let path = Path::new(text);
        let hub_id = || {
            let mut parts = text.split('/');
            let named = |part: Option<&str>| part.is_some_and(|p| !p.is_empty() && !p.starts_with('.'));
            named(parts.next()) && named(parts.next()) && parts.next().is_none()
        };
        if text == "tiny" {
            Ok(Self::Tiny)
        } else if path.is_dir() {
            Ok(Self::Dir(path.to_owned()))
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            Ok(Self::Gguf(path.to_owned()))
        } else if !path.exists() && hub_id() {
            Ok(Self::Hub(text.to_owned()))
        } else {
            let what = "not a model: expected a Hugging Face directory, a .gguf file, a hub id as owner/name, or tiny";
            Err(Error::format(path, what))
        }
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dir(path) | Self::Gguf(path) => path.display().fmt(f),
            Self::Hub(id) => f.write_str(id),
            Self::Tiny => f.write_str("tiny"),
        }
    }
}

/// The file or folder behind a model.
#[derive(Debug)]
pub enum Origin {
    /// Safetensors.
    Checkpoint(Checkpoint),
    /// GGUF.
    Gguf(Box<Gguf>),
}

impl Origin {
    /// The tensors, whatever holds them.
    pub fn weights(&self) -> &dyn Weights {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint,
            Self::Gguf(gguf) => gguf.as_ref(),
        }
    }
}

/// All that belongs to a model but the values of its weights.
#[derive(Debug)]
pub struct ModelFiles {
    /// `config.json`.
    pub config: Value,
    /// The file or folder.
    pub origin: Origin,
    /// As the user named it; written into adapters as `base_model_name_or_path`.
    pub name: String,
    tokenizer: Option<Tokenizer>,
}

impl ModelSource {
    /// Reads everything but the values of the weights.
    ///
    /// # Errors
    /// When a file is missing or malformed, or the hub cannot be reached.
    pub fn open(&self) -> Result<ModelFiles> {
        let (config, origin, tokenizer) = match self {
            Self::Dir(dir) => from_dir(dir)?,
            Self::Hub(id) => from_dir(&hub(id)?)?,
            Self::Gguf(path) => {
                let gguf = Gguf::open(path)?;
                let ids = gguf.special_tokens()?;
                let special = SpecialTokens { bos: ids.bos, eos: ids.eos.into_iter().collect(), pad: ids.pad };
                let tokenizer = Tokenizer::new(gguf.tokenizer()?, special, gguf.chat_template().map(str::to_owned))?;
                (gguf.config()?, Origin::Gguf(Box::new(gguf)), Some(tokenizer))
            }
            Self::Tiny => {
                let (config, checkpoint, tokenizer) = tiny::parts()?;
                (config, Origin::Checkpoint(checkpoint), Some(tokenizer))
            }
        };
        Ok(ModelFiles { config, origin, name: self.to_string(), tokenizer })
    }
}

impl ModelFiles {
    /// The tokenizer.
    ///
    /// # Errors
    /// When the source has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing =
            || Error::format(&self.name, "no tokenizer.json here; only token ids can be used with this model");
        self.tokenizer.as_ref().ok_or_else(missing)
    }

    /// `config.json`, understood: of a decoder or of an encoder.
    ///
    /// # Errors
    /// When it is malformed or the architecture is not supported.
    pub fn architecture(&self) -> Result<Architecture> {
        Architecture::from_json(&self.config, self.origin.weights().path())
    }

    /// `config.json` of a decoder, understood.
    ///
    /// # Errors
    /// When it is malformed or the architecture is not supported.
    pub fn model_config(&self) -> Result<ModelConfig> {
        ModelConfig::from_json(&self.config, self.origin.weights().path())
    }
}

fn from_dir(dir: &Path) -> Result<(Value, Origin, Option<Tokenizer>)> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let config = serde_json::from_str(&text).map_err(|e| Error::format(&path, format!("not JSON: {e}")))?;
    Ok((config, Origin::Checkpoint(Checkpoint::open(dir)?), Tokenizer::find(dir)?))
}

/// A model and what it was made from.
#[derive(Debug)]
pub struct Pretrained {
    /// The model, un-adapted.
    pub model: CausalLm,
    /// The rest.
    pub files: ModelFiles,
}

impl Pretrained {
    /// Loads the model onto `device`: weights that the file holds packed stay so, all others become f32.
    ///
    /// # Errors
    /// When a file is missing, malformed or does not fit its configuration; when the architecture is not supported; when the hub cannot be
    /// reached.
    pub fn load(source: &ModelSource, device: &Device) -> Result<Self> {
        Self::load_with(source, &Packing::AsStored, Precision::F32, device)
    }

    /// [`load`](Self::load) with linear layers and experts in the form that `packing` says, and what is dense in `precision`.
    ///
    /// # Errors
    /// As [`load`](Self::load); and when a weight cannot be packed, or the device does not have the precision.
    pub fn load_with(source: &ModelSource, packing: &Packing, precision: Precision, device: &Device) -> Result<Self> {
        Self::from_files(source.open()?, packing, precision, device)
    }

    /// [`load_with`](Self::load_with) from files that are open already.
    ///
    /// # Errors
    /// As [`load_with`](Self::load_with).
    pub fn from_files(files: ModelFiles, packing: &Packing, precision: Precision, device: &Device) -> Result<Self> {
        let config = files.model_config()?;
        let tied = config.is_tied();
        // Buffers that `transformers` computes itself, and the second name of a tied head.
        // Of DeepSeek-V3's files also the blocks that predict tokens further ahead, behind those of the model.
        let beyond = |name: &str| {
            let block =
                name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            config.is_latent() && block.is_some_and(|block| block >= config.num_layers())
        };
        let ignored = |name: &str| {
            let buffer =
                [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"].iter().any(|end| name.ends_with(end));
            buffer || beyond(name) || (tied && name == "lm_head.weight")
        };
        let weights = Stacked::new(files.origin.weights())?;
        let model = load_weights(CausalLm::new(&config, device), &weights, packing, precision, ignored)?;
        Ok(Self { model, files })
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// When the source has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.files.tokenizer()
    }
}

/// Downloads a model, or finds it in the hub's cache, and gives its folder.
#[cfg(feature = "hub")]
fn hub(id: &str) -> Result<PathBuf> {
    let failed = |e: hf_hub::api::sync::ApiError| Error::Hub { id: id.to_owned(), message: e.to_string() };
    let cached = hf_hub::Cache::from_env().model(id.to_owned()).get("config.json");
    let api = hf_hub::api::sync::ApiBuilder::from_env().build().map_err(failed)?.model(id.to_owned());
    let config = match cached {
        Some(path) => path,
        None => api.get("config.json").map_err(failed)?,
    };
    for optional in [
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "generation_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
    ] {
        // A repository need not have these; the loader says so where one is needed.
        api.get(optional).ok();
    }
    if api.get("model.safetensors").is_err() {
        let index = api.get("model.safetensors.index.json").map_err(failed)?;
        let text = std::fs::read_to_string(&index).map_err(Error::io(&index))?;
        let json: Value = serde_json::from_str(&text).map_err(|e| Error::format(&index, format!("not JSON: {e}")))?;
        let shards = json.get("weight_map").and_then(Value::as_object).into_iter().flat_map(|m| m.values());
        for shard in shards.filter_map(Value::as_str).collect::<std::collections::BTreeSet<_>>() {
            api.get(shard).map_err(failed)?;
        }
    }
    Ok(config.parent().unwrap_or(Path::new(".")).to_owned())
}

#[cfg(not(feature = "hub"))]
fn hub(id: &str) -> Result<PathBuf> {
    Err(Error::Hub { id: id.to_owned(), message: "this program was built without the feature `hub`".to_owned() })
}
