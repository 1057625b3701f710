//! (IA)³: trained factors on what frozen layers compute. Liu et al. 2022, arXiv:2205.05638, section 3.3.
//!
//! - formula: `y = l ⊙ (x·W + b)`, `l: [d_out]`; in feed-forward modules `y = (l ⊙ x)·W + b`, `l: [d_in]`
//! - with `use_gating`: `y = s·l ⊙ (x·W + b)`, `s` one number for each row of a batch, [`Gate`]; `d_in + 1` values more
//! - trained: `d_out` or `d_in` values a weight
//! - at init: identity, since `l = 1`, unless `init_ia3_weights` is `false` or there is a gate, which starts near one half
//!
//! The paper scales keys, values and what enters the second layer of the feed-forward part: `k_proj`, `v_proj` and, as a feed-forward module,
//! `down_proj`.

use std::collections::BTreeMap;

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::Tensor;
use peft_core::files::{HubFolder, Values};
use peft_core::{
    Activation, AdapterFile, Base, Composable, End, Error, Experts, FileTensor, Gate, LayerKind, Method, Names, Part,
    Result, Site, Targets,
};
use serde::{Deserialize, Serialize};

use crate::hub;

/// Configuration of (IA)³; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
/// use peft_adapter::Ia3Config;
/// use peft_core::{Peft, Targets, linear};
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model { key: burn::nn::Linear, down: burn::nn::Linear }
///
/// let device = Device::flex().autodiff();
/// let layer = |d_in, d_out| LinearConfig::new(d_in, d_out).with_bias(false).init(&device);
/// let model = Model { key: layer(16, 8), down: layer(64, 16) };
/// let ia3 = Ia3Config::new(Targets::modules(["key", "down"])).with_feedforward(["down"]);
/// let model = model.attach(&ia3)?;
/// assert_eq!(model.trainable().trainable, 8 + 64);
/// let y = linear(&model.key, Tensor::<2>::ones([1, 16], &device));
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ia3Config {
    /// The modules whose input is scaled in place of their output: ends of names, each one of `target_modules` too, or a regular expression.
    pub feedforward_modules: Names,
    /// Start as the identity; `false`, which is for tests, starts at `N(0, 1)`.
    pub init_ia3_weights: bool,
    /// A gate on the scaled output, as in AdapterHub's library; PEFT has no such field.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub use_gating: bool,
    /// Whether the file's base weights are `[d_in, d_out]`, as GPT-2's. Written for Hugging Face; here the layer itself knows.
    pub fan_in_fan_out: bool,
    /// Which layers.
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Ia3Config {
    fn default() -> Self {
        // Not null, for which Python would take the modules that it knows for the architecture.
        let feedforward_modules = Names::List(Vec::new());
        Self {
            feedforward_modules,
            init_ia3_weights: true,
            use_gating: false,
            fan_in_fan_out: false,
            targets: Targets::default(),
        }
    }
}

impl Ia3Config {
    /// (IA)³ on the output of `targets`.
    pub fn new(targets: Targets) -> Self {
        Self { targets, ..Self::default() }
    }

    /// Sets the ends of the names of the modules whose input is scaled.
    #[must_use]
    pub fn with_feedforward<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        Self { feedforward_modules: Names::List(names.into_iter().map(Into::into).collect()), ..self }
    }

    /// Whether the module `path` is scaled at its input.
    ///
    /// # Errors
    /// When `feedforward_modules` is no regular expression.
    pub fn is_feedforward(&self, path: &str) -> Result<bool> {
        self.feedforward_modules.name(FEEDFORWARD, path)
    }
}

const FEEDFORWARD: &str = "feedforward_modules";

/// Why a gate is no part of a weight.
const GATED: &str = "a gate weighs the output row by row";

/// State of [`Ia3Config`] in one weight.
#[derive(Module, Debug)]
pub struct Ia3Adapter {
    /// `[1, d_out]`, or `[d_in, 1]` in a feed-forward module: as it multiplies the weight.
    pub l: Param<Tensor<2>>,
    /// On the scaled output.
    pub gate: Option<Gate>,
    /// Whether the input is scaled.
    pub feedforward: bool,
}

impl Method for Ia3Config {
    const PEFT_TYPE: &'static str = "IA3";
    type Adapter = Ia3Adapter;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn takes_whole_rows(&self) -> bool {
        self.use_gating
    }

    fn check(&self) -> Result<()> {
        self.is_feedforward("")?;
        if self.use_gating && self.feedforward_modules != Names::List(Vec::new()) {
            return Err(Error::config(
                FEEDFORWARD,
                "none beside a gate, which is on outputs",
                format!("{:?}", self.feedforward_modules),
            ));
        }
        let (Names::List(feedforward), Some(Names::List(targets))) =
            (&self.feedforward_modules, &self.targets.target_modules)
        else {
            return Ok(());
        };
        match feedforward.iter().find(|name| !targets.contains(name)) {
            Some(name) => Err(Error::config(FEEDFORWARD, format!("some of the target_modules {targets:?}"), name)),
            None => Ok(()),
        }
    }

