//! PILL: experts for text and for images, and a gate through which a decoder's text reads images.
//!
//! - formula: behind a norm `x + A(x)`, `A(x) = (silu(x·G) ⊙ (x·D))·U`, `G, D: [width, adapter_dim]`, `U: [adapter_dim, width]`; behind the norms of feed-forward parts (`expert_modules`) one `A` for text tokens
//!   and one for image tokens, behind those of attention one for both. The values of an image token, `x·V + b`, are multiplied head by head by `tanh(x·W)`, `W: [width, kv_heads]`. Features `f` of images come in as
//!   `f·P` in the places of image tokens, `P: [d_features, width]`, or with a hidden layer as `gelu(f·H + h)·P`
//! - source: Zhang et al. 2023, arXiv:2311.02126, section 3 ("PILL: Plug Into LLM with Adapter Expert and Attention Gate"), and its authors' code. Overviews also spell the acronym out as "Pluggable Instruction
//!   Language Learning"; no paper of that name is known
//! - trained: `3 · width · adapter_dim` values an expert, `width · kv_heads` a gate, and the projector's
//! - at init: `U` and `W` are zero. On text alone the model is the base, bit for bit; of images it reads nothing, but their keys take their part of the attention. Without gates
//!   (`gate: false`, as the authors train first) it is the base on the same embeddings
//!
//! What each token is [`for_modalities`](peft_core::for_modalities) says; without it all are text. The file is in PEFT's layout with keys of its own, each behind the path of its layer, matrices `[d_out, d_in]`:
//! `pill_shared.*`, `pill_text.*` and `pill_image.*` (`gate_proj.weight`, `down_proj.weight`, `up_proj.weight`) at norms, `pill_gate.weight` at the projection of values, and at the model's `prompts`
//! `pill_projector.weight`, `pill_projector.hidden.weight` and `.bias`.

mod parts;

use burn::module::{Module, Reparameterization};
use burn::tensor::{Tensor, TensorData};
use peft_core::{
    Activation, Base, Error, FileTensor, LayerKind, Method, Modality, Names, Places, Problem, Prompt, Reading, Result,
    Scan, Site, Targets, by_modality, modalities, select,
};
use serde::{Deserialize, Serialize};

pub use self::parts::{Expert, Projector, ValueGate};

/// Configuration of PILL.
///
/// ```
/// use burn::{module::Module, nn::{Linear, LinearConfig, RmsNorm, RmsNormConfig}, tensor::{Device, Tensor}};
/// use peft_core::{AdapterAware, Modalities, Modality::{Image, Text}, Peft, Targets, for_modalities, rms_norm};
/// use peft_moe::PillConfig;
///
/// #[derive(Module, Debug)]
/// struct Model { mlp_norm: RmsNorm, aware: AdapterAware }
///
/// let device = Device::flex().autodiff();
/// let model = Model { mlp_norm: RmsNormConfig::new(16).init(&device), aware: AdapterAware };
/// let pill = PillConfig::new(8, Targets::modules(["mlp_norm"])).with_experts(["mlp_norm"]).without_gate();
/// let model = model.attach(&pill)?;
/// assert_eq!(model.trainable().trainable, 2 * 3 * 16 * 8);
/// let batch = Modalities::new(vec![vec![Image, Image, Text]]);
/// let y = for_modalities(batch, || rms_norm(&model.mlp_norm, Tensor::<3>::ones([1, 3, 16], &device)));
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PillConfig {
    /// Width inside an expert.
    pub adapter_dim: usize,
    /// Norms behind which each modality has an expert of its own; behind other norms both have the same.
    pub expert_modules: Names,
    /// Whether the values of image tokens go through gates. Without them linear layers are left alone.
    #[serde(default = "yes")]
    pub gate: bool,
    /// What comes in from a model of images; nothing for a model that reads text alone, or whose tokens stand for parts of images as they are.
    #[serde(default)]
    pub features: Option<FeatureConfig>,
    /// Which layers: norms, and the projections of values.
    #[serde(flatten)]
    pub targets: Targets,
}

/// What a projector makes embeddings of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureConfig {
    /// Width of a feature.
    pub width: usize,
    /// Width of the layer between; a matrix alone without it.
    #[serde(default)]
    pub hidden: Option<usize>,
}

