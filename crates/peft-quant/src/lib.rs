//! Packed bases: weights of about four bits, bit for bit as bitsandbytes packs them.

mod code;
mod mean;
mod packed;

pub use code::{Code4, dynamic_map};
pub use packed::{Error, Packed, Statistics};