    fn init(&self, site: &Site, seed: u64) -> Result<Ia3Adapter> {
        let feedforward = self.is_feedforward(&site.path)?;
        let shape = if feedforward { [site.d_in, 1] } else { [1, site.d_out] };
        let l = if self.init_ia3_weights {
            site.param(shape, || 1.0)?
        } else {
            site.normal(shape, 1.0, &mut site.rng(seed))?
        };
        let gate = self.use_gating.then(|| Gate::new(site, [site.d_in, 1], &mut site.rng(seed ^ 1))).transpose()?;
        Ok(Ia3Adapter { l, gate, feedforward })
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &const {
            [
                FileTensor { field: "l", key: "ia3_l", transposed: true },
                FileTensor { field: "gate.dense.weight", key: "ia3_gate.weight", transposed: true },
                FileTensor { field: "gate.dense.bias", key: "ia3_gate.bias", transposed: false },
            ]
        }
    }

    fn from_hub(folder: &HubFolder) -> Result<Option<(Self, BTreeMap<String, Values>)>> {
        hub::ia3::read(folder).map(Some)
    }

    fn to_hub(file: &AdapterFile<Self>, name: &str) -> Result<Option<HubFolder>> {
        hub::ia3::write(file, name).map(Some)
    }

    fn activation(adapter: &Ia3Adapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, site: &Site) -> Option<String> {
        if self.use_gating {
            return Some(GATED.to_owned());
        }
        // A regular expression that does not compile was refused by `check`.
        let scales_bias = site.has_bias && !self.is_feedforward(&site.path).unwrap_or(false);
        scales_bias.then(|| "(IA)³ scales the layer's bias".to_owned())
    }

    fn unmergeable(&self, _site: &Site) -> Option<String> {
        self.use_gating.then(|| GATED.to_owned())
    }
}

impl Reparameterization for Ia3Adapter {
    const NAME: &'static str = "ia3";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let (dtype, l) = (base.dtype(), self.l.val());
        let shape = l.shape();
        (base.cast(l.dtype()) * l.reshape::<D, _>(shape)).cast(dtype)
    }
}

impl Activation for Ia3Adapter {
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        if self.feedforward {
            return Some(base.linear(scaled(x, self.l.val().transpose())));
        }
        let (y, l) = (base.linear(x.clone()), self.l.val());
        let Some(gate) = &self.gate else { return Some(scaled(y, l)) };
        let ([batch, seq], [_, d_in], [rows, d_out]) = (base.leading(), x.dims(), y.dims());
        let factors = gate.forward(x.reshape([batch, seq, d_in])) * l.unsqueeze(); // [batch, 1, d_out]
        Some(scaled(y.reshape([batch, seq, d_out]), factors).reshape([rows, d_out]))
    }

    fn shift(&self, bias: Option<&Tensor<1>>) -> Option<Tensor<1>> {
        let bias = bias.filter(|_| !self.feedforward)?;
        let l: Tensor<1> = self.l.val().squeeze_dim(0);
        Some(bias.clone().cast(l.dtype()) * (l - 1.0))
    }
}

/// `l ⊙ x` in the type of `x`: `[.., width]` and `[.., 1, width]` to `[.., width]`.
fn scaled<const D: usize>(x: Tensor<D>, l: Tensor<D>) -> Tensor<D> {
    let dtype = x.dtype();
    (x.cast(l.dtype()) * l).cast(dtype)
}

impl Composable for Ia3Config {
    const COMPOSITION: &'static str = "IA3_COMPOSITION";
    const MIXTURE: &'static str = "IA3_MIXTURE";
    const PLACES: &'static [LayerKind] = &[LayerKind::Linear, LayerKind::Conv1D];

    fn check_part(&self) -> Result<()> {
        if self.feedforward_modules != Names::List(Vec::new()) {
            let found = format!("{:?}", self.feedforward_modules);
            return Err(Error::config(FEEDFORWARD, "none: what scales an input adds nothing to an output", found));
        }
        if self.use_gating {
            return Err(Error::config("use_gating", "false in a part of something larger", true));
        }
        Ok(())
    }
}

/// Of a layer whose output is scaled: the scale adds `(l − 1) ⊙ y` to it.
impl Part for Ia3Adapter {
    type Experts = Ia3Experts;

    fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>) {
        (end.output.clone(), end.output.clone())
    }

    fn through(&self, seen: Tensor<3>, residual: Tensor<3>) -> Tensor<3> {
        residual + self.update(seen)
    }

    fn update(&self, seen: Tensor<3>) -> Tensor<3> {
        scaled(seen, (self.l.val() - 1.0).unsqueeze())
    }
}

/// Several vectors as one for each row: `1 + Σ gₑ·(lₑ − 1)`.
#[derive(Module, Debug)]
pub struct Ia3Experts {
    /// `[experts, d_out]`
    pub l: Param<Tensor<2>>,
}

impl Experts<Ia3Adapter> for Ia3Experts {
    fn of(experts: Vec<Ia3Adapter>) -> Self {
        let all = experts.into_iter().map(|expert| expert.l.val()).collect();
        Self { l: Param::from_tensor(Tensor::cat(all, 0).detach()) }
    }

    fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>) {
        (end.output.clone(), end.output.clone())
    }

    fn mixed(&self, seen: Tensor<3>, gates: Tensor<2>) -> Tensor<3> {
        let l = self.l.val() - 1.0;
        let factors = gates.cast(l.dtype()).matmul(l); // [batch · seq, d_out]
        let dims = seen.dims();
        scaled(seen, factors.reshape(dims))
    }
}
