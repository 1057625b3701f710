//! Methods as the settings of `peft train` ask for them.

use indexmap::IndexMap;
use peft_adapter::{BitFitConfig, BottleneckConfig, Ia3Config, InitSsf, LnTuningConfig, SsfConfig};
use peft_core::{Names, OneOrMany, Targets};
use peft_lora::LoraConfig;

use crate::rows::assignments;
use crate::settings::{Init, Settings};
use crate::{Error, Result};

/// A flag that (IA)³ alone has.
const FEEDFORWARD: &str = "feedforward";

/// Rank of `LoRA`, where nothing is said.
const RANK: usize = 8;

/// Width of the model over width of a bottleneck, where nothing is said.
const FACTOR: f64 = 16.0;

/// A flag that bottlenecks alone have.
const REDUCTION: &str = "reduction-factor";

/// Another.
const INVERTIBLE: &str = "inv-adapter";

/// Methods with a prefix in blocks.
const OF_PREFIXES: [&str; 2] = ["prefix", "p-tuning-v2"];

/// Flags that `LoRA` alone has.
const OF_LORA: [&str; 9] = [
    "target-parameters",
    "rank",
    "alpha",
    "dropout",
    "rslora",
    "lora-bias",
    "rank-pattern",
    "alpha-pattern",
    "lora-plus",
];

/// `LoRA`.
pub(super) fn lora(settings: &Settings) -> Result<LoraConfig> {
    only(settings, "lora", &OF_LORA)?;
    let rank = settings.rank.unwrap_or(RANK);
    Ok(LoraConfig {
        rank,
        alpha: settings.alpha.unwrap_or(rank as f64),
        dropout: settings.dropout,
        use_rslora: settings.rslora,
        lora_bias: settings.lora_bias,
        init_lora_weights: settings.init.into(),
        rank_pattern: pattern("rank-pattern", &settings.rank_pattern)?,
        alpha_pattern: pattern("alpha-pattern", &settings.alpha_pattern)?,
        targets: match &settings.target_parameters[..] {
            [] => targets(settings)?,
            names => targets(settings)?.with_parameters(names),
        },
        ..LoraConfig::default()
    })
}

/// (IA)³.
pub(super) fn ia3(settings: &Settings) -> Result<Ia3Config> {
    only(settings, "ia3", &[FEEDFORWARD])?;
    let init_ia3_weights = initial(settings, "ia3", &[(Init::Kaiming, true), (Init::Random, false)])?;
    let ia3 = Ia3Config { init_ia3_weights, ..Ia3Config::new(targets(settings)?) };
    Ok(ia3.with_feedforward(settings.feedforward.iter().cloned()))
}

/// SSF.
pub(super) fn ssf(settings: &Settings) -> Result<SsfConfig> {
    only(settings, "ssf", &[])?;
    let start = initial(settings, "ssf", &[(Init::Kaiming, InitSsf::Identity), (Init::Gaussian, InitSsf::Paper)])?;
    Ok(SsfConfig::new(targets(settings)?).with_init(start))
}

/// LN tuning.
pub(super) fn ln_tuning(settings: &Settings) -> Result<LnTuningConfig> {
    only(settings, "ln-tuning", &[])?;
    initial(settings, "ln-tuning", &[(Init::Kaiming, ())])?;
    Ok(LnTuningConfig::new(targets(settings)?))
}

/// `BitFit`.
pub(super) fn bitfit(settings: &Settings) -> Result<BitFitConfig> {
    only(settings, "bitfit", &[])?;
    let init_weights = initial(settings, "bitfit", &[(Init::Kaiming, true), (Init::Random, false)])?;
    Ok(BitFitConfig { init_weights, ..BitFitConfig::new(targets(settings)?) })
}

/// Bottlenecks, in the places of `preset`.
pub(super) fn bottleneck(
    settings: &Settings,
    method: &str,
    preset: impl Fn(f64) -> BottleneckConfig,
) -> Result<BottleneckConfig> {
    only(settings, method, &[REDUCTION, INVERTIBLE, "dropout"])?;
    initial(settings, method, &[(Init::Kaiming, ())])?;
    let mut config = preset(settings.reduction_factor.unwrap_or(FACTOR));
    if let Some(factor) = settings.inv_adapter {
        config = config.with_inv_adapter(factor);
    }
    config.dropout = settings.dropout;
    let given = targets(settings)?;
    config.targets = Targets { target_modules: given.target_modules.or(config.targets.target_modules), ..given };
    Ok(config)
}

/// What `--init` means for a method.
pub(super) fn initial<T: Copy>(settings: &Settings, method: &str, meanings: &[(Init, T)]) -> Result<T> {
    let found = meanings.iter().find(|(init, _)| *init == settings.init);
    found.map(|(_, meaning)| *meaning).ok_or_else(|| {
        let what = format!("--init {}: {method} has no such initial values", Init::name(settings.init));
        let known: Vec<_> = meanings.iter().map(|(init, _)| Init::name(*init)).collect();
        Error::usage(what, format!("one of {}", known.join(", ")))
    })
}

