//! One binary, so that the workspace links once.
#![allow(clippy::unwrap_used, reason = "everything here is a test")]

mod adapterhub;
mod composition;
mod encoders;
mod expert_lora;
mod experts;
mod golden;
mod hostile;
mod labels;
mod llama_adapter;
mod mixture_reference;
mod mixtures;
mod packed;
mod pill;
mod prompt_variants;
mod prompts;
mod published;
mod training;
mod union;
