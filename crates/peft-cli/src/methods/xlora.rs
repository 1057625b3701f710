//! X-LoRA as the settings of `peft train` ask for it.

use burn::module::Module;
use peft_core::{AdapterFile, LayerKind, Method as _, Targets, scan};
use peft_lora::LoraConfig;
use peft_models::ModelFiles;
use peft_moe::XLoraConfig;
use peft_train::{AdapterOf, Trained};

use super::configure::{initial, only, refuse_targets};
use super::{Adaptation, Adapts};
use crate::settings::{Init, Settings};
use crate::{Error, Result};

/// Trained experts, and the classifier before it has seen the model and them.
pub(super) struct Classified {
    method: XLoraConfig,
    experts: Vec<AdapterFile<LoraConfig>>,
}

/// X-LoRA.
pub(super) fn xlora(settings: &Settings) -> Result<Classified> {
    only(settings, "xlora", &["experts", "layerwise-scalings", "top-k"])?;
    refuse_targets(settings, "xlora")?;
    initial(settings, "xlora", &[(Init::Kaiming, ())])?;
    let count = settings.experts.len();
    if count == 0 {
        let example = "--experts law --experts code: a folder of LoRA for each";
        return Err(Error::usage("--method xlora: --experts is missing", example));
    }
    if let Some(k) = settings.top_k.filter(|k| *k > count) {
        return Err(Error::usage(format!("--top-k {k}: there are {count} --experts"), format!("--top-k {count}")));
    }
    // Of an encoder the head is one of these.
    if let Some(name) = settings.modules_to_save.first() {
        let what = format!("xlora trains its own classifier and nothing besides, here {name}");
        return Err(Error::usage(what, "a language model, and no --modules-to-save"));
    }
    let method = XLoraConfig {
        layerwise_scalings: settings.layerwise_scalings,
        top_k_lora: settings.top_k,
        ..XLoraConfig::default()
    };
    method.check()?;
    let experts = settings.experts.iter().map(|dir| AdapterFile::read(dir)).collect::<peft_core::Result<_>>()?;
    Ok(Classified { method, experts })
}

impl Classified {
    /// The method for a model: its file says how wide that is.
    fn on<T: Module>(&self, model: &T) -> XLoraConfig {
        let place = scan(model).sites.into_iter().find(|site| site.kind == LayerKind::Prompts);
        // A model without the place is refused as that.
        let hidden_size = place.map_or(self.method.hidden_size, |place| place.d_in);
        XLoraConfig { hidden_size, ..self.method.clone() }
    }
}

impl<T: Module> Adapts<T> for Classified {
    fn attach(&self, model: T, _files: &ModelFiles, seed: u64) -> Result<T> {
        let (adapted, _) = self.on(&model).attach_experts(model, self.experts.clone(), seed)?;
        Ok(adapted)
    }

    fn trained(&self, model: &T, files: &ModelFiles) -> Result<Box<dyn Trained<T>>> {
        let experts = self.experts.iter().map(|expert| expert.method.clone()).collect();
        Ok(Box::new(AdapterOf::on(XLoraConfig { experts, ..self.on(model) }, files)?))
    }
}

impl Adaptation for Classified {
    fn targets(&self) -> Option<&Targets> {
        None
    }
}
