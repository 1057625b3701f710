//! One `LoRA` for each task of a mixture by task.

use burn::tensor::Device;
use peft_core::files::Values;
use peft_core::{AdapterFile, Method, Targets, for_tasks, merge};
use peft_lora::LoraConfig;
use peft_moe::{MixtureConfig, RouterConfig, moelora, task_lora};

use crate::mixtures::{file, filled, near, output, random, values, x};

type Mixture = MixtureConfig<LoraConfig>;

/// Eight experts of rank two for three tasks.
fn method() -> Mixture {
    moelora(Targets::modules(["proj"]), 3)
}

fn learned(method: &Mixture) -> AdapterFile<Mixture> {
    file(&random(method), method)
}

/// With its task, and merged into the weight.
fn is_a_lora_for_each(learned: AdapterFile<Mixture>) {
    let model = filled(learned.clone());
    for task in 0..learned.method.num_tasks().unwrap() {
        let expected = for_tasks(&[task], || output(&model));
        let lora = task_lora(&learned, task).unwrap();
        let method = lora.method.clone();
        let lora = filled(lora);
        near(&output(&lora), &expected);
        near(&values(merge(lora, &method).unwrap().proj.forward(x(&Device::flex()))), &expected);
    }
}

#[test]
fn a_mixture_by_task_is_a_lora_for_each() {
    let plain = method();
    let with = |expert: LoraConfig| MixtureConfig { expert, ..plain.clone() };
    let expert = || plain.expert.clone();
    let cases = [
        plain.clone(),
        MixtureConfig { temperature: 0.25, ..plain.clone() },
        with(LoraConfig { use_rslora: true, ..expert() }),
        with(LoraConfig { rank_pattern: [("proj".to_owned(), 3)].into(), ..expert() }),
        with(LoraConfig { alpha_pattern: [("proj".to_owned(), 5.0)].into(), ..expert() }),
        with(LoraConfig { alpha_pattern: [("proj".to_owned(), 5.0)].into(), use_rslora: true, ..expert() }),
    ];
    for case in cases {
        is_a_lora_for_each(learned(&case));
    }
}

/// However far apart logits are.
#[test]
fn gates_are_numbers() {
    let mut certain = learned(&method());
    let weight = certain.tensors.get_mut("proj.router.weight").unwrap();
    weight.values.iter_mut().for_each(|value| *value *= 1e4);
    is_a_lora_for_each(certain);
}

#[test]
fn what_is_trained_besides_stays() {
    let mut with_head = learned(&method());
    with_head.tensors.insert("head.weight".to_owned(), Values { shape: vec![1, 1], values: vec![2.0] });
    let lora = task_lora(&with_head, 0).unwrap();
    let keys: Vec<&str> = lora.tensors.keys().map(String::as_str).collect();
    assert_eq!(keys, ["head.weight", "proj.lora_A.weight", "proj.lora_B.weight"]);
}

fn refused(file: &AdapterFile<Mixture>, task: usize, with: &str) {
    let error = task_lora(file, task).unwrap_err().to_string();
    assert!(error.contains(with), "{error}");
}

#[test]
fn what_is_none_is_refused() {
    let by_task = learned(&method());
    refused(&by_task, 3, "below 3");
    refused(&learned(&MixtureConfig { router: RouterConfig::Soft, ..method() }), 0, "a router by task");
    refused(&learned(&method().with_shared(1)), 0, "none that is shared");
    let biased = LoraConfig { lora_bias: true, ..method().expert };
    refused(&learned(&MixtureConfig { expert: biased, ..method() }), 0, "lora_bias");
    let mut large = by_task.clone();
    large.method.expert.rank = usize::MAX;
    refused(&large, 0, "at most");
    let mut senseless = by_task;
    senseless.method.temperature = 0.0;
    refused(&senseless, 0, "temperature");
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let by_task = learned(&method());
    let with = |key: &str, shape: &[usize], count: usize| {
        let mut file = by_task.clone();
        let values = Values { shape: shape.to_vec(), values: vec![0.5; count] };
        file.tensors.insert(format!("proj.{key}"), values);
        refused(&file, 2, &format!("proj.{key}"));
    };
    let shapes: [(&str, &[usize]); 8] = [
        ("router.weight", &[8, 0]),
        ("router.weight", &[8]),
        ("router.weight", &[7, 64]),
        ("router.task_embeddings", &[2, 64]),
        ("router.task_embeddings", &[3, 63]),
        ("experts.lora_A.weight", &[15, 6]),
        ("experts.lora_B.weight", &[6, 0]),
        ("experts.lora_B.weight", &[96]),
    ];
    for (key, shape) in shapes {
        with(key, shape, shape.iter().product());
    }
    with("router.task_embeddings", &[3, 64], 100);
    for key in by_task.tensors.keys() {
        let mut lacking = by_task.clone();
        lacking.tensors.remove(key);
        refused(&lacking, 0, key);
    }
}
