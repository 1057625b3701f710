//! From a data file to batches: [`read_rows`], [`substitute`], [`encode`], [`split`], [`Batches`].

mod batch;
mod encode;
mod plan;
mod rows;
mod shuffle;

pub use batch::{Batch, BatchOptions, BatchTensors, Batches, Position};
pub use encode::{EncodeOptions, EncodeReport, Sample, encode};
pub use rows::{Row, read_rows, substitute};
pub use shuffle::split;
