//! Bottleneck adapters between the layers of a model, and methods that scale and shift what its layers compute.

mod bitfit;
mod bottleneck;
mod config;
mod hub;
mod ia3;
mod ln_tuning;
mod projection;
mod ssf;

pub use bitfit::{BitFitAdapter, BitFitConfig};
pub use bottleneck::BottleneckAdapter;
pub use config::{
    AFTER_ATTENTION, AFTER_FEED_FORWARD, BottleneckConfig, InitWeights, NonLinearity, ReductionFactor, Residual,
    Scaling,
};
pub use hub::read_fusion;
pub use ia3::{Ia3Adapter, Ia3Config};
pub use ln_tuning::{LnTuningAdapter, LnTuningConfig};
pub use projection::{Phm, Projection};
pub use ssf::{InitSsf, SsfAdapter, SsfConfig};
