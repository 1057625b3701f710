//! Bottleneck adapters between the layers of a model, and methods that scale and shift what its layers compute.

mod bottleneck;
mod compose;
mod config;
mod fusion;
mod hub;
mod projection;

pub use bottleneck::BottleneckAdapter;
pub use compose::{ComposedAdapter, ComposedConfig, Composition};
pub use config::{
    AFTER_ATTENTION, AFTER_FEED_FORWARD, BottleneckConfig, InitWeights, NonLinearity, ReductionFactor, Residual,
    Scaling,
};
pub use fusion::Fusion;
pub use projection::{Dense, Phm, Projection};
