//! Mixtures of adapters: several experts in one place, and a router that opens a gate to each of them, row by row.
//!
//! A mixture is experts × router × balance ([`MixtureConfig`]), and the published ones are presets: [`molora`], [`mov`], [`mola`], [`loramoe`], [`moelora`]. [`ArrowConfig`] makes one
//! of adapters that are trained already. In [`PolyConfig`] tasks share skills, whose factors are averaged before anything is multiplied by them; in [`XLoraConfig`] a classifier mixes what is trained
//! already, by what a first pass makes of the text.
//! Where the modality of a token chooses its expert, nothing is routed: [`PillConfig`].

mod arrow;
mod balance;
mod mixlora;
mod mixture;
mod pill;
mod poly;
mod presets;
mod router;
mod task_lora;
mod xlora;

pub use arrow::ArrowConfig;
pub use balance::Balance;
pub use mixlora::{MixLoraAdapter, MixLoraConfig, Projection};
pub use mixture::{MixtureAdapter, MixtureConfig};
pub use pill::{Expert, Experts, FeatureConfig, PillAdapter, PillConfig, Projector, Shared, ValueGate};
pub use poly::{PolyAdapter, PolyConfig, PolyType};
pub use presets::{MolaShape, loramoe, mixlora, moelora, mola, molora, mov};
pub use router::{Level, Router, RouterConfig, Routing};
pub use task_lora::task_lora;
pub use xlora::{XLoraAdapter, XLoraConfig};
