//! From a data file to batches: [`read_rows`], [`substitute`], [`encode`], or [`read_labelled`], [`task_of`], [`label`]; then [`split`], [`Batches`].

mod batch;
mod encode;
mod file;
mod idx;
mod labelled;
mod labels;
mod plan;
mod reader;
mod rows;
mod shuffle;

pub use batch::{Batch, BatchOptions, BatchTensors, Batches, Example, Position};
pub use encode::{EncodeOptions, EncodeReport, Sample, encode};
pub use labelled::{Content, IGNORED, Label, LabelledRow, Picture, read_labelled};
pub use labels::{Target, TaskKind, task_of};
pub use reader::{LabelReport, Labelled, MAX_TOKENS, Prepared, Reader, label};
pub use rows::{Row, read_rows, substitute};
pub use shuffle::split;
