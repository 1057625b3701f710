//! Merge truth: whether what a merge changed is still there once the merged weights are packed.
//!
//! A merged adapter changes a weight by `delta = W' − W`; packing it changes it by about as much as packing `W` does, `error = W − Q(W)`. Where
//! the error is larger than the delta, the fine-tuning is drowned in roundings.

use std::collections::HashMap;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use peft_core::{ParamVisitor, PathStack, Problem, scan, visit_params};
use serde::Serialize;

use crate::quantize::rows;
use crate::{Format, Quantization};

/// What packing does to one layer beside what merging did to it, as absolute differences of weights; made by [`merge_truth`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerTruth {
    /// Path of the layer.
    pub path: String,
    /// `max |W − Q(W)|`
    pub largest_error: f32,
    /// `mean |W − Q(W)|`
    pub mean_error: f32,
    /// `max |W' − W|`
    pub largest_delta: f32,
    /// `mean |W' − W|`
    pub mean_delta: f32,
}

impl LayerTruth {
    /// `mean_error / mean_delta`: infinite where only packing changes the weight, zero where packing changes nothing.
    pub fn ratio(&self) -> f32 {
        if self.mean_error == 0.0 { 0.0 } else { self.mean_error / self.mean_delta }
    }

    /// Whether packing changes the weight by more than merging did.
    pub fn drowned(&self) -> bool {
        self.mean_error > self.mean_delta
    }
}

/// Compares, for each layer that `quantization` packs and that differs between `base` and `merged`, what packing changes with what merging
/// changed: `|W − Q(W)|` and `|W' − W|`, value by value, in the order of the visit.
///
/// Both models are dense; what made the difference does not matter. One layer's values are in memory at a time.
///
/// # Errors
/// [`peft_core::Error::Truth`] with every reason at once: a weight is packed, `merged` still carries an adapter, a layer of `base` is not in
/// `merged` or has another shape there, a weight is not finite, or the device does not hand it out. And when an entry of `pattern` is no
/// regular expression.
pub fn merge_truth<T: Module>(base: &T, merged: &T, quantization: &Quantization) -> peft_core::Result<Vec<LayerTruth>> {
    let (mut formats, mut problems) = (HashMap::new(), Vec::new());
    for site in scan(base).sites {
        let Some(format) = quantization.format_of(&site)? else { continue };
        if site.packed.is_some() {
            let what = "the weight is packed; merge truth needs the dense one".to_owned();
            problems.push(Problem::Other { path: site.path, what });
        } else {
            formats.insert(site.path, format);
        }
    }
    problems.extend(scan(merged).adapted.into_iter().map(|path| Problem::AlreadyAdapted { path }));
    let mut weights = Weights { formats, weights: HashMap::new() };
    if problems.is_empty() {
        visit_params(merged, &mut weights);
    }
    let mut judge = Judge { merged: weights, truths: Vec::new(), problems };
    if judge.problems.is_empty() {
        visit_params(base, &mut judge);
    }
    let Judge { truths, problems, .. } = judge;
    if problems.is_empty() { Ok(truths) } else { Err(peft_core::Error::Truth { problems }) }
}

/// A weight: its shape, and what reads its values as they are packed.
struct Weight {
    shape: Vec<usize>,
    rows: Box<dyn FnOnce() -> Result<Vec<f32>, String>>,
}

impl Weight {
    fn of<const D: usize>(param: &Param<Tensor<D>>) -> Self {
        let weight = param.base();
        Self { shape: param.lazy_shape().to_vec(), rows: Box::new(|| rows(weight)) }
    }
}

/// The weights of a model that are to be judged. They share the model's storage.
struct Weights {
    formats: HashMap<String, Format>,
    weights: HashMap<String, Weight>,
}

impl Weights {
    /// The layer whose weight the parameter at this place is, and its format.
    fn layer(&self, at: &PathStack) -> Option<(String, Format)> {
        let location = at.locate();
        let format = self.formats.get(&location.module)?;
        (location.field.is_none() && location.param == "weight").then_some((location.module, *format))
    }
}

impl ParamVisitor for Weights {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        if let Some((path, _)) = self.layer(at) {
            self.weights.insert(path, Weight::of(param));
        }
    }
}

/// Compares the weights of the base with those of the merged model.
struct Judge {
    merged: Weights,
    truths: Vec<LayerTruth>,
    problems: Vec<Problem>,
}

impl ParamVisitor for Judge {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let Some((path, format)) = self.merged.layer(at) else { return };
        let Some(merged) = self.merged.weights.remove(&path) else {
            let what = "the merged model has no dense weight here".to_owned();
            return self.problems.push(Problem::Other { path, what });
        };
        let base = Weight::of(param);
        if base.shape != merged.shape {
            return self.problems.push(Problem::Shape { name: path, expected: base.shape, found: merged.shape });
        }
        match truth(&path, format, base, merged) {
            Ok(truth) => self.truths.extend(truth),
            Err(what) => self.problems.push(Problem::Other { path, what }),
        }
    }
}

/// `None` when the weights are equal; `Err` says why they cannot be compared.
fn truth(path: &str, format: Format, base: Weight, merged: Weight) -> Result<Option<LayerTruth>, String> {
    let matrix: usize = base.shape.iter().rev().take(2).product();
    let (base, merged) = ((base.rows)()?, (merged.rows)()?);
    if base == merged {
        return Ok(None);
    }
    let (largest_delta, mean_delta) = distance(&merged, &base);
    if !mean_delta.is_finite() {
        return Err("the merged weight is not finite".to_owned());
    }
    let (mut largest_error, mut mean_error) = (0.0_f32, 0.0);
    for rows in base.chunks(matrix) {
        let (largest, mean) = distance(rows, &format.pack(rows).map_err(|e| e.to_string())?.unpack());
        largest_error = largest_error.max(largest);
        mean_error += mean * matrix as f32 / base.len() as f32;
    }
    Ok(Some(LayerTruth { path: path.to_owned(), largest_error, mean_error, largest_delta, mean_delta }))
}

