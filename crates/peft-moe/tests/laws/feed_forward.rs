//! A mixture of feed-forward parts against a loop over whole ones.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Device, Tensor, TensorData};
use peft_core::{
    FeedForward, Gated, Named, ParamVisitor, PathStack, Targets, attach, for_tasks, linear, visit_params,
    with_auxiliary,
};
use peft_lora::LoraConfig;
use peft_moe::{MixLoraConfig, MixtureConfig, Projection, RouterConfig, mixlora};
use peft_testkit::fill_adapter;

const WIDTH: usize = 6;
const INNER: usize = 10;
const EXPERTS: usize = 4;
const RANK: usize = 2;
const BATCH: [usize; 2] = [2, 5];
const NEAR: f32 = 1e-5;

#[derive(Module, Debug)]
struct Model {
    mlp: Mlp,
}

#[derive(Module, Debug)]
struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    whole: Named<FeedForward>,
}

impl Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let parts = Gated {
            gate: &|x| linear(&self.gate, x),
            up: &|x| linear(&self.up, x),
            inner: &|gate, up| silu(gate) * up,
            down: &|inner| linear(&self.down, inner),
        };
        self.whole.forward(x, &parts)
    }
}

fn wave<const D: usize>(shape: [usize; D], step: f32, device: &Device) -> Tensor<D> {
    let values: Vec<f32> = (0..shape.iter().product()).map(|i| (step * i as f32).sin()).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn model(method: &MixLoraConfig, device: &Device) -> Model {
    let layer = |d_in, d_out, step| {
        let weight = Param::from_tensor(wave([d_in, d_out], step, device));
        Linear { weight, ..LinearConfig::new(d_in, d_out).with_bias(false).init(device) }
    };
    let whole = FeedForward::new(WIDTH, INNER, device);
    let mlp =
        Mlp { gate: layer(WIDTH, INNER, 1.7), up: layer(WIDTH, INNER, 0.7), down: layer(INNER, WIDTH, 1.1), whole };
    fill_adapter(attach(Model { mlp }, method, 0).unwrap())
}

fn method(router: RouterConfig) -> MixLoraConfig {
    let expert = LoraConfig::new(RANK, Targets::modules(["mlp"])).with_alpha(3.0);
    MixLoraConfig { mixture: MixtureConfig::new(expert, EXPERTS, router), projections: Projection::ALL.to_vec() }
}

/// The adapter's values by field, with their gradients where there are some.
#[derive(Default)]
struct Fields {
    values: BTreeMap<String, Tensor<2>>,
    grads: BTreeMap<String, Vec<f32>>,
    by_param: Option<GradientsParams>,
}

impl ParamVisitor for Fields {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let Some(field) = at.locate().field else { return };
        if let Some(grad) = self.by_param.as_ref().and_then(|grads| grads.get::<D>(param.id)) {
            self.grads.insert(field.clone(), floats(grad));
        }
        if D == 2 {
            let value = param.val();
            let leaf = Tensor::<2>::from_data(value.to_data(), &value.device());
            self.values.insert(field, leaf.require_grad());
        }
    }
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter().collect()
}

#[track_caller]
fn near(found: &[f32], expected: &[f32], what: &str) {
    let largest = expected.iter().fold(1.0_f32, |largest, value| largest.max(value.abs()));
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
    assert!(found.len() == expected.len() && worst < NEAR * largest, "{what}: {worst} of {largest}");
}

/// `Σ gₑ·FFNₑ(x)`, one expert after the other, each with dense weights.
fn slow(mlp: &Mlp, fields: &BTreeMap<String, Tensor<2>>, router: &RouterConfig, x: &Tensor<2>) -> Tensor<2> {
    let p = softmax(x.clone().matmul(fields["router.weight"].clone()), 1);
    let gates = match router {
        RouterConfig::Soft => p,
        RouterConfig::Switch => {
            let best = p.clone().max_dim(1);
            p.clone().mask_fill(p.lower(best), 0.0)
        }
        _ => {
            let second = p.clone().detach().sort_descending(1).narrow(1, 1, 1);
            let best = p.clone().mask_fill(p.lower(second), 0.0);
            best.clone() / best.sum_dim(1)
        }
    };
    let weight = |layer: &Linear, name: &str, expert: usize| {
        let a = fields[&format!("{name}.a")].clone().narrow(1, expert * RANK, RANK);
        let b = fields[&format!("{name}.b")].clone().narrow(0, expert * RANK, RANK);
        layer.weight.val().detach() + a.matmul(b) * (3.0 / RANK as f64)
    };
    let part = |expert: usize| {
        let gate = x.clone().matmul(weight(&mlp.gate, "gate", expert));
        let inner = silu(gate) * x.clone().matmul(weight(&mlp.up, "up", expert));
        inner.matmul(weight(&mlp.down, "down", expert)) * gates.clone().narrow(1, expert, 1)
    };
    (0..EXPERTS).map(part).reduce(|sum, part| sum + part).unwrap()
}

