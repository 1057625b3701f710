//! LoRA: a low-rank sum on frozen weights. Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
//!
//! - formula: `y = x·W + b + s·(dropout(x)·A·B + β)`, `A: [d_in, rank]`, `B: [rank, d_out]`
//! - scale: `s = alpha / rank`, or `alpha / √rank` with rsLoRA
//! - trained: `rank · (d_in + d_out)` values a weight, `d_out` more with `lora_bias`
//! - with `use_gating`: `s` is one number for each row of a batch, [`Gate`]; `d_in + 1` values more
//! - on the layers of several experts: each expert has factors of its own (`grouped.rs`)
//! - at init: identity, since `B = 0` (for embeddings `A = 0`), unless `init_lora_weights` is `false`

use std::collections::BTreeMap;

use burn::module::{Module, Param, Reparameterization};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Int, Tensor};
use indexmap::IndexMap;
use peft_core::files::{HubFolder, Values};
use peft_core::{
    Activation, AdapterFile, Base, Error, FileTensor, Gate, GroupedBase, LayerKind, Method, Result, Scan, Site,
    Targets, check_size, pattern_value, product,
};
use serde::{Deserialize, Serialize};

use crate::{InitWeights, grouped, hub, per_expert, unbuilt};

/// Configuration of LoRA; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
/// use peft_core::{Peft, Targets, linear};
/// use peft_lora::LoraConfig;
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model { proj: burn::nn::Linear }
///
/// let device = Device::flex().autodiff();
/// let model = Model { proj: LinearConfig::new(16, 16).init(&device) };
/// let lora = LoraConfig::new(4, Targets::modules(["proj"])).with_alpha(8.0);
/// let model = model.attach(&lora)?;
/// assert_eq!(model.trainable().trainable, 4 * (16 + 16));
/// let y = linear(&model.proj, Tensor::<2>::ones([1, 16], &device));
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Rank of the update.
    #[serde(rename = "r")]
    pub rank: usize,
    /// Numerator of the scale.
    #[serde(rename = "lora_alpha")]
    pub alpha: f64,
    /// Probability that an input of `A` is dropped during training.
    #[serde(rename = "lora_dropout")]
    pub dropout: f64,
    /// Scale by `alpha / √rank`.
    pub use_rslora: bool,
    /// Train a bias next to `B`.
    pub lora_bias: bool,
    /// A gate in place of the scale, as in AdapterHub's library; PEFT has no such field.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub use_gating: bool,
    /// Initial values of `A` and `B`.
    pub init_lora_weights: InitWeights,
    /// Other ranks for modules that a name or regular expression matches; the first entry that matches counts.
    pub rank_pattern: IndexMap<String, usize>,
    /// Other alphas, by the same rule.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Whether the file's base weights are `[d_in, d_out]`, as GPT-2's. Written for Hugging Face; here the layer itself knows.
    pub fan_in_fan_out: bool,
    /// Which layers.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            dropout: 0.0,
            use_rslora: false,
            lora_bias: false,
            use_gating: false,
            init_lora_weights: InitWeights::Kaiming,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            fan_in_fan_out: false,
            targets: Targets::default(),
        }
    }
}

impl LoraConfig {
    /// LoRA of rank `rank` on `targets`, with `alpha = rank`, that is a scale of one.
    pub fn new(rank: usize, targets: Targets) -> Self {
        Self { rank, alpha: rank as f64, targets, ..Self::default() }
    }

    /// Sets the numerator of the scale.
    #[must_use]
    pub fn with_alpha(self, alpha: f64) -> Self {
        Self { alpha, ..self }
    }

    /// Sets the dropout on the adapter's input.
    #[must_use]
    pub fn with_dropout(self, dropout: f64) -> Self {
        Self { dropout, ..self }
    }

    /// Sets the initial values.
    #[must_use]
    pub fn with_init(self, init_lora_weights: InitWeights) -> Self {
        Self { init_lora_weights, ..self }
    }

    /// The rank of the module `path`, which patterns name as the parameter that it is where `target_parameters` does.
    ///
    /// # Errors
    /// When an entry of `rank_pattern` is no regular expression.
    pub fn rank_of(&self, path: &str) -> Result<usize> {
        Ok(*pattern_value("rank_pattern", &self.rank_pattern, &self.targets.name_of(path))?.unwrap_or(&self.rank))
    }

    /// The scale of the module `path`.
    ///
    /// # Errors
    /// When an entry of `rank_pattern` or `alpha_pattern` is no regular expression.
    pub fn scale_of(&self, path: &str) -> Result<f64> {
        let alpha = pattern_value("alpha_pattern", &self.alpha_pattern, &self.targets.name_of(path))?;
        let (alpha, rank) = (alpha.unwrap_or(&self.alpha), self.rank_of(path)? as f64);
        Ok(if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank })
    }
}

