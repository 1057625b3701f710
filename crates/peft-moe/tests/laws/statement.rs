//! What mixtures and PILL state of themselves, for the laws: here and in the comparison over all backends.

use peft_core::{Composable, LayerKind, Method, Modality, Result, Site, Targets};
use peft_lora::LoraConfig;
use peft_moe::{MixtureConfig, PillConfig, RouterConfig};
use peft_testkit::{Laws, Layer, MODALITIES, Matrix};

/// `LoRA`s of rank two in the laws' model.
pub(crate) fn expert() -> LoraConfig {
    LoraConfig::new(2, Targets::modules(["up", "down"])).with_alpha(3.0)
}

/// The laws for a mixture of `LoRA`.
pub(crate) fn lora_laws(method: MixtureConfig<LoraConfig>) -> Laws<MixtureConfig<LoraConfig>> {
    laws(method, |method, site| {
        let experts = (method.num_experts + method.num_shared) * method.expert.rank * (site.d_in + site.d_out);
        experts + router(method, site)
    })
    .with_reference(mixed)
}

/// The laws for a mixture, given what it trains in a layer.
pub(crate) fn laws<M: Composable>(
    method: MixtureConfig<M>,
    params: fn(&MixtureConfig<M>, &Site) -> usize,
) -> Laws<MixtureConfig<M>> {
    Laws::new(method, params, ("num_experts", 0.into()))
        .skip("file", "keys of experts have numbers, which a list of keys cannot have")
}

/// Values of a router.
pub(crate) fn router<M: Method>(method: &MixtureConfig<M>, site: &Site) -> usize {
    match method.router {
        RouterConfig::Task { num_tasks, embedding_dim } => embedding_dim * (num_tasks + method.num_experts),
        _ => site.d_in * method.num_experts,
    }
}

/// Tokens of a row of the laws' batch, whose tasks are 1 and 0.
const SEQ: usize = 4;

/// `x·W + b + Σ gₑ·s·x·Aₑ·Bₑ`, and the shared experts.
fn mixed(method: &MixtureConfig<LoraConfig>, layer: &Layer<'_>) -> Result<Matrix> {
    let scale = method.expert.alpha / method.expert.rank as f64;
    let update = |part: &str| -> Result<Matrix> {
        let factor = |name: &str| layer.field(&format!("{part}.{name}"));
        Ok(layer.x.times(factor("a")?)?.times(factor("b")?)?.scale(scale))
    };
    let gates = gates(method, layer)?;
    let mut y = layer.base(&layer.x)?;
    for expert in 0..method.num_experts {
        let update = update(&format!("experts.{expert}"))?;
        let rows = update.values().chunks(update.columns()).zip(&gates);
        let gated = rows.flat_map(|(row, gates)| row.iter().map(|value| gates[expert] * value)).collect();
        y = y.plus(&Matrix::new(update.rows(), update.columns(), gated)?)?;
    }
    (0..method.num_shared).try_fold(y, |y, shared| y.plus(&update(&format!("shared.{shared}"))?))
}

/// The gates of each row.
fn gates(method: &MixtureConfig<LoraConfig>, layer: &Layer<'_>) -> Result<Vec<Vec<f64>>> {
    let weight = layer.field("router.weight")?;
    let logits = match layer.field("router.embeddings") {
        Ok(embeddings) => {
            let of_tasks = embeddings.times(weight)?;
            let width = of_tasks.columns();
            let of = |row: usize| &of_tasks.values()[(1 - row / SEQ % 2) * width..][..width];
            let rows: Vec<f64> = (0..layer.x.rows()).flat_map(|row| of(row).to_vec()).collect();
            Matrix::new(layer.x.rows(), width, rows)?
        }
        Err(_) => layer.x.times(weight)?,
    };
    let row = |z: &[f64]| {
        let powers: Vec<f64> = z.iter().map(|z| z.exp()).collect();
        let sum: f64 = powers.iter().sum();
        let p: Vec<f64> = powers.into_iter().map(|power| power / sum).collect();
        let before = |e: usize| p.iter().filter(|other| **other > p[e]).collect::<Vec<_>>();
        let open = |e: usize| match method.router {
            RouterConfig::Soft | RouterConfig::Task { .. } => true,
            RouterConfig::TopK { k } => before(e).len() < k,
            RouterConfig::Switch => before(e).is_empty(),
            RouterConfig::TopP { p } => before(e).into_iter().sum::<f64>() < p,
        };
        let gates: Vec<f64> = (0..p.len()).map(|e| if open(e) { p[e] } else { 0.0 }).collect();
        let whole = match method.router {
            RouterConfig::TopK { .. } | RouterConfig::TopP { .. } => gates.iter().sum(),
            _ => 1.0,
        };
        gates.into_iter().map(|gate| gate / whole).collect()
    };
    Ok(logits.values().chunks(logits.columns()).map(row).collect())
}

