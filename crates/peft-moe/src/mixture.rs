//! A mixture of adapters in one place.
//!
//! - formula: `y = base(x) + Σₑ gₑ(x)·updateₑ(x) + Σₛ updateₛ(x)`, `g` from a router, see [`RouterConfig`]; experts `s` are shared: always there
//! - source: Zadouri et al. 2023, arXiv:2309.05444 (soft); Li et al. 2024, arXiv:2404.15159 (top-k); Dai et al. 2024, arXiv:2401.06066 (shared experts)
//! - trained: `experts` times the values of one, and the router's `d_in · experts`
//! - at init: the identity where that of an expert is
//!
//! All experts of `LoRA` are one operation: [`low_rank_experts`](peft_core::kernels::low_rank_experts).

use burn::module::{Module, Reparameterization};
use burn::tensor::Tensor;
use peft_core::files::Values;
use peft_core::{
    Activation, AdapterFile, Base, Composable, End, Error, Experts, FileTensor, LayerKind, Method, Part, Result, Site,
    Targets,
};
use peft_lora::LoraConfig;
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
    pub(crate) fn router_at(&self, site: &Site, experts: usize, seed: u64) -> Router {
        let look = Look { level: self.level, temperature: self.temperature, jitter: self.jitter };
        Router::new(&self.router, look, &self.balance, site, experts, !seed)
    }

    /// How many experts a layer has.
    ///
    /// # Errors
    /// When layers have numbers of their own, and this one has none.
    pub(crate) fn experts_at(&self, path: &str) -> Result<usize> {
        if self.experts_per_layer.is_empty() {
            return Ok(self.num_experts);
        }
        let layer = path.split('.').find_map(|part| part.parse::<usize>().ok());
        let count = layer.and_then(|layer| self.experts_per_layer.get(layer));
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
        let shared = self.shared.iter().map(|expert| expert.update(seen.clone()));
        let update = shared.fold(mixed, |sum, update| sum + update);
        self.experts.close(residual + update.cast(dtype), end)
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
        self.router.check()?;
        for count in self.experts_per_layer.iter().chain([&self.num_experts]) {
            if *count == 0 {
                return Err(Error::config("num_experts", "at least 1", count));
            }
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

    fn num_tasks(&self) -> Option<usize> {
        let RouterConfig::Task { num_tasks, .. } = self.router else { return None };
        Some(num_tasks)
    }

    fn init(&self, site: &Site, seed: u64) -> Result<Self::Adapter> {
        let count = self.experts_at(&site.path)?;
        let expert = |number: usize| self.expert.init(site, seed.wrapping_add(number as u64));
        let experts = Experts::of((0..count).map(expert).collect::<Result<_>>()?);
        let shared = (count..count + self.num_shared).map(expert).collect::<Result<_>>()?;
        let adapter = MixtureAdapter { experts, shared, router: self.router_at(site, count, seed) };
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

/// What a mixture by task is for one task: one `LoRA`, whose rank is that of all experts together, and which merges as any other.
///
/// `Σₑ gₑ·s·Aₑ·Bₑ` is `s·[A₁ … Aₙ]·[g₁·B₁; …; gₙ·Bₙ]`.
///
/// # Errors
/// When the router looks at its input, the experts have biases or numbers by layer, there is no such task, or a tensor is missing.
pub fn task_lora(file: &AdapterFile<MixtureConfig<LoraConfig>>, task: usize) -> Result<AdapterFile<LoraConfig>> {
    let method = &file.method;
    let count = method.num_tasks().filter(|_| method.num_shared == 0 && method.experts_per_layer.is_empty());
    let count = count.ok_or_else(|| {
        let expected = "a router by task, with the same experts in all layers and none that is shared";
        Error::config("router", expected, format!("{:?}", method.router))
    })?;
    if task >= count {
        return Err(Error::config("task", format!("one below {count}"), task));
    }
    let experts = method.num_experts;
    let lora = LoraConfig {
        rank: method.expert.rank * experts,
        alpha: method.expert.alpha * experts as f64,
        targets: method.targets.clone(),
        ..method.expert.clone()
    };
    let mut tensors = std::collections::BTreeMap::new();
    for path in file.tensors.keys().filter_map(|key| key.strip_suffix(".router.weight")) {
        let gates = gates_of(file, path, task)?;
        // In the file `[experts · rank, d_in]` and `[d_out, experts · rank]`.
        let factor = |key: &str| tensor(file, &format!("{path}.{EXPERTS}.{key}"));
        let (down, mut up) = (factor("lora_A.weight")?.clone(), factor("lora_B.weight")?.clone());
        let rank = down.shape[0] / experts;
        up.values.iter_mut().enumerate().for_each(|(at, value)| *value *= gates[at / rank % experts]);
        tensors.insert(format!("{path}.lora_A.weight"), down);
        tensors.insert(format!("{path}.lora_B.weight"), up);
    }
    if let Some(key) = file.tensors.keys().find(|key| key.ends_with("lora_B.bias")) {
        return Err(Error::config("lora_bias", "false", key));
    }
    let (base_model, task_type) = (file.base_model.clone(), file.task_type.clone());
    Ok(AdapterFile { method: lora, base_model, task_type, base_fingerprint: file.base_fingerprint.clone(), tensors })
}

fn tensor<'a, M>(file: &'a AdapterFile<M>, key: &str) -> Result<&'a Values> {
    file.tensors.get(key).ok_or_else(|| Error::config(key, "a tensor of the file", "none"))
}

/// `softmax(e·W)` of a task, from the file.
fn gates_of<M>(file: &AdapterFile<M>, path: &str, task: usize) -> Result<Vec<f32>> {
    let weight = tensor(file, &format!("{path}.router.weight"))?; // [experts, embedding_dim]
    let embeddings = tensor(file, &format!("{path}.router.task_embeddings"))?; // [num_tasks, embedding_dim]
    let width = weight.shape[1];
    let embedding = &embeddings.values[task * width..(task + 1) * width];
    let logits = weight.values.chunks(width).map(|row| row.iter().zip(embedding).map(|(a, b)| a * b).sum::<f32>());
    let powers: Vec<f32> = logits.map(f32::exp).collect();
    let sum: f32 = powers.iter().sum();
    Ok(powers.into_iter().map(|power| power / sum).collect())
}
