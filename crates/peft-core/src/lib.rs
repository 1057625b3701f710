//! The core of the workspace: what a method is, where it attaches, how it computes, and what its files look like.
//!
//! - [`Method`]: a configuration that makes one adapter per matched layer. A method is one file, in any crate.
//! - [`Targets`]: which layers are adapted, by Hugging Face's rules.
//! - [`Peft::attach`]: all or nothing; freezes the base and puts an adapter into each matched weight.
//! - [`pack`]: packed weights in place of dense ones; every method attaches over them as over dense ones.
//! - [`linear`], [`embedding`], [`layer_norm`], [`rms_norm`], [`conv2d`], [`SubLayer::end`], [`Embedded::enter`], [`Attended::beside`], [`GroupedLinear`], [`FeedForward::forward`]: the activation seam. They take the unchanged `burn::nn` layers and compute the adapter on activations.
//!   A model that calls `layer.forward(x)` instead is equally correct, by the weight seam, only slower.
//! - [`ComposedConfig`]: several adapters of a method at one place, as one; [`Union`]: adapters of several methods, each at its own places.
//! - [`save_adapter`], [`load_adapter`]: `adapter_config.json` and `adapter_model.safetensors` in Hugging Face PEFT's layout.
//!
//! Values replace state machines: the clone made before [`Peft::attach`] is the disabled model, the reference model and the un-merged model.

mod activation;
mod attach;
mod attended;
mod auxiliary;
mod compose;
mod dense;
mod embedded;
mod error;
mod feed_forward;
pub mod files;
mod fingerprint;
mod gate;
mod grouped;
mod location;
mod merge;
mod method;
mod modalities;
mod named;
mod padding;
mod prompts;
mod quantized;
mod rebuild;
mod report;
mod scope;
mod site;
mod sub_layer;
mod targets;
mod tasks;
mod union;
mod walk;

pub use activation::{
    Activation, Base, conv2d, cross_entropy, embedding, embedding_as, layer_norm, linear, linear_with, product,
    rms_norm,
};
pub use attach::{Peft, attach, select};
pub use attended::{Attended, KeysAndValues};
pub use auxiliary::{Auxiliary, say_auxiliary, with_auxiliary};
pub use compose::{Composable, ComposedAdapter, ComposedConfig, Composition, Experts, Fusion, Part, composed};
pub use dense::{Dense, Start};
pub use embedded::Embedded;
pub use error::{Error, Problem, Result, check_size};
pub use feed_forward::{FeedForward, Gated};
pub use files::{AdapterFile, Strictness, load_adapter, load_adapter_with, save_adapter};
pub use fingerprint::base_fingerprint;
pub use gate::Gate;
pub use grouped::{GroupedBase, GroupedLinear};
pub use location::{HfName, LayerKind, Location, PathStack, block_of, hf_name};
pub use merge::merge;
pub use method::{FileTensor, Method};
pub use modalities::{Modalities, Modality, by_modality, for_modalities, for_text, modalities};
pub use named::Named;
pub use padding::{for_mask, mask};
/// The custom operations, on which the activation seam rests.
pub use peft_kernels as kernels;
pub use prompts::{Places, Prompt, PromptShape, Prompts, Reading, mean_of_tokens};
pub use quantized::{Quantized, pack};
pub use report::{Report, report};
pub use scope::within;
pub use site::{AdapterAware, Room, Scan, Site, rng_of, scan};
pub use sub_layer::{End, Norm, SubLayer};
pub use targets::{Bias, Matcher, Names, OneOrMany, Targets, pattern_value};
pub use tasks::{for_tasks, tasks};
pub use union::{Union, UnionAdapter};
pub use walk::{ParamMapper, ParamVisitor, map_params, visit_params};
