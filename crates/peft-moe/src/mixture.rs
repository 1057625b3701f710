//! A mixture of adapters in one place.
//!
//! - formula: `y = base(x) + Σₑ gₑ(x)·updateₑ(x) + Σₛ updateₛ(x)`, `g` from a router, see [`RouterConfig`]; experts `s` are shared: always there
//! - source: Zadouri et al. 2023, arXiv:2309.05444 (soft); Li et al. 2024, arXiv:2404.15159 (top-k); Dai et al. 2024, arXiv:2401.06066 (shared experts)
//! - trained: `experts` times the values of one, and the router's `d_in · experts`
//! - at init: the identity where that of an expert is
//!
//! All experts of `LoRA` are one operation: [`low_rank_experts`](peft_core::kernels::low_rank_experts).

use std::ops::RangeInclusive;

use burn::module::{Module, Reparameterization};
use burn::tensor::Tensor;
use peft_core::{
    Activation, Base, Composable, End, Error, Experts, FileTensor, LayerKind, Method, Part, Result, Site, Targets,
    block_of,
};
use serde::{Deserialize, Serialize};

use crate::balance::Balance;
use crate::router::{Level, Look, Router, RouterConfig};

/// Configuration of a mixture of adapters of one method.
///
/// ```
/// use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
/// use peft_core::{Peft, Targets, linear};
/// use peft_lora::LoraConfig;
/// use peft_moe::{MixtureConfig, RouterConfig};
///
/// #[derive(burn::module::Module, Debug)]
/// struct Model { proj: burn::nn::Linear, aware: peft_core::AdapterAware }
///
/// let device = Device::flex().autodiff();
/// let model = Model { proj: LinearConfig::new(16, 16).init(&device), aware: peft_core::AdapterAware };
/// let expert = LoraConfig::new(4, Targets::modules(["proj"]));
/// let model = model.attach(&MixtureConfig::new(expert, 8, RouterConfig::TopK { k: 2 }))?;
/// assert_eq!(model.trainable().trainable, 8 * 4 * (16 + 16) + 16 * 8);
/// let y = linear(&model.proj, Tensor::<2>::ones([3, 16], &device));
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "M: Method")]
pub struct MixtureConfig<M> {
    /// What each expert is; where it is, `targets` says.
    pub expert: M,
    /// How many there are in a place.
    pub num_experts: usize,
    /// Other numbers by the number of the layer, from 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts_per_layer: Vec<usize>,
    /// Experts that all rows go through besides.
    #[serde(default)]
    pub num_shared: usize,
    /// What opens gates.
    pub router: RouterConfig,
    /// What has gates of its own.
    #[serde(default)]
    pub level: Level,
    /// The router's logits are divided by this.
    #[serde(default = "one")]
    pub temperature: f64,
    /// The router's inputs are multiplied by numbers from `1 ± jitter` during training.
    #[serde(default)]
    pub jitter: f64,
    /// What keeps all experts at work.
    #[serde(default)]
    pub balance: Balance,
    /// Which layers.
    #[serde(flatten)]
    pub targets: Targets,
}

fn one() -> f64 {
    1.0
}

/// As many tasks as there are at most, and the width of the widest embedding of one.
pub(crate) const MOST_TASKS: usize = 65_536;

/// As many experts as a place has at most, of each sort.
const MOST_EXPERTS: usize = 4096;

/// Refuses a number of things that makes no sense, or that no memory holds.
pub(crate) fn check_count(field: &str, allowed: RangeInclusive<usize>, count: usize) -> Result<()> {
    if allowed.contains(&count) {
        return Ok(());
    }
    Err(Error::config(field, format!("from {} to {}", allowed.start(), allowed.end()), count))
}

impl<M: Method> MixtureConfig<M> {
    /// So many experts on the targets of one, nothing balanced.
    pub fn new(expert: M, num_experts: usize, router: RouterConfig) -> Self {
        let targets = expert.targets().clone();
        Self {
            expert,
            num_experts,
            experts_per_layer: Vec::new(),
            num_shared: 0,
            router,
            level: Level::Token,
            temperature: 1.0,
            jitter: 0.0,
            balance: Balance::default(),
            targets,
        }
    }

    /// Sets the losses of the router.
    #[must_use]
    pub fn with_balance(self, balance: Balance) -> Self {
        Self { balance, ..self }
    }

    /// Sets how many experts all rows go through besides.
    #[must_use]
    pub fn with_shared(self, num_shared: usize) -> Self {
        Self { num_shared, ..self }
    }

    /// The router of one place with so many experts.
    pub(crate) fn router_at(&self, site: &Site, experts: usize, seed: u64) -> Result<Router> {
        let look = Look { level: self.level, temperature: self.temperature, jitter: self.jitter };
        Router::new(&self.router, look, &self.balance, site, experts, !seed)
    }

    /// How many experts layers can have.
    fn counts(&self) -> &[usize] {
        if self.experts_per_layer.is_empty() {
            std::slice::from_ref(&self.num_experts)
        } else {
            &self.experts_per_layer
        }
    }

