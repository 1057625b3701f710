//! Mixtures and PILL under the laws of `peft-testkit`, and under laws of their own.
#![allow(clippy::unwrap_used, reason = "a helper of a test should stop where it fails, as the test itself does")]

mod arrow;
mod experts;
mod feed_forward;
mod mixtures;
mod poly;
mod refusals;
mod statement;
mod task_lora;
mod xlora;

use burn::tensor::Device;
use peft_core::Method;
use peft_moe::{MixtureConfig, PolyConfig, RouterConfig};
use peft_testkit::{Laws, table};
use statement::{
    bottlenecks, expert, lora_laws, mixlora_laws, other_routers, pill, pill_without_gate, poly, poly_laws, vectors,
};

fn hold<M: Method>(laws: &Laws<M>) {
    let checks = laws.run(&Device::flex());
    assert!(checks.iter().all(|check| !check.failed()), "\n{}", table(&checks));
}

#[test]
fn mixtures_of_lora_obey_the_laws() {
    let routers = [
        RouterConfig::Soft,
        RouterConfig::TopK { k: 2 },
        RouterConfig::TopP { p: 0.7 },
        RouterConfig::Switch,
        RouterConfig::Task { num_tasks: 2, embedding_dim: 5 },
    ];
    for config in routers {
        hold(&lora_laws(MixtureConfig::new(expert(), 3, config).with_shared(1)));
    }
    // What the comparison over all backends looks at of them.
    other_routers().iter().for_each(|(_, laws)| hold(laws));
}

#[test]
fn mixtures_of_feed_forward_parts_obey_the_laws() {
    hold(&mixlora_laws());
}

#[test]
fn mixtures_of_other_adapters_obey_the_laws() {
    hold(&vectors());
    hold(&bottlenecks());
}

#[test]
fn poly_obeys_the_laws() {
    hold(&poly_laws(poly()));
    hold(&poly_laws(PolyConfig { n_splits: 4, ..poly() }));
}

#[test]
fn pill_obeys_the_laws() {
    hold(&pill());
    hold(&pill_without_gate(false));
    hold(&pill_without_gate(true));
}
