//! Several adapters at one place: bottlenecks and LoRA alike.

use std::path::Path;

use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft_adapter::BottleneckConfig;
use peft_core::{
    AdapterFile, Composable, ComposedConfig, Composition, Error, Peft, Strictness, Targets, composed, load_adapter,
    merge, save_adapter,
};
use peft_lora::LoraConfig;
use peft_testkit::{Seam, Stack, composition_laws, difference, fill_adapter, read, table};

fn bottlenecks() -> [BottleneckConfig; 3] {
    [BottleneckConfig::pfeiffer(4.0), BottleneckConfig::houlsby(8.0), BottleneckConfig::parallel(2.0)]
}

/// The second is in one of the layers alone, and the third drops.
fn loras() -> [LoraConfig; 3] {
    let lora = |rank, names: &[&str]| LoraConfig::new(rank, Targets::modules(names.iter().copied()));
    let both = ["up", "down"];
    [lora(2, &both), lora(3, &["down"]).with_alpha(6.0), lora(4, &both).with_dropout(0.5)]
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
fn apart<M: Composable>(adapters: [M; 3], composition: Composition) -> (Stack, [Stack; 3]) {
    let (mut number, mut files) = (0, Vec::new());
    let alone = adapters.map(|method| {
        number += 1;
        let model = fill_adapter(peft_core::attach(base(), &method, 0).unwrap());
        let mut file = AdapterFile::collect(&model, &method).unwrap();
        // What `fill_adapter` draws is the same for the same path.
        let change = |value: &mut f32| *value *= number as f32 / 2.0;
        file.tensors.values_mut().for_each(|tensor| tensor.values.iter_mut().for_each(change));
        files.push(file.clone());
        file.fill(model, Path::new("a part"), Strictness::default()).unwrap()
    });
    let file = composed(files, composition).unwrap();
    let whole = base().attach(&file.method).unwrap();
    (file.fill(whole, Path::new("the whole"), Strictness::default()).unwrap(), alone)
}

/// The test for both methods.
macro_rules! of_both {
    ($($name:ident: $held:ident;)*) => {$(
        #[test]
        fn $name() {
            $held(bottlenecks());
            $held(loras());
        }
    )*};
}

of_both! {
    a_composition_obeys_the_laws: laws;
    a_stack_of_identities_is_the_identity: stack;
    parts_of_a_batch_are_separate_runs: batch_split;
    parallel_adapters_have_equal_shares: parallel;
    parts_of_a_sequence_are_separate_runs: split;
    an_average_of_one_adapter_is_that_adapter: average;
    gradients_of_a_fusion_reach_the_fusion_alone: fusion;
    a_composition_is_saved_and_loaded: saved;
    a_composition_that_makes_no_sense_is_refused: refused;
}

fn laws<M: Composable>(adapters: [M; 3]) {
    let checks = composition_laws(adapters)
        .unwrap()
        .skip("unaware", "of bottlenecks, a place is there for adapters alone")
        .run(&Device::flex());
    assert!(checks.iter().all(|check| !check.failed()), "\n{}", table(&checks));
}

fn stack<M: Composable>(adapters: [M; 3]) {
    let method = ComposedConfig::new(adapters.into(), Composition::Stack(vec![one(0), one(1), one(2)])).unwrap();
    let model = base().attach(&method).unwrap();
    assert_eq!(run(&model, 0..4), run(&base(), 0..4));
}

fn batch_split<M: Composable>(adapters: [M; 3]) {
    let split = Composition::BatchSplit(vec![(1, one(0)), (2, one(1)), (1, one(2))]);
    let (whole, parts) = apart(adapters, split);
    let expected = [run(&parts[0], 0..1), run(&parts[1], 1..3), run(&parts[2], 3..4)].concat();
    assert!(difference(&run(&whole, 0..4), &expected) < 1e-6);
    assert!(difference(&run(&parts[0], 0..4), &run(&parts[1], 0..4)) > 1e-2, "the parts are alike");
}

fn parallel<M: Composable>(adapters: [M; 3]) {
    let (whole, parts) = apart(adapters, Composition::Parallel(vec![one(2), one(0)]));
    let expected = [run(&parts[2], 0..2), run(&parts[0], 2..4)].concat();
    assert!(difference(&run(&whole, 0..4), &expected) < 1e-6);
}

fn split<M: Composable>(adapters: [M; 3]) {
    let (whole, parts) = apart(adapters, Composition::Split(vec![(2, one(1)), (3, one(0))]));
    let (found, first, second) = (run(&whole, 0..1), run(&parts[1], 0..1), run(&parts[0], 0..1));
    let expected = [&first[..2 * 16], &second[2 * 16..]].concat();
    assert!(difference(&found, &expected) < 1e-6);
}

fn average<M: Composable>(adapters: [M; 3]) {
    let (whole, parts) = apart(adapters, Composition::Average(vec![(0.3, one(0)), (0.7, one(0))]));
    assert!(difference(&run(&whole, 0..4), &run(&parts[0], 0..4)) < 1e-6);
}

/// Only the fusion is trained, and only it has gradients.
fn fusion<M: Composable>(adapters: [M; 3]) {
    let device = Device::flex().autodiff();
    let method = ComposedConfig::new(adapters.into(), Composition::Fuse(vec![0, 2])).unwrap();
    let model = fill_adapter(Stack::new(&device, DType::F32, true).attach(&method).unwrap());
    let sites = peft_core::scan(&model);
    let sites = sites.sites.iter().filter(|site| sites.adapted.contains(&site.path));
    let values = |site: &peft_core::Site| site.d_out * (site.d_in + 2 * site.d_out + 2);
    let (places, trained) = sites.fold((0, 0), |(places, sum), site| (places + 1, sum + values(site)));
    assert_eq!(model.trainable().trainable, trained);
    let (ids, x) = input(2);
    let (ids, x) = (Tensor::from_data(ids.into_data(), &device), Tensor::from_data(x.into_data(), &device));
    let mut tape = model.forward(Seam::Activation, ids, x).square().sum().backward();
    let grads = GradientsParams::from_module(&mut tape, &model);
    assert_eq!(grads.len(), 5 * places);
}

fn saved<M: Composable>(adapters: [M; 3]) {
    let dir = tempfile::tempdir().unwrap();
    let method = ComposedConfig::new(adapters.into(), Composition::Fuse(vec![0, 2])).unwrap();
    let model = fill_adapter(base().attach(&method).unwrap());
    save_adapter(&model, &method, None, dir.path()).unwrap();
    let (loaded, _) = load_adapter::<_, ComposedConfig<M>>(base(), dir.path()).unwrap();
    assert_eq!(run(&loaded, 0..4), run(&model, 0..4));
}

fn refused<M: Composable>(adapters: [M; 3]) {
    let refused = |composition: Composition, with: &str| {
        let method = ComposedConfig::new(adapters.to_vec(), composition).unwrap();
        match base().attach(&method) {
            Err(Error::Config { field, expected, .. }) => {
                assert!(field == "composition" && expected.contains(with), "{expected}");
            }
            other => panic!("expected an error with {with:?}, found {other:?}"),
        }
    };
    refused(one(3), "below 3");
    refused(Composition::Stack(Vec::new()), "at least");
    refused(Composition::BatchSplit(vec![(1, one(0)), (1, Composition::Parallel(Vec::new()))]), "at least");
    refused(Composition::Average(vec![(1.0, one(0)), (-1.0, one(1))]), "other than zero");
    refused(Composition::Stack(vec![Composition::Parallel(vec![one(0)])]), "outside");
}

/// Behind the embeddings the first adapter acts, or none, and not on a part of the input.
#[test]
fn a_composition_has_the_first_adapter_behind_the_embeddings() {
    let [first, ..] = bottlenecks();
    let adapters = || [first.clone().with_inv_adapter(2.0), first.clone(), first.clone().with_inv_adapter(4.0)];
    laws(adapters());
    let places = |composition: Composition| {
        let method = ComposedConfig::new(adapters().into(), composition).unwrap();
        peft_core::scan(&base().attach(&method).unwrap()).adapted.len()
    };
    assert_eq!(places(Composition::Stack(vec![one(0), one(1)])), 2);
    assert_eq!(places(Composition::Stack(vec![one(1), one(0)])), 1);
    let (stack, [alone, ..]) = apart(adapters(), Composition::Stack(vec![one(0), one(2)]));
    let entered = |model: &Stack| read(model.invertible_adapters.enter(input(2).1)).unwrap();
    assert_eq!(entered(&stack), entered(&alone));
    let split = ComposedConfig::new(adapters().into(), Composition::BatchSplit(vec![(1, one(1)), (3, one(2))]));
    let error = base().attach(&split.unwrap()).unwrap_err().to_string();
    assert!(error.contains("behind the embeddings"), "{error}");
}

/// Updates of weights that add up are part of the weight; what acts on parts of the input is not.
#[test]
fn a_stack_of_lora_merges_and_a_split_does_not() {
    let [first, second, _] = loras();
    let adapters = || [first.clone(), second.clone(), first.clone()];
    let stack = Composition::Stack(vec![one(0), one(1)]);
    let (whole, _) = apart(adapters(), stack.clone());
    let merged = merge(whole.clone(), &ComposedConfig::new(adapters().into(), stack).unwrap()).unwrap();
    assert!(difference(&run(&merged, 0..4), &run(&whole, 0..4)) < 1e-5);
    let split = Composition::Parallel(vec![one(0), one(1)]);
    let (whole, _) = apart(adapters(), split.clone());
    let error = merge(whole, &ComposedConfig::new(adapters().into(), split).unwrap()).unwrap_err();
    assert!(error.to_string().contains("a part of the input"), "{error}");
}

/// The fusion of LoRA's updates, against its formula: `h + Σᵢ softmaxᵢ(q(x)·k(uᵢ))·v(uᵢ)`.
#[test]
fn a_fusion_of_lora_is_attention_over_updates() {
    let device = Device::flex();
    let lora = [2, 3, 4].map(|rank| LoraConfig::new(rank, Targets::modules(["up"])).with_alpha(6.0));
    let method = ComposedConfig::new(lora.to_vec(), Composition::Fuse(vec![0, 1, 2])).unwrap();
    let model = fill_adapter(base().attach(&method).unwrap());
    let tensors = AdapterFile::collect(&model, &method).unwrap().tensors;
    let tensor = |key: &str| {
        let values = &tensors[&format!("up.{key}")];
        let shape = match values.shape[..] {
            [columns] => [1, columns],
            _ => [values.shape[0], values.shape[1]],
        };
        let tensor = Tensor::<2>::from_data(TensorData::new(values.values.clone(), shape), &device);
        if values.shape.len() == 2 { tensor.transpose() } else { tensor }
    };
    let x: Tensor<2> = input(2).1.reshape([2 * SEQ, 16]);
    let affine = |x: Tensor<2>, name: &str| {
        x.matmul(tensor(&format!("adapter_fusion.{name}.weight"))) + tensor(&format!("adapter_fusion.{name}.bias"))
    };
    let updates: Vec<Tensor<2>> = (0..3)
        .map(|at| {
            let scale = method.adapters[at].scale_of("up").unwrap();
            let part = |name: &str| tensor(&format!("parts.{at}.{name}.weight"));
            x.clone().matmul(part("lora_A")).matmul(part("lora_B")) * scale
        })
        .collect();
    let query = affine(x.clone(), "query");
    let scores = updates.iter().map(|update| (query.clone() * affine(update.clone(), "key")).sum_dim(1));
    let p = burn::tensor::activation::softmax(Tensor::cat(scores.collect(), 1), 1);
    let value = tensor("adapter_fusion.value.weight");
    let mixed = updates
        .iter()
        .enumerate()
        .map(|(at, update)| update.clone().matmul(value.clone()) * p.clone().narrow(1, at, 1));
    let expected = base().up.forward(x.clone()) + mixed.reduce(|sum, each| sum + each).unwrap();
    let found = peft_core::linear(&model.up, x.reshape([2, SEQ, 16])).reshape([2 * SEQ, 32]);
    assert!(difference(&read(found).unwrap(), &read(expected).unwrap()) < 1e-5);
}
