//! The state of a prompt method: what is learned, as it is used or as an encoder reads it.

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::Tensor;
use peft_core::{Activation, Error, Prompt, PromptShape, Result, Site};

use crate::encoder::Encoder;

/// What a prompt is used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Virtual tokens, `[n, width]`.
    Tokens,
    /// Keys and values of every block, `[n, 2·blocks·kv_heads·head_dim]`.
    Past,
}

/// State of a prompt method in a model.
#[derive(Module, Debug)]
pub struct PromptAdapter {
    /// What is used, without an encoder.
    direct: Option<Param<Tensor<2>>>,
    /// What computes it, during training.
    encoder: Option<Encoder>,
    #[module(skip)]
    used: Use,
}

impl PromptAdapter {
    pub(crate) fn direct(values: Param<Tensor<2>>, used: Use) -> Self {
        Self { direct: Some(values), encoder: None, used }
    }

    pub(crate) fn encoded(encoder: Encoder, used: Use) -> Self {
        Self { direct: None, encoder: Some(encoder), used }
    }

    /// What an encoder makes, for the file.
    pub(crate) fn computed(&self) -> Option<(&'static str, Tensor<2>)> {
        self.encoder.as_ref().map(|encoder| (KEY, encoder.forward()))
    }

    /// The prompt as it is used, `[n, values of a token]`.
    pub fn values(&self) -> Tensor<2> {
        match (&self.direct, &self.encoder) {
            (Some(values), _) => values.val(),
            (None, Some(encoder)) => encoder.forward(),
            (None, None) => unreachable!("made with one of them"),
        }
    }
}

/// The key of the prompt in PEFT's files.
pub(crate) const KEY: &str = "prompt_embeddings";

/// The key of a field: that of the prompt, or one of the encoder's file.
pub(crate) fn key(field: &str) -> Option<(String, bool)> {
    if field == "direct" {
        return Some((KEY.to_owned(), false));
    }
    let (key, transposed) = Encoder::key(field.strip_prefix("encoder.")?)?;
    Some((format!("{}{key}", peft_core::files::ENCODER_PREFIX), transposed))
}

/// What all prompt methods answer alike, of the items of [`Method`](peft_core::Method).
macro_rules! of_prompts {
    () => {
        const OF_MODEL: bool = true;
        type Adapter = $crate::PromptAdapter;

        fn targets(&self) -> &peft_core::Targets {
            self.besides.targets()
        }

        fn kinds(&self) -> &'static [peft_core::LayerKind] {
            &[peft_core::LayerKind::Prompts]
        }

        fn tensors(_kind: peft_core::LayerKind) -> &'static [peft_core::FileTensor] {
            &[peft_core::FileTensor { field: "direct", key: $crate::adapter::KEY, transposed: false }]
        }

        fn key(_kind: peft_core::LayerKind, field: &str) -> Option<(String, bool)> {
            $crate::adapter::key(field)
        }

        fn computed(adapter: &Self::Adapter) -> Option<(&'static str, burn::tensor::Tensor<2>)> {
            adapter.computed()
        }

        fn activation(adapter: &Self::Adapter) -> Option<&dyn peft_core::Activation> {
            Some(adapter)
        }

        fn needs_activation(&self, _site: &peft_core::Site) -> Option<String> {
            Some("a prompt stands in front of the model's input".to_owned())
        }

        fn unmergeable(&self, _site: &peft_core::Site) -> Option<String> {
            Some("a prompt is no part of any weight".to_owned())
        }
    };
}

pub(crate) use of_prompts;

/// The shape of the model that prompts are for, which must have room for `n` virtual tokens and some text.
pub(crate) fn shape_of(site: &Site, n: usize) -> Result<PromptShape> {
    let shape = site.prompt.ok_or_else(|| Error::config("num_virtual_tokens", "a place for prompts", &site.path))?;
    if n >= shape.positions {
        let expected = format!("fewer than the {} positions of the model", shape.positions);
        return Err(Error::config("num_virtual_tokens", expected, n));
    }
    Ok(shape)
}

/// Refuses a prompt of no tokens.
pub(crate) fn check_count(n: usize) -> Result<()> {
    if n == 0 { Err(Error::config("num_virtual_tokens", "at least 1", n)) } else { Ok(()) }
}

/// The weight form: there is none, and what it would change is not read.
impl Reparameterization for PromptAdapter {
    const NAME: &'static str = "prompt";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for PromptAdapter {
    fn prompt(&self, shape: &PromptShape) -> Prompt {
        let values = self.values();
        match self.used {
            Use::Tokens => Prompt { tokens: Some(values), past: None },
            Use::Past => {
                let n = values.dims()[0];
                let past = values.reshape([n, 2 * shape.blocks, shape.kv_heads, shape.head_dim]);
                Prompt { tokens: None, past: Some(past) }
            }
        }
    }
}
