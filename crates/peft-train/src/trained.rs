//! What a run trains, and thus what its checkpoints hold: an adapter, or a whole model.

use std::path::Path;

use burn::module::Module;
use peft_core::files::{CAUSAL_LM, TENSOR_FILE};
use peft_core::{AdapterFile, Method, Strictness};
use peft_models::checkpoint::Checkpoint;
use peft_models::export::save_model;
use peft_models::load::{Packing, Precision, load_weights};
use peft_models::tokenizer::Tokenizer;
use serde_json::Value;

use crate::Result;

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

    /// The adapter's fields that LoRA+ trains faster: [`Method::FAST`].
    fn fast(&self) -> &'static [&'static str] {
        &[]
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
}

impl<M> AdapterOf<M> {
    /// An adapter on the model that others have under that name.
    pub fn new(method: M, base_model: impl Into<String>) -> Self {
        Self { method, base_model: base_model.into(), base_fingerprint: None }
    }
}

impl<T: Module, M: Method> Trained<T> for AdapterOf<M> {
    fn save(&self, model: &T, dir: &Path) -> Result<()> {
        let mut file = AdapterFile::collect(model, &self.method)?;
        file.base_model = Some(self.base_model.clone());
        file.task_type = Some(CAUSAL_LM.to_owned());
        file.base_fingerprint.clone_from(&self.base_fingerprint);
        Ok(file.write(dir)?)
    }

    fn restore(&self, model: T, dir: &Path) -> Result<T> {
        let file = AdapterFile::<M>::read(dir)?;
        Ok(file.fill(model, &dir.join(TENSOR_FILE), Strictness::default())?)
    }

    fn fast(&self) -> &'static [&'static str] {
        M::FAST
    }
}

/// A whole model as a Hugging Face directory in f32.
#[derive(Clone, Debug)]
pub struct WholeModel {
    /// `config.json`.
    pub config: Value,
    /// Saved along.
    pub tokenizer: Tokenizer,
}

impl<T: Module> Trained<T> for WholeModel {
    fn save(&self, model: &T, dir: &Path) -> Result<()> {
        Ok(save_model(model, &self.config, Some(&self.tokenizer), safetensors::Dtype::F32, dir)?)
    }

    fn restore(&self, model: T, dir: &Path) -> Result<T> {
        Ok(load_weights(model, &Checkpoint::open(dir)?, &Packing::Dense, Precision::F32, |_| false)?)
    }
}
