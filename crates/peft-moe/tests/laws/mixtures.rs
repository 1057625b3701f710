//! Laws of mixtures.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use peft_core::{
    AdapterAware, AdapterFile, Auxiliary, Method, ParamVisitor, PathStack, Strictness, Targets, attach, for_tasks,
    linear, visit_params, with_auxiliary,
};
use peft_lora::LoraConfig;
use peft_moe::{Balance, MixtureConfig, RouterConfig, loramoe, mola, molora, mov};
use peft_moe::{Level, MolaShape, moelora};
use peft_testkit::fill_adapter;

pub(crate) const WIDTH: usize = 6;
const NEAR: f32 = 1e-5;

#[derive(Module, Debug)]
pub(crate) struct Model {
    pub(crate) proj: Linear,
    aware: AdapterAware,
}

pub(crate) fn wave(count: usize, step: f32) -> Vec<f32> {
    (0..count).map(|i| (step * i as f32).sin()).collect()
}

pub(crate) fn base(device: &Device) -> Model {
    let weight = Tensor::from_data(TensorData::new(wave(WIDTH * WIDTH, 1.7), [WIDTH, WIDTH]), device);
    let proj = LinearConfig::new(WIDTH, WIDTH).with_bias(false).init(device);
    Model { proj: Linear { weight: Param::from_tensor(weight), ..proj }, aware: AdapterAware }
}

pub(crate) fn x(device: &Device) -> Tensor<3> {
    Tensor::from_data(TensorData::new(wave(2 * 5 * WIDTH, 0.9), [2, 5, WIDTH]), device)
}

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter().collect()
}

#[track_caller]
pub(crate) fn near(found: &[f32], expected: &[f32]) {
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
    assert!(found.len() == expected.len() && worst < NEAR, "{worst}");
}

fn expert() -> LoraConfig {
    LoraConfig::new(2, Targets::modules(["proj"])).with_alpha(3.0)
}

pub(crate) fn file<M: Method>(model: &Model, method: &M) -> AdapterFile<M> {
    AdapterFile::collect(model, method).unwrap()
}

pub(crate) fn filled<M: Method>(file: AdapterFile<M>) -> Model {
    let model = attach(base(&Device::flex()), &file.method, 0).unwrap();
    file.fill(model, "the values".as_ref(), Strictness::default()).unwrap()
}

pub(crate) fn random<M: Method>(method: &M) -> Model {
    fill_adapter(attach(base(&Device::flex()), method, 0).unwrap())
}

pub(crate) fn output(model: &Model) -> Vec<f32> {
    values(linear(&model.proj, x(&Device::flex())))
}

#[test]
fn one_expert_is_that_expert() {
    for router in [RouterConfig::Soft, RouterConfig::TopK { k: 1 }, RouterConfig::TopP { p: 0.1 }, RouterConfig::Switch]
    {
        let mixture = MixtureConfig::new(expert(), 1, router);
        let one = random(&mixture);
        let mut alone =
            AdapterFile { method: expert(), ..AdapterFile::collect(&random(&expert()), &expert()).unwrap() };
        for (key, values) in file(&one, &mixture).tensors {
            if let Some((path, key)) = key.split_once(".experts.") {
                alone.tensors.insert(format!("{path}.{key}"), values);
            }
        }
        near(&output(&one), &output(&filled(alone)));
    }
}

/// With all of them open, the best of all are all.
#[test]
fn the_best_of_all_is_all() {
    let soft = MixtureConfig::new(expert(), 4, RouterConfig::Soft);
    let all = output(&random(&soft));
    near(&output(&random(&MixtureConfig { router: RouterConfig::TopK { k: 4 }, ..soft.clone() })), &all);
    near(&output(&random(&MixtureConfig { router: RouterConfig::TopP { p: 1.0 }, ..soft })), &all);
}

/// Experts in another order, with what the router says of them, are the same mixture.
#[test]
fn the_order_of_experts_means_nothing() {
    let method = MixtureConfig::new(expert(), 4, RouterConfig::TopK { k: 2 });
    let model = random(&method);
    let mut other = file(&model, &method);
    let order = [2, 0, 3, 1];
    let tensors = other.tensors.clone();
    for (key, values) in &tensors {
        // Experts are rows of A and of the router, and columns of B, in the file's orientation.
        let [rows, columns] = values.shape[..] else { panic!("{key}: {:?}", values.shape) };
        let by_columns = key.ends_with("lora_B.weight");
        let size = if by_columns { columns } else { rows } / order.len();
        let moved = |at: usize| order[at / size] * size + at % size;
        let mut to = values.clone();
        for (at, value) in values.values.iter().enumerate() {
            let (row, column) = (at / columns, at % columns);
            let (row, column) = if by_columns { (row, moved(column)) } else { (moved(row), column) };
            to.values[row * columns + column] = *value;
        }
        other.tensors.insert(key.clone(), to);
    }
    assert_ne!(other, file(&model, &method));
    near(&output(&filled(other)), &output(&model));
}

