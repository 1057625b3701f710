//! LoRA in all its forms under the laws of `peft-testkit`.
#![allow(clippy::unwrap_used, reason = "everything here is a test")]

mod statement;

use burn::tensor::{DType, Device};
use peft_core::{Peft as _, Targets};
use peft_lora::{InitWeights, LoraConfig};
use peft_testkit::{Laws, Stack, table};
use statement::{gated, laws, lora};

fn hold(laws: &Laws<LoraConfig>) {
    let checks = laws.run(&Device::flex());
    assert!(checks.iter().all(|check| !check.failed()), "\n{}", table(&checks));
}

#[test]
fn plain() {
    hold(&laws(lora()));
}

#[test]
fn rslora() {
    hold(&laws(LoraConfig { use_rslora: true, ..lora() }));
}

#[test]
fn gaussian_init() {
    hold(&laws(lora().with_init(InitWeights::Gaussian)));
}

#[test]
fn random_init() {
    hold(
        &laws(lora().with_init(InitWeights::Random))
            .skip("identity", "init_lora_weights is false: both factors are random"),
    );
}

#[test]
fn rank_and_alpha_pattern() {
    let rank_pattern = [("up".to_owned(), 2)].into_iter().collect();
    let alpha_pattern = [("down".to_owned(), 3.0)].into_iter().collect();
    hold(&laws(LoraConfig { rank_pattern, alpha_pattern, ..lora() }));
}

#[test]
fn dropout() {
    let random = "dropout draws other numbers on every backend";
    hold(&laws(lora().with_dropout(0.1)).skip("backend_gradients", random));
}

/// Only `up` has a bias to merge into.
#[test]
fn bias() {
    let targets = Targets::modules(["up"]);
    hold(&laws(LoraConfig { lora_bias: true, targets, ..lora() }));
}

#[test]
fn gate() {
    hold(&gated());
}

/// A gate is on everything that is added; and an embedding sees nothing that it could read.
#[test]
fn gate_on_a_bias_and_no_embedding() {
    let gated = LoraConfig { use_gating: true, lora_bias: true, targets: Targets::modules(["up"]), ..lora() };
    hold(&laws(gated.clone()));
    let on_embedding = LoraConfig { lora_bias: false, targets: Targets::modules(["embed"]), ..gated };
    let error = Stack::new(&Device::flex(), DType::F32, true).attach(&on_embedding).unwrap_err().to_string();
    assert!(error.contains("use_gating") && error.contains("embed"), "{error}");
}

#[test]
fn only_the_embedding() {
    hold(&laws(LoraConfig { targets: Targets::modules(["embed"]), ..lora() }));
}

/// The laws can fail: a wrong formula, a wrong count and a law that does not exist are found.
#[test]
fn a_false_statement_is_found() {
    let wrong = Laws::new(lora(), |_, site| site.d_in, ("lora_alpha", 1.0.into()))
        .with_reference(|_, layer| layer.base(&layer.x))
        .skip("identiti", "a misspelt name");
    let failed: Vec<_> =
        wrong.run(&Device::flex()).into_iter().filter(peft_testkit::Check::failed).map(|check| check.name).collect();
    assert_eq!(failed, ["identiti", "file", "bad_value", "reference"]);
}
