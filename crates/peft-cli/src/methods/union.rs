//! Unions of methods as the settings of `peft train` ask for them.

use burn::module::Module;
use peft_adapter::ReductionFactor;
use peft_core::{Method as _, Targets, attach};
use peft_models::ModelFiles;
use peft_train::{AdapterOf, Trained};
use peft_union::{AnyUnion, Parts};

use super::configure::{initial, only, refuse_targets, targets};
use super::prompts::besides;
use super::{Adaptation, Adapts, mixture};
use crate::Result;
use crate::settings::{Init, Settings};

/// Settings of the parts that both have.
const OF_BOTH: [&str; 3] = ["num-virtual-tokens", "encoder-hidden-size", "reduction-factor"];

/// A union, with the layers that the user chooses for a part of it.
pub(super) struct Mixed {
    method: AnyUnion,
    layers: Option<Targets>,
}

/// MAM.
pub(super) fn mam(settings: &Settings) -> Result<Mixed> {
    only(settings, "mam", &OF_BOTH)?;
    refuse_targets(settings, "mam")?;
    sized(settings, "mam", Parts::mam())
}

/// `UniPELT`.
pub(super) fn unipelt(settings: &Settings) -> Result<Mixed> {
    only(settings, "unipelt", &[&OF_BOTH[..], &["rank"]].concat())?;
    sized(settings, "unipelt", Parts::unipelt(targets(settings)?))
}

/// `MixLoRA`: experts in every gated feed-forward part, and `LoRA` on the layers that the user chooses.
pub(super) fn mixlora(settings: &Settings) -> Result<Mixed> {
    let mut mixlora = peft_moe::mixlora(Targets::modules(["mlp"]));
    mixlora.mixture = mixture::lora(
        settings,
        "mixlora",
        &[&["experts-per-layer"][..], &mixture::OF_ROUTERS].concat(),
        mixlora.mixture,
    )?;
    sized(settings, "mixlora", Parts::mixlora_with(mixlora, targets(settings)?))
}

/// The parts in the sizes that are asked for, and what is trained besides.
fn sized(settings: &Settings, method: &str, mut parts: Parts) -> Result<Mixed> {
    initial(settings, method, &[(Init::Kaiming, ())])?;
    if let Some(prefix) = &mut parts.prefix {
        prefix.num_virtual_tokens = settings.num_virtual_tokens.unwrap_or(prefix.num_virtual_tokens);
        prefix.encoder_hidden_size = settings.encoder_hidden_size.or(prefix.encoder_hidden_size);
        prefix.besides = besides(settings);
    }
    if let Some(bottleneck) = &mut parts.bottleneck {
        if let Some(factor) = settings.reduction_factor {
            bottleneck.reduction_factor = ReductionFactor::All(factor);
        }
        bottleneck.targets.bias = settings.bias;
    }
    if let Some(lora) = &mut parts.lora {
        lora.rank = settings.rank.unwrap_or(lora.rank);
    }
    let layers = parts.lora.as_ref().map(|lora| lora.targets.clone());
    Ok(Mixed { method: parts.union(), layers })
}

impl<T: Module> Adapts<T> for Mixed {
    fn attach(&self, model: T, _files: &ModelFiles, seed: u64) -> Result<T> {
        Ok(attach(model, &self.method, seed)?)
    }

    fn trained(&self, _model: &T, files: &ModelFiles) -> Result<Box<dyn Trained<T>>> {
        Ok(Box::new(AdapterOf::on(self.method.clone(), files)?))
    }
}

impl Adaptation for Mixed {
    fn targets(&self) -> Option<&Targets> {
        self.layers.as_ref()
    }

    fn reads_ahead(&self) -> bool {
        self.method.takes_whole_rows()
    }
}
