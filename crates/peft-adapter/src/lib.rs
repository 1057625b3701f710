//! Bottleneck adapters between the layers of a model, and methods that scale and shift what its layers compute.

mod bitfit;
mod bottleneck;
mod compose;
mod config;
mod fusion;
mod hub;
mod ia3;
mod invertible;
mod ln_tuning;
mod projection;
mod ssf;

pub use bitfit::{BitFitAdapter, BitFitConfig};
pub use bottleneck::{Bottleneck, BottleneckAdapter};
pub use compose::{ComposedAdapter, ComposedConfig, Composition, composed};
pub use config::{
    AFTER_ATTENTION, AFTER_FEED_FORWARD, BottleneckConfig, InitWeights, InvAdapter, NonLinearity, ReductionFactor,
    Residual, Scaling,
};
pub use fusion::Fusion;
pub use hub::read_fusion;
pub use ia3::{Ia3Adapter, Ia3Config};
pub use invertible::Nice;
pub use ln_tuning::{LnTuningAdapter, LnTuningConfig};
pub use projection::{Dense, Phm, Projection};
pub use ssf::{InitSsf, SsfAdapter, SsfConfig};
