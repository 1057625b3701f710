//! Unions of methods as the settings of `peft train` ask for them.

use peft_adapter::ReductionFactor;
use peft_union::{Mixture, Parts};

use super::configure::{initial, only, refuse_targets, targets};
use super::prompts::besides;
use crate::settings::{Init, Settings};
use crate::{Error, Result};

/// Settings of the parts that both have.
const OF_BOTH: [&str; 3] = ["num-virtual-tokens", "encoder-hidden-size", "reduction-factor"];

/// MAM.
pub(super) fn mam(settings: &Settings) -> Result<Mixture> {
    only(settings, "mam", &OF_BOTH)?;
    refuse_targets(settings, "mam")?;
    sized(settings, "mam", Parts::mam())
}

/// `UniPELT`.
pub(super) fn unipelt(settings: &Settings) -> Result<Mixture> {
    only(settings, "unipelt", &[&OF_BOTH[..], &["rank"]].concat())?;
    let targets = targets(settings)?;
    if targets.target_modules.is_none() {
        let what = "--targets is missing: unipelt has LoRA in layers that you choose";
        return Err(Error::usage(what, "--targets query,value, or what `peft inspect` calls these in the model"));
    }
    sized(settings, "unipelt", Parts::unipelt(targets))
}

/// The parts in the sizes that are asked for, and what is trained besides.
fn sized(settings: &Settings, method: &str, mut parts: Parts) -> Result<Mixture> {
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
    Ok(parts.union())
}