fn yes() -> bool {
    true
}

impl PillConfig {
    /// Experts of that inner width behind the norms among the targets, and gates on the linear layers among them.
    pub fn new(adapter_dim: usize, targets: Targets) -> Self {
        Self { adapter_dim, expert_modules: Names::List(Vec::new()), gate: true, features: None, targets }
    }

    /// The paper's places in decoders, by the names that Llama's family or GPT-2 has in `transformers`; its inner width is 8.
    pub fn decoder(adapter_dim: usize) -> Self {
        let targets = ["input_layernorm", "post_attention_layernorm", "v_proj", "ln_1", "ln_2", "c_attn"];
        Self::new(adapter_dim, Targets::modules(targets)).with_experts(["post_attention_layernorm", "ln_2"])
    }

    /// Sets the norms behind which each modality has an expert of its own.
    #[must_use]
    pub fn with_experts<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        Self { expert_modules: Names::List(names.into_iter().map(Into::into).collect()), ..self }
    }

    /// Sets what features come in.
    #[must_use]
    pub fn with_features(self, features: FeatureConfig) -> Self {
        Self { features: Some(features), ..self }
    }

    /// Lets the text read images from the start.
    #[must_use]
    pub fn without_gate(self) -> Self {
        Self { gate: false, ..self }
    }

    /// Whether each modality has an expert of its own at that path.
    fn tells_apart(&self, path: &str) -> Result<bool> {
        self.expert_modules.name("expert_modules", path)
    }
}

/// State of [`PillConfig`] in one place.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one a place; a box would not be a Burn module")]
pub enum PillAdapter {
    /// Behind a norm, for both modalities.
    Shared(Shared),
    /// Behind a norm, one for each.
    Experts(Experts),
    /// On values.
    Gate(ValueGate),
    /// In front of the model.
    Projector(Projector),
}

/// One expert for all tokens.
#[derive(Module, Debug)]
pub struct Shared {
    shared: Expert,
}

/// An expert for each modality.
#[derive(Module, Debug)]
pub struct Experts {
    text: Expert,
    image: Expert,
}

const WITHOUT_FEATURES: &[LayerKind] =
    &[LayerKind::LayerNorm, LayerKind::RmsNorm, LayerKind::Linear, LayerKind::Conv1D];
const WITH_FEATURES: &[LayerKind] =
    &[LayerKind::LayerNorm, LayerKind::RmsNorm, LayerKind::Linear, LayerKind::Conv1D, LayerKind::Prompts];

const BY_TOKEN: &str = "what a token goes through hangs on its modality";

