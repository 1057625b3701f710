//! Merging: the adapter folded into the weights, as a new value.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::{
    Error, Method, ParamMapper, ParamVisitor, PathStack, Problem, Result, Site, map_params, scan, visit_params,
};

/// Folds the adapter of `module` into its weights and biases and drops it; the result lives on the plain device, ready for inference.
///
/// `module` is consumed, but cloning it before is cheap and un-merging is keeping that clone: nothing is subtracted, so nothing drifts.
/// The sum is taken in the adapter's precision and rounded once, to the weight's.
///
/// # Errors
/// [`Error::Merge`] when a merged weight is not finite, or the adapter has a bias and the layer has none. All layers at once.
pub fn merge<T: Module, M: Method>(module: T, method: &M) -> Result<T> {
    let module = module.valid();
    let mut fields = Fields::default();
    visit_params(&module, &mut fields);
    let sites = scan(&module).sites;
    let mut biases = BTreeMap::new();
    let mut problems = fields.problems;
    for (path, values) in &fields.values {
        let Some(site) = sites.iter().find(|site: &&Site| site.path == *path) else { continue };
        let Some(delta) = method.bias_delta(site, values)? else { continue };
        if site.has_bias {
            biases.insert(path.clone(), delta);
        } else {
            let what = "the adapter adds a bias, and the layer has none to merge it into; keep the adapter separate"
                .to_owned();
            problems.push(Problem::Other { path: path.clone(), what });
        }
    }
    let adapted = fields.values.into_keys().collect();
    let mut finish = Finish { biases, adapted, problems };
    let module = map_params(module.materialize(), &mut finish);
    if finish.problems.is_empty() { Ok(module) } else { Err(Error::Merge { problems: finish.problems }) }
}

/// The adapters' tensors by module path and field.
#[derive(Default)]
struct Fields {
    values: BTreeMap<String, BTreeMap<String, Vec<f32>>>,
    problems: Vec<Problem>,
}

impl ParamVisitor for Fields {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        let Some(field) = location.field else { return };
        match param.base().try_into_data() {
            Ok(data) => {
                self.values.entry(location.module).or_default().insert(field, data.iter::<f32>().collect());
            }
            Err(e) => self.problems.push(Problem::Other { path: at.path(), what: format!("{e:?}") }),
        }
    }
}

/// Adds the bias parts and looks for values that are not finite.
struct Finish {
    biases: BTreeMap<String, Vec<f32>>,
    adapted: Vec<String>,
    problems: Vec<Problem>,
}

impl ParamMapper for Finish {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let location = at.locate();
        if location.param == "weight" && self.adapted.contains(&location.module) {
            let finite = param.base().is_finite().all().into_scalar::<bool>();
            if !finite {
                let what = "the merged weight is not finite".to_owned();
                self.problems.push(Problem::Other { path: location.module, what });
            }
            return param;
        }
        match self.biases.remove(&location.module) {
            Some(delta) if location.param == "bias" => param.map(|bias| {
                let delta = Tensor::<1>::from_data(delta.as_slice(), (&bias.device(), bias.dtype()));
                let shape = bias.shape();
                bias + delta.reshape(shape)
            }),
            Some(delta) => {
                self.biases.insert(location.module, delta);
                param
            }
            None => param,
        }
    }
}