/// The laws for PILL: an expert for each modality behind the norm of the laws' model, and `down` for what makes values.
pub(crate) fn pill() -> Laws<PillConfig> {
    pill_laws(PillConfig::new(3, Targets::modules(["norm", "down"])).with_experts(["norm"]))
        .skip("identity", "a closed gate takes the values of images away")
}

/// The laws for PILL without gates, so that it starts as the identity; with one expert for both modalities, or one for each.
pub(crate) fn pill_without_gate(apart: bool) -> Laws<PillConfig> {
    let method = PillConfig::new(3, Targets::modules(["norm"])).without_gate();
    pill_laws(if apart { method.with_experts(["norm"]) } else { method })
}

fn pill_laws(method: PillConfig) -> Laws<PillConfig> {
    let params = |method: &PillConfig, site: &Site| {
        let expert = 3 * site.d_out * method.adapter_dim;
        match site.kind {
            LayerKind::Linear => 2 * site.d_in,
            _ if method.expert_modules.name("", &site.path).is_ok_and(|apart| apart) => 2 * expert,
            _ => expert,
        }
    };
    Laws::new(method, params, ("adapter_dim", 0.into())).with_reference(by_modality)
}

/// `y + (silu(y·G) ⊙ (y·D))·U` of the expert of each row's modality; values of images times `tanh(x·W)` of their head.
fn by_modality(_: &PillConfig, layer: &Layer<'_>) -> Result<Matrix> {
    let (y, tokens) = (layer.base(&layer.x)?, MODALITIES.concat());
    let rows = |matrix: &Matrix| matrix.values().chunks(matrix.columns()).map(<[f64]>::to_vec).collect::<Vec<_>>();
    if layer.site.kind == LayerKind::Linear {
        let open = layer.x.times(layer.field("opening")?)?.map(f64::tanh);
        let opened = rows(&y).into_iter().zip(rows(&open)).zip(tokens).flat_map(|((values, open), token)| {
            let width = values.len() / open.len();
            let factor = move |at: usize| if token == Modality::Image { open[at / width] } else { 1.0 };
            values.into_iter().enumerate().map(move |(at, value)| value * factor(at)).collect::<Vec<_>>()
        });
        return Matrix::new(y.rows(), y.columns(), opened.collect());
    }
    let expert = |name: &str| -> Result<Vec<Vec<f64>>> {
        let through = |field: &str| y.times(layer.field(&format!("{name}.{field}"))?);
        let inner = through("gate")?.map(|z| z / (1.0 + (-z).exp())).scale_by(&through("down")?)?;
        Ok(rows(&y.plus(&inner.times(layer.field(&format!("{name}.up"))?)?)?))
    };
    let [text, image] = match expert("shared") {
        Ok(shared) => [shared.clone(), shared],
        Err(_) => [expert("text")?, expert("image")?],
    };
    let chosen = tokens.iter().enumerate().flat_map(|(row, token)| match token {
        Modality::Text => text[row].clone(),
        Modality::Image => image[row].clone(),
    });
    Matrix::new(y.rows(), y.columns(), chosen.collect())
}
