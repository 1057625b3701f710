//! Bottleneck adapters between the layers of a model, and methods that scale and shift what its layers compute.

mod bitfit;
mod ia3;
mod ln_tuning;
mod ssf;

pub use bitfit::{BitFitAdapter, BitFitConfig};
pub use ia3::{Ia3Adapter, Ia3Config};
pub use ln_tuning::{LnTuningAdapter, LnTuningConfig};
pub use ssf::{InitSsf, SsfAdapter, SsfConfig};
