//! Parameter-efficient fine-tuning for [Burn](burn): everything under one roof.
//!
//! - [`core`]: methods, targets, attaching, the activation seam, adapter files
//! - [`lora`]: the low-rank methods
//! - [`adapter`]: bottlenecks between the layers, (IA)³, SSF and their relatives
//! - [`prompt`]: prompt tuning, prefix tuning, P-tuning, LLaMA-Adapter
//! - [`moe`]: mixtures of adapters
//! - [`quant`]: packed bases of about four bits a value, under any method
//! - [`models`]: adapter-aware decoders, Hugging Face directories and GGUF
//! - [`union`]: several of these methods as one adapter: MAM, `UniPELT`
//! - [`train`]: data, the loop, checkpoints
//!
//! ```
//! use burn::{nn::LinearConfig, tensor::{Device, Distribution, Tensor}};
//! use peft::prelude::*;
//!
//! #[derive(burn::module::Module, Debug)]
//! struct Model { proj: burn::nn::Linear }                               // any Burn module, untouched
//!
//! let device = Device::flex().autodiff();
//! let base = Model { proj: LinearConfig::new(64, 64).init(&device) };
//! let lora = LoraConfig::new(8, Targets::modules(["proj"])).with_alpha(16.0);
//! let model = base.clone().attach(&lora)?;                              // freezes the base; an error if nothing matches
//! assert_eq!(model.trainable().trainable, 8 * (64 + 64));
//!
//! let x = Tensor::<2>::random([4, 64], Distribution::Default, &device);
//! let y = peft::core::linear(&model.proj, x.clone());                   // `model.proj.forward(x)` is right as well, only slower
//! assert_eq!(y.dims(), base.proj.forward(x).dims());
//! # Ok::<(), peft::core::Error>(())
//! ```

pub use peft_adapter as adapter;
pub use peft_core as core;
pub use peft_lora as lora;
pub use peft_models as models;
pub use peft_moe as moe;
pub use peft_prompt as prompt;
pub use peft_quant as quant;
pub use peft_train as train;
pub use peft_union as union;

/// What most programs need.
pub mod prelude {
    pub use peft_core::{Peft, Targets, load_adapter, merge, save_adapter};
    pub use peft_lora::LoraConfig;
    pub use peft_quant::{Format, Quantization, quantize};
}
