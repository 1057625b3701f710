//! The commands, one file each.

pub mod combine;
pub mod convert;
pub mod eval;
pub mod generate;
pub mod inspect;
pub mod logits;
pub mod merge;
pub mod methods;
pub mod predict;
pub mod quantize;
pub mod quickstart;
pub mod train;
