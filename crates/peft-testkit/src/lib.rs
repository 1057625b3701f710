//! What every method must obey, as functions over any [`Method`](peft_core::Method) on any Burn device.
//!
//! [`Laws`] runs them and gives one [`Check`] each, so that the same code serves tests, the table over all backends, and a method in a
//! crate of one's own. Nothing panics: a backend that does is a failed check with its message.

mod check;
mod composition;
mod golden;
mod laws;
mod matrix;
mod operations;
mod stack;
mod state;

pub use check::{Check, Failure, Finding, Outcome, Status, table};
pub use composition::composition_laws;
pub use golden::Golden;
pub use laws::{Laws, Layer, MODALITIES};
pub use matrix::Matrix;
pub use operations::{Operation, operations};
pub use stack::{Seam, Stack};
pub use state::{difference, fill_adapter, read};
