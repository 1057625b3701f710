//! What a model offers to adapters, found in one visit.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_kernels::PackedLayout;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::location::REPARAMETERIZATION;
use crate::named::NAMED;
use crate::quantized::PACKED;
use crate::{Error, LayerKind, PathStack, PromptShape, Result};

/// One layer that an adapter can sit in: its weight, and what a method needs to know of it. A norm's weight is its scale.
#[derive(Clone, Debug)]
pub struct Site {
    /// Path of the module, as `transformers` names it: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// What the module is.
    pub kind: LayerKind,
    /// The parameter that an adapter sits in: the weight.
    pub id: ParamId,
    /// How many layers there are in one, each with these features, where it is those of experts.
    pub experts: Option<usize>,
    /// Input features: rows of the weight, or the number of embedding vectors; of a convolution the values that an output value is made of.
    pub d_in: usize,
    /// Output features: columns of the weight, the width of an embedding vector, or channels.
    pub d_out: usize,
    /// Whether the layer has a bias.
    pub has_bias: bool,
    /// The layer's own parameters that are vectors, by name: the `bias` of a linear layer, the `gamma` and `beta` of a norm.
    pub vectors: BTreeMap<String, Param<Tensor<1>>>,
    /// Whether the model calls [`linear`](crate::linear), [`embedding`](crate::embedding), or what there is for its kind, and says so with [`AdapterAware`].
    pub aware: bool,
    /// Type of the weight, and of what it is unpacked to.
    pub dtype: DType,
    /// How the weight is packed, if it is, or that of each expert.
    pub packed: Option<PackedLayout>,
    /// What prompts of the model must be like, where it takes any: how wide it is, and how many heads it has.
    pub prompt: Option<PromptShape>,
    /// Device of the weight.
    pub device: Device,
    /// How much room there is for adapters, in all sites together.
    pub room: Room,
}

/// How many values the tensors of an adapter may still have: as many as memory holds, or fewer where the adapter is for a file.
#[derive(Clone, Debug, Default)]
pub struct Room(Option<Arc<AtomicUsize>>);

impl Room {
    /// Room for so many values; clones share it.
    pub(crate) fn of(values: usize) -> Self {
        Self(Some(Arc::new(AtomicUsize::new(values))))
    }

    /// Takes room for so many, if there is as much.
    fn take(&self, count: usize) -> bool {
        let left = |left: usize| left.checked_sub(count);
        self.0.as_ref().is_none_or(|room| room.fetch_update(Relaxed, Relaxed, left).is_ok())
    }
}

/// Whether a path is that of the router of a mixture of experts.
pub(crate) fn is_router(path: &str) -> bool {
    path.ends_with("mlp.gate")
}

