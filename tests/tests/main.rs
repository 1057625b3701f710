//! One binary, so that the workspace links once.

mod golden;
mod hostile;
mod training;
