//! Merging: the adapter folded into the weights, as a new value.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};

use crate::{Error, Method, ParamMapper, ParamVisitor, PathStack, Problem, Result, map_params, scan, visit_params};

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
    let mut parts = Parts::default();
    visit_params(&module, &mut parts);
    let (mut problems, mut shifts) = (parts.problems, BTreeMap::new());
    for site in found.sites.iter().filter(|site| found.adapted.contains(&site.path)) {
        let mut refuse = |what: &str| {
            let what = format!("{what}; keep the adapter separate");
            problems.push(Problem::Other { path: site.path.clone(), what });
        };
        if let Some(reason) = method.unmergeable(site) {
            refuse(&reason);
            continue;
        }
        // A parameter shows its adapter to nobody who visits it, so it is made again, with its values.
        let values = parts.fields.remove(&site.path).unwrap_or_default();
        let adapter = map_params(method.init(site, 0)?, &mut Values(values));
        let bias = parts.biases.get(&site.path);
        match M::activation(&adapter).and_then(|adapter| adapter.shift(bias)) {
            Some(_) if bias.is_none() => refuse("the adapter adds a bias, and the layer has none to merge it into"),
            Some(shift) => drop(shifts.insert(site.path.clone(), shift)),
            None => {}
        }
    }
    let mut finish = Finish { shifts, adapted: found.adapted, problems };
    let module = map_params(module.materialize(), &mut finish);
    if finish.problems.is_empty() { Ok(module) } else { Err(Error::Merge { problems: finish.problems }) }
}

/// What the layers add to their output, by path; and the adapters' tensors, by path and field.
#[derive(Default)]
struct Parts {
    biases: BTreeMap<String, Tensor<1>>,
    fields: BTreeMap<String, BTreeMap<String, TensorData>>,
    problems: Vec<Problem>,
}

impl ParamVisitor for Parts {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        if location.is_bias() {
            self.biases.insert(location.module, param.base().flatten(0, D - 1));
            return;
        }
        let Some(field) = location.field else { return };
        match param.base().try_into_data() {
            Ok(data) => drop(self.fields.entry(location.module).or_default().insert(field, data)),
            Err(e) => self.problems.push(Problem::Other { path: at.path(), what: format!("{e:?}") }),
        }
    }
}

/// Puts an adapter's values into a fresh one.
struct Values(BTreeMap<String, TensorData>);

impl ParamMapper for Values {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.remove(&at.path()) {
            Some(data) => param.map(|fresh| Tensor::from_data(data, (&fresh.device(), fresh.dtype()))),
            None => param,
        }
    }
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