impl Method for PillConfig {
    const PEFT_TYPE: &'static str = "PILL";
    type Adapter = PillAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        self.tells_apart("")?;
        let features = self.features.map(|features| [features.width, features.hidden.unwrap_or(features.width)]);
        for (field, values) in [("adapter_dim", [self.adapter_dim; 2]), ("features", features.unwrap_or([1; 2]))] {
            if values.contains(&0) {
                return Err(Error::config(field, "widths of at least 1", 0));
            }
        }
        Ok(())
    }

    fn kinds(&self) -> &'static [LayerKind] {
        if self.features.is_some() { WITH_FEATURES } else { WITHOUT_FEATURES }
    }

    fn select<'a>(&self, found: &'a Scan) -> Result<Vec<&'a Site>> {
        let mut sites = select(found, self)?;
        sites.retain(|site| self.gate || !site.kind.multiplies());
        let missing = |there: bool, what: &str| {
            let what = format!("matches no {what}");
            (!there).then(|| Problem::Other { path: self.targets.to_string(), what })
        };
        let any = |holds: fn(&LayerKind) -> bool| sites.iter().any(|site| holds(&site.kind));
        let norm = any(|kind| matches!(kind, LayerKind::LayerNorm | LayerKind::RmsNorm));
        let place = any(|kind| *kind == LayerKind::Prompts);
        let problems: Vec<Problem> = [
            missing(norm, "norm, behind which an expert stands"),
            missing(
                !self.gate || any(|kind| kind.multiplies()),
                "linear layer that makes values; or set `gate` to false",
            ),
            missing(
                self.features.is_none() || place,
                "place for features: a field of type `peft_core::Prompts` that the model enters",
            ),
        ]
        .into_iter()
        .flatten()
        .collect();
        if problems.is_empty() { Ok(sites) } else { Err(Error::Attach { method: Self::PEFT_TYPE, problems }) }
    }

    fn init(&self, site: &Site, seed: u64) -> Result<PillAdapter> {
        let rng = &mut site.rng(seed);
        let mut expert = || Expert::new(site, self.adapter_dim, rng);
        Ok(match (site.kind, self.features) {
            (LayerKind::Prompts, Some(features)) => PillAdapter::Projector(Projector::new(features, site, rng)?),
            (kind, _) if kind.multiplies() => PillAdapter::Gate(ValueGate::new(site)?),
            _ if self.tells_apart(&site.path)? => PillAdapter::Experts(Experts { text: expert()?, image: expert()? }),
            _ => PillAdapter::Shared(Shared { shared: expert()? }),
        })
    }

    fn tensors(kind: LayerKind) -> &'static [FileTensor] {
        const fn matrix(field: &'static str, key: &'static str) -> FileTensor {
            FileTensor { field, key, transposed: true }
        }
        match kind {
            LayerKind::Prompts => {
                &const {
                    [
                        matrix("projection", "pill_projector.weight"),
                        matrix("hidden.weight", "pill_projector.hidden.weight"),
                        FileTensor { field: "hidden.bias", key: "pill_projector.hidden.bias", transposed: false },
                    ]
                }
            }
            LayerKind::LayerNorm | LayerKind::RmsNorm => {
                &const {
                    [
                        matrix("shared.gate", "pill_shared.gate_proj.weight"),
                        matrix("shared.down", "pill_shared.down_proj.weight"),
                        matrix("shared.up", "pill_shared.up_proj.weight"),
                        matrix("text.gate", "pill_text.gate_proj.weight"),
                        matrix("text.down", "pill_text.down_proj.weight"),
                        matrix("text.up", "pill_text.up_proj.weight"),
                        matrix("image.gate", "pill_image.gate_proj.weight"),
                        matrix("image.down", "pill_image.down_proj.weight"),
                        matrix("image.up", "pill_image.up_proj.weight"),
                    ]
                }
            }
            _ => &const { [matrix("opening", "pill_gate.weight")] },
        }
    }

    fn activation(adapter: &PillAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, _site: &Site) -> Option<String> {
        Some(BY_TOKEN.to_owned())
    }

    fn unmergeable(&self, _site: &Site) -> Option<String> {
        Some(BY_TOKEN.to_owned())
    }
}

/// The weight form: there is none, and what it would change is not read.
impl Reparameterization for PillAdapter {
    const NAME: &'static str = "pill";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for PillAdapter {
    fn normed(&self, y: Tensor<3>) -> Tensor<3> {
        let [batch, seq, width] = y.dims();
        let rows: Tensor<2> = y.clone().reshape([batch * seq, width]);
        match self {
            Self::Shared(Shared { shared }) => shared.forward(rows),
            Self::Experts(Experts { text, image }) => {
                by_modality([batch, seq], rows, |modality, rows| match modality {
                    Modality::Text => text.forward(rows),
                    Modality::Image => image.forward(rows),
                })
            }
            Self::Gate(_) | Self::Projector(_) => return y,
        }
        .reshape([batch, seq, width])
    }

    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        let y = base.linear(x.clone());
        let images = modalities(base.leading()).is_some_and(|batch| batch.has_images());
        Some(match self {
            Self::Gate(gate) if images => gate.forward(x, y, base.leading()),
            _ => y,
        })
    }

    fn prompt(&self, reading: &Reading<'_>) -> Prompt {
        let [batch, seq, _] = reading.x.dims();
        let (Self::Projector(projector), Some(tokens)) = (self, modalities([batch, seq])) else {
            return Prompt::default();
        };
        let Some(features) = tokens.features() else { return Prompt::default() };
        let here: Vec<bool> = tokens.tokens().map(|token| token == Modality::Image).collect();
        let here = Tensor::from_data(TensorData::new(here, [batch, seq]), &reading.x.device());
        let tokens = Some(projector.forward(features));
        Prompt { tokens, places: Places::Marked(here), ..Prompt::default() }
    }
}
