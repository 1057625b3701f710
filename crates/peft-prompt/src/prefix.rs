//! Prefix tuning, and P-tuning v2: keys and values in front of those of every block are what is learned.
//!
//! - formula: in each block `o = attention(q, [Pₖ; k], [Pᵥ; v])`, `P: [n, 2·blocks, kv_heads, head_dim]`; every token sees all `n`; the text's positions begin behind them. Learned keys are used as they are, without a rotary
//!   embedding
//! - with `layers_to_transform`: in these blocks alone; with `leave_out`: in all others
//! - with `gating`: `[s·Pₖ; k], [t·Pᵥ; v]` in each block, `s` and `t` numbers for each row of a batch, [`Gate`] of the block's input: one number for both, or one for each
//! - with `prefix_projection`: `P = f(E·A + a)·B + b` during training, see [`Encoder`]
//! - source: Li & Liang 2021, arXiv:2101.00190, section 4; Liu et al. 2022, arXiv:2110.07602, section 3 (P-tuning v2: without the projection, for understanding, beside a trained head);
//!   Mao et al. 2022, arXiv:2110.07577, section 3.2 (gates)
//! - trained: `2·n·blocks·kv_heads·head_dim` values; with the projection, of `w = kv_heads·head_dim` and `e = encoder_hidden_size`, `n·w + w·e + e + 2·blocks·w·(e + 1)`;
//!   with gates `width + 1` more in a block, or twice that
//! - at init: no identity: a key takes its share of the attention, whatever it holds

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use peft_core::files::{HubFolder, Values};
use peft_core::{AdapterFile, Error, Gate, Method, PromptShape, Result, Site, check_size};
use serde::{Deserialize, Serialize};

use crate::adapter::{PromptAdapter, Use, of_prompts, shape_of};
use crate::{Besides, Between, Encoder, hub};

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
/// let (x, prompt) = model.prompts.enter(x, &ids, None);
/// let text = Tensor::<4>::zeros([1, 7, 2, 4], &device);
/// let (keys, _values) = prompt.behind_past(0, &x, text.clone(), text);
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
    /// What is between the encoder's layers. In PEFT always the hyperbolic tangent.
    #[serde(skip_serializing_if = "is_default")]
    pub non_linearity: Between,
    /// Probability that a value of the prefix is dropped during training. PEFT has no such field.
    #[serde(skip_serializing_if = "is_default")]
    pub dropout: f64,
    /// How much of the prefix a row takes. PEFT has no gates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gating: Option<Gating>,
    /// Numbers of the blocks that have a prefix, from 0 [default: all]. PEFT has no such choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Numbers of the blocks without one, in AdapterHub's words.
    #[serde(skip_serializing_if = "is_default")]
    pub leave_out: Vec<usize>,
    /// Whether the positions of the text begin as they do without a prefix, as AdapterHub has it, and not behind the prefix, as PEFT has it.
    #[serde(skip_serializing_if = "is_default")]
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

