//! Mixtures on one layer: equality with plain loops in f64, which `tools/golden/mixture_reference.py` writes.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_adapter::Ia3Config;
use peft_core::files::{Values, transpose};
use peft_core::{
    AdapterAware, AdapterFile, Method, Strictness, Targets, attach, for_mask, for_tasks, linear, with_auxiliary,
};
use peft_lora::{InitWeights, LoraConfig};
use peft_models::encoder::{Input, Text};
use peft_moe::{Balance, Level, MixtureConfig, RouterConfig};

use crate::encoders::{encoder, text};
use crate::golden::{deviation, floats, ints, testdata};

/// Largest difference in f32 of values below ten.
const NEAR: f32 = 1e-5;

const ROWS: usize = 2;
const LENGTH: usize = 5;
const WIDTH: usize = 7;
const OUT: usize = 6;
const EXPERTS: usize = 4;
const RANK: usize = 2;
const TASKS: usize = 3;
const EMBEDDING: usize = 5;

#[derive(Module, Debug)]
struct Model {
    proj: Linear,
    aware: AdapterAware,
}

/// A key behind the layer's path, a shape and values.
type Entry = (&'static str, [usize; 2], Vec<f32>);

fn file() -> std::path::PathBuf {
    testdata().join("mixtures/reference.safetensors")
}

fn reference(name: &str) -> Vec<f32> {
    floats(&file(), name)
}

/// The layer times a number.
fn base(scale: f32) -> Model {
    let scaled = |values: Vec<f32>| values.into_iter().map(|value| value * scale).collect::<Vec<_>>();
    let weight = TensorData::new(scaled(transpose(&reference("w"), OUT, WIDTH)), [WIDTH, OUT]);
    let bias = TensorData::new(scaled(reference("bias")), [OUT]);
    let device = Device::flex();
    let weight = Param::from_tensor(Tensor::from_data(weight, &device));
    let bias = Some(Param::from_tensor(Tensor::from_data(bias, &device)));
    Model { proj: Linear { weight, bias }, aware: AdapterAware }
}

fn filled<M: Method>(base: Model, method: M, entries: Vec<Entry>) -> Model {
    let model = attach(base, &method, 0).unwrap();
    let entry = |(key, shape, values): Entry| (format!("proj.{key}"), Values { shape: shape.to_vec(), values });
    let tensors = entries.into_iter().map(entry).collect();
    let file = AdapterFile { method, base_model: None, task_type: None, base_fingerprint: None, tensors };
    file.fill(model, "the reference".as_ref(), Strictness::default()).unwrap()
}

/// What the layer makes of the input with rows of these tasks, and the losses of its router.
fn run(model: &Model, tasks: &[usize]) -> (Vec<f32>, Vec<f32>) {
    let x = TensorData::new(reference("x"), [ROWS, LENGTH, WIDTH]);
    let x = Tensor::<3>::from_data(x, &Device::flex());
    let (y, said) = with_auxiliary(|| for_tasks(tasks, || linear(&model.proj, x)));
    let losses = said.into_iter().filter_map(|said| said.loss).map(|loss| loss.into_scalar::<f32>());
    (y.into_data().iter::<f32>().collect(), losses.collect())
}

#[track_caller]
fn near(name: &str, found: &[f32], expected: &[f32]) {
    let found = deviation(found, expected);
    assert!(found < NEAR, "{name}: {found}");
}

fn targets() -> Targets {
    Targets::modules(["proj"])
}

fn by_task() -> RouterConfig {
    RouterConfig::Task { num_tasks: TASKS, embedding_dim: EMBEDDING }
}

fn task_ids() -> Vec<usize> {
    ints(&file(), "task_ids").1.into_iter().map(|task| task as usize).collect()
}

fn router(config: &RouterConfig) -> Vec<Entry> {
    match config {
        RouterConfig::Task { .. } => vec![
            ("router.weight", [EXPERTS, EMBEDDING], reference("task_gate")),
            ("router.task_embeddings", [TASKS, EMBEDDING], reference("task_embedding")),
        ],
        _ => vec![("router.weight", [EXPERTS, WIDTH], reference("router"))],
    }
}

fn lora(config: RouterConfig, balance: Balance) -> Model {
    let b = reference("b");
    // Experts are side by side in the file, by columns.
    let places = (0..OUT).flat_map(|out| (0..EXPERTS).map(move |expert| (expert * OUT + out) * RANK));
    let up = places.flat_map(|place| b[place..place + RANK].to_vec()).collect();
    let mut entries = router(&config);
    entries.push(("experts.lora_A.weight", [EXPERTS * RANK, WIDTH], reference("a")));
    entries.push(("experts.lora_B.weight", [OUT, EXPERTS * RANK], up));
    let expert = LoraConfig::new(RANK, targets()).with_alpha(1.5 * RANK as f64);
    filled(base(1.0), MixtureConfig::new(expert, EXPERTS, config).with_balance(balance), entries)
}

#[test]
fn outputs_are_those_of_loops() {
    let cases = [(RouterConfig::Soft, "molora"), (RouterConfig::TopK { k: 2 }, "mixlora"), (by_task(), "moelora")];
    for (router, name) in cases {
        near(name, &run(&lora(router, Balance::default()), &task_ids()).0, &reference(name));
    }
    let mut entries = router(&RouterConfig::Soft);
    entries.push(("experts.ia3_l", [OUT, EXPERTS], transpose(&reference("vectors"), EXPERTS, OUT)));
    let mov = MixtureConfig::new(Ia3Config::new(targets()), EXPERTS, RouterConfig::Soft);
    near("mov", &run(&filled(base(1.0), mov, entries), &[0]).0, &reference("mov_by_input"));
}

/// By experts each of which adds one to an output of its own, on a layer of zeros.
#[test]
fn gates_are_those_of_loops() {
    let of_tasks = reference("task_weights");
    let by_row = of_tasks.chunks(EXPERTS).flat_map(|row| row.repeat(LENGTH)).collect();
    let cases = [
        (RouterConfig::Soft, reference("probabilities")),
        (RouterConfig::TopK { k: 2 }, reference("top_k_weights")),
        (by_task(), by_row),
    ];
    for (config, expected) in cases {
        let mut ones = vec![0.0; EXPERTS * OUT];
        (0..EXPERTS).for_each(|expert| ones[expert * OUT + expert] = 1.0);
        let mut entries = router(&config);
        entries.push(("experts.lora_A.weight", [EXPERTS, WIDTH], vec![0.0; EXPERTS * WIDTH]));
        entries.push(("experts.lora_B.weight", [OUT, EXPERTS], vec![0.0; OUT * EXPERTS]));
        entries.push(("experts.lora_B.bias", [EXPERTS, OUT], ones));
        let expert = LoraConfig { lora_bias: true, ..LoraConfig::new(1, targets()) };
        let model = filled(base(0.0), MixtureConfig::new(expert, EXPERTS, config.clone()), entries);
        let y = run(&model, &task_ids()).0;
        let gates: Vec<f32> = y.chunks(OUT).flat_map(|token| token[..EXPERTS].to_vec()).collect();
        near(&format!("{config:?}"), &gates, &expected);
    }
}

#[test]
fn losses_are_those_of_loops() {
    // The first half of the experts is for rows of type 1.
    let of_types: Vec<usize> = ints(&file(), "task_types").1.into_iter().map(|of| usize::from(of == 0)).collect();
    let localised = Balance { localised: 1.0, delta: 0.1, groups: 2, ..Balance::default() };
    let load = Balance { load: 1.0, ..Balance::default() };
    let cases = [
        (RouterConfig::Soft, localised, "loramoe_balance"),
        (RouterConfig::Switch, load.clone(), "switch_loss"),
        (RouterConfig::TopK { k: 2 }, load, "top_k_loss"),
        (RouterConfig::Soft, Balance { z: 1.0, ..Balance::default() }, "z_loss"),
    ];
    for (router, balance, name) in cases {
        near(name, &run(&lora(router, balance), &of_types).1, &reference(name));
    }
    // Without padding.
    let (shape, padding) = ints(&file(), "mask");
    let padding = Tensor::<2, Int>::from_data(TensorData::new(padding, shape), &Device::flex());
    let load = || Balance { load: 1.0, ..Balance::default() };
    for (router, name) in
        [(RouterConfig::Switch, "switch_loss_masked"), (RouterConfig::TopK { k: 2 }, "top_k_loss_masked")]
    {
        let found = for_mask(Some(padding.clone()), || run(&lora(router, load()), &of_types).1);
        near(name, &found, &reference(name));
    }
}

/// A text that is routed whole goes the same way whatever padding its batch gives it.
#[test]
fn padding_has_no_say_in_where_a_text_goes() {
    let expert = LoraConfig::new(2, Targets::modules(["query", "dense"])).with_init(InitWeights::Random);
    let method = MixtureConfig { level: Level::Sequence, ..MixtureConfig::new(expert, 3, RouterConfig::TopK { k: 1 }) };
    let model = attach(encoder("bert_seqcls"), &method, 7).unwrap();
    let read = |text: Text| model.forward(&Input::Text(text));
    let batch = text("bert_seqcls", true);
    let mask = batch.mask.clone().unwrap();
    let real = mask.clone().narrow(0, 1, 1).sum().into_scalar::<i64>() as usize;
    assert!(real < mask.dims()[1]);
    let cut = |x: Tensor<2, Int>| x.narrow(0, 1, 1).narrow(1, 0, real);
    let alone = Text { ids: cut(batch.ids.clone()), mask: None, types: batch.types.clone().map(cut) };
    let values = |x: Tensor<3>| x.into_data().iter::<f32>().collect::<Vec<_>>();
    near("alone", &values(read(alone)), &values(read(batch).narrow(0, 1, 1)));
}