/// The parts of the gradients that are not zero, by the names of parameters.
struct Moved<'a> {
    grads: &'a GradientsParams,
    names: Vec<String>,
}

impl ParamVisitor for Moved<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id)
            && values(grad).iter().any(|value| *value != 0.0)
        {
            self.names.push(at.path());
        }
    }
}

pub(crate) fn moved(model: &Model, loss: Tensor<1>) -> Vec<String> {
    let grads = GradientsParams::from_grads(loss.backward(), model);
    let mut moved = Moved { grads: &grads, names: Vec::new() };
    visit_params(model, &mut moved);
    moved.names
}

#[test]
fn the_gradient_reaches_the_router() {
    let device = Device::flex().autodiff();
    for router in [RouterConfig::Soft, RouterConfig::TopK { k: 2 }, RouterConfig::TopP { p: 0.7 }, RouterConfig::Switch]
    {
        let method = MixtureConfig::new(expert(), 4, router.clone());
        let model = fill_adapter(attach(base(&device), &method, 0).unwrap());
        let names = moved(&model, linear(&model.proj, x(&device)).square().sum());
        assert!(names.iter().any(|name| name.contains("router")), "{router:?}: {names:?}");
        // The losses of balance alone reach nothing but the router.
        let balance = Balance { load: 0.5, z: 0.1, ..Balance::default() };
        let model = fill_adapter(attach(base(&device), &method.with_balance(balance), 0).unwrap());
        let (_, said) = with_auxiliary(|| linear(&model.proj, x(&device)));
        let names = moved(&model, said[0].loss.clone().unwrap());
        assert!(!names.is_empty() && names.iter().all(|name| name.contains("router")), "{router:?}: {names:?}");
    }
}

/// What a router said of `x`, and its probabilities from the file in double precision.
fn said(method: &MixtureConfig<LoraConfig>) -> (Auxiliary, Vec<Vec<f64>>) {
    let model = random(method);
    let (_, mut said) = with_auxiliary(|| for_tasks(&[1, 0], || output(&model)));
    assert_eq!(said.len(), 1);
    let weight = file(&model, method).tensors["proj.router.weight"].clone(); // [experts, d_in]
    let x = values(x(&Device::flex()));
    let logits = |row: &[f32]| {
        let dot = |w: &[f32]| w.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        weight.values.chunks(WIDTH).map(dot).collect()
    };
    (said.remove(0), x.chunks(WIDTH).map(logits).collect())
}

fn softmax(z: &[f64]) -> Vec<f64> {
    let sum: f64 = z.iter().map(|z| z.exp()).sum();
    z.iter().map(|z| z.exp() / sum).collect()
}

#[test]
fn losses_of_balance_are_their_formulas() {
    let (experts, rows) = (4, 10.0);
    let of = |router: RouterConfig, balance: Balance| {
        said(&MixtureConfig::new(expert(), experts, router).with_balance(balance))
    };
    for k in [1, 2] {
        let router = if k == 1 { RouterConfig::Switch } else { RouterConfig::TopK { k } };
        let (auxiliary, logits) = of(router, Balance { load: 0.5, ..Balance::default() });
        let p: Vec<Vec<f64>> = logits.iter().map(|z| softmax(z)).collect();
        let chosen = |p: &[f64], e: usize| p.iter().filter(|other| **other > p[e]).count() < k;
        let f = |e: usize| p.iter().filter(|p| chosen(p, e)).count() as f64 / rows;
        let mean = |e: usize| p.iter().map(|p| p[e]).sum::<f64>() / rows;
        let expected = 0.5 * experts as f64 * (0..experts).map(|e| f(e) * mean(e)).sum::<f64>();
        near(&values(auxiliary.loss.unwrap()), &[expected as f32]);
        let load: Vec<f32> = (0..experts).map(|e| (f(e) / k as f64) as f32).collect();
        near(&values(auxiliary.load), &load);
        let entropy = p.iter().map(|p| -p.iter().map(|p| p * p.ln()).sum::<f64>()).sum::<f64>() / rows;
        near(&values(auxiliary.entropy), &[entropy as f32]);
    }
    let (auxiliary, logits) = of(RouterConfig::Soft, Balance { z: 0.5, ..Balance::default() });
    let z = logits.iter().map(|z| z.iter().map(|z| z.exp()).sum::<f64>().ln().powi(2)).sum::<f64>() / rows;
    near(&values(auxiliary.loss.unwrap()), &[0.5 * z as f32]);
    // Rows of tasks 1 and 0, of five tokens each; experts 0 and 1 are those of task 0.
    let balance = Balance { localised: 2.0, delta: 0.25, groups: 2, ..Balance::default() };
    let (auxiliary, logits) = of(RouterConfig::Soft, balance);
    let z = |row: usize, e: usize| {
        let sum: f64 = logits[5 * row..5 * row + 5].iter().map(|z| softmax(z)[e]).sum();
        sum * if e / 2 == 1 - row { 1.25 } else { 0.75 }
    };
    let z: Vec<f64> = (0..2).flat_map(|row| (0..experts).map(move |e| (row, e))).map(|(row, e)| z(row, e)).collect();
    let mean = z.iter().sum::<f64>() / z.len() as f64;
    let variance = z.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / (z.len() - 1) as f64;
    near(&values(auxiliary.loss.unwrap()), &[(2.0 * variance / (mean.powi(2) + 1e-10)) as f32]);
}