#[test]
fn values_and_gradients_are_those_of_a_loop_over_experts() {
    let device = Device::flex().autodiff();
    let [batch, seq] = BATCH;
    for router in [RouterConfig::TopK { k: 2 }, RouterConfig::Switch, RouterConfig::Soft] {
        let model = model(&method(router.clone()), &device);
        let mut fields = Fields::default();
        visit_params(&model, &mut fields);
        let weights = wave([batch * seq, WIDTH], 0.3, &device);

        let x = wave([batch, seq, WIDTH], 0.9, &device).require_grad();
        let y = model.mlp.forward(x.clone()).flatten::<2>(0, 1);
        let mut grads = (y.clone() * weights.clone()).sum().backward();
        let x_grad = floats(x.grad_remove(&mut grads).unwrap());
        let mut of_adapter = Fields { by_param: Some(GradientsParams::from_grads(grads, &model)), ..Fields::default() };
        visit_params(&model, &mut of_adapter);

        let x = wave([batch * seq, WIDTH], 0.9, &device).require_grad();
        let expected = slow(&model.mlp, &fields.values, &router, &x);
        let mut grads = (expected.clone() * weights).sum().backward();
        near(&floats(y), &floats(expected), "values");
        near(&x_grad, &floats(x.grad_remove(&mut grads).unwrap()), "input");
        assert_eq!(of_adapter.grads.len(), 7, "{:?}", of_adapter.grads.keys());
        for (field, found) in &of_adapter.grads {
            near(found, &floats(fields.values[field].grad_remove(&mut grads).unwrap()), field);
        }
    }
}

#[test]
fn routers_say_what_they_do_and_tasks_can_choose() {
    let device = Device::flex();
    let x = || wave([BATCH[0], BATCH[1], WIDTH], 0.9, &device);
    let preset = mixlora(Targets::modules(["mlp"]));
    let (_, said) = with_auxiliary(|| model(&preset, &device).mlp.forward(x()));
    assert!(said.len() == 1 && said[0].path == "mlp" && said[0].loss.is_some());
    let by_task = model(&method(RouterConfig::Task { num_tasks: 2, embedding_dim: 3 }), &device);
    let of = |tasks: [usize; 2]| floats(for_tasks(&tasks, || by_task.mlp.forward(x())));
    let half = BATCH[1] * WIDTH;
    assert_eq!(of([0, 1])[..half], of([0, 0])[..half]);
    assert_ne!(of([0, 1])[half..], of([0, 0])[half..]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let device = Device::flex();
    let refused = |method: MixLoraConfig| {
        let layer = || LinearConfig::new(WIDTH, WIDTH).init(&device);
        let mlp = Mlp { gate: layer(), up: layer(), down: layer(), whole: FeedForward::new(WIDTH, WIDTH, &device) };
        attach(Model { mlp }, &method, 0).map(|_| ()).unwrap_err().to_string()
    };
    let none = MixLoraConfig { projections: Vec::new(), ..method(RouterConfig::Soft) };
    assert!(refused(none).contains("projections"));
    let plain = method(RouterConfig::Soft);
    let shared = MixLoraConfig { mixture: plain.mixture.clone().with_shared(1), ..plain };
    assert!(refused(shared).contains("num_shared"));
    let linear = method(RouterConfig::Soft);
    let targets = Targets::modules(["gate"]);
    let linear = MixLoraConfig { mixture: MixtureConfig { targets, ..linear.mixture }, ..linear };
    assert!(refused(linear).contains("gate"));
}