    /// How many experts a layer has.
    ///
    /// # Errors
    /// When layers have numbers of their own, and this one has none.
    pub(crate) fn experts_at(&self, path: &str) -> Result<usize> {
        if self.experts_per_layer.is_empty() {
            return Ok(self.num_experts);
        }
        let count = block_of(path).and_then(|block| self.experts_per_layer.get(block));
        count.copied().ok_or_else(|| {
            let expected = format!("a number for each layer, and for {path} too");
            Error::config("experts_per_layer", expected, format!("{:?}", self.experts_per_layer))
        })
    }
}

/// State of a [`MixtureConfig`] in one place.
#[derive(Module, Debug)]
pub struct MixtureAdapter<E: Module, A: Module> {
    experts: E,
    shared: Vec<A>,
    router: Router,
}

impl<E: Experts<A>, A: Part> MixtureAdapter<E, A> {
    fn end(&self, end: End<'_>) -> Tensor<3> {
        let (seen, residual) = self.experts.sees(&end);
        let (dtype, gates) = (residual.dtype(), self.router.route(end.input.clone()).gates);
        let mixed = self.experts.mixed(seen.clone(), gates);
        let hidden = residual + mixed.cast(dtype);
        let hidden = self.shared.iter().fold(hidden, |hidden, expert| expert.through(seen.clone(), hidden));
        self.experts.close(hidden, end)
    }
}

/// The weight form: there is none, as gates differ by row.
impl<E: Experts<A>, A: Part> Reparameterization for MixtureAdapter<E, A> {
    const NAME: &'static str = "mixture";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl<E: Experts<A>, A: Part> Activation for MixtureAdapter<E, A> {
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        Some(self.end(base.end(x)).flatten(0, 1))
    }

    fn sub_layer(&self, end: End<'_>) -> Tensor<3> {
        self.end(end)
    }
}

/// The fields that experts are in: by number, or side by side.
const EXPERTS: &str = "experts";
const SHARED: &str = "shared";

/// An expert, or all of them, and the field in it.
fn part_of(field: &str) -> Option<(&str, &str)> {
    let (several, rest) = field.split_once('.').filter(|(several, _)| [EXPERTS, SHARED].contains(several))?;
    let numbered = rest.split_once('.').filter(|(number, _)| number.parse::<usize>().is_ok());
    Some(numbered.map_or((several, rest), |(number, inner)| (&field[..several.len() + 1 + number.len()], inner)))
}

const ROUTED: &str = "a router opens gates row by row";

impl<M: Composable> Method for MixtureConfig<M> {
    const PEFT_TYPE: &'static str = M::MIXTURE;
    const FAST: &'static [&'static str] = M::FAST;
    type Adapter = MixtureAdapter<<M::Adapter as Part>::Experts, M::Adapter>;

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn check(&self) -> Result<()> {
        self.expert.check()?;
        self.expert.check_part()?;
        self.expert.check_expert()?;
        self.router.check()?;
        check_count("num_experts", 1..=MOST_EXPERTS, self.num_experts)?;
        check_count("num_shared", 0..=MOST_EXPERTS, self.num_shared)?;
        for count in self.counts() {
            check_count("experts_per_layer", 1..=MOST_EXPERTS, *count)?;
            self.router.check_experts(*count)?;
            self.balance.check(*count)?;
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::config("temperature", "a number above 0", self.temperature));
        }
        if !(0.0..1.0).contains(&self.jitter) {
            return Err(Error::config("jitter", "a number in 0..1", self.jitter));
        }
        Ok(())
    }

    fn kinds(&self) -> &'static [LayerKind] {
        M::PLACES
    }

    fn leaves_out(&self, path: &str) -> bool {
        self.expert.leaves_out(path)
    }

    fn num_tasks(&self) -> Option<usize> {
        let RouterConfig::Task { num_tasks, .. } = self.router else { return None };
        Some(num_tasks)
    }

    fn takes_whole_rows(&self) -> bool {
        self.num_tasks().is_some() || self.level == Level::Sequence || self.balance.localised > 0.0
    }

    fn init(&self, site: &Site, seed: u64) -> Result<Self::Adapter> {
        let count = self.experts_at(&site.path)?;
        let expert = |number: usize| self.expert.init(site, seed.wrapping_add(number as u64));
        let experts = Experts::of((0..count).map(expert).collect::<Result<_>>()?);
        let shared = (count..count + self.num_shared).map(expert).collect::<Result<_>>()?;
        let adapter = MixtureAdapter { experts, shared, router: self.router_at(site, count, seed)? };
        Ok(if matches!(self.router, RouterConfig::Arrow { .. }) { adapter.no_grad() } else { adapter })
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &const {
            [
                FileTensor { field: "router.weight", key: "router.weight", transposed: true },
                FileTensor { field: "router.embeddings", key: "router.task_embeddings", transposed: false },
            ]
        }
    }

    fn is_fast(field: &str) -> bool {
        part_of(field).is_some_and(|(_, field)| M::is_fast(field))
    }

    fn key(kind: LayerKind, field: &str) -> Option<(String, bool)> {
        if let Some(tensor) = Self::tensors(kind).iter().find(|tensor| tensor.field == field) {
            return Some((tensor.key.to_owned(), tensor.transposed));
        }
        let (part, field) = part_of(field)?;
        let (key, transposed) = M::key(kind, field)?;
        Some((format!("{part}.{key}"), transposed))
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
