//! Weights into a model and out of it, by Hugging Face's names.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use peft_core::files::transpose;
use peft_core::{ParamMapper, ParamVisitor, PathStack, hf_name, map_params, visit_params};

use crate::weights::Weights;
use crate::{Error, Result};

/// Puts `weights` into `module`: any Burn module whose paths are the names of `transformers`.
///
/// `ignored` says which tensors of the source may go unused, for instance buffers.
///
/// # Errors
/// [`Error::Weights`] with every missing, unknown and misshapen tensor; or the first that cannot be read.
pub fn load_weights<M: Module>(module: M, weights: &dyn Weights, ignored: impl Fn(&str) -> bool) -> Result<M> {
    let mut loader = Loader { weights, used: BTreeSet::new(), problems: Vec::new(), failed: None };
    let module = map_params(module, &mut loader);
    let Loader { used, mut problems, failed, .. } = loader;
    if let Some(error) = failed {
        return Err(error);
    }
    let unused = weights.tensors().iter().filter(|t| !used.contains(&t.name) && !ignored(&t.name));
    problems.extend(unused.map(|t| format!("  - {}: not part of this model", t.name)));
    if problems.is_empty() { Ok(module) } else { Err(Error::Weights { path: weights.path().to_owned(), problems }) }
}

struct Loader<'a> {
    weights: &'a dyn Weights,
    used: BTreeSet<String>,
    problems: Vec<String>,
    failed: Option<Error>,
}

impl ParamMapper for Loader<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let hf = hf_name(&at.locate(), D);
        let shape = param.lazy_shape().to_vec();
        let expected: Vec<usize> = if hf.transposed { shape.iter().rev().copied().collect() } else { shape.clone() };
        // GPT-2's own checkpoints leave out the outermost name.
        let short = hf.name.strip_prefix("transformer.").unwrap_or(&hf.name);
        let Some(info) = self.weights.find(&hf.name).or_else(|| self.weights.find(short)) else {
            self.problems.push(format!("  - {}: missing; expected shape {expected:?}", hf.name));
            return param;
        };
        self.used.insert(info.name.clone());
        if info.shape != expected {
            self.problems.push(format!("  - {}: expected shape {expected:?}, found {:?}", info.name, info.shape));
            return param;
        }
        if self.failed.is_some() {
            return param;
        }
        match self.weights.read(info) {
            Ok(values) => {
                let values = if hf.transposed { transpose(&values, expected[0], expected[1]) } else { values };
                // The random initial value is never made: the lazy parameter is replaced, not read.
                let value = Tensor::from_data(TensorData::new(values, shape), &param.lazy_device());
                Param::initialized(param.id, value).set_require_grad(true)
            }
            Err(error) => {
                self.failed = Some(error);
                param
            }
        }
    }
}

/// One tensor of a model, by Hugging Face's name and in its orientation.
#[derive(Clone, Debug, PartialEq)]
pub struct HfTensor {
    /// In the file's orientation.
    pub shape: Vec<usize>,
    /// Row-major.
    pub values: Vec<f32>,
}

/// The parameters of `module` by Hugging Face's names, those for which `wanted` holds.
///
/// # Errors
/// When the device fails to hand out a tensor.
pub fn export_weights<M: Module>(module: &M, wanted: impl Fn(&str) -> bool) -> Result<BTreeMap<String, HfTensor>> {
    let mut exporter = Exporter { wanted, tensors: BTreeMap::new(), failed: None };
    visit_params(module, &mut exporter);
    exporter.failed.map_or(Ok(exporter.tensors), Err)
}

struct Exporter<F> {
    wanted: F,
    tensors: BTreeMap<String, HfTensor>,
    failed: Option<Error>,
}

impl<F: Fn(&str) -> bool> ParamVisitor for Exporter<F> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        let hf = hf_name(&location, D);
        if location.field.is_some() || !(self.wanted)(&hf.name) || self.failed.is_some() {
            return;
        }
        let shape = param.lazy_shape().to_vec();
        match param.base().try_into_data() {
            Ok(data) => {
                let values: Vec<f32> = data.iter::<f32>().collect();
                let tensor = match (hf.transposed, &shape[..]) {
                    (true, [rows, columns]) => {
                        HfTensor { values: transpose(&values, *rows, *columns), shape: vec![*columns, *rows] }
                    }
                    _ => HfTensor { shape, values },
                };
                self.tensors.insert(hf.name, tensor);
            }
            Err(e) => {
                self.failed = Some(Error::format(hf.name, format!("the device could not hand out the tensor: {e:?}")));
            }
        }
    }
}