impl Site {
    /// Path of the parameter that an adapter sits in.
    pub(crate) fn weight(&self) -> String {
        let name = self.kind.weight();
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Whether it is the router of a mixture of experts, by the name that it has in `transformers`, where it is no linear layer: what takes all of those leaves it out.
    pub fn is_router(&self) -> bool {
        is_router(&self.path)
    }

    /// The random generator of this site: it depends on the seed and the path alone, so that a model gets the same adapter on every
    /// device, whatever else is adapted.
    pub fn rng(&self, seed: u64) -> ChaCha8Rng {
        rng_of(&self.path, seed)
    }

    /// The type of adapter tensors on this site: the weight's, but f32 where that has less precision.
    pub fn adapter_dtype(&self) -> DType {
        if self.dtype == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// A trainable parameter with the values that `next` gives in row-major order.
    ///
    /// # Errors
    /// When they are more than the file has that the adapter is for, or than there is memory for.
    pub fn param<const D: usize>(&self, shape: [usize; D], mut next: impl FnMut() -> f32) -> Result<Param<Tensor<D>>> {
        let count = shape.iter().try_fold(1_usize, |count, dim| count.checked_mul(*dim));
        let mut values = Vec::new();
        let count = count.filter(|count| self.room.take(*count) && values.try_reserve_exact(*count).is_ok());
        let count = count.ok_or_else(|| {
            let expected = if self.room.0.is_some() { "tensors of its file" } else { "values that memory holds" };
            Error::config(format!("the adapter at {}", self.path), expected, format!("{shape:?}"))
        })?;
        values.extend((0..count).map(|_| next()));
        let options = (&self.device, self.adapter_dtype());
        Ok(Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), options)))
    }

    /// Values from `U(-bound, bound)`.
    ///
    /// # Errors
    /// As [`param`](Self::param).
    pub fn uniform<const D: usize>(
        &self,
        shape: [usize; D],
        bound: f32,
        rng: &mut impl Rng,
    ) -> Result<Param<Tensor<D>>> {
        use rand::RngExt;
        self.param(shape, || if bound > 0.0 { rng.random_range(-bound..bound) } else { 0.0 })
    }

    /// Values from `N(0, std²)`.
    ///
    /// # Errors
    /// As [`param`](Self::param).
    pub fn normal<const D: usize>(&self, shape: [usize; D], std: f32, rng: &mut impl Rng) -> Result<Param<Tensor<D>>> {
        self.normal_around(0.0, shape, std, rng)
    }

    /// Values from `N(mean, std²)`.
    ///
    /// # Errors
    /// As [`param`](Self::param).
    pub fn normal_around<const D: usize>(
        &self,
        mean: f32,
        shape: [usize; D],
        std: f32,
        rng: &mut impl Rng,
    ) -> Result<Param<Tensor<D>>> {
        use rand::RngExt;
        self.param(shape, || mean + std * rng.sample::<f32, _>(rand_distr::StandardNormal))
    }

    /// A trainable copy of one of the layer's [`vectors`](Self::vectors), for a method that starts from what the base holds.
    pub fn copy(&self, vector: &str) -> Option<Param<Tensor<1>>> {
        let values = self.vectors.get(vector)?.base().cast(self.adapter_dtype());
        Some(Param::from_tensor(values.detach()))
    }

    /// Values from `N(0, std²)`, drawn again where they are more than two deviations away.
    ///
    /// # Errors
    /// As [`param`](Self::param).
    pub fn cut_normal<const D: usize>(
        &self,
        shape: [usize; D],
        std: f32,
        rng: &mut impl Rng,
    ) -> Result<Param<Tensor<D>>> {
        use rand::RngExt;
        const MOST: f32 = 2.0;
        self.param(shape, || {
            loop {
                let value: f32 = rng.sample(rand_distr::StandardNormal);
                if value.abs() <= MOST {
                    return std * value;
                }
            }
        })
    }

    /// Zeros.
    ///
    /// # Errors
    /// As [`param`](Self::param).
    pub fn zeros<const D: usize>(&self, shape: [usize; D]) -> Result<Param<Tensor<D>>> {
        self.param(shape, || 0.0)
    }
}

/// The random generator of what lies at `path`.
pub fn rng_of(path: &str, seed: u64) -> ChaCha8Rng {
    // FNV-1a over the path: stable across versions and machines, which `std`'s hasher does not promise.
    let hash = path.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    ChaCha8Rng::seed_from_u64(seed ^ hash)
}

/// A field of a model's module that says: every layer below me of a kind that adapters know is called through the activation seam.
///
/// Methods that no weight can express (dropout on the adapter's input, routing, bottlenecks) attach only to such layers.
///
/// ```
/// use burn::{module::Module, nn::Linear, tensor::Tensor};
/// use peft_core::{AdapterAware, linear};
///
/// #[derive(Module, Debug)]
/// struct Block { up: Linear, down: Linear, aware: AdapterAware }
///
/// impl Block {
///     fn forward(&self, x: Tensor<3>) -> Tensor<3> {
///         linear(&self.down, linear(&self.up, x))
///     }
/// }
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct AdapterAware;

const AWARE: &str = "AdapterAware";

peft_kernels::marker_module!(AdapterAware, |_aware| AWARE);

