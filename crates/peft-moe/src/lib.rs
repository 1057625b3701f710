//! Mixtures of adapters: several experts in one place, and a router that opens a gate to each of them, row by row.
//!
//! A mixture is experts × router × balance ([`MixtureConfig`]), and the published ones are presets: [`molora`], [`mov`], [`mola`], [`loramoe`], [`moelora`].
//! Where the modality of a token chooses its expert, nothing is routed: [`PillConfig`].

mod balance;
mod mixture;
mod pill;
mod presets;
mod router;

pub use balance::Balance;
pub use mixture::{MixtureAdapter, MixtureConfig, task_lora};
pub use pill::{Expert, Experts, FeatureConfig, PillAdapter, PillConfig, Projector, Shared, ValueGate};
pub use presets::{MolaShape, loramoe, moelora, mola, molora, mov};
pub use router::{Level, Router, RouterConfig, Routing};
