//! Prefix tuning, and P-tuning v2: keys and values in front of those of every block are what is learned.
//!
//! - formula: in each block `o = attention(q, [Pₖ; k], [Pᵥ; v])`, `P: [n, 2·blocks, kv_heads, head_dim]`; every token sees all `n`; the text's positions begin behind them. Learned keys are used as they are, without a rotary
//!   embedding
//! - with `prefix_projection`: `P = tanh(E·A + a)·B + b` during training, see [`Encoder`]
//! - source: Li & Liang 2021, arXiv:2101.00190, section 4; Liu et al. 2022, arXiv:2110.07602, section 3 (P-tuning v2: without the projection, for understanding, beside a trained head)
//! - trained: `2·n·blocks·kv_heads·head_dim` values; with the projection, of `w = kv_heads·head_dim` and `e = encoder_hidden_size`, `n·w + w·e + e + 2·blocks·w·(e + 1)`
//! - at init: no identity: a key takes its share of the attention, whatever it holds

use peft_core::{Error, Method, Result, Site};
use serde::{Deserialize, Serialize};

use crate::adapter::{PromptAdapter, Use, check_count, of_prompts, shape_of};
use crate::{Besides, Encoder};

/// Configuration of prefix tuning; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{module::Module, tensor::{Device, Tensor}};
/// use peft_core::{Peft, PromptShape, Prompts};
/// use peft_prompt::PrefixTuningConfig;
///
/// #[derive(Module, Debug)]
/// struct Model { prompts: Prompts }
///
/// let device = Device::flex().autodiff();
/// let shape = PromptShape { width: 8, blocks: 3, kv_heads: 2, head_dim: 4, positions: 16 };
/// let model = Model { prompts: Prompts::new(shape, &device) }.attach(&PrefixTuningConfig::new(5))?;
/// assert_eq!(model.trainable().trainable, 2 * 5 * 3 * 2 * 4);
///
/// let text = Tensor::<4>::zeros([1, 7, 2, 4], &device);
/// let (keys, _values) = model.prompts.prompt().behind_past(0, text.clone(), text);
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
        let (width, out) = (shape.kv_width(), 2 * shape.blocks * shape.kv_width());
        if self.prefix_projection && !self.direct {
            let inner = self.encoder_hidden_size.unwrap_or(width);
            let encoder = Encoder::projection(site, [n, width, inner, out], &mut rng);
            return Ok(PromptAdapter::encoded(encoder, Use::Past));
        }
        Ok(PromptAdapter::direct(site.normal([n, out], 1.0, &mut rng), Use::Past))
    }

    fn without_encoder(self) -> Self {
        Self { direct: true, ..self }
    }
}
