//! What mixtures and PILL state of themselves, for the laws: here and in the comparison over all backends.

use peft_adapter::{BottleneckConfig, Ia3Config};
use peft_core::{Composable, LayerKind, Method, Modality, Result, Site, Targets};
use peft_lora::LoraConfig;
use peft_moe::{MixLoraConfig, MixtureConfig, PillConfig, PolyConfig, Projection, RouterConfig};
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
        .skip("file", "keys of shared experts have numbers, which a list of keys cannot have")
}

/// The laws of values for routers that choose in other ways than the best two.
pub(crate) fn other_routers() -> Vec<(&'static str, Laws<MixtureConfig<LoraConfig>>)> {
    let routers =
        [("soft", RouterConfig::Soft), ("top-p", RouterConfig::TopP { p: 0.7 }), ("switch", RouterConfig::Switch)];
    routers.map(|(name, router)| (name, lora_laws(MixtureConfig::new(expert(), 3, router)).brief())).into()
}

/// The laws for a mixture of vectors of (IA)³.
pub(crate) fn vectors() -> Laws<MixtureConfig<Ia3Config>> {
    let vectors = MixtureConfig::new(Ia3Config::new(Targets::modules(["up", "down"])), 3, RouterConfig::Soft);
    laws(vectors, |method, site| method.num_experts * site.d_out + router(method, site))
}

/// The laws for a mixture of bottlenecks.
pub(crate) fn bottlenecks() -> Laws<MixtureConfig<BottleneckConfig>> {
    let bottlenecks = MixtureConfig::new(BottleneckConfig::houlsby(4.0), 3, RouterConfig::TopK { k: 2 });
    let params = |method: &MixtureConfig<BottleneckConfig>, site: &Site| {
        method.num_experts * (2 * 16 * 4 + 4 + 16) + router(method, site)
    };
    laws(bottlenecks, params).skip("unaware", "a place is there for adapters alone")
}

/// The laws for the best two of three feed-forward parts, of the laws' model, which has no `up` of its own.
pub(crate) fn mixlora_laws() -> Laws<MixLoraConfig> {
    let expert = LoraConfig { targets: Targets::modules(["mlp"]), ..expert() };
    let mixture = MixtureConfig::new(expert, 3, RouterConfig::TopK { k: 2 });
    let method = MixLoraConfig { mixture, projections: vec![Projection::Gate, Projection::Down] };
    let params = |method: &MixLoraConfig, site: &Site| {
        let factors = 2 * method.mixture.expert.rank * (site.d_in + site.d_out);
        method.mixture.num_experts * (factors + site.d_in)
    };
    Laws::new(method, params, ("num_experts", 0.into()))
        .skip("unaware", "a place is there for adapters alone")
        .skip("identity", "gates sum to one but for their rounding")
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
    let (rank, factor) = (method.expert.rank, |part: &str, name: &str| layer.field(&format!("{part}.{name}")));
    let (a, b) = (factor("experts", "a")?, factor("experts", "b")?);
    let gates = gates(method, layer)?;
    let mut y = layer.base(&layer.x)?;
    for expert in 0..method.num_experts {
        let of_expert = expert * rank..(expert + 1) * rank;
        let down = a.values().chunks(a.columns()).flat_map(|row| row[of_expert.clone()].to_vec()).collect();
        let up = b.values()[expert * rank * b.columns()..][..rank * b.columns()].to_vec();
        let h = layer.x.times(&Matrix::new(a.rows(), rank, down)?)?;
        let update = h.times(&Matrix::new(rank, b.columns(), up)?)?.scale(scale);
        let rows = update.values().chunks(update.columns()).zip(&gates);
        let gated = rows.flat_map(|(row, gates)| row.iter().map(|value| gates[expert] * value)).collect();
        y = y.plus(&Matrix::new(update.rows(), update.columns(), gated)?)?;
    }
    (0..method.num_shared).try_fold(y, |y, shared| {
        let part = format!("shared.{shared}");
        y.plus(&layer.x.times(factor(&part, "a")?)?.times(factor(&part, "b")?)?.scale(scale))
    })
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
            RouterConfig::TopK { k } | RouterConfig::Arrow { k } => before(e).len() < k,
            RouterConfig::Switch => before(e).is_empty(),
            RouterConfig::TopP { p } => before(e).into_iter().sum::<f64>() < p,
        };
        let gates: Vec<f64> = (0..p.len()).map(|e| if open(e) { p[e] } else { 0.0 }).collect();
        let whole = match method.router {
            RouterConfig::TopK { .. } | RouterConfig::TopP { .. } | RouterConfig::Arrow { .. } => gates.iter().sum(),
            _ => 1.0,
        };
        gates.into_iter().map(|gate| gate / whole).collect()
    };
    Ok(logits.values().chunks(logits.columns()).map(row).collect())
}

/// Skills of rank two in the laws' model.
pub(crate) fn poly() -> PolyConfig {
    PolyConfig { rank: 2, ..PolyConfig::new(3, 2, Targets::modules(["up", "down"])) }
}

/// The laws for Poly.
pub(crate) fn poly_laws(method: PolyConfig) -> Laws<PolyConfig> {
    let params = |method: &PolyConfig, site: &Site| {
        let skills = method.n_skills * method.rank * (site.d_in + site.d_out);
        skills + method.n_tasks * method.n_splits * method.n_skills
    };
    Laws::new(method, params, ("n_skills", 0.into()))
        .with_reference(skilled)
        .skip("backend_gradients", "training samples gates, and each device draws them in its own way")
}

/// `x·W + b + x·A·B / rank` of the task of each row.
fn skilled(method: &PolyConfig, layer: &Layer<'_>) -> Result<Matrix> {
    let (a, b, logits) = (layer.field("a")?, layer.field("b")?, layer.field("logits")?);
    let (splits, skills, rank) = (method.n_splits, method.n_skills, method.rank);
    let (d_in, d_out) = (layer.x.columns(), layer.site.d_out);
    let (part_in, part_out) = (d_in / splits, d_out / splits);
    let mut update = Vec::new();
    for (row, x) in layer.x.values().chunks(d_in).enumerate() {
        let task = 1 - row / SEQ % 2;
        let open = |split: usize, skill: usize| {
            let z = logits.values()[(task * splits + split) * skills + skill];
            1.0 / (1.0 + (-z).exp())
        };
        let gate = |split: usize, skill: usize| open(split, skill) / (0..skills).map(|s| open(split, s)).sum::<f64>();
        let mixed = |factor: &Matrix, split: usize, within: usize, size: usize| -> f64 {
            (0..skills).map(|s| gate(split, s) * factor.values()[(split * skills + s) * size + within]).sum()
        };
        let inner = |k: usize| -> f64 {
            (0..d_in).map(|i| x[i] * mixed(a, i / part_in, i % part_in * rank + k, part_in * rank)).sum()
        };
        let inner: Vec<f64> = (0..rank).map(inner).collect();
        let value = |out: usize| -> f64 {
            let factor = |k: usize| mixed(b, out / part_out, k * part_out + out % part_out, rank * part_out);
            (0..rank).map(|k| inner[k] * factor(k)).sum()
        };
        update.extend((0..d_out).map(|out| value(out) / rank as f64));
    }
    layer.base(&layer.x)?.plus(&Matrix::new(layer.x.rows(), d_out, update)?)
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
