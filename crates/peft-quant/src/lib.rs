//! Packed bases: weights of about four bits, bit for bit as bitsandbytes packs them.
//!
//! ```
//! use peft_quant::{Code, Packed};
//!
//! let weight = [0.11, -0.52, 0.0, 0.98];
//! let packed = Packed::pack(&weight, Code::Nf4, 64, true)?;
//! assert_eq!(packed.codes().len(), 2);
//! assert!(packed.unpack().iter().zip(weight).all(|(a, b)| (a - b).abs() < 0.1));
//! # Ok::<(), peft_quant::Error>(())
//! ```

mod bitsandbytes;
mod code;
mod loftq;
mod mean;
mod packed;
mod quantize;
mod truth;

pub use bitsandbytes::{BnbWeight, Stored, packed_weight, part_names, stored_shape};
pub use code::{Code, dynamic_map};
pub use loftq::{Factors, LoftQ, loftq, loftq_model};
use packed::NESTED_BLOCK;
pub use packed::{Error, Packed, Statistics};
pub use quantize::{Format, Quantization, quantize};
pub use truth::{LayerTruth, merge_truth};
