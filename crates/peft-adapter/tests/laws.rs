//! Bottlenecks in all their forms under the laws of `peft-testkit`.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;
use peft_adapter::{BottleneckConfig, InitWeights, NonLinearity, Residual, Scaling};
use peft_core::{Error, Peft, Problem, Site};
use peft_testkit::{Laws, table};

/// Of a model of 16 features and a bottleneck of 4.
fn count(config: &BottleneckConfig, site: &Site) -> usize {
    let (width, inner) = (site.d_out, 4);
    let projections = if config.phm_layer {
        let (n, rank) = (config.phm_dim, config.phm_rank);
        2 * (n * n * n + rank * (width + inner)) + inner + width
    } else {
        2 * width * inner + inner + width
    };
    let norms = 2 * width * (usize::from(config.ln_before) + usize::from(config.ln_after));
    let scale = match config.scaling {
        Scaling::Constant(_) => 0,
        Scaling::Learned => 1,
        Scaling::Channel => width,
    };
    projections + norms + scale + if config.use_gating { width + 1 } else { 0 }
}

const AWARE: &str = "a place is there for adapters alone";

fn hold(config: BottleneckConfig) {
    hold_laws(&laws(config));
}

fn laws(config: BottleneckConfig) -> Laws<BottleneckConfig> {
    Laws::new(config, count, ("reduction_factor", 0.0.into())).skip("unaware", AWARE)
}

fn hold_laws(laws: &Laws<BottleneckConfig>) {
    let checks = laws.run(&Device::flex());
    assert!(checks.iter().all(|check| !check.failed()), "\n{}", table(&checks));
}

#[test]
fn houlsby() {
    hold(BottleneckConfig::houlsby(4.0));
}

#[test]
fn pfeiffer() {
    hold(BottleneckConfig::pfeiffer(4.0));
}

#[test]
fn parallel() {
    hold(BottleneckConfig::parallel(4.0));
    hold(BottleneckConfig { scaling: Scaling::Learned, ..BottleneckConfig::parallel(4.0) });
}

#[test]
fn compacter() {
    hold(BottleneckConfig { phm_rank: 2, ..BottleneckConfig::compacter(4.0) });
    hold(BottleneckConfig::compacter_plus_plus(4.0));
}

#[test]
fn own_norms_gate_and_residuals() {
    let all = BottleneckConfig {
        ln_before: true,
        use_gating: true,
        scaling: Scaling::Channel,
        non_linearity: NonLinearity::Tanh,
        residual_before_ln: Residual::Normed,
        ..BottleneckConfig::pfeiffer(4.0)
    };
    for config in [BottleneckConfig { residual_before_ln: Residual::Sum, ..all.clone() }, all] {
        hold_laws(&laws(config).skip("identity", "the residual is not what the sub-layer computed"));
    }
}

#[test]
fn initial_values_near_the_identity() {
    let houlsby = BottleneckConfig { init_weights: InitWeights::Houlsby, ..BottleneckConfig::houlsby(4.0) };
    let laws = Laws::new(houlsby, count, ("reduction_factor", "much".into()))
        .skip("unaware", AWARE)
        .skip("identity", "init_weights houlsby starts near the identity, not at it");
    hold_laws(&laws);
}

/// A model that declares no place cannot have a bottleneck.
#[test]
fn a_model_without_places_is_refused() {
    #[derive(Module, Debug)]
    struct Plain {
        proj: Linear,
    }

    let device = Device::flex();
    let plain = Plain { proj: LinearConfig::new(4, 4).init(&device) };
    match plain.attach(&BottleneckConfig::houlsby(2.0)) {
        Err(Error::Attach { problems, .. }) => {
            assert!(matches!(&problems[..], [Problem::NoPlace { .. }]), "{problems:?}");
            assert!(problems[0].to_string().contains("SubLayer"), "{}", problems[0]);
        }
        other => panic!("expected `NoPlace`, found {other:?}"),
    }
}
