//! What LoRA states of itself, for the laws: here and in the comparison over all backends.

use peft_core::{Result, Site, Targets};
use peft_lora::LoraConfig;
use peft_testkit::{Laws, Layer, Matrix};

/// LoRA of rank 4 and scale 2 on all layers of the laws' model.
pub(crate) fn lora() -> LoraConfig {
    LoraConfig::new(4, Targets::modules(["embed", "up", "down"])).with_alpha(8.0)
}

/// The laws for a LoRA configuration.
pub(crate) fn laws(method: LoraConfig) -> Laws<LoraConfig> {
    Laws::new(method, params, ("r", 0.into())).with_reference(output)
}

/// LoRA on linear layers, with a gate in place of its scale.
pub(crate) fn gated() -> Laws<LoraConfig> {
    laws(LoraConfig { use_gating: true, targets: Targets::modules(["up", "down"]), ..lora() })
}

/// `rank · (d_in + d_out)`, `d_out` with a bias, and `d_in + 1` with a gate.
fn params(method: &LoraConfig, site: &Site) -> usize {
    let rank = method.rank_pattern.get(&site.path).copied().unwrap_or(method.rank);
    let bias = if method.lora_bias { site.d_out } else { 0 };
    rank * (site.d_in + site.d_out) + bias + if method.use_gating { site.d_in + 1 } else { 0 }
}

/// `x·W + b + s·(x·A·B + β)`.
fn output(method: &LoraConfig, layer: &Layer<'_>) -> Result<Matrix> {
    let path = &layer.site.path;
    let rank = *method.rank_pattern.get(path).unwrap_or(&method.rank) as f64;
    let alpha = method.alpha_pattern.get(path).unwrap_or(&method.alpha);
    let scale = alpha / if method.use_rslora { rank.sqrt() } else { rank };
    let mut update = layer.x.times(layer.field("a")?)?.times(layer.field("b")?)?;
    if method.lora_bias {
        update = update.plus(layer.field("bias")?)?;
    }
    let update = if method.use_gating { layer.gated(&update)? } else { update.scale(scale) };
    layer.base(&layer.x)?.plus(&update)
}
