//! One binary, so that the workspace links once.
#![allow(clippy::unwrap_used, reason = "everything here is a test")]

mod adapterhub;
mod composition;
mod encoders;
mod experts;
mod golden;
mod hostile;
mod labels;
mod llama_adapter;
mod packed;
mod pill;
mod prompt_variants;
mod prompts;
mod training;
mod union;