/// Why a gate is no part of a weight.
const GATED: &str = "a gate weighs the update row by row";

/// State of [`LoraConfig`] in one weight.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    /// `[d_in, rank]`; of several experts `[experts · rank, d_in]`.
    pub a: Param<Tensor<2>>,
    /// `[rank, d_out]`; of several experts `[experts · d_out, rank]`.
    pub b: Param<Tensor<2>>,
    /// `[d_out]`
    pub bias: Option<Param<Tensor<1>>>,
    /// In place of `scale`.
    pub gate: Option<Gate>,
    /// Factor of the update.
    pub scale: f64,
    /// On the input of `a`; acts only during training.
    pub dropout: Dropout,
}

impl LoraAdapter {
    /// `s·A·B`, `[d_in, d_out]`, of one layer.
    pub fn delta(&self) -> Tensor<2> {
        (self.a.val() * self.scale).matmul(self.b.val())
    }

    /// `s·(dropped·A·B + β)`, where `dropped` is `x` or what dropout left of it, `[batch, seq, d_in]` to `[batch, seq, d_out]`.
    pub(crate) fn added(&self, dropped: Tensor<3>, x: Tensor<3>) -> Tensor<3> {
        let ([batch, seq, d_in], a) = (dropped.dims(), self.a.val());
        let inner = product(dropped.cast(a.dtype()).reshape([batch * seq, d_in]), a);
        let y = product(if self.gate.is_none() { inner * self.scale } else { inner }, self.b.val());
        let d_out = y.dims()[1];
        let y = y.reshape([batch, seq, d_out]);
        let Some(gate) = &self.gate else {
            return match self.shift(None) {
                Some(shift) => y + shift.unsqueeze(),
                None => y,
            };
        };
        let y = self.bias.iter().fold(y, |y, bias| y + bias.val().unsqueeze());
        y * gate.forward(x)
    }
}

