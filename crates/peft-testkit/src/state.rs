//! Values in and out of a model: random states that are the same on every device, and what a device made of them.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor, TensorData};
use peft_core::{ParamMapper, ParamVisitor, PathStack, map_params, visit_params};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use crate::Failure;

/// Spread of random weights and adapters.
const SPREAD: f32 = 0.3;

/// The values of a tensor in row-major order.
///
/// # Errors
/// When the device fails.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f64>, Failure> {
    let data = tensor.try_into_data().map_err(|e| format!("{e:?}"))?;
    Ok(data.iter::<f64>().collect())
}

/// The largest absolute difference; infinite for different lengths, not a number if a value is not.
pub fn difference(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, worse)
}

/// The largest absolute difference relative to the largest expected value.
pub(crate) fn deviation(found: &[f64], expected: &[f64]) -> f64 {
    let scale = expected.iter().map(|value| value.abs()).fold(0.0, worse);
    difference(found, expected) / if scale == 0.0 { 1.0 } else { scale }
}

/// The largest [`deviation`] over tensors of the same names.
pub(crate) fn deviation_of(found: &BTreeMap<String, Vec<f64>>, expected: &BTreeMap<String, Vec<f64>>) -> f64 {
    if !found.keys().eq(expected.keys()) {
        return f64::INFINITY;
    }
    found.iter().map(|(name, values)| deviation(values, &expected[name])).fold(0.0, worse)
}

/// The larger of two deviations; not a number if one is not, which `f64::max` would drop.
pub(crate) fn worse(a: f64, b: f64) -> f64 {
    if b <= a || a.is_nan() { a } else { b }
}

/// `count` values from `N(0, std²)`.
pub(crate) fn normal(count: usize, std: f32, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| std * rng.sample::<f32, _>(StandardNormal)).collect()
}

/// Which parameters of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Part {
    /// The base, in that type. Scales of norms are about one.
    Base(DType),
    /// The adapters, in their own type.
    Adapter,
}

/// Gives every adapter tensor of `module` values from `N(0, 0.3²)`, the same on every device: at its initial state an adapter is an
/// identity, which hides half of all mistakes.
pub fn fill_adapter<T: Module>(module: T) -> T {
    fill(module, Part::Adapter, 2)
}

pub(crate) fn fill<T: Module>(module: T, part: Part, seed: u64) -> T {
    map_params(module, &mut Filler { part, rng: ChaCha8Rng::seed_from_u64(seed) })
}

struct Filler {
    part: Part,
    rng: ChaCha8Rng,
}

impl ParamMapper for Filler {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let location = at.locate();
        let dtype = match (self.part, location.field) {
            (Part::Base(dtype), None) => Some(dtype),
            (Part::Adapter, Some(_)) => None,
            _ => return param,
        };
        let (rng, mean) = (&mut self.rng, if location.param == "gamma" { 1.0 } else { 0.0 });
        param.map(|old| {
            let (shape, trained) = (old.shape(), old.is_require_grad());
            let values: Vec<f32> =
                (0..shape.num_elements()).map(|_| mean + SPREAD * rng.sample::<f32, _>(StandardNormal)).collect();
            let target = (&old.device(), dtype.unwrap_or(old.dtype()));
            Tensor::from_data(TensorData::new(values, shape), target).set_require_grad(trained)
        })
    }
}

/// What a [`Reader`] takes of each parameter.
enum Take<'a> {
    /// Values of frozen base parameters.
    Frozen,
    /// Values of adapter tensors.
    Adapter,
    /// Gradients of adapter tensors.
    Gradient(&'a GradientsParams),
    /// Whether the parameter is trained.
    Trained,
}

struct Reader<'a> {
    take: Take<'a>,
    values: Result<BTreeMap<String, Vec<f64>>, Failure>,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl<'a> Reader<'a> {
    fn read<T: Module>(module: &T, take: Take<'a>) -> Self {
        let mut reader = Reader { take, values: Ok(BTreeMap::new()), shapes: BTreeMap::new() };
        visit_params(module, &mut reader);
        reader
    }
}

impl ParamVisitor for Reader<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let Ok(values) = &mut self.values else { return };
        let location = at.locate();
        let (name, in_adapter) = match location.field {
            Some(field) => (format!("{}:{field}", location.module), true),
            None => (at.path(), false),
        };
        let found = match &self.take {
            Take::Frozen if !in_adapter && !param.is_require_grad() => read(param.base()),
            Take::Adapter if in_adapter => read(param.base()),
            Take::Gradient(grads) if in_adapter => match grads.get::<D>(param.id) {
                Some(grad) => read(grad),
                None => Err(format!("{name} has no gradient").into()),
            },
            Take::Trained => Ok(vec![f64::from(u8::from(param.is_require_grad()))]),
            _ => return,
        };
        self.shapes.insert(name.clone(), param.lazy_shape().to_vec());
        match found {
            Ok(found) => drop(values.insert(name, found)),
            Err(failure) => self.values = Err(failure),
        }
    }
}

/// Values of the base parameters that are frozen, by path.
pub(crate) fn frozen<T: Module>(module: &T) -> Result<BTreeMap<String, Vec<f64>>, Failure> {
    Reader::read(module, Take::Frozen).values
}

/// Values of the adapter tensors, by `path of the layer:field`.
pub(crate) fn adapter<T: Module>(module: &T) -> Result<BTreeMap<String, Vec<f64>>, Failure> {
    Reader::read(module, Take::Adapter).values
}

/// Shapes of the adapter tensors, by `path of the layer:field`.
pub(crate) fn adapter_shapes<T: Module>(module: &T) -> BTreeMap<String, Vec<usize>> {
    Reader::read(module, Take::Adapter).shapes
}

/// Gradients of the adapter tensors, which must all have one, by `path of the layer:field`.
pub(crate) fn gradients<T: Module>(module: &T, grads: &GradientsParams) -> Result<BTreeMap<String, Vec<f64>>, Failure> {
    Reader::read(module, Take::Gradient(grads)).values
}

/// One for each trained parameter and zero for each frozen one, by path.
pub(crate) fn trained<T: Module>(module: &T) -> Result<BTreeMap<String, Vec<f64>>, Failure> {
    Reader::read(module, Take::Trained).values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deviation_is_relative_to_the_largest_value() {
        assert_eq!(deviation(&[1.0, -4.0], &[2.0, -4.0]), 0.25);
        assert_eq!(deviation(&[0.5], &[0.0]), 0.5);
        assert_eq!(deviation(&[], &[1.0]), f64::INFINITY);
        for found in [[f64::NAN, 1.0], [1.0, f64::NAN], [f64::INFINITY, 1.0]] {
            assert!(!deviation(&found, &[1.0, 1.0]).is_finite());
        }
    }
}
