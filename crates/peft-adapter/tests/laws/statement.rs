//! What the methods state of themselves, for the laws: here and in the comparison over all backends.

use peft_adapter::{BitFitConfig, BottleneckConfig, Ia3Config, LnTuningConfig, Scaling, SsfConfig};
use peft_core::{LayerKind, Names, Result, Site, Targets};
use peft_testkit::{Laws, Layer, Matrix};

/// What no field accepts as a regular expression.
const NO_PATTERN: &str = "(";

/// (IA)³ on the output of `up` and the input of `down`.
pub(crate) fn ia3() -> Ia3Config {
    let feedforward_modules = Names::Pattern("down".to_owned());
    Ia3Config { feedforward_modules, ..Ia3Config::new(Targets::modules(["up", "down"])) }
}

/// (IA)³ on both layers, with a gate.
pub(crate) fn gated_ia3() -> Laws<Ia3Config> {
    let gated = Ia3Config { use_gating: true, ..Ia3Config::new(Targets::modules(["up", "down"])) };
    ia3_laws(gated).skip("identity", "a gate starts near one half")
}

/// The laws for a configuration of (IA)³.
pub(crate) fn ia3_laws(method: Ia3Config) -> Laws<Ia3Config> {
    Laws::new(method, params, ("feedforward_modules", NO_PATTERN.into())).with_reference(infused)
}

/// `d_in` in feed-forward modules, `d_out` in all others; a gate has `d_in + 1`.
fn params(method: &Ia3Config, site: &Site) -> usize {
    let factors = if matches!(method.is_feedforward(&site.path), Ok(true)) { site.d_in } else { site.d_out };
    factors + if method.use_gating { site.d_in + 1 } else { 0 }
}

/// `l ⊙ (x·W + b)` or `(l ⊙ x)·W + b`.
fn infused(method: &Ia3Config, layer: &Layer<'_>) -> Result<Matrix> {
    let l = Matrix::new(1, layer.field("l")?.values().len(), layer.field("l")?.values().to_vec())?;
    if method.is_feedforward(&layer.site.path)? {
        layer.base(&layer.x.scale_by(&l)?)
    } else {
        let y = layer.base(&layer.x)?.scale_by(&l)?;
        if method.use_gating { layer.gated(&y) } else { Ok(y) }
    }
}

/// SSF behind the layers with a bias, which are those that it can be merged into.
pub(crate) fn ssf() -> SsfConfig {
    SsfConfig::new(Targets::modules(["up", "norm"]))
}

/// The laws for a configuration of SSF.
pub(crate) fn ssf_laws(method: SsfConfig) -> Laws<SsfConfig> {
    Laws::new(method, |_, site| 2 * site.d_out, ("target_modules", NO_PATTERN.into()))
        .with_reference(|_, layer| layer.base(&layer.x)?.scale_by(layer.field("scale")?)?.plus(layer.field("shift")?))
}

/// The laws for LN tuning.
pub(crate) fn ln_tuning_laws() -> Laws<LnTuningConfig> {
    let method = LnTuningConfig::new(Targets::modules(["norm"]));
    Laws::new(method, |_, site| 2 * site.d_out, ("target_modules", NO_PATTERN.into())).with_reference(|_, layer| {
        let (weight, bias) = (layer.field("weight")?.clone(), Some(layer.field("bias")?.clone()));
        Layer { weight, bias, ..layer.clone() }.base(&layer.x)
    })
}

/// BitFit of every bias.
pub(crate) fn bitfit() -> BitFitConfig {
    BitFitConfig::new(Targets::modules(["up", "norm"]))
}

/// The laws for a configuration of BitFit.
pub(crate) fn bitfit_laws(method: BitFitConfig) -> Laws<BitFitConfig> {
    Laws::new(method, |_, site| site.d_out, ("target_modules", NO_PATTERN.into()))
        .with_reference(|_, layer| layer.base(&layer.x)?.plus(layer.field("bias")?))
}

/// The laws for a bottleneck of four in the laws' model.
pub(crate) fn bottleneck_laws(method: BottleneckConfig) -> Laws<BottleneckConfig> {
    Laws::new(method, bottleneck_params, ("reduction_factor", 0.0.into()))
        .skip("unaware", "a place is there for adapters alone")
}

/// Of a model of 16 features and a bottleneck of 4.
pub(crate) fn bottleneck_params(config: &BottleneckConfig, site: &Site) -> usize {
    let (width, inner) = (site.d_out, 4);
    if site.kind == LayerKind::Embedded {
        let (half, inner) = (width / 2, (width as f64 / 2.0 / config.inv_adapter_reduction_factor) as usize);
        return 4 * half * inner + 2 * inner + width;
    }
    let projections = if config.phm_layer {
        let (n, rank) = (config.phm_dim, config.phm_rank);
        2 * (n * n * n + rank * (width + inner)) + inner + width
    } else {
        2 * width * inner + inner + width
    };
    let norms = 2 * width * (usize::from(config.ln_before) + usize::from(config.ln_after));
    let scale = match config.scaling {
        Scaling::Constant(_) => 0,
        Scaling::Learned => 1,
        Scaling::Channel => width,
    };
    projections + norms + scale + if config.use_gating { width + 1 } else { 0 }
}
