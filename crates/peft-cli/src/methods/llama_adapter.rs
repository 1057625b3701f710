//! LLaMA-Adapter as the settings of `peft train` ask for it.

use burn::module::Module;
use peft_core::{LayerKind, Targets, attach, scan};
use peft_models::ModelFiles;
use peft_prompt::LlamaAdapterConfig;
use peft_train::{AdapterOf, Trained};

use super::configure::{initial, only, refuse_targets};
use super::{Adaptation, Adapts};
use crate::settings::{Init, Settings};
use crate::{Error, Result};

/// Tokens of a layer, where nothing is said: as in the paper.
const TOKENS: usize = 10;

/// The method before it has seen the model.
pub(super) struct Gated {
    adapter_len: usize,
    /// All where nothing is said.
    adapter_layers: Option<usize>,
    /// Modules that the user wants trained besides, which PEFT's files of this method cannot say.
    modules_to_save: Vec<String>,
}

/// LLaMA-Adapter.
pub(super) fn llama_adapter(settings: &Settings) -> Result<Gated> {
    only(settings, "llama-adapter", &["num-virtual-tokens", "adapter-layers"])?;
    refuse_targets(settings, "llama-adapter")?;
    initial(settings, "llama-adapter", &[(Init::Kaiming, ())])?;
    Ok(Gated {
        adapter_len: settings.num_virtual_tokens.unwrap_or(TOKENS),
        adapter_layers: settings.adapter_layers,
        modules_to_save: settings.modules_to_save.clone(),
    })
}

impl Gated {
    /// The method for a model: its file says how many layers, so all of them is a number.
    fn on<T: Module>(&self, model: &T) -> LlamaAdapterConfig {
        let all = || scan(model).sites.iter().filter(|site| site.kind == LayerKind::Attended).count();
        LlamaAdapterConfig::new(self.adapter_len, self.adapter_layers.unwrap_or_else(|| all().max(1)))
    }
}

impl<T: Module> Adapts<T> for Gated {
    fn attach(&self, model: T, _files: &ModelFiles, seed: u64) -> Result<T> {
        let method = self.on(&model);
        // First, as a model without the place, an encoder, is refused as that, and has a head to be trained.
        let adapted = attach(model, &method, seed)?;
        match self.modules_to_save.first() {
            Some(name) => {
                let what = format!("--modules-to-save {name}: llama-adapter trains nothing besides its prompts");
                Err(Error::usage(what, "leave it out"))
            }
            None => Ok(adapted),
        }
    }

    fn trained(&self, model: &T, files: &ModelFiles) -> Result<Box<dyn Trained<T>>> {
        Ok(Box::new(AdapterOf::on(self.on(model), files)?))
    }
}

impl Adaptation for Gated {
    fn targets(&self) -> Option<&Targets> {
        None
    }
}
