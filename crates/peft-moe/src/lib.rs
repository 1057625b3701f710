//! Mixtures of adapters: several experts in one place, and a router that opens a gate to each of them, row by row.
//!
//! A mixture is experts × router × balance ([`MixtureConfig`]), and the published ones are presets: [`molora`], [`mov`], [`mola`], [`loramoe`], [`moelora`].

mod balance;
mod mixlora;
mod mixture;
mod presets;
mod router;

pub use balance::Balance;
pub use mixlora::{MixLoraAdapter, MixLoraConfig, Projection};
pub use mixture::{MixtureAdapter, MixtureConfig, task_lora};
pub use presets::{MolaShape, loramoe, mixlora, moelora, mola, molora, mov};
pub use router::{Level, Router, RouterConfig, Routing};
