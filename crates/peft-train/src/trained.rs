//! What a run trains, and thus what its checkpoints hold: an adapter, or a whole model.

use std::path::Path;

use burn::module::Module;
use peft_core::files::{CAUSAL_LM, TENSOR_FILE, write_atomically};
use peft_core::{AdapterFile, Method, Strictness};
use peft_models::checkpoint::Checkpoint;
use peft_models::config::{Architecture, EncoderConfig};
use peft_models::encoder::Naming;
use peft_models::export::save_model;
use peft_models::load::{Packing, Precision, load_weights};
use peft_models::tokenizer::Tokenizer;
use peft_models::{CausalLm, Encoder, ModelFiles};
use serde_json::Value;

use crate::Result;
use crate::task_file::{TASK_FILE, describe, task_type};

/// The trained part of a model of type `T`, to and from a folder.
pub trait Trained<T> {
    /// Writes the trained part into `dir`, atomically.
    ///
    /// # Errors
    /// When the device or the file system refuses.
    fn save(&self, model: &T, dir: &Path) -> Result<()>;

    /// Puts what `dir` holds into `model`, which carries an adapter already if the trained part is one.
    ///
    /// # Errors
    /// When the folder does not hold the trained part of this model.
    fn restore(&self, model: T, dir: &Path) -> Result<T>;

    /// Which of the adapter's fields LoRA+ trains faster, if any: [`Method::is_fast`].
    fn fast(&self) -> Option<fn(&str) -> bool> {
        None
    }
}

/// An adapter in Hugging Face PEFT's layout.
#[derive(Clone, Debug)]
pub struct AdapterOf<M> {
    /// The method.
    pub method: M,
    /// `base_model_name_or_path`.
    pub base_model: String,
    /// Of the base that the adapter belongs to, where that is not the model as others have it.
    pub base_fingerprint: Option<String>,
    /// The encoder that it is on, with its task; nothing for a language model.
    pub encoder: Option<EncoderConfig>,
}

impl<M> AdapterOf<M> {
    /// An adapter on the language model that others have under that name.
    pub fn new(method: M, base_model: impl Into<String>) -> Self {
        Self { method, base_model: base_model.into(), base_fingerprint: None, encoder: None }
    }

    /// An adapter on the model of these files, for the task that they describe.
    ///
    /// # Errors
    /// When the configuration is malformed.
    pub fn on(method: M, files: &ModelFiles) -> Result<Self> {
        let encoder = match files.architecture()? {
            Architecture::Encoder(config) => Some(config),
            Architecture::Decoder(_) => None,
        };
        Ok(Self { encoder, ..Self::new(method, files.name.clone()) })
    }
}

impl<T: Module, M: Method> Trained<T> for AdapterOf<M> {
    fn save(&self, model: &T, dir: &Path) -> Result<()> {
        let mut file = AdapterFile::collect(model, &self.method)?;
        file.base_model = Some(self.base_model.clone());
        file.task_type = self.encoder.as_ref().map_or(Some(CAUSAL_LM), task_type).map(str::to_owned);
        file.base_fingerprint.clone_from(&self.base_fingerprint);
        file.write(dir)?;
        if let Some(config) = &self.encoder {
            let task = format!("{:#}\n", describe(config));
            write_atomically(dir, &[(TASK_FILE, task.as_bytes())])?;
        }
        Ok(())
    }

    fn restore(&self, model: T, dir: &Path) -> Result<T> {
        let file = AdapterFile::<M>::read(dir)?;
        Ok(file.fill(model, &dir.join(TENSOR_FILE), Strictness::default())?)
    }

    fn fast(&self) -> Option<fn(&str) -> bool> {
        (!M::FAST.is_empty()).then_some(M::is_fast)
    }
}

/// A whole model as a Hugging Face directory in f32.
#[derive(Clone, Debug)]
pub struct WholeModel {
    /// `config.json`.
    pub config: Value,
    /// Saved along, if there is one.
    pub tokenizer: Option<Tokenizer>,
    /// Other files that are saved along, with their bytes.
    pub others: Vec<(&'static str, Vec<u8>)>,
}

/// What makes pixels of pictures.
const PREPROCESSOR: &str = "preprocessor_config.json";

impl WholeModel {
    /// The model of these files, for the task that they describe.
    ///
    /// # Errors
    /// When a file that belongs to it is there and cannot be read.
    pub fn of(files: &ModelFiles) -> Result<Self> {
        let mut others = Vec::new();
        let path = files.origin.weights().path().join(PREPROCESSOR);
        if path.is_file() {
            others.push((PREPROCESSOR, std::fs::read(&path).map_err(crate::Error::io(&path))?));
        }
        Ok(Self { config: files.config.clone(), tokenizer: files.tokenizer().ok().cloned(), others })
    }

    fn write<T: Module>(&self, model: &T, dir: &Path) -> Result<()> {
        save_model(model, &self.config, self.tokenizer.as_ref(), safetensors::Dtype::F32, dir)?;
        let others: Vec<(&str, &[u8])> = self.others.iter().map(|(name, bytes)| (*name, &bytes[..])).collect();
        Ok(write_atomically(dir, &others)?)
    }
}

fn read<T: Module>(model: T, dir: &Path) -> Result<T> {
    Ok(load_weights(model, &Checkpoint::open(dir)?, &Packing::Dense, Precision::F32, |_| false)?)
}

impl Trained<CausalLm> for WholeModel {
    fn save(&self, model: &CausalLm, dir: &Path) -> Result<()> {
        self.write(model, dir)
    }

    fn restore(&self, model: CausalLm, dir: &Path) -> Result<CausalLm> {
        read(model, dir)
    }
}

impl Trained<Encoder> for WholeModel {
    fn save(&self, model: &Encoder, dir: &Path) -> Result<()> {
        self.write(&model.clone().renamed(Naming::Files), dir)
    }

    fn restore(&self, model: Encoder, dir: &Path) -> Result<Encoder> {
        Ok(read(model.renamed(Naming::Files), dir)?.renamed(Naming::Modules))
    }
}
