//! `MixLoRA`: experts that are whole feed-forward parts, the frozen one with a `LoRA` each.
//!
//! - formula: `y = Σₑ gₑ·FFNₑ(x)`, `FFNₑ(x) = down(inner) + s·inner·Aₑ·Bₑ` of `inner = f(gate(x) + s·x·A′ₑ·B′ₑ) · (up(x) + s·x·A″ₑ·B″ₑ)`; one router for the part
//! - source: Li et al. 2024, arXiv:2404.15159, section 3
//! - trained: the factors, and the router's `d_in · experts`
//! - at init: the identity where gates sum to one, as those of the best do
//!
//! The frozen matrices are multiplied once, for all experts: `gate` and `up` do not know of experts, and `down` is linear, so it takes the sum of all `gₑ·innerₑ`.
//! Between them a row has one place for each gate that can be open, whatever the number of experts, and the updates of all experts are one operation.

use burn::module::{Module, Reparameterization};
use burn::tensor::Tensor;
use peft_core::{Activation, Error, Experts, FileTensor, Gated, LayerKind, Method, Result, Site, Targets};
use peft_lora::{LoraConfig, LoraExperts};
use serde::{Deserialize, Serialize};

use crate::mixture::MixtureConfig;
use crate::router::{Router, one_by_one};

/// One matrix of a gated feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Into the non-linearity.
    Gate,
    /// What is multiplied with what comes out of it.
    Up,
    /// Back to the model's width.
    Down,
}

impl Projection {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

/// Configuration of a mixture of feed-forward parts.
///
/// ```
/// use burn::{nn::{Linear, LinearConfig}, tensor::{Device, Tensor, activation::silu}};
/// use peft_core::{FeedForward, Gated, Named, Peft, Targets, linear};
/// use peft_moe::mixlora;
///
/// #[derive(burn::module::Module, Debug)]
/// struct Mlp { gate: Linear, up: Linear, down: Linear, whole: Named<FeedForward> }
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model { mlp: Mlp }
///
/// let device = Device::flex().autodiff();
/// let layer = |d_in, d_out| LinearConfig::new(d_in, d_out).with_bias(false).init(&device);
/// let mlp = Mlp { gate: layer(8, 16), up: layer(8, 16), down: layer(16, 8), whole: FeedForward::new(8, 16, &device) };
/// let model = Model { mlp }.attach(&mixlora(Targets::modules(["mlp"])))?;
/// assert_eq!(model.trainable().trainable, 8 * (3 * 16 * (8 + 16) + 8));
/// let Mlp { gate, up, down, whole } = &model.mlp;
/// let parts = Gated { gate: &|x| linear(gate, x), up: &|x| linear(up, x), inner: &|g, u| silu(g) * u, down: &|x| linear(down, x) };
/// assert_eq!(whole.forward(Tensor::ones([2, 3, 8], &device), &parts).dims(), [2, 3, 8]);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MixLoraConfig {
    /// The experts and their router; its targets are feed-forward parts.
    #[serde(flatten)]
    pub mixture: MixtureConfig<LoraConfig>,
    /// The matrices that experts change.
    #[serde(default = "all")]
    pub projections: Vec<Projection>,
}

fn all() -> Vec<Projection> {
    Projection::ALL.to_vec()
}

/// State of a [`MixLoraConfig`] in one feed-forward part.
#[derive(Module, Debug)]
pub struct MixLoraAdapter {
    gate: Option<LoraExperts>,
    up: Option<LoraExperts>,
    down: Option<LoraExperts>,
    router: Router,
}

const ROUTED: &str = "a router opens gates row by row";

