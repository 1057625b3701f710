//! LoRA, and what belongs to it: combining adapters and LoRA+ learning rates.

pub mod combine;
mod compose;
mod experts;
mod factors;
mod grouped;
mod hub;
mod init;
mod lora;
mod per_expert;
mod plus;
mod unbuilt;

pub use combine::{Combination, combine};
pub use experts::{LoraExperts, join_factors, mix};
pub use factors::attach_factors;
pub use init::InitWeights;
pub use lora::{LoraAdapter, LoraConfig};
pub use plus::{LoraPlus, lora_plus};
