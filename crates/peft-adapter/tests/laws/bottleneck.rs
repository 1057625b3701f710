//! Bottlenecks in all their forms.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;
use peft_adapter::{BottleneckConfig, InitWeights, NonLinearity, Residual, Scaling};
use peft_core::{Error, Peft, Problem};

use crate::hold;
use crate::statement::bottleneck_laws;

#[test]
fn houlsby() {
    hold(&bottleneck_laws(BottleneckConfig::houlsby(4.0)));
}

#[test]
fn pfeiffer() {
    hold(&bottleneck_laws(BottleneckConfig::pfeiffer(4.0)));
}

#[test]
fn parallel() {
    hold(&bottleneck_laws(BottleneckConfig::parallel(4.0)));
    hold(&bottleneck_laws(BottleneckConfig { scaling: Scaling::Learned, ..BottleneckConfig::parallel(4.0) }));
}

#[test]
fn compacter() {
    hold(&bottleneck_laws(BottleneckConfig { phm_rank: 2, ..BottleneckConfig::compacter(4.0) }));
    hold(&bottleneck_laws(BottleneckConfig::compacter_plus_plus(4.0)));
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
        hold(&bottleneck_laws(config).skip("identity", "the residual is not what the sub-layer computed"));
    }
}

#[test]
fn initial_values_near_the_identity() {
    let houlsby = BottleneckConfig { init_weights: InitWeights::Houlsby, ..BottleneckConfig::houlsby(4.0) };
    hold(&bottleneck_laws(houlsby).skip("identity", "init_weights houlsby starts near the identity, not at it"));
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