impl Method for LoraConfig {
    const PEFT_TYPE: &'static str = "LORA";
    const FAST: &'static [&'static str] = &["b", "bias"];
    type Adapter = LoraAdapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn takes_whole_rows(&self) -> bool {
        self.use_gating
    }

    fn check(&self) -> Result<()> {
        self.rank_pattern.values().chain([&self.rank]).try_for_each(|rank| check_size("r", *rank))?;
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::config("lora_dropout", "a probability in 0..1", self.dropout));
        }
        for alpha in self.alpha_pattern.values().chain([&self.alpha]) {
            if !alpha.is_finite() {
                return Err(Error::config("lora_alpha", "a finite number", alpha));
            }
        }
        grouped::check(self)
    }

    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::Linear, LayerKind::Conv1D, LayerKind::GroupedLinear, LayerKind::Embedding]
    }

    fn init(&self, site: &Site, seed: u64) -> Result<LoraAdapter> {
        let (rank, mut rng) = (self.rank_of(&site.path)?, site.rng(seed));
        let (a, b) = grouped::shapes(site, rank);
        let bound = |fan_in: usize| 1.0 / (fan_in as f32).sqrt();
        let (a, b) = match (site.kind, self.init_lora_weights) {
            (LayerKind::Embedding, InitWeights::Random) => {
                (site.normal(a, 1.0, &mut rng)?, site.normal(b, 1.0, &mut rng)?)
            }
            (LayerKind::Embedding, _) => (site.zeros(a)?, site.normal(b, 1.0, &mut rng)?),
            (_, InitWeights::Kaiming) => (site.uniform(a, bound(site.d_in), &mut rng)?, site.zeros(b)?),
            (_, InitWeights::Gaussian) => (site.normal(a, 1.0 / rank as f32, &mut rng)?, site.zeros(b)?),
            (_, InitWeights::Random) => {
                (site.uniform(a, bound(site.d_in), &mut rng)?, site.uniform(b, bound(rank), &mut rng)?)
            }
        };
        let refused = |field: &str, why: &str| {
            Error::config(field, format!("false: {} is an embedding, which {why}", site.path), true)
        };
        let bias = match (self.lora_bias, self.init_lora_weights) {
            (false, _) => None,
            (true, _) if site.kind == LayerKind::Embedding => return Err(refused("lora_bias", "has no bias")),
            (true, InitWeights::Random) => Some(site.uniform([site.d_out], bound(rank), &mut rng)?),
            (true, _) => Some(site.zeros([site.d_out])?),
        };
        let gate = match (self.use_gating, site.kind) {
            (false, _) => None,
            (true, LayerKind::Embedding) => return Err(refused("use_gating", "sees no activations")),
            (true, _) => Some(Gate::new(site, [site.d_in, 1], &mut site.rng(seed ^ 1))?),
        };
        let dropout = DropoutConfig::new(self.dropout).init();
        Ok(LoraAdapter { a, b, bias, gate, scale: self.scale_of(&site.path)?, dropout })
    }

    fn tensors(kind: LayerKind) -> &'static [FileTensor] {
        const fn tensor(field: &'static str, key: &'static str) -> FileTensor {
            FileTensor { field, key, transposed: true }
        }
        match kind {
            LayerKind::Embedding => &const { [tensor("a", "lora_embedding_A"), tensor("b", "lora_embedding_B")] },
            LayerKind::GroupedLinear => &grouped::TENSORS,
            _ => {
                &const {
                    let bias = FileTensor { field: "bias", key: "lora_B.bias", transposed: false };
                    let gate = FileTensor { field: "gate.dense.bias", key: "lora_gate.bias", transposed: false };
                    let weight = tensor("gate.dense.weight", "lora_gate.weight");
                    [tensor("a", "lora_A.weight"), tensor("b", "lora_B.weight"), bias, weight, gate]
                }
            }
        }
    }

    fn from_hub(folder: &HubFolder) -> Result<Option<(Self, BTreeMap<String, Values>)>> {
        hub::read(folder).map(Some)
    }

    fn to_hub(file: &AdapterFile<Self>, name: &str) -> Result<Option<HubFolder>> {
        hub::write(file, name).map(Some)
    }

    fn activation(adapter: &LoraAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, site: &Site) -> Option<String> {
        if self.use_gating {
            Some(GATED.to_owned())
        } else if self.lora_bias {
            Some("lora_bias adds to the layer's output".to_owned())
        } else if self.dropout > 0.0 && site.kind != LayerKind::Embedding {
            Some("lora_dropout acts on the layer's input".to_owned())
        } else {
            None
        }
    }

    fn unmergeable(&self, _site: &Site) -> Option<String> {
        self.use_gating.then(|| GATED.to_owned())
    }

    fn renew(self, tensors: BTreeMap<String, Values>, found: &Scan) -> Result<(Self, BTreeMap<String, Values>)> {
        per_expert::fused(self, tensors, found)
    }

    fn check_file(json: &serde_json::Map<String, serde_json::Value>) -> Result<()> {
        unbuilt::check(json)
    }
}

impl Reparameterization for LoraAdapter {
    const NAME: &'static str = "lora";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let (shape, dtype) = (base.shape(), base.dtype());
        // What is no matrix are the matrices of experts.
        let delta: Tensor<D> = if D == 2 { self.delta().reshape(shape) } else { self.deltas(shape[0]).reshape(shape) };
        (base.cast(delta.dtype()) + delta).cast(dtype)
    }
}

impl Activation for LoraAdapter {
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        let drops = self.dropout.prob > 0.0 && x.device().is_autodiff();
        let dropped = drops.then(|| self.dropout.forward(x.clone()));
        if self.gate.is_some() {
            let y = base.linear(x.clone());
            let ([batch, seq], [_, d_in], shape) = (base.leading(), x.dims(), y.dims());
            let unfolded = |x: Tensor<2>| x.reshape([batch, seq, d_in]);
            let added = self.added(unfolded(dropped.unwrap_or_else(|| x.clone())), unfolded(x)).cast(y.dtype());
            return Some(y + added.reshape(shape));
        }
        let y = base.low_rank(x, dropped, self.a.val(), self.b.val(), self.scale);
        Some(match self.shift(None) {
            Some(shift) => {
                let dtype = y.dtype();
                y + shift.cast(dtype).unsqueeze()
            }
            None => y,
        })
    }

    fn grouped(&self, x: Tensor<2>, base: &GroupedBase<'_>) -> Option<Tensor<2>> {
        Some(self.on_experts(x, base))
    }

    fn shift(&self, _bias: Option<&Tensor<1>>) -> Option<Tensor<1>> {
        let bias = self.bias.as_ref().filter(|_| self.gate.is_none())?;
        Some(bias.val() * self.scale)
    }

    fn embedding(&self, ids: Tensor<1, Int>, base: &Base<'_>) -> Option<Tensor<2>> {
        let y = base.embedding(ids.clone());
        let delta = (self.a.val().select(0, ids) * self.scale).matmul(self.b.val());
        let dtype = y.dtype();
        Some(y + delta.cast(dtype))
    }
}
