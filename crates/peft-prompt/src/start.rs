//! Prompts that start from what a model knows: the embeddings of a text, its keys and values.

use std::path::Path;

use burn::module::Module;
use peft_core::files::Values;
use peft_core::{AdapterFile, Error, Method, Result, Strictness, attach};

use crate::PromptAdapter;
use crate::adapter::KEY;

/// Attaches `method`, and starts its prompt at `values`, row-major: `[num_virtual_tokens, width]`, or for a prefix
/// `[num_virtual_tokens, 2·blocks·kv_heads·head_dim]`, keys of the first block first; of several prompts one below the other.
///
/// # Errors
/// As [`attach`]; when an encoder computes the prompt, which cannot be asked for given values; and when there are too many or too few.
pub fn start_at<T: Module, M: Method<Adapter = PromptAdapter>>(
    module: T,
    method: &M,
    values: &[f32],
    seed: u64,
) -> Result<T> {
    let module = attach(module, method, seed)?;
    let mut file = AdapterFile::collect(&module, method)?;
    if file.tensors.keys().any(|key| key.starts_with(peft_core::files::ENCODER_PREFIX)) {
        return Err(Error::config("encoder_hidden_size", "a prompt without an encoder, for values to start at", "one"));
    }
    let Some(prompt) = file.tensors.get_mut(KEY) else { unreachable!("attached above") };
    if prompt.values.len() != values.len() {
        let expected = format!("{:?} values", prompt.shape);
        return Err(Error::config("num_virtual_tokens", expected, values.len()));
    }
    *prompt = Values { shape: prompt.shape.clone(), values: values.to_vec() };
    file.fill(module, Path::new("the values"), Strictness::default())
}
