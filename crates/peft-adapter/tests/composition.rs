//! Several bottlenecks at one place.
#![allow(clippy::unwrap_used, reason = "everything here is a test")]

use std::path::Path;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft_adapter::{BottleneckConfig, ComposedConfig, Composition};
use peft_core::{AdapterFile, Error, Method as _, Peft, Strictness};
use peft_testkit::{Laws, Seam, Stack, difference, fill_adapter, read, table};

fn adapters() -> Vec<BottleneckConfig> {
    vec![BottleneckConfig::pfeiffer(4.0), BottleneckConfig::houlsby(8.0), BottleneckConfig::parallel(2.0)]
}

fn one(number: usize) -> Composition {
    Composition::Adapter(number)
}

fn base() -> Stack {
    Stack::new(&Device::flex(), DType::F32, true)
}

const SEQ: usize = 5;

fn input(rows: usize) -> (Tensor<2, Int>, Tensor<3>) {
    let device = Device::flex();
    let ids: Vec<i64> = (0..rows * SEQ).map(|at| (7 * at % 32) as i64).collect();
    let x: Vec<f32> = (0..rows * SEQ * 16).map(|at| (at as f32 * 0.37).sin()).collect();
    let ids = Tensor::from_data(TensorData::new(ids, [rows, SEQ]), &device);
    (ids, Tensor::from_data(TensorData::new(x, [rows, SEQ, 16]), &device))
}

fn run(model: &Stack, rows: std::ops::Range<usize>) -> Vec<f64> {
    let (ids, x) = input(4);
    let (ids, x) = (ids.narrow(0, rows.start, rows.len()), x.narrow(0, rows.start, rows.len()));
    read(model.forward(Seam::Activation, ids, x)).unwrap()
}

/// A composition with random values, and a model for each of its adapters alone with the same.
fn apart(composition: Composition) -> (Stack, Vec<Stack>) {
    let method = ComposedConfig::new(adapters(), composition);
    let whole = fill_adapter(base().attach(&method).unwrap());
    let file = AdapterFile::collect(&whole, &method).unwrap();
    let alone = |(number, method): (usize, BottleneckConfig)| {
        let middle = format!(".parts.{number}.");
        let own = |(key, values): (&String, &_)| {
            Some((key.replace(&middle, "."), Clone::clone(values))).filter(|(new, _)| new != key)
        };
        let tensors = file.tensors.iter().filter_map(own).collect();
        let model = base().attach(&method).unwrap();
        let own = AdapterFile { method, base_model: None, task_type: None, base_fingerprint: None, tensors };
        own.fill(model, Path::new("a part"), Strictness::default()).unwrap()
    };
    let parts = adapters().into_iter().enumerate().map(alone).collect();
    (whole, parts)
}

#[test]
fn a_composition_obeys_the_laws() {
    let stack = Composition::Stack(vec![one(0), Composition::Average(vec![(1.0, one(1)), (1.0, one(2))])]);
    let count = |method: &ComposedConfig, site: &peft_core::Site| {
        let inner = |config: &BottleneckConfig| config.init(site, 0).unwrap().num_params();
        method.adapters.iter().map(inner).sum()
    };
    let laws =
        Laws::new(ComposedConfig::new(adapters(), stack), count, ("composition", serde_json::json!({ "stack": [] })))
            .skip("unaware", "a place is there for adapters alone")
            .skip("file", "keys of parts have numbers, which a list of keys cannot have");
    let checks = laws.run(&Device::flex());
    assert!(checks.iter().all(|check| !check.failed()), "\n{}", table(&checks));
}

#[test]
fn a_stack_of_identities_is_the_identity() {
    let stack = Composition::Stack(vec![one(0), one(1), one(2)]);
    let model = base().attach(&ComposedConfig::new(adapters(), stack)).unwrap();
    assert_eq!(run(&model, 0..4), run(&base(), 0..4));
}

#[test]
fn parts_of_a_batch_are_separate_runs() {
    let split = Composition::BatchSplit(vec![(1, one(0)), (2, one(1)), (1, one(2))]);
    let (whole, parts) = apart(split);
    let expected = [run(&parts[0], 0..1), run(&parts[1], 1..3), run(&parts[2], 3..4)].concat();
    assert!(difference(&run(&whole, 0..4), &expected) < 1e-6);
    assert!(difference(&run(&parts[0], 0..4), &run(&parts[1], 0..4)) > 1e-2, "the parts are alike");
}

#[test]
fn parallel_adapters_have_equal_shares() {
    let (whole, parts) = apart(Composition::Parallel(vec![one(2), one(0)]));
    let expected = [run(&parts[2], 0..2), run(&parts[0], 2..4)].concat();
    assert!(difference(&run(&whole, 0..4), &expected) < 1e-6);
}

#[test]
fn parts_of_a_sequence_are_separate_runs() {
    let (whole, parts) = apart(Composition::Split(vec![(2, one(1)), (3, one(0))]));
    let (found, first, second) = (run(&whole, 0..1), run(&parts[1], 0..1), run(&parts[0], 0..1));
    let expected = [&first[..2 * 16], &second[2 * 16..]].concat();
    assert!(difference(&found, &expected) < 1e-6);
}

#[test]
fn an_average_of_one_adapter_is_that_adapter() {
    let (whole, parts) = apart(Composition::Average(vec![(0.3, one(0)), (0.7, one(0))]));
    assert!(difference(&run(&whole, 0..4), &run(&parts[0], 0..4)) < 1e-6);
}

/// Only the fusion is trained, and only it has gradients.
#[test]
fn gradients_of_a_fusion_reach_the_fusion_alone() {
    let device = Device::flex().autodiff();
    let method = ComposedConfig::new(adapters(), Composition::Fuse(vec![0, 1]));
    let model = Stack::new(&device, DType::F32, true).attach(&method).unwrap();
    let model = fill_adapter(model);
    assert_eq!(model.trainable().trainable, 3 * 16 * 16 + 2 * 16);
    let (ids, x) = input(2);
    let (ids, x) = (Tensor::from_data(ids.into_data(), &device), Tensor::from_data(x.into_data(), &device));
    let mut tape = model.forward(Seam::Activation, ids, x).square().sum().backward();
    let grads = GradientsParams::from_module(&mut tape, &model);
    assert_eq!(grads.len(), 5);
}

#[test]
fn a_composition_that_makes_no_sense_is_refused() {
    let refused =
        |composition: Composition, with: &str| match base().attach(&ComposedConfig::new(adapters(), composition)) {
            Err(Error::Config { field, expected, .. }) => {
                assert!(field == "composition" && expected.contains(with), "{expected}");
            }
            other => panic!("expected an error with {with:?}, found {other:?}"),
        };
    refused(one(3), "below 3");
    refused(Composition::Stack(Vec::new()), "at least");
    refused(Composition::Stack(vec![Composition::Parallel(vec![one(0)])]), "outside");
}
