//! From a data file to a trained adapter: data, loss, optimizer, the loop, checkpoints, metrics and their picture.

mod checkpoint;
mod config;
mod confusion;
pub mod data;
mod error;
mod experts;
mod heat;
mod labelling;
mod language;
pub mod measures;
mod metrics;
mod objective;
mod optimizer;
mod plot;
mod schedule;
mod task_file;
mod trained;
mod trainer;

pub use config::TrainConfig;
pub use confusion::confusion_matrix;
pub use error::{Error, Place, Result};
pub use experts::{ExpertRecord, expert_load};
pub use labelling::{Labelling, Report};
pub use language::NextToken;
pub use metrics::{EvalRecord, Record, StepRecord, read_metrics};
pub use objective::{BatchOf, Evaluation, Objective};
pub use optimizer::{Optimization, Rates};
pub use plot::loss_curve;
pub use schedule::Schedule;
pub use task_file::{TASK_FILE, task_of_adapter};
pub use trained::{AdapterOf, Trained, WholeModel};
pub use trainer::{Outcome, Stop, Summary, train};
