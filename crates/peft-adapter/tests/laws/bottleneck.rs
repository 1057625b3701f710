//! Bottlenecks in all their forms.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor, Tolerance};
use peft_adapter::{BottleneckConfig, InitWeights, NonLinearity, Residual, Scaling};
use peft_core::{Embedded, Error, Peft, Problem, SubLayer};
use peft_testkit::{Laws, fill_adapter};

use crate::hold;
use crate::statement::{bottleneck_laws, bottleneck_params};

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
fn invertible() {
    hold(&bottleneck_laws(BottleneckConfig::pfeiffer(4.0).with_inv_adapter(2.0)));
    let laws = Laws::new(
        BottleneckConfig::houlsby(4.0).with_inv_adapter(0.5),
        bottleneck_params,
        ("inv_adapter_reduction_factor", 0.0.into()),
    );
    hold(&laws.skip("unaware", "a place is there for adapters alone"));
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

/// What enters the blocks leaves them as it was, of an odd width too; bit for bit in both directions while the adapter is new.
#[test]
fn an_invertible_adapter_goes_back() {
    #[derive(Module, Debug)]
    struct Text {
        invertible_adapters: Embedded,
        output_adapters: SubLayer,
    }

    let device = Device::flex();
    let text = |width| Text {
        invertible_adapters: Embedded::new(width, &device),
        output_adapters: SubLayer::new(width, &device),
    };
    let config = BottleneckConfig::pfeiffer(2.0).with_inv_adapter(2.0);
    for width in [8, 7] {
        let x = Tensor::<3>::random([2, 3, width], Distribution::Normal(0.0, 1.0), &device);
        let new = text(width).attach(&config).unwrap();
        new.invertible_adapters.enter(x.clone()).into_data().assert_eq(&x.to_data(), true);
        let random = fill_adapter(new).invertible_adapters;
        let y = random.enter(x.clone());
        let moved = (y.clone() - x.clone()).abs().max().into_scalar::<f32>();
        assert!(moved > 0.1, "{moved}");
        random.leave(y).into_data().assert_approx_eq(&x.into_data(), Tolerance::<f32>::absolute(1e-5));
    }
}

/// A configuration that asks for an adapter behind the embeddings of a model that declares no such place is refused, rather than the half of it attached.
#[test]
fn a_model_without_a_place_behind_its_embeddings_is_refused() {
    #[derive(Module, Debug)]
    struct Block {
        output_adapters: SubLayer,
    }

    let block = Block { output_adapters: SubLayer::new(4, &Device::flex()) };
    let config = BottleneckConfig::pfeiffer(2.0);
    assert!(block.clone().attach(&config).is_ok());
    match block.attach(&config.with_inv_adapter(2.0)) {
        Err(Error::Attach { problems, .. }) => {
            assert!(matches!(&problems[..], [Problem::NoPlace { .. }]), "{problems:?}");
            assert!(problems[0].to_string().contains("Embedded"), "{}", problems[0]);
        }
        other => panic!("expected `NoPlace`, found {other:?}"),
    }
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
