//! Prefix tuning, and P-tuning v2: keys and values in front of those of every block are what is learned.
//!
//! - formula: in each block `o = attention(q, [Pₖ; k], [Pᵥ; v])`, `P: [n, 2·blocks, kv_heads, head_dim]`; every token sees all `n`; the text's positions begin behind them. Learned keys are used as they are, without a rotary
//!   embedding
//! - with `layers_to_transform`: in these blocks alone
//! - with `prefix_projection`: `P = tanh(E·A + a)·B + b` during training, see [`Encoder`]
//! - source: Li & Liang 2021, arXiv:2101.00190, section 4; Liu et al. 2022, arXiv:2110.07602, section 3 (P-tuning v2: without the projection, for understanding, beside a trained head)
//! - trained: `2·n·blocks·kv_heads·head_dim` values; with the projection, of `w = kv_heads·head_dim` and `e = encoder_hidden_size`, `n·w + w·e + e + 2·blocks·w·(e + 1)`
//! - at init: no identity: a key takes its share of the attention, whatever it holds

use burn::tensor::Tensor;
use peft_core::{Error, Method, Result, Site};
use serde::{Deserialize, Serialize};

use crate::adapter::{PromptAdapter, Use, check_count, of_prompts, shape_of};
use crate::{Besides, Encoder};

/// Configuration of prefix tuning; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{module::Module, tensor::{Device, Int, Tensor}};
/// use peft_core::{Peft, PromptShape, Prompts};
/// use peft_prompt::PrefixTuningConfig;
///
/// #[derive(Module, Debug)]
/// struct Model { prompts: Prompts }
///
/// let device = Device::flex().autodiff();
/// let shape = PromptShape { width: 8, blocks: 3, kv_heads: 2, head_dim: 4, positions: 16, causal: true };
/// let model = Model { prompts: Prompts::new(shape, &device) }.attach(&PrefixTuningConfig::new(5))?;
/// assert_eq!(model.trainable().trainable, 2 * 5 * 3 * 2 * 4);
///
/// let (x, ids) = (Tensor::<3>::zeros([1, 7, 8], &device), Tensor::<2, Int>::zeros([1, 7], &device));
/// let (_x, prompt) = model.prompts.enter(x, &ids, None);
/// let text = Tensor::<4>::zeros([1, 7, 2, 4], &device);
/// let (keys, _values) = prompt.behind_past(0, text.clone(), text);
/// assert_eq!(keys.dims(), [1, 5 + 7, 2, 4]);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefixTuningConfig {
    /// Length of the prefix.
    pub num_virtual_tokens: usize,
    /// Whether an encoder computes the prefix during training.
    pub prefix_projection: bool,
    /// Width of the encoder [default: that of the keys].
    pub encoder_hidden_size: Option<usize>,
    /// Numbers of the blocks that have a prefix, from 0 [default: all]. PEFT has no such choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Whether the positions of the text begin behind the prefix, as PEFT has it; AdapterHub's prefixes take none.
    #[serde(skip)]
    pub unshifted: bool,
    /// Whether the prefix stays as it starts: one of a given text, see [`start_at`](crate::start_at).
    #[serde(skip)]
    pub fixed: bool,
    /// Where the encoder is gone: what is learned is the prefix itself.
    #[serde(skip)]
    pub direct: bool,
    /// What is trained besides.
    #[serde(rename = "modules_to_save")]
    pub besides: Besides,
}

impl Default for PrefixTuningConfig {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            prefix_projection: false,
            encoder_hidden_size: None,
            layers_to_transform: None,
            unshifted: false,
            fixed: false,
            direct: false,
            besides: Besides::default(),
        }
    }
}

impl PrefixTuningConfig {
    /// A prefix of that length.
    pub fn new(num_virtual_tokens: usize) -> Self {
        Self { num_virtual_tokens, ..Self::default() }
    }

    /// With an encoder of that width during training.
    #[must_use]
    pub fn with_projection(self, encoder_hidden_size: usize) -> Self {
        Self { prefix_projection: true, encoder_hidden_size: Some(encoder_hidden_size), ..self }
    }

    /// In these blocks alone.
    #[must_use]
    pub fn in_layers(self, layers: impl IntoIterator<Item = usize>) -> Self {
        Self { layers_to_transform: Some(layers.into_iter().collect()), ..self }
    }

    /// Keys and values of a text for the prefix to start at, of those of all blocks `[n, 2·blocks, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// When there is no such block.
    pub fn of_text(&self, past: Tensor<4>) -> Result<Tensor<4>> {
        self.count(past.dims()[1] / 2)?;
        let Some(layers) = &self.layers_to_transform else { return Ok(past) };
        Ok(Tensor::cat(layers.iter().map(|layer| past.clone().narrow(1, 2 * layer, 2)).collect(), 1))
    }

    /// How many blocks of a model have a prefix.
    fn count(&self, blocks: usize) -> Result<usize> {
        let Some(layers) = &self.layers_to_transform else { return Ok(blocks) };
        let known = layers.iter().all(|layer| *layer < blocks);
        if layers.is_empty() || !known || layers.windows(2).any(|pair| pair[0] >= pair[1]) {
            let expected = format!("numbers of some of the {blocks} blocks, in order");
            return Err(Error::config("layers_to_transform", expected, format!("{layers:?}")));
        }
        Ok(layers.len())
    }
}

impl Method for PrefixTuningConfig {
    const PEFT_TYPE: &'static str = "PREFIX_TUNING";

    of_prompts!();

    fn check(&self) -> Result<()> {
        if self.encoder_hidden_size == Some(0) {
            return Err(Error::config("encoder_hidden_size", "at least 1", 0));
        }
        check_count(self.num_virtual_tokens)
    }

    fn init(&self, site: &Site, seed: u64) -> Result<PromptAdapter> {
        let (n, mut rng) = (self.num_virtual_tokens, site.rng(seed));
        let shape = shape_of(site, n)?;
        let (width, out) = (shape.kv_width(), 2 * self.count(shape.blocks)? * shape.kv_width());
        let used = Use::Past { blocks: self.layers_to_transform.clone(), shifts: !self.unshifted };
        if self.prefix_projection && !self.direct {
            let inner = self.encoder_hidden_size.unwrap_or(width);
            let encoder = Encoder::projection(site, [n, width, inner, out], &mut rng);
            return Ok(PromptAdapter::encoded(encoder, n, used));
        }
        let values = site.normal([n, out], 1.0, &mut rng).set_require_grad(!self.fixed);
        Ok(PromptAdapter::direct(values, n, used))
    }

    fn without_encoder(self) -> Self {
        Self { direct: true, ..self }
    }
}
