//! The packed base: a property of the weight, whatever method adapts it.
//!
//! A packed weight keeps its place, its path and its adapter. The parameter holds a placeholder of one value and carries [`Quantized`]: the
//! packed matrix, and a second placeholder that carries the adapter. So nothing that adapts a weight has to know of packing.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Device, Tensor};
use peft_kernels::PackedMatrix;

use crate::location::REPARAMETERIZATION;
use crate::{Error, Problem, Result, Site, scan};

/// A packed weight in place of a dense one; made by [`pack`].
///
/// Through the activation seam the weight stays packed during the whole step; through the weight seam it is unpacked in each forward.
#[derive(Module, Debug)]
pub struct Quantized {
    packed: PackedMatrix,
    /// One value; the adapter sits in it.
    carrier: Param<Tensor<2>>,
}

impl Quantized {
    /// The packed weight `[d_out, d_in]`.
    pub fn packed(&self) -> &PackedMatrix {
        &self.packed
    }

    /// The dense weight `[d_in, d_out]`, without the adapter.
    pub(crate) fn dense(&self, dtype: DType) -> Tensor<2> {
        self.packed.unpack().transpose().cast(dtype)
    }

    /// The parameter that carries the weight's adapter, if there is one.
    pub(crate) fn carrier(&self) -> &Param<Tensor<2>> {
        &self.carrier
    }
}

impl Reparameterization for Quantized {
    const NAME: &'static str = "packed";

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
fn adapted(carrier: &Param<Tensor<2>>, weight: Tensor<2>) -> Tensor<2> {
    struct Replace {
        id: ParamId,
        weight: Tensor<2>,
    }

    impl ModuleMapper for Replace {
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

/// Puts packed matrices `[d_out, d_in]` in place of the weights with these ids; lazy weights are never made. The weights are frozen.
///
/// # Errors
/// [`Error::Pack`] when an id is not that of a linear layer's weight, the weight has another shape, or it is packed or adapted already. All
/// reasons at once; nothing is changed then.
pub fn pack<T: Module>(module: T, weights: HashMap<ParamId, PackedMatrix>) -> Result<T> {
    let found = scan(&module);
    let sites: HashMap<ParamId, &Site> = found.sites.iter().map(|site| (site.id, site)).collect();
    let mut problems: Vec<Problem> =
        found.adapted.iter().map(|path| Problem::AlreadyAdapted { path: path.clone() }).collect();
    for (id, packed) in &weights {
        let Some(site) = sites.get(id) else {
            let path = format!("parameter {id}");
            problems.push(Problem::Other { path, what: "not the weight of a layer of this model".to_owned() });
            continue;
        };
        let layout = packed.layout();
        let (expected, shape) = (vec![site.d_out, site.d_in], vec![layout.d_out, layout.d_in]);
        let problem = |what: &str| Problem::Other { path: site.path.clone(), what: what.to_owned() };
        if site.packed.is_some() {
            problems.push(problem("the weight is packed already"));
        } else if !site.kind.multiplies() {
            problems.push(problem("only the weights of linear layers can be packed: those that are multiplied by"));
        } else if expected != shape {
            problems.push(Problem::Shape { name: site.path.clone(), expected, found: shape });
        }
    }
    if !problems.is_empty() {
        return Err(Error::Pack { problems });
    }
    let dtypes = sites.iter().map(|(id, site)| (*id, site.dtype)).collect();
    Ok(module.apply_reparameterization(Packer { weights, dtypes }))
}

struct Packer {
    weights: HashMap<ParamId, PackedMatrix>,
    dtypes: HashMap<ParamId, DType>,
}

impl Reparameterizer for Packer {
    type Reparam = Quantized;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Quantized>) {
        let Some(packed) = self.weights.remove(&param.id) else { return (param, None) };
        let (device, dtype) = (param.lazy_device(), self.dtypes.get(&param.id).copied().unwrap_or(DType::F32));
        let carrier = placeholder(ParamId::new(), &device, dtype);
        (placeholder(param.id, &device, dtype), Some(Quantized { packed, carrier }))
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
            if container == REPARAMETERIZATION && name == Quantized::NAME {
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
