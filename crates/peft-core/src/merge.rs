//! Merging: the adapter folded into the weights, as a new value.

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;

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
    let adapted = found.sites.iter().filter(|site| found.adapted.contains(&site.path));
    let refused = adapted.filter_map(|site| {
        let what = method.unmergeable(site)?;
        Some(Problem::Other { path: site.path.clone(), what: format!("{what}; keep the adapter separate") })
    });
    let mut problems: Vec<Problem> = refused.collect();
    let mut biases = Biases::default();
    visit_params(&module, &mut biases);
    let mut shifts =
        Shifts::<M> { stack: PathStack::default(), biases: biases.0, shifts: BTreeMap::new(), method: PhantomData };
    module.visit(&mut shifts);
    let Shifts { biases, shifts, .. } = shifts;
    problems.extend(shifts.keys().filter(|path| !biases.contains_key(*path)).map(|path| {
        let what = "the adapter adds a bias, and the layer has none to merge it into; keep the adapter separate";
        Problem::Other { path: path.clone(), what: what.to_owned() }
    }));
    let mut finish = Finish { shifts, adapted: found.adapted, problems };
    let module = map_params(module.materialize(), &mut finish);
    if finish.problems.is_empty() { Ok(module) } else { Err(Error::Merge { problems: finish.problems }) }
}

/// What the layers add to their output, by path.
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

/// What the adapters add to that. They sit in weights, packed ones among them, so this visit sees everything.
struct Shifts<M> {
    stack: PathStack,
    biases: BTreeMap<String, Tensor<1>>,
    shifts: BTreeMap<String, Tensor<1>>,
    method: PhantomData<M>,
}

impl<M: Method> ModuleVisitor for Shifts<M> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.stack.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.stack.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let activation = param.reparameterization::<M::Adapter>().and_then(M::activation);
        let path = self.stack.locate().module;
        if let Some(shift) = activation.and_then(|adapter| adapter.shift(self.biases.get(&path))) {
            self.shifts.insert(path, shift);
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
