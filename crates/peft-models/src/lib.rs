//! Decoders and encoders with the activation seam, and their files: Hugging Face directories, GGUF, the model hub.
//!
//! The models' parameter paths are the keys of `transformers`, so [`peft_core::Targets`] means here what it means there.

mod attention;
mod causal_lm;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod encoder;
mod error;
mod experts;
pub mod export;
mod feed_forward;
mod generate;
pub mod gguf;
mod gpt2;
pub mod heads;
pub mod image;
mod latent;
mod llama;
pub mod load;
mod pretrained;
pub mod quantize;
pub mod stacked;
mod tiny;
pub mod tokenizer;
pub mod weights;

pub use attention::{KvCache, Layout};
pub use causal_lm::CausalLm;
pub use encoder::Encoder;
pub use error::{Error, Result};
pub use experts::{Routed, load_balancing_loss};
pub use generate::{Sampling, generate};
pub use gpt2::Gpt2;
pub use llama::Llama;
pub use pretrained::{EncoderOptions, ModelFiles, ModelSource, Origin, Pretrained, PretrainedEncoder};