impl Method for MixLoraConfig {
    const PEFT_TYPE: &'static str = "FEED_FORWARD_MIXTURE";
    const FAST: &'static [&'static str] = LoraConfig::FAST;
    type Adapter = MixLoraAdapter;

    fn targets(&self) -> &Targets {
        &self.mixture.targets
    }

    fn check(&self) -> Result<()> {
        self.mixture.check()?;
        if self.projections.is_empty() {
            return Err(Error::config("projections", "one of gate, up and down at least", "none"));
        }
        match self.mixture.num_shared {
            0 => Ok(()),
            shared => Err(Error::config("num_shared", "0: the frozen part is shared by all", shared)),
        }
    }

    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::FeedForward]
    }

    fn num_tasks(&self) -> Option<usize> {
        self.mixture.num_tasks()
    }

    fn takes_whole_rows(&self) -> bool {
        self.mixture.takes_whole_rows()
    }

    fn init(&self, site: &Site, seed: u64) -> Result<Self::Adapter> {
        let count = self.mixture.experts_at(&site.path)?;
        let experts = |projection: Projection, name: &str| -> Result<Option<LoraExperts>> {
            if !self.projections.contains(&projection) {
                return Ok(None);
            }
            let down = projection == Projection::Down;
            let (d_in, d_out) = if down { (site.d_out, site.d_in) } else { (site.d_in, site.d_out) };
            let path = format!("{}.{name}", site.path);
            let linear = Site { path, kind: LayerKind::Linear, d_in, d_out, ..site.clone() };
            let expert = |number: usize| self.mixture.expert.init(&linear, seed.wrapping_add(number as u64));
            Ok(Some(LoraExperts::of((0..count).map(expert).collect::<Result<_>>()?)))
        };
        Ok(MixLoraAdapter {
            gate: experts(Projection::Gate, "gate")?,
            up: experts(Projection::Up, "up")?,
            down: experts(Projection::Down, "down")?,
            router: self.mixture.router_at(site, count, seed)?,
        })
    }

    fn is_fast(field: &str) -> bool {
        field.split_once('.').is_some_and(|(_, field)| LoraConfig::is_fast(field))
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        const fn tensor(field: &'static str, key: &'static str, transposed: bool) -> FileTensor {
            FileTensor { field, key, transposed }
        }
        &const {
            [
                tensor("router.weight", "router.weight", true),
                tensor("router.embeddings", "router.task_embeddings", false),
                tensor("gate.a", "experts.gate.lora_A.weight", true),
                tensor("gate.b", "experts.gate.lora_B.weight", true),
                tensor("gate.bias", "experts.gate.lora_B.bias", false),
                tensor("up.a", "experts.up.lora_A.weight", true),
                tensor("up.b", "experts.up.lora_B.weight", true),
                tensor("up.bias", "experts.up.lora_B.bias", false),
                tensor("down.a", "experts.down.lora_A.weight", true),
                tensor("down.b", "experts.down.lora_B.weight", true),
                tensor("down.bias", "experts.down.lora_B.bias", false),
            ]
        }
    }

    fn activation(adapter: &Self::Adapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, _site: &Site) -> Option<String> {
        Some(ROUTED.to_owned())
    }

    fn unmergeable(&self, _site: &Site) -> Option<String> {
        Some(ROUTED.to_owned())
    }
}

/// The weight form: there is none, and what it would change is not read.
impl Reparameterization for MixLoraAdapter {
    const NAME: &'static str = "mixlora";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for MixLoraAdapter {
    fn feed_forward(&self, x: Tensor<3>, parts: &Gated<'_>) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let gates = self.router.route(x.clone()).gates; // [batch · seq, experts]
        let open = self.router.most_open();
        // Its one expert for each place of a row, then how far that one's gate is open: all first places, then all second ones, and so on.
        let chosen = Tensor::cat(one_by_one(&gates, open), 0); // [open · batch · seq, experts]
        let gates = gates.repeat_dim(0, open) * chosen.clone();
        let share = gates.clone().sum_dim(1).reshape([open * batch, seq, 1]);
        let places = x.clone().repeat_dim(0, open);
        let adapted = |experts: &Option<LoraExperts>, base: Tensor<3>| {
            let (base, dtype) = (base.repeat_dim(0, open), places.dtype());
            match experts {
                Some(experts) => base + experts.mixed(places.clone(), chosen.clone()).cast(dtype),
                None => base,
            }
        };
        let inner = (parts.inner)(adapted(&self.gate, (parts.gate)(x.clone())), adapted(&self.up, (parts.up)(x)));
        let dtype = inner.dtype();
        // Over the places of a row.
        let sum = |y: Tensor<3>| {
            let [_, _, width] = y.dims();
            y.reshape([open, batch, seq, width]).sum_dim(0).reshape([batch, seq, width])
        };
        let y = (parts.down)(sum(inner.clone() * share.cast(dtype)));
        match &self.down {
            Some(experts) => y + sum(experts.mixed(inner, gates)).cast(dtype),
            None => y,
        }
    }
}
