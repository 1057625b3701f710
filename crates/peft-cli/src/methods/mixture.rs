//! Mixtures of adapters, and PILL, as the settings of `peft train` ask for them.

use peft_adapter::Ia3Config;
use peft_core::{Method, Targets};
use peft_lora::LoraConfig;
use peft_moe::{MixtureConfig, PillConfig, PolyConfig, RouterConfig};

use super::configure::{initial, only, targets};
use crate::settings::{Init, Settings};
use crate::{Error, Result};

/// Settings that all mixtures have.
const OF_ALL: [&str; 1] = ["num-experts"];
/// Settings of mixtures whose layers may differ.
const OF_LAYERS: [&str; 2] = ["experts-per-layer", "shared-experts"];
/// Settings of routers that look at their input.
pub(super) const OF_ROUTERS: [&str; 4] = ["top-k", "top-p", "balance", "z-loss"];
/// Settings of experts that are `LoRA`.
const OF_LORA: [&str; 3] = ["rank", "alpha", "dropout"];

/// `MoLoRA`; with `--top-k` the best alone.
pub(super) fn molora(settings: &Settings) -> Result<MixtureConfig<LoraConfig>> {
    lora(settings, "molora", &[&OF_LAYERS[..], &OF_ROUTERS].concat(), peft_moe::molora(targets(settings)?))
}

/// `LoRAMoE`, with a group of experts for each file of data, two at least.
pub(super) fn loramoe(settings: &Settings) -> Result<MixtureConfig<LoraConfig>> {
    let mut method = peft_moe::loramoe(targets(settings)?);
    method.balance.groups = settings.data.len().max(method.balance.groups);
    method.num_experts = method.num_experts.next_multiple_of(method.balance.groups);
    lora(settings, "loramoe", &OF_LAYERS, method)
}

/// `MOELoRA`, with a task for each file of data.
pub(super) fn moelora(settings: &Settings) -> Result<MixtureConfig<LoraConfig>> {
    lora(settings, "moelora", &[], peft_moe::moelora(targets(settings)?, settings.data.len().max(1)))
}

/// Poly, with a task for each file of data; its skills are the experts.
pub(super) fn poly(settings: &Settings) -> Result<PolyConfig> {
    only(settings, "poly", &["num-experts", "rank"])?;
    let init_weights = initial(settings, "poly", &[(Init::Kaiming, true), (Init::Random, false)])?;
    let plain = PolyConfig { init_weights, n_tasks: settings.data.len().max(1), ..PolyConfig::default() };
    let (n_skills, rank) = (settings.num_experts.unwrap_or(plain.n_skills), settings.rank.unwrap_or(plain.rank));
    Ok(PolyConfig { n_skills, rank, targets: targets(settings)?, ..plain })
}

/// `MoV`.
pub(super) fn mov(settings: &Settings) -> Result<MixtureConfig<Ia3Config>> {
    only(settings, "mov", &[&OF_ALL[..], &OF_LAYERS, &OF_ROUTERS].concat())?;
    routed(settings, "mov", peft_moe::mov(targets(settings)?))
}

/// PILL, of which text alone trains the part that is for text.
pub(super) fn pill(settings: &Settings) -> Result<PillConfig> {
    /// The inner width of the paper.
    const WIDTH: usize = 8;
    only(settings, "pill", &["adapter-dim"])?;
    initial(settings, "pill", &[(Init::Kaiming, ())])?;
    let (mut method, given) = (PillConfig::decoder(settings.adapter_dim.unwrap_or(WIDTH)), targets(settings)?);
    method.targets = Targets { target_modules: given.target_modules.or(method.targets.target_modules), ..given };
    Method::check(&method)?;
    Ok(method)
}

/// A mixture of `LoRA` in the sizes that are asked for.
pub(super) fn lora(
    settings: &Settings,
    name: &str,
    own: &[&str],
    mut method: MixtureConfig<LoraConfig>,
) -> Result<MixtureConfig<LoraConfig>> {
    only(settings, name, &[&OF_ALL[..], &OF_LORA, own].concat())?;
    let expert = &mut method.expert;
    // The scale stays the method's unless another one is asked for.
    let scale = expert.alpha / expert.rank as f64;
    expert.rank = settings.rank.unwrap_or(expert.rank);
    expert.alpha = settings.alpha.unwrap_or(scale * expert.rank as f64);
    if settings.dropout != 0.0 {
        expert.dropout = settings.dropout;
    }
    routed(settings, name, method)
}

fn routed<M: Method>(settings: &Settings, name: &str, mut method: MixtureConfig<M>) -> Result<MixtureConfig<M>>
where
    MixtureConfig<M>: Method,
{
    initial(settings, name, &[(Init::Kaiming, ())])?;
    method.num_experts = settings.num_experts.unwrap_or(method.num_experts);
    method.experts_per_layer.clone_from(&settings.experts_per_layer);
    method.num_shared = settings.shared_experts.unwrap_or(method.num_shared);
    method.router = match (settings.top_k, settings.top_p) {
        (Some(_), Some(_)) => return Err(Error::usage("--top-k and --top-p are both given", "give one of them")),
        (Some(k), None) => RouterConfig::TopK { k },
        (None, Some(p)) => RouterConfig::TopP { p },
        (None, None) => method.router,
    };
    method.balance.load = settings.balance.unwrap_or(method.balance.load);
    method.balance.z = settings.z_loss.unwrap_or(method.balance.z);
    Method::check(&method)?;
    Ok(method)
}
