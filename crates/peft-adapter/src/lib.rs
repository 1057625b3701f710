//! Bottleneck adapters between the layers of a model, and methods that scale and shift what its layers compute.

mod bitfit;
mod bottleneck;
mod config;
mod hub;
mod ia3;
mod invertible;
mod ln_tuning;
mod method;
mod projection;
mod ssf;

pub use bitfit::{BitFitAdapter, BitFitConfig};
pub use bottleneck::Bottleneck;
pub use config::{
    AFTER_ATTENTION, AFTER_FEED_FORWARD, BottleneckConfig, InitWeights, InvAdapter, NonLinearity, ReductionFactor,
    Residual, Scaling,
};
pub use hub::read_fusion;
pub use ia3::{Ia3Adapter, Ia3Config, Ia3Experts};
pub use invertible::Nice;
pub use ln_tuning::{LnTuningAdapter, LnTuningConfig};
pub use method::BottleneckAdapter;
pub use projection::{Phm, Projection};
pub use ssf::{InitSsf, SsfAdapter, SsfConfig};
