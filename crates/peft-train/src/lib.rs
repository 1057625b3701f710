//! From a data file to a trained adapter: data, loss, optimizer, the loop, checkpoints, metrics and their picture.

mod checkpoint;
pub mod data;
mod error;
mod loss;
mod metrics;
mod optimizer;
mod plot;
mod schedule;
mod trained;
mod trainer;

pub use error::{Error, Place, Result};
pub use loss::{Evaluation, evaluate};
pub use metrics::{EvalRecord, Record, StepRecord, read_metrics};
pub use plot::loss_curve;
pub use schedule::Schedule;
pub use trained::{AdapterOf, Trained, WholeModel};
pub use trainer::{Outcome, Stop, Summary, TrainConfig, train};