/// The gates of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gating {
    /// One for keys and values.
    Shared,
    /// One for each.
    Own,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for PrefixTuningConfig {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            prefix_projection: false,
            encoder_hidden_size: None,
            non_linearity: Between::default(),
            dropout: 0.0,
            gating: None,
            layers_to_transform: None,
            leave_out: Vec::new(),
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

    /// As AdapterHub has it: the positions of the text are those without a prefix.
    #[must_use]
    pub fn without_shift(self) -> Self {
        Self { unshifted: true, ..self }
    }

    /// With gates.
    #[must_use]
    pub fn with_gating(self, gating: Gating) -> Self {
        Self { gating: Some(gating), ..self }
    }

    /// Keys and values of a text for the prefix to start at, of those of all blocks `[n, 2·blocks, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// When there is no such block.
    pub fn of_text(&self, past: Tensor<4>) -> Result<Tensor<4>> {
        let Some(blocks) = self.blocks(past.dims()[1] / 2)? else { return Ok(past) };
        Ok(Tensor::cat(blocks.iter().map(|block| past.clone().narrow(1, 2 * block, 2)).collect(), 1))
    }

    /// The blocks that have a prefix, of so many; nothing for all of them.
    fn blocks(&self, count: usize) -> Result<Option<Vec<usize>>> {
        let refused = |field: &str, found: &[usize]| {
            let expected = format!("numbers of some of the {count} blocks, in order");
            Err(Error::config(field, expected, format!("{found:?}")))
        };
        let some = |chosen: &[usize]| {
            let known = chosen.iter().all(|block| *block < count);
            known && !chosen.is_empty() && chosen.windows(2).all(|pair| pair[0] < pair[1])
        };
        match (&self.layers_to_transform, &self.leave_out[..]) {
            (None, []) => Ok(None),
            (Some(layers), []) if some(layers) => Ok(Some(layers.clone())),
            (Some(layers), []) => refused("layers_to_transform", layers),
            (None, out) if some(out) && out.len() < count => {
                Ok(Some((0..count).filter(|block| !out.contains(block)).collect()))
            }
            (_, out) => refused("leave_out", out),
        }
    }

    fn gates(&self, site: &Site, shape: &PromptShape, count: usize, seed: u64) -> Result<Vec<Gate>> {
        let Some(gating) = self.gating else { return Ok(Vec::new()) };
        if shape.causal {
            let expected = "null: a gate looks at the whole row, and this model's tokens must not see those to come";
            return Err(Error::config("gating", expected, "gates"));
        }
        let outputs = if gating == Gating::Own { 2 } else { 1 };
        let mut rng = site.rng(seed ^ 1);
        (0..count).map(|_| Gate::new(site, [shape.width, outputs], &mut rng)).collect()
    }
}

impl Method for PrefixTuningConfig {
    const PEFT_TYPE: &'static str = "PREFIX_TUNING";

    of_prompts!();

    fn check(&self) -> Result<()> {
        check_size("encoder_hidden_size", self.encoder_hidden_size.unwrap_or(1))?;
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::config("dropout", "a probability in 0..1", self.dropout));
        }
        check_size("num_virtual_tokens", self.num_virtual_tokens)
    }

    fn init(&self, site: &Site, seed: u64) -> Result<PromptAdapter> {
        let (n, mut rng) = (self.num_virtual_tokens, site.rng(seed));
        let shape = shape_of(site, n)?;
        let blocks = self.blocks(shape.blocks)?;
        let count = blocks.as_ref().map_or(shape.blocks, Vec::len);
        // AdapterHub's encoders read tokens as wide as the model, PEFT's as wide as a block's keys.
        let width = if self.unshifted { shape.width } else { shape.kv_width() };
        let out = 2 * count * shape.kv_width();
        let used = Use::Past { blocks, shifts: !self.unshifted };
        let gates = self.gates(site, &shape, count, seed)?;
        if self.prefix_projection && !self.direct {
            let inner = self.encoder_hidden_size.unwrap_or(width);
            let encoder = Encoder::projection(site, [n, width, inner, out], self.non_linearity, &mut rng)?;
            return Ok(PromptAdapter::encoded(encoder, n, used).with_gates(gates).with_dropout(self.dropout));
        }
        let values = site.normal([n, out], 1.0, &mut rng)?.set_require_grad(!self.fixed);
        Ok(PromptAdapter::direct(values, n, used).with_gates(gates).with_dropout(self.dropout))
    }

    fn without_encoder(self) -> Self {
        Self { direct: true, ..self }
    }

    fn from_hub(folder: &HubFolder) -> Result<Option<(Self, BTreeMap<String, Values>)>> {
        hub::read(folder).map(Some)
    }

    fn to_hub(file: &AdapterFile<Self>, name: &str) -> Result<Option<HubFolder>> {
        hub::write(file, name).map(Some)
    }
}
