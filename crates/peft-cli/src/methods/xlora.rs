//! X-LoRA as the settings of `peft train` ask for it.

use burn::module::Module;
use peft_core::{AdapterFile, LayerKind, Targets, scan};
use peft_lora::LoraConfig;
use peft_models::ModelFiles;
use peft_moe::XLoraConfig;
use peft_train::{AdapterOf, Trained};

use super::configure::{initial, only, refuse_targets};
use super::{Adaptation, Adapts};
use crate::settings::{Init, Settings};
use crate::{Error, Result};

/// Trained experts, and the classifier before it has seen the model.
pub(super) struct Classified {
    method: XLoraConfig,
    experts: Vec<AdapterFile<LoraConfig>>,
}

/// X-LoRA.
pub(super) fn xlora(settings: &Settings) -> Result<Classified> {
    only(settings, "xlora", &["experts", "layerwise-scalings", "top-k"])?;
    refuse_targets(settings, "xlora")?;
    initial(settings, "xlora", &[(Init::Kaiming, ())])?;
    let example = "--experts law --experts code: a folder of LoRA for each";
    if settings.experts.is_empty() {
        return Err(Error::usage("--method xlora: --experts is missing", example));
    }
    // The model's head, which an encoder's classifier would need, is trained with an adapter's file that says so; X-LoRA's cannot.
    if let Some(name) = settings.modules_to_save.first() {
        let what = format!("--modules-to-save {name}: xlora trains nothing besides its classifier");
        return Err(Error::usage(what, "leave it out; of an encoder X-LoRA cannot train the head"));
    }
    let experts: Vec<_> =
        settings.experts.iter().map(|dir| AdapterFile::<LoraConfig>::read(dir)).collect::<peft_core::Result<_>>()?;
    let method = XLoraConfig {
        layerwise_scalings: settings.layerwise_scalings,
        top_k_lora: settings.top_k,
        experts: experts.iter().map(|expert| expert.method.clone()).collect(),
        ..XLoraConfig::default()
    };
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
        let method = XLoraConfig { experts: Vec::new(), ..self.on(&model) };
        let (adapted, _) = method.attach_experts(model, self.experts.clone(), seed)?;
        Ok(adapted)
    }

    fn trained(&self, model: &T, files: &ModelFiles) -> Result<Box<dyn Trained<T>>> {
        Ok(Box::new(AdapterOf::on(self.on(model), files)?))
    }
}

impl Adaptation for Classified {
    fn targets(&self) -> Option<&Targets> {
        None
    }
}
