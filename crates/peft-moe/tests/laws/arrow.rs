//! Laws of Arrow.

use burn::tensor::Device;
use peft_core::{AdapterFile, Strictness, Targets, attach, linear, report};
use peft_lora::LoraConfig;
use peft_moe::ArrowConfig;

use crate::mixtures::{WIDTH, base, file, filled, near, output, random, values, x};

const RANK: usize = 2;

/// An adapter of random values that are its own.
fn task(number: usize) -> AdapterFile<LoraConfig> {
    let method = LoraConfig::new(RANK, Targets::modules(["proj"])).with_alpha(1.0 + number as f64);
    let mut task = file(&random(&method), &method);
    for values in task.tensors.values_mut() {
        values.values.rotate_left(number);
        values.values.iter_mut().enumerate().for_each(|(at, value)| *value += (1.3 * (at * (number + 2)) as f32).sin());
    }
    task
}

fn tensor(file: &AdapterFile<LoraConfig>, key: &str) -> Vec<f64> {
    file.tensors[&format!("proj.{key}")].values.iter().map(|value| f64::from(*value)).collect()
}

/// `B·A`, `[d_out, d_in]`.
fn product(a: &[f64], b: &[f64]) -> Vec<f64> {
    let value = |at: usize| {
        let (out, i) = (at / WIDTH, at % WIDTH);
        (0..RANK).map(|k| b[out * RANK + k] * a[k * WIDTH + i]).sum()
    };
    (0..WIDTH * WIDTH).map(value).collect()
}

fn times(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(WIDTH).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

/// What a matrix stretches most, by steps that are enough for any gap.
fn stretched(matrix: &[f64]) -> Vec<f64> {
    let transposed: Vec<f64> = (0..WIDTH * WIDTH).map(|at| matrix[at % WIDTH * WIDTH + at / WIDTH]).collect();
    let mut v = vec![1.0; WIDTH];
    for _ in 0..5000 {
        v = times(&transposed, &times(matrix, &v));
        let length = v.iter().map(|value| value * value).sum::<f64>().sqrt();
        v.iter_mut().for_each(|value| *value /= length);
    }
    v
}

/// The formula, by plain loops.
fn expected(arrow: &ArrowConfig, tasks: &[AdapterFile<LoraConfig>], general: &[AdapterFile<LoraConfig>]) -> Vec<f32> {
    let factor = |task: &AdapterFile<LoraConfig>, key: &str| {
        let mut own = tensor(task, key);
        for other in general {
            own.iter_mut().zip(tensor(other, key)).for_each(|(own, other)| *own -= other / general.len() as f64);
        }
        own
    };
    let updates: Vec<Vec<f64>> =
        tasks.iter().map(|task| product(&factor(task, "lora_A.weight"), &factor(task, "lora_B.weight"))).collect();
    let prototypes: Vec<Vec<f64>> = updates.iter().map(|update| stretched(update)).collect();
    let mut y = values(linear(&base(&Device::flex()).proj, x(&Device::flex())));
    for (y, x) in y.chunks_mut(WIDTH).zip(values(x(&Device::flex())).chunks(WIDTH)) {
        let x: Vec<f64> = x.iter().map(|value| f64::from(*value)).collect();
        let score = |p: &Vec<f64>| p.iter().zip(&x).map(|(p, x)| p * x).sum::<f64>().abs();
        let scores: Vec<f64> = prototypes.iter().map(score).collect();
        let open = |e: usize| scores.iter().filter(|other| **other > scores[e]).count() < arrow.top_k;
        let power = |e: usize| if open(e) { (scores[e] / arrow.router_temperature).exp() } else { 0.0 };
        let sum: f64 = (0..tasks.len()).map(power).sum();
        for (e, update) in updates.iter().enumerate() {
            let weight = power(e) / sum * tasks[e].method.alpha / RANK as f64;
            y.iter_mut().zip(times(update, &x)).for_each(|(y, update)| *y += (weight * update) as f32);
        }
    }
    y
}

#[test]
fn a_mixture_of_trained_adapters_is_its_formula() {
    let tasks: Vec<_> = (0..4).map(task).collect();
    let general: Vec<_> = (4..6).map(task).collect();
    for top_k in [1, 2, 4] {
        let arrow = ArrowConfig { top_k, router_temperature: 0.7, use_gks: false };
        near(&output(&filled(arrow.mixture(&tasks, &[]).unwrap())), &expected(&arrow, &tasks, &[]));
        let arrow = ArrowConfig { use_gks: true, ..arrow };
        near(&output(&filled(arrow.mixture(&tasks, &general).unwrap())), &expected(&arrow, &tasks, &general));
    }
}

/// What was made is a file as any other, and there is nothing in it to train.
#[test]
fn it_goes_through_a_file_and_nothing_is_trained() {
    let tasks: Vec<_> = (0..3).map(task).collect();
    let mixture = ArrowConfig::default().mixture(&tasks, &[]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    mixture.write(dir.path()).unwrap();
    let again = AdapterFile::read(dir.path()).unwrap();
    assert_eq!(again, mixture);
    let model = attach(base(&Device::flex().autodiff()), &again.method, 0).unwrap();
    let model = again.fill(model, dir.path(), Strictness::default()).unwrap();
    assert_eq!(report(&model).trainable, 0);
    let x = x(&Device::flex().autodiff()).require_grad();
    let grads = linear(&model.proj, x.clone()).square().sum().backward();
    assert!(values(x.grad(&grads).unwrap()).iter().any(|value| *value != 0.0));
}

#[test]
fn adapters_that_cannot_be_mixed_are_refused() {
    let tasks: Vec<_> = (0..3).map(task).collect();
    let refused =
        |arrow: ArrowConfig, tasks: &[AdapterFile<LoraConfig>], general: &[AdapterFile<LoraConfig>], with: &str| {
            let error = arrow.mixture(tasks, general).unwrap_err().to_string();
            assert!(error.contains(with), "{error}");
        };
    let arrow = ArrowConfig::default;
    refused(arrow(), &[], &[], "tasks");
    refused(arrow(), &tasks[..2], &[], "from 1 to 2");
    refused(ArrowConfig { top_k: 0, ..arrow() }, &tasks, &[], "top_k");
    refused(ArrowConfig { router_temperature: 0.0, ..arrow() }, &tasks, &[], "router_temperature");
    refused(ArrowConfig { use_gks: true, ..arrow() }, &tasks, &[], "general adapters");
    refused(arrow(), &tasks, &tasks, "use_gks");
    let wide = LoraConfig::new(RANK + 1, Targets::modules(["proj"]));
    let wide = file(&random(&wide), &wide);
    refused(arrow(), &[tasks.clone(), vec![wide]].concat(), &[], "as in the first adapter");
    let biased = LoraConfig { lora_bias: true, ..LoraConfig::new(RANK, Targets::modules(["proj"])) };
    let biased = file(&random(&biased), &biased);
    refused(arrow(), &[tasks.clone(), vec![biased]].concat(), &[], "lora_B.bias");
}
