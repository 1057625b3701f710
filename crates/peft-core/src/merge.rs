//! Merging: the adapter folded into the weights, as a new value.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::rebuild::Adapters;
use crate::{
    Error, Method, ParamMapper, ParamVisitor, PathStack, Problem, Result, Site, map_params, scan, visit_params,
};

/// Folds the adapter of `module` into its weights and biases and drops it; the result lives on the plain device, ready for inference.
///
/// `module` is consumed, but cloning it before is cheap and un-merging is keeping that clone: nothing is subtracted, so nothing drifts.
/// The sum is taken in the adapter's precision and rounded once, to the weight's.
///
/// # Errors
/// [`Error::Merge`] when the adapter is no part of a weight, a merged weight is not finite, or the adapter has a bias and the layer has none. All layers at once.
pub fn merge<T: Module, M: Method>(module: T, method: &M) -> Result<T> {
    let module = module.valid();
    let found = scan(&module);
    let (mut adapters, mut biases) = (Adapters::of(&module), Biases::default());
    visit_params(&module, &mut biases);
    let (mut shifts, mut problems) = (BTreeMap::new(), Vec::new());
    for site in found.sites.iter().filter(|site| found.adapted.contains(&site.path)) {
        let mut problem = |what: &str| {
            let what = format!("{what}; keep the adapter separate");
            problems.push(Problem::Other { path: site.path.clone(), what });
        };
        if let Some(what) = method.unmergeable(site) {
            problem(&what);
        } else if let Some(shift) = shift_of(method, site, &mut adapters, &biases)? {
            if !site.has_bias {
                problem("the adapter adds a bias, and the layer has none to merge it into");
            }
            shifts.insert(site.path.clone(), shift);
        }
    }
    let mut finish = Finish { shifts, adapted: found.adapted, problems };
    let module = map_params(module.materialize(), &mut finish);
    if finish.problems.is_empty() { Ok(module) } else { Err(Error::Merge { problems: finish.problems }) }
}

/// What layers add to their output, by their path.
#[derive(Default)]
struct Biases(BTreeMap<String, Tensor<1>>);

impl ParamVisitor for Biases {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        if location.is_bias() {
            self.0.insert(location.module, param.base().flatten(0, D - 1));
        }
    }
}

/// What the adapter adds to the output of its layer besides the layer's bias.
fn shift_of<M: Method>(method: &M, site: &Site, adapters: &mut Adapters, biases: &Biases) -> Result<Option<Tensor<1>>> {
    if method.needs_activation(site).is_none() {
        return Ok(None);
    }
    let adapter = adapters.take(method, site)?;
    Ok(adapter.and_then(|adapter| M::activation(&adapter)?.shift(biases.0.get(&site.path))))
}

/// Adds the shifts and looks for values that are not finite.
struct Finish {
    shifts: BTreeMap<String, Tensor<1>>,
    adapted: BTreeSet<String>,
    problems: Vec<Problem>,
}

impl ParamMapper for Finish {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let location = at.locate();
        if !self.adapted.contains(&location.module) {
            return param;
        }
        let param = match self.shifts.remove(&location.module) {
            Some(shift) if location.is_bias() => param.map(|bias| {
                let shape = bias.shape();
                (bias.clone().cast(shift.dtype()) + shift.reshape(shape)).cast(bias.dtype())
            }),
            Some(shift) => {
                self.shifts.insert(location.module.clone(), shift);
                param
            }
            None => param,
        };
        if !param.base().is_finite().all().into_scalar::<bool>() {
            let what = format!("the merged {} is not finite", location.param);
            self.problems.push(Problem::Other { path: location.module, what });
        }
        param
    }
}
