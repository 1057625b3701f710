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
use peft_adapter::{BottleneckConfig, Ia3Config};
use peft_core::{Method, Targets};
use peft_moe::{MixtureConfig, PolyConfig, RouterConfig};
use peft_testkit::{Laws, table};
use statement::{expert, laws, lora_laws, mixlora_laws, pill, pill_without_gate, poly, poly_laws, router};

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
}

#[test]
fn mixtures_of_feed_forward_parts_obey_the_laws() {
    hold(&mixlora_laws());
}

#[test]
fn mixtures_of_other_adapters_obey_the_laws() {
    let vectors = MixtureConfig::new(Ia3Config::new(Targets::modules(["up", "down"])), 3, RouterConfig::Soft);
    hold(&laws(vectors, |method, site| method.num_experts * site.d_out + router(method, site)));
    let bottlenecks = MixtureConfig::new(BottleneckConfig::houlsby(4.0), 3, RouterConfig::TopK { k: 2 });
    let params = |method: &MixtureConfig<BottleneckConfig>, site: &peft_core::Site| {
        method.num_experts * (2 * 16 * 4 + 4 + 16) + router(method, site)
    };
    hold(&laws(bottlenecks, params).skip("unaware", "a place is there for adapters alone"));
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
