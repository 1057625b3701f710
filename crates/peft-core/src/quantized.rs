//! The packed base: a property of the weight, whatever method adapts it.
//!
//! A packed weight keeps its place, its path and its adapter. The parameter holds a placeholder of one value and carries [`Quantized`]: the
//! packed matrix or that of each expert, and a second placeholder that carries the adapter. So nothing that adapts a weight has to know of packing.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Device, Tensor};
use peft_kernels::PackedMatrix;

use crate::location::REPARAMETERIZATION;
use crate::{Error, Problem, Result, Site, scan};

/// What Burn calls the level of a packed weight.
pub(crate) const PACKED: &str = "packed";

/// A packed weight in place of a dense one of rank `R`, that of a linear layer (2) or those of several experts (3); made by [`pack`].
///
/// Through the activation seam the weight stays packed during the whole step; through the weight seam it is unpacked in each forward.
#[derive(Module, Debug)]
pub struct Quantized<const R: usize = 2> {
    /// One, or one for each expert.
    matrices: Vec<PackedMatrix>,
    /// One value; the adapter sits in it.
    carrier: Param<Tensor<R>>,
}

impl Quantized<2> {
    /// The packed weight `[d_out, d_in]`.
    pub fn packed(&self) -> &PackedMatrix {
        &self.matrices[0]
    }
}

impl Quantized<3> {
    /// The packed weight of each expert, `[d_out, d_in]`.
    pub fn experts(&self) -> &[PackedMatrix] {
        &self.matrices
    }
}

impl<const R: usize> Quantized<R> {
    /// The dense weight without the adapter: `[d_in, d_out]`, or `[experts, d_out, d_in]`.
    pub(crate) fn dense(&self, dtype: DType) -> Tensor<R> {
        let matrices = self.matrices.iter().map(PackedMatrix::unpack);
        if R == 3 {
            let all = Tensor::stack::<3>(matrices.collect(), 0).cast(dtype);
            let shape = all.shape();
            return all.reshape::<R, _>(shape);
        }
        let weight = self.matrices[0].unpack().transpose().cast(dtype);
        let shape = weight.shape();
        weight.reshape::<R, _>(shape)
    }

    /// The parameter that carries the weight's adapter, if there is one.
    pub(crate) fn carrier(&self) -> &Param<Tensor<R>> {
        &self.carrier
    }
}

impl<const R: usize> Reparameterization for Quantized<R> {
    const NAME: &'static str = PACKED;

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let mut weight = self.dense(base.dtype());
        // A constant of the graph so far; the weight that it stands for lives on the base's device, which may be one with autodiff.
        if let Some(strategy) = base.gradient_checkpointing_strategy() {
            weight = weight.autodiff().with_gradient_checkpointing_strategy(strategy);
        }
        let shape = weight.shape();
        adapted(&self.carrier, weight).reshape::<D, _>(shape)
    }
}

/// `weight` as the adapter that sits in `carrier` changes it.
///
/// A parameter gives its adapter to nobody who does not know the type, but a mapper may put another value under it.
fn adapted<const R: usize>(carrier: &Param<Tensor<R>>, weight: Tensor<R>) -> Tensor<R> {
    struct Replace<const R: usize> {
        id: ParamId,
        weight: Tensor<R>,
    }

    impl<const R: usize> ModuleMapper for Replace<R> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if param.id != self.id {
                return param;
            }
            let shape = self.weight.shape();
            param.map(|_| self.weight.clone().reshape::<D, _>(shape))
        }
    }

    Module::map(carrier.clone(), &mut Replace { id: carrier.id, weight }).val()
}

/// Puts packed matrices `[d_out, d_in]` in place of the weights with these ids, one for a linear layer, and for the layers of experts one each; lazy weights are never made. The weights
/// are frozen.
///
/// # Errors
/// [`Error::Pack`] when an id is not that of such a weight, the weight has another shape, or it is packed or adapted already. All
/// reasons at once; nothing is changed then.
pub fn pack<T: Module>(module: T, weights: HashMap<ParamId, Vec<PackedMatrix>>) -> Result<T> {
    let found = scan(&module);
    let sites: HashMap<ParamId, &Site> = found.sites.iter().map(|site| (site.id, site)).collect();
    let mut problems: Vec<Problem> =
        found.adapted.iter().map(|path| Problem::AlreadyAdapted { path: path.clone() }).collect();
    for (id, matrices) in &weights {
        let Some(site) = sites.get(id) else {
            let path = format!("parameter {id}");
            problems.push(Problem::Other { path, what: "not the weight of a layer of this model".to_owned() });
            continue;
        };
        let (count, expected) = (site.experts.unwrap_or(1), vec![site.d_out, site.d_in]);
        let mut shapes = matrices.iter().map(|matrix| vec![matrix.layout().d_out, matrix.layout().d_in]);
        let problem = |what: &str| Problem::Other { path: site.path.clone(), what: what.to_owned() };
        if site.packed.is_some() {
            problems.push(problem("the weight is packed already"));
        } else if !site.kind.packs() {
            problems.push(problem(
                "only the weights of linear layers and of experts can be packed: those that are multiplied by",
            ));
        } else if matrices.len() != count {
            problems.push(problem(&format!("expected {count} packed matrices, found {}", matrices.len())));
        } else if let Some(shape) = shapes.find(|shape| *shape != expected) {
            problems.push(Problem::Shape { name: site.path.clone(), expected, found: shape });
        }
    }
    if !problems.is_empty() {
        return Err(Error::Pack { problems });
    }
    let dtypes: HashMap<ParamId, DType> = sites.iter().map(|(id, site)| (*id, site.dtype)).collect();
    let (of_experts, of_layers) = weights.into_iter().partition(|(id, _)| sites[id].experts.is_some());
    let module = module.apply_reparameterization(Packer::<2> { weights: of_layers, dtypes: &dtypes });
    Ok(module.apply_reparameterization(Packer::<3> { weights: of_experts, dtypes: &dtypes }))
}

/// Packs the weights of rank `R`.
struct Packer<'a, const R: usize> {
    weights: HashMap<ParamId, Vec<PackedMatrix>>,
    dtypes: &'a HashMap<ParamId, DType>,
}

impl<const R: usize> Reparameterizer for Packer<'_, R> {
    type Reparam = Quantized<R>;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Quantized<R>>) {
        let Some(matrices) = self.weights.remove(&param.id) else { return (param, None) };
        let (device, dtype) = (param.lazy_device(), self.dtypes.get(&param.id).copied().unwrap_or(DType::F32));
        let carrier = placeholder(ParamId::new(), &device, dtype);
        (placeholder(param.id, &device, dtype), Some(Quantized { matrices, carrier }))
    }
}

/// What stands where a weight was: its device and its type, and no value that counts.
fn placeholder<const D: usize>(id: ParamId, device: &Device, dtype: DType) -> Param<Tensor<D>> {
    Param::initialized(id, Tensor::zeros([1; D], (device, dtype))).set_require_grad(false)
}

/// The parameters that stand where a packed weight was.
pub(crate) fn placeholders<T: Module>(module: &T) -> HashSet<ParamId> {
    #[derive(Default)]
    struct Finder {
        last: Option<ParamId>,
        found: HashSet<ParamId>,
    }

    impl ModuleVisitor for Finder {
        fn enter_module(&mut self, name: &str, container: &str) {
            if container == REPARAMETERIZATION && name == PACKED {
                // A parameter is visited before what it carries.
                self.found.extend(self.last);
            }
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.last = Some(param.id);
        }
    }

    let mut finder = Finder::default();
    module.visit(&mut finder);
    finder.found
}