/// One expert for one row of the batch.
#[test]
fn a_number_alone_does_not_vary() {
    let balance = Balance { localised: 2.0, groups: 1, ..Balance::default() };
    let model = random(&MixtureConfig::new(expert(), 1, RouterConfig::Soft).with_balance(balance));
    let row = x(&Device::flex()).narrow(0, 0, 1);
    let (_, said) = with_auxiliary(|| for_tasks(&[0], || linear(&model.proj, row)));
    assert_eq!(values(said[0].loss.clone().unwrap()), [0.0]);
}

/// Of experts that are equally likely the first are taken, and no more than it needs.
#[test]
fn the_first_of_equals_are_taken() {
    let cases = [
        (RouterConfig::TopP { p: 0.5 }, [0.5, 0.5, 0.0, 0.0]),
        (RouterConfig::TopP { p: 0.2 }, [1.0, 0.0, 0.0, 0.0]),
        (RouterConfig::TopP { p: 1.0 }, [0.25; 4]),
        (RouterConfig::TopK { k: 2 }, [0.5, 0.5, 0.0, 0.0]),
        (RouterConfig::Switch, [1.0, 0.0, 0.0, 0.0]),
    ];
    for (router, load) in cases {
        let method = MixtureConfig::new(expert(), 4, router);
        let mut undecided = file(&random(&method), &method);
        undecided.tensors.get_mut("proj.router.weight").unwrap().values.fill(0.0);
        let model = filled(undecided);
        let (_, said) = with_auxiliary(|| output(&model));
        near(&values(said[0].load.clone()), &load);
    }
}

/// A row has one decision for all its tokens.
#[test]
fn rows_can_be_routed_whole() {
    let method = MixtureConfig { level: Level::Sequence, ..MixtureConfig::new(expert(), 4, RouterConfig::Switch) };
    let model = random(&method);
    let (_, said) = with_auxiliary(|| output(&model));
    let load = values(said[0].load.clone());
    assert!(load.iter().all(|part| [0.0, 0.5, 1.0].contains(part)), "{load:?}");
    let first = |rows: usize| values(linear(&model.proj, x(&Device::flex()).narrow(0, 0, rows)).narrow(0, 0, 1));
    near(&first(1), &first(2));
}

#[test]
fn presets_attach_and_say_what_they_are() {
    let targets = || Targets::modules(["proj"]);
    let device = Device::flex();
    let lora = [molora(targets()), loramoe(targets()), moelora(targets(), 2)];
    for method in lora {
        let said = with_auxiliary(|| for_tasks(&[0], || output(&attach(base(&device), &method, 0).unwrap()))).1;
        assert_eq!(said[0].path, "proj");
        assert_eq!(said[0].load.dims(), [method.num_experts]);
    }
    attach(base(&device), &mov(targets()), 0).unwrap();
    let counts = |shape, layers| mola(targets(), shape, layers).experts_per_layer;
    assert_eq!(counts(MolaShape::Inverted, 8), [2, 2, 4, 4, 6, 6, 8, 8]);
    assert_eq!(counts(MolaShape::Diamond, 4), [2, 8, 8, 2]);
    assert_eq!(counts(MolaShape::Triangle, 4), [8, 6, 4, 2]);
    assert_eq!(counts(MolaShape::Uniform, 2), [5, 5]);
    // A layer without a number has none of its own.
    let error = attach(base(&device), &mola(targets(), MolaShape::Uniform, 2), 0).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("experts_per_layer"), "{error}");
}
