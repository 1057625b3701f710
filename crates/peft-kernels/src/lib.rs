//! Custom operations, each with a body that runs on every backend, a path for the CPU, a kernel for GPUs, and one test that holds all of them
//! against double precision.
//!
//! - [`marker_module`]: fields that say something to visitors.
//! - [`PackedMatrix`]: a weight of about four bits a value, and the product with it. Only packed tensors outlive an operation.

mod marker;
mod packed;

pub use packed::{BlockScales, PackedData, PackedLayout, PackedMatrix, PackedOps, Primitive, ScaleKind};
