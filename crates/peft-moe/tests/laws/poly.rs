//! Laws of Poly.

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use peft_core::{ParamVisitor, PathStack, Targets, attach, for_tasks, linear, merge, visit_params};
use peft_moe::PolyConfig;
use peft_testkit::fill_adapter;

use crate::mixtures::{base, file, filled, moved, near, output, random, values, x};

fn method(n_splits: usize) -> PolyConfig {
    PolyConfig { n_splits, rank: 2, ..PolyConfig::new(4, 3, Targets::modules(["proj"])) }
}

/// One `LoRA` for each task, merged into the weight.
#[test]
fn a_task_is_a_lora() {
    for splits in [1, 3] {
        let method = method(splits);
        let model = random(&method);
        let learned = file(&model, &method);
        for task in 0..3 {
            let expected = for_tasks(&[task], || output(&model));
            let lora = PolyConfig::lora_of(&learned, task).unwrap();
            let config = lora.method.clone();
            let lora = filled(lora);
            near(&output(&lora), &expected);
            let merged = merge(lora, &config).unwrap();
            near(&values(merged.proj.forward(x(&Device::flex()))), &expected);
        }
        let error = PolyConfig::lora_of(&learned, 3).unwrap_err();
        assert!(error.to_string().contains("below 3"), "{error}");
        let mut lacking = learned.clone();
        lacking.tensors.remove("proj.poly_lora_B");
        let error = PolyConfig::lora_of(&lacking, 0).unwrap_err();
        assert!(error.to_string().contains("proj.poly_lora_B"), "{error}");
    }
}

/// Rows of several tasks are each what a batch of its task alone is.
#[test]
fn rows_differ_by_task() {
    let model = random(&method(2));
    let mixed = for_tasks(&[2, 0], || output(&model));
    let (second, first) = (for_tasks(&[2], || output(&model)), for_tasks(&[0], || output(&model)));
    let half = mixed.len() / 2;
    near(&mixed, &[&second[..half], &first[half..]].concat());
    assert!(second.iter().zip(&first).any(|(a, b)| (a - b).abs() > 1e-4));
}

/// Training draws how much of each skill there is, except where that is beyond doubt.
#[test]
fn training_samples_gates() {
    let device = Device::flex().autodiff();
    let method = method(1);
    let trained = |certain: bool| {
        let model = random(&method);
        let mut learned = file(&model, &method);
        let logits = learned.tensors.get_mut("proj.poly_router.module_logits").unwrap();
        if certain {
            // A skill is had or not.
            logits
                .values
                .iter_mut()
                .enumerate()
                .for_each(|(at, logit)| *logit = if at % 4 == 1 { 60.0 } else { -60.0 });
        }
        let model = attach(base(&device), &method, 0).unwrap();
        learned.fill(model, "the values".as_ref(), peft_core::Strictness::default()).unwrap()
    };
    let run =
        |model: &crate::mixtures::Model, device: &Device| for_tasks(&[2, 0], || values(linear(&model.proj, x(device))));
    let certain = trained(true);
    near(&run(&certain, &device), &run(&certain.valid(), &Device::flex()));
    let model = trained(false);
    let (one, other) = (run(&model, &device), run(&model, &device));
    assert!(one.iter().zip(&other).any(|(a, b)| (a - b).abs() > 1e-3));
}

/// The rows of a matrix that have a gradient, by the name of the parameter.
struct Rows<'a>(&'a GradientsParams, Vec<Vec<bool>>);

impl ParamVisitor for Rows<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        if let (Some(grad), true) = (self.0.get::<D>(param.id), at.path().ends_with("logits")) {
            let columns = grad.dims()[D - 1];
            self.1.push(values(grad).chunks(columns).map(|row| row.iter().any(|value| *value != 0.0)).collect());
        }
    }
}

#[test]
fn the_gradient_reaches_skills_and_the_tasks_that_were_there() {
    let device = Device::flex().autodiff();
    let model = fill_adapter(attach(base(&device), &method(2), 0).unwrap());
    let loss = || for_tasks(&[2, 0], || linear(&model.proj, x(&device)).square().sum());
    let names = moved(&model, loss());
    assert!(names.len() == 3 && names.iter().all(|name| name.contains("poly")), "{names:?}");
    let grads = GradientsParams::from_grads(loss().backward(), &model);
    let mut rows = Rows(&grads, Vec::new());
    visit_params(&model, &mut rows);
    assert_eq!(rows.1, [[true, false, true]]);
}

#[test]
fn splits_that_do_not_divide_a_layer_are_refused() {
    let error = attach(base(&Device::flex()), &method(4), 0).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("n_splits") && error.to_string().contains("divides 6 and 6"), "{error}");
}