/// Everything that attaching needs to know of a model.
#[derive(Debug, Default)]
pub struct Scan {
    /// The layers that adapters know, by the order of the visit.
    pub sites: Vec<Site>,
    /// Every module: path and type name, so that a target that is no layer can be named in the error.
    pub modules: BTreeMap<String, String>,
    /// Paths of modules that carry an adapter.
    pub adapted: BTreeSet<String>,
}

/// Visits `module` once, without initialising a lazy parameter.
pub fn scan<M: Module>(module: &M) -> Scan {
    let mut scanner = Scanner::default();
    module.visit(&mut scanner);
    let Scanner { mut scan, aware, biased, mut vectors, .. } = scanner;
    let shape = scan.sites.iter().find_map(|site| site.prompt);
    for site in &mut scan.sites {
        site.prompt = site.prompt.or(shape);
        site.has_bias = biased.contains(&site.path);
        site.vectors = vectors.remove(&site.path).unwrap_or_default();
        // A place is there for adapters alone, and there is one way to call the layers of experts.
        site.aware = site.kind.is_place()
            || site.kind == LayerKind::GroupedLinear
            || aware.iter().any(|prefix| {
                prefix.is_empty()
                    || site.path == *prefix
                    || site.path.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.'))
            });
    }
    scan
}

#[derive(Default)]
struct Scanner {
    stack: PathStack,
    scan: Scan,
    aware: BTreeSet<String>,
    biased: BTreeSet<String>,
    /// By module and name.
    vectors: BTreeMap<String, BTreeMap<String, Param<Tensor<1>>>>,
}

impl ModuleVisitor for Scanner {
    fn enter_module(&mut self, name: &str, container: &str) {
        match container {
            AWARE => {
                self.aware.insert(self.stack.parent());
            }
            REPARAMETERIZATION if name != PACKED => {
                self.scan.adapted.insert(self.stack.parent());
            }
            // The path so far has the field's name, which is about to be replaced.
            NAMED => {}
            _ if self.stack.in_packing() => {
                if let (Some(layout), Some(site)) = (PackedLayout::announced(container), self.scan.sites.last_mut()) {
                    // The placeholder was that of one expert; each has a matrix.
                    let others = site.packed.replace(layout).map_or(0, |_| 1);
                    site.experts = site.experts.map(|experts| experts + others);
                    (site.d_in, site.d_out) = (layout.d_in, layout.d_out);
                }
            }
            _ if let Some(shape) = PromptShape::announced(container) => {
                // The place was visited just before.
                if let Some(site) = self.scan.sites.last_mut() {
                    site.prompt = Some(shape);
                }
            }
            // What an adapter is made of is nothing to adapt.
            _ if self.stack.locate().field.is_some() => {}
            _ => {
                let owner = container.split_once(':').map_or(container, |(_, name)| name).to_owned();
                self.scan.modules.entry(self.stack.path()).or_insert(owner);
            }
        }
        self.stack.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.stack.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let location = self.stack.locate();
        if location.field.is_some() {
            return;
        }
        if self.stack.in_packing() {
            // The placeholder was visited just before; of its parts the one that is no vector is where an adapter sits.
            if let (2.., Some(site)) = (D, self.scan.sites.last_mut()) {
                site.id = param.id;
            }
            return;
        }
        // Cloning makes no lazy value.
        if let Some(vector) = (param as &dyn Any).downcast_ref::<Param<Tensor<1>>>() {
            self.vectors.entry(location.module.clone()).or_default().insert(location.param.clone(), vector.clone());
        }
        if location.is_bias() {
            self.biased.insert(location.module);
            return;
        }
        let Some(kind) = location.kind else { return };
        let shape = param.lazy_shape();
        if let Some((d_in, d_out)) = kind.features(&location.param, &shape) {
            self.scan.sites.push(Site {
                path: location.module,
                kind,
                id: param.id,
                experts: (kind == LayerKind::GroupedLinear).then(|| shape[0]),
                d_in,
                d_out,
                has_bias: false,
                vectors: BTreeMap::new(),
                aware: false,
                packed: None,
                prompt: None,
                dtype: if param.is_initialized() { param.base().dtype() } else { DType::F32 },
                device: param.lazy_device(),
                room: Room::default(),
            });
        }
    }
}
