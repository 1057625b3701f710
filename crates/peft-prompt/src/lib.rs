//! Methods that learn inputs instead of weights: virtual tokens in front of the embeddings, keys and values in front of those of every block, tokens that attention reads besides.

mod adapter;
mod bank;
mod besides;
mod encoder;
mod hub;
mod llama_adapter;
mod lstm;
mod multitask;
mod p_tuning;
mod prefix;
mod prompt;
mod start;

pub use adapter::PromptAdapter;
pub use bank::{Banked, PromptBankConfig, ensemble};
pub use besides::Besides;
pub use encoder::{Between, Encoder, EncoderKind};
pub use llama_adapter::{AttentionName, LlamaAdapter, LlamaAdapterConfig};
pub use lstm::Lstm;
pub use multitask::{MultitaskPromptTuningConfig, SourceTasks, TaskFactors};
pub use p_tuning::PTuningConfig;
pub use prefix::{Gating, PrefixTuningConfig};
pub use prompt::{PromptInit, PromptTuningConfig};
pub use start::start_at;
