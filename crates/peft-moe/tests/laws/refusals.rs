//! What mixtures and Poly refuse to be.

use peft_adapter::BottleneckConfig;
use peft_core::{Composable, Method, Targets};
use peft_lora::LoraConfig;
use peft_moe::{Balance, MixtureConfig, MolaShape, PolyConfig, RouterConfig, mola};

fn targets() -> Targets {
    Targets::modules(["proj"])
}

fn mixture(num_experts: usize, router: RouterConfig) -> MixtureConfig<LoraConfig> {
    MixtureConfig::new(LoraConfig::new(2, targets()), num_experts, router)
}

fn of<M: Composable>(expert: M) -> MixtureConfig<M> {
    MixtureConfig::new(expert, 2, RouterConfig::Soft)
}

#[track_caller]
fn refused<M: Method>(method: &M, with: &str) {
    let error = method.check().unwrap_err().to_string();
    assert!(error.contains(with), "{error}");
}

#[test]
fn experts_that_a_mixture_has_no_place_for() {
    refused(&of(LoraConfig { use_gating: true, ..LoraConfig::new(2, targets()) }), "use_gating");
    refused(&of(BottleneckConfig::pfeiffer(4.0).with_inv_adapter(2.0)), "inv_adapter");
    let inside = BottleneckConfig { adapter_residual_before_ln: true, ..BottleneckConfig::pfeiffer(4.0) };
    of(inside.clone()).check().unwrap();
    of(BottleneckConfig { ln_after: true, ..BottleneckConfig::pfeiffer(4.0) }).check().unwrap();
    let inside = BottleneckConfig { ln_after: true, ..inside };
    refused(&of(inside.clone()), "adapter_residual_before_ln");
    // There is no residual around it.
    of(BottleneckConfig { is_parallel: true, ..inside }).check().unwrap();
}

#[test]
fn more_open_gates_than_experts() {
    for router in [RouterConfig::TopK { k: 5 }, RouterConfig::Arrow { k: 5 }] {
        refused(&mixture(4, router.clone()), "top_k of at most 4");
        mixture(5, router).check().unwrap();
    }
    mola(targets(), MolaShape::Inverted, 4).check().unwrap();
    // A layer with one expert alone; what all layers would have counts for none.
    let by_layer = |experts_per_layer| MixtureConfig { experts_per_layer, ..mixture(1, RouterConfig::TopK { k: 2 }) };
    refused(&by_layer(vec![8, 1]), "top_k of at most 1");
    by_layer(vec![8, 2]).check().unwrap();
}

#[test]
fn numbers_that_nobody_means() {
    for count in [0, 4097, usize::MAX] {
        refused(&mixture(count, RouterConfig::Soft), "num_experts");
        let by_layer = MixtureConfig { experts_per_layer: vec![2, count], ..mixture(2, RouterConfig::Soft) };
        refused(&by_layer, "experts_per_layer");
        refused(&PolyConfig::new(count, 1, targets()), "n_skills");
    }
    for count in [4097, usize::MAX] {
        refused(&mixture(2, RouterConfig::Soft).with_shared(count), "num_shared");
    }
    for count in [0, 65_537, usize::MAX] {
        refused(&mixture(2, RouterConfig::Task { num_tasks: count, embedding_dim: 1 }), "num_tasks");
        refused(&mixture(2, RouterConfig::Task { num_tasks: 1, embedding_dim: count }), "embedding_dim");
        refused(&PolyConfig::new(2, count, targets()), "n_tasks");
        refused(&PolyConfig { n_splits: count, ..PolyConfig::new(2, 1, targets()) }, "n_splits");
    }
    refused(&PolyConfig { rank: usize::MAX, ..PolyConfig::new(1, 2, targets()) }, "`r`");
    mixture(4096, RouterConfig::Task { num_tasks: 65_536, embedding_dim: 65_536 }).check().unwrap();
}

#[test]
fn a_preference_that_is_no_part() {
    let with = |delta| mixture(2, RouterConfig::Soft).with_balance(Balance { delta, ..Balance::default() });
    for delta in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        refused(&with(delta), "balance.delta");
    }
    with(0.0).check().unwrap();
    with(1.0).check().unwrap();
}