/// Refuses settings of other methods, which would change nothing here.
pub(super) fn only(settings: &Settings, method: &str, own: &[&str]) -> Result<()> {
    let given = [
        ("rank", settings.rank.is_some()),
        ("alpha", settings.alpha.is_some()),
        ("dropout", settings.dropout != 0.0),
        ("rslora", settings.rslora),
        ("lora-bias", settings.lora_bias),
        ("rank-pattern", !settings.rank_pattern.is_empty()),
        ("alpha-pattern", !settings.alpha_pattern.is_empty()),
        ("lora-plus", settings.lora_plus != 1.0),
        ("num-experts", settings.num_experts.is_some()),
        ("experts", !settings.experts.is_empty()),
        ("layerwise-scalings", settings.layerwise_scalings),
        ("top-k", settings.top_k.is_some()),
        ("top-p", settings.top_p.is_some()),
        ("experts-per-layer", !settings.experts_per_layer.is_empty()),
        ("shared-experts", settings.shared_experts.is_some()),
        ("z-loss", settings.z_loss.is_some()),
        ("balance", settings.balance.is_some()),
        ("target-parameters", !settings.target_parameters.is_empty()),
        (FEEDFORWARD, !settings.feedforward.is_empty()),
        (REDUCTION, settings.reduction_factor.is_some()),
        ("adapter-dim", settings.adapter_dim.is_some()),
        (INVERTIBLE, settings.inv_adapter.is_some()),
        ("num-virtual-tokens", settings.num_virtual_tokens.is_some()),
        ("adapter-layers", settings.adapter_layers.is_some()),
        ("prompt-text", settings.prompt_text.is_some()),
        ("prompt-labels", !settings.prompt_labels.is_empty()),
        ("num-ranks", settings.num_ranks.is_some()),
        ("placeholder", settings.placeholder.is_some()),
        ("input-conditioned", settings.input_conditioned),
        ("prefix-projection", settings.prefix_projection),
        ("encoder", settings.encoder.is_some()),
        ("encoder-hidden-size", settings.encoder_hidden_size.is_some()),
        ("encoder-num-layers", settings.encoder_num_layers.is_some()),
    ];
    match given.iter().find(|(flag, given)| *given && !own.contains(flag)) {
        Some((flag, _)) => Err(Error::usage(format!("--{flag}: {method} has no such setting"), "leave it out")),
        None => Ok(()),
    }
}

/// Refuses settings that choose layers, for what adapts none.
pub(super) fn refuse_targets(settings: &Settings, method: &str) -> Result<()> {
    let given = [
        ("targets", !settings.targets.is_empty()),
        ("target-regex", settings.target_regex.is_some()),
        ("exclude", !settings.exclude.is_empty()),
        // A prefix is in blocks, and may be in some.
        ("layers", !settings.layers.is_empty() && !OF_PREFIXES.contains(&method)),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(Error::usage(format!("--{flag}: {method} adapts no layers"), "leave it out")),
        None => Ok(()),
    }
}

fn pattern<T: std::str::FromStr>(flag: &str, pairs: &[String]) -> Result<IndexMap<String, T>> {
    let parse = |(name, value): (&str, &str)| {
        let bad = |_| {
            Error::usage(
                format!("--{flag} {name}={value}: {value} is not a number that fits"),
                format!("--{flag} {name}=16"),
            )
        };
        Ok((name.to_owned(), value.parse().map_err(bad)?))
    };
    assignments(flag, pairs)?.into_iter().map(parse).collect()
}

pub(super) fn targets(settings: &Settings) -> Result<Targets> {
    let target_modules = match (&settings.targets[..], &settings.target_regex) {
        ([_, ..], Some(_)) => {
            return Err(Error::usage("--targets and --target-regex are both given", "give one of them"));
        }
        (_, Some(regex)) => Some(Names::Pattern(regex.clone())),
        ([all], None) if all.eq_ignore_ascii_case("all-linear") => Some(Names::Pattern(all.clone())),
        ([], None) => None,
        (list, None) => Some(Names::List(list.to_vec())),
    };
    let list = |names: &[String]| (!names.is_empty()).then(|| names.to_vec());
    Ok(Targets {
        target_modules,
        target_parameters: None,
        exclude_modules: list(&settings.exclude).map(Names::List),
        layers_to_transform: (!settings.layers.is_empty()).then(|| OneOrMany::Many(settings.layers.clone())),
        layers_pattern: None,
        modules_to_save: list(&settings.modules_to_save),
        bias: settings.bias,
    })
}