/// Largest and mean absolute difference.
fn distance(a: &[f32], b: &[f32]) -> (f32, f32) {
    let distances = || a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let sum: f64 = distances().map(f64::from).sum();
    (distances().fold(0.0, f32::max), (sum / a.len().max(1) as f64) as f32)
}

#[cfg(test)]
mod tests {
    use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
    use burn::tensor::Device;
    use peft_core::{ParamMapper, map_params};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use rand_distr::StandardNormal;

    use super::*;
    use crate::quantize;

    const D_IN: usize = 48;
    const D_OUT: usize = 64;

    #[derive(Module, Debug)]
    struct Model {
        embed: Embedding,
        up: Linear,
        down: Linear,
        same: Linear,
        lm_head: Linear,
    }

    fn model() -> Model {
        let device = Device::flex();
        let linear = || LinearConfig::new(D_IN, D_OUT).init(&device);
        let embed = EmbeddingConfig::new(8, D_IN).init(&device);
        Model { embed, up: linear(), down: linear(), same: linear(), lm_head: linear() }
    }

    /// Adds values from `N(0, std²)`, or one value everywhere, to the parameters whose path begins so.
    struct Change(Vec<(&'static str, f32)>, ChaCha8Rng);

    impl Change {
        fn of(model: &Model, changes: &[(&'static str, f32)]) -> Model {
            map_params(model.clone(), &mut Self(changes.to_vec(), ChaCha8Rng::seed_from_u64(1)))
        }
    }

    impl ParamMapper for Change {
        fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some((_, std)) = self.0.iter().find(|(path, _)| at.path().starts_with(path)) else { return param };
            param.map(|tensor| {
                let shape = tensor.shape();
                let delta: Vec<f32> =
                    (0..shape.num_elements()).map(|_| std * self.1.sample::<f32, _>(StandardNormal)).collect();
                tensor + Tensor::<1>::from_floats(delta.as_slice(), &Device::flex()).reshape::<D, _>(shape)
            })
        }
    }

    fn values(layer: &Linear) -> Vec<f32> {
        layer.weight.base().into_data().try_to_vec().unwrap()
    }

    #[test]
    fn a_small_change_is_drowned_and_a_large_one_is_not() {
        let base = model();
        let merged = Change::of(&base, &[("embed", 1.0), ("up", 0.5), ("down", 1e-4), ("lm_head", 1.0)]);
        let truths = merge_truth(&base, &merged, &Quantization::default()).unwrap();
        let paths: Vec<&str> = truths.iter().map(|truth| truth.path.as_str()).collect();
        assert_eq!(paths, ["up", "down"]);
        for (truth, base, merged) in [(&truths[0], &base.up, &merged.up), (&truths[1], &base.down, &merged.down)] {
            let (weight, merged) = (values(base), values(merged));
            // What is packed is the transpose, `[d_out, d_in]`.
            let rows: Vec<f32> = (0..D_OUT * D_IN).map(|i| weight[i % D_IN * D_OUT + i / D_IN]).collect();
            let unpacked = Format::NF4.pack(&rows).unwrap().unpack();
            let (mut largest, mut sum) = ([0.0_f32; 2], [0.0_f32; 2]);
            for (at, value) in weight.iter().enumerate() {
                let unpacked = unpacked[at % D_OUT * D_IN + at / D_OUT];
                for (kind, other) in [unpacked, merged[at]].into_iter().enumerate() {
                    largest[kind] = largest[kind].max((value - other).abs());
                    sum[kind] += (value - other).abs();
                }
            }
            assert_eq!([truth.largest_error, truth.largest_delta], largest);
            for (found, sum) in [truth.mean_error, truth.mean_delta].into_iter().zip(sum) {
                assert!((found / (sum / weight.len() as f32) - 1.0).abs() < 1e-4, "{found}");
            }
            assert_eq!(truth.ratio(), truth.mean_error / truth.mean_delta);
        }
        assert_eq!([truths[0].drowned(), truths[1].drowned()], [false, true]);
        let none = LayerTruth { mean_delta: 0.0, ..truths[0].clone() };
        assert_eq!((none.ratio(), LayerTruth { mean_error: 0.0, ..none.clone() }.ratio()), (f32::INFINITY, 0.0));
    }

    #[test]
    fn what_cannot_be_compared_is_named() {
        let base = model();
        let packed = quantize(base.clone(), &Quantization::default()).unwrap();
        let refused = |base: &Model, merged: &Model| {
            let error = merge_truth(base, merged, &Quantization::default()).unwrap_err();
            assert!(matches!(error, peft_core::Error::Truth { .. }));
            error.to_string()
        };
        assert!(refused(&packed, &base).contains("up: the weight is packed"));
        assert!(refused(&base, &packed).contains("down: the merged model has no dense weight here"));
        let infinite = Change::of(&base, &[("same", f32::INFINITY)]);
        assert!(refused(&base, &infinite).contains("same: the merged weight is not finite"));
        let other = Model { up: LinearConfig::new(D_IN, 2).init(&Device::flex()), ..base.clone() };
        assert!(refused(&base, &other).contains("up: expected shape [48, 64], found [48, 2]"));
        assert!(merge_truth(&base, &base, &Quantization::default()).unwrap().is_empty());
    }
}
