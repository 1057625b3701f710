//! P-tuning: virtual tokens that an encoder makes of what is learned for each, so that they are learned together.
//!
//! - formula: `x = [P; embed(ids)]`, `P = encoder(E)`, see [`Encoder`]; after training `P` alone is needed, as in prompt tuning
//! - with `placeholder_token_id`: virtual tokens take the places of that token in the text, in their order, as the paper's templates have them around text and `[MASK]`
//! - with `input_conditioned`: the encoder reads a summary of the text too, so that texts get prompts of their own. This is no part of the paper; it needs the
//!   encoder after training, and a model that reads a text whole before it says something
//! - source: Liu et al. 2021, arXiv:2103.10385, section 3
//! - trained, of `w = width` and `e = encoder_hidden_size`: `n·w` and an MLP of `2·w·e + e² + 2·e + w`, or an LSTM and `4·e² + 2·e + 2·e·w + w`
//! - at init: no identity

use peft_core::{Error, Method, Result, Site, check_size};
use serde::{Deserialize, Serialize};

use crate::adapter::{PromptAdapter, Use, of_prompts, shape_of};
use crate::{Besides, Encoder, EncoderKind};

/// Configuration of P-tuning; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{module::Module, tensor::Device};
/// use peft_core::{Peft, PromptShape, Prompts};
/// use peft_prompt::PTuningConfig;
///
/// #[derive(Module, Debug)]
/// struct Model { prompts: Prompts }
///
/// let device = Device::flex().autodiff();
/// let shape = PromptShape { width: 8, blocks: 3, kv_heads: 2, head_dim: 4, positions: 16, causal: true };
/// let model = Model { prompts: Prompts::new(shape, &device) }.attach(&PTuningConfig::new(5, 16))?;
/// assert_eq!(model.trainable().trainable, 5 * 8 + 2 * 8 * 16 + 16 * 16 + 2 * 16 + 8);
/// assert_eq!(model.prompts.positions(), 5);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PTuningConfig {
    /// Length of the prompt.
    pub num_virtual_tokens: usize,
    /// What computes it.
    pub encoder_reparameterization_type: EncoderKind,
    /// Width of the encoder [default: that of the model].
    pub encoder_hidden_size: Option<usize>,
    /// Layers of an LSTM.
    pub encoder_num_layers: usize,
    /// Probability that a value between the layers of an LSTM is dropped during training.
    pub encoder_dropout: f64,
    /// The token whose places the virtual tokens take [default: they stand in front]. PEFT has no such choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placeholder_token_id: Option<u32>,
    /// Whether the LSTM reads a summary of the text too. PEFT has no such choice.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub input_conditioned: bool,
    /// Where the encoder is gone: what is learned is the prompt itself.
    #[serde(skip)]
    pub direct: bool,
    /// What is trained besides.
    #[serde(rename = "modules_to_save")]
    pub besides: Besides,
}

impl Default for PTuningConfig {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            encoder_reparameterization_type: EncoderKind::default(),
            encoder_hidden_size: None,
            encoder_num_layers: 2,
            encoder_dropout: 0.0,
            placeholder_token_id: None,
            input_conditioned: false,
            direct: false,
            besides: Besides::default(),
        }
    }
}

impl PTuningConfig {
    /// A prompt of that length, from an MLP of that width.
    pub fn new(num_virtual_tokens: usize, encoder_hidden_size: usize) -> Self {
        Self { num_virtual_tokens, encoder_hidden_size: Some(encoder_hidden_size), ..Self::default() }
    }

    /// From an LSTM of so many layers.
    #[must_use]
    pub fn with_lstm(self, layers: usize) -> Self {
        Self { encoder_reparameterization_type: EncoderKind::Lstm, encoder_num_layers: layers, ..self }
    }

    /// In the places of that token.
    #[must_use]
    pub fn in_place_of(self, token: u32) -> Self {
        Self { placeholder_token_id: Some(token), ..self }
    }
}

impl Method for PTuningConfig {
    const PEFT_TYPE: &'static str = "P_TUNING";

    of_prompts!();

    fn check(&self) -> Result<()> {
        check_size("encoder_hidden_size", self.encoder_hidden_size.unwrap_or(1))?;
        if !(1..=64).contains(&self.encoder_num_layers) {
            return Err(Error::config("encoder_num_layers", "1 to 64", self.encoder_num_layers));
        }
        if !(0.0..1.0).contains(&self.encoder_dropout) {
            return Err(Error::config("encoder_dropout", "a probability in 0..1", self.encoder_dropout));
        }
        if self.input_conditioned && self.encoder_reparameterization_type != EncoderKind::Lstm {
            return Err(Error::config("input_conditioned", "an encoder of type LSTM", "MLP"));
        }
        check_size("num_virtual_tokens", self.num_virtual_tokens)
    }

    fn init(&self, site: &Site, seed: u64) -> Result<PromptAdapter> {
        let (n, mut rng) = (self.num_virtual_tokens, site.rng(seed));
        let shape = shape_of(site, n)?;
        if self.input_conditioned && shape.causal {
            let found = "a causal one, for which the text is not there yet";
            return Err(Error::config("input_conditioned", "a model that reads texts whole", found));
        }
        let (width, used) = (shape.width, Use::Tokens { placeholder: self.placeholder_token_id });
        if self.direct {
            return Ok(PromptAdapter::direct(site.normal([n, width], 1.0, &mut rng)?, n, used));
        }
        let numbers = [n, width, self.encoder_hidden_size.unwrap_or(width), self.encoder_num_layers];
        let kind = self.encoder_reparameterization_type;
        let encoder = Encoder::tokens(kind, site, numbers, self.encoder_dropout, &mut rng)?;
        let encoder = if self.input_conditioned { encoder.conditioned() } else { encoder };
        Ok(PromptAdapter::encoded(encoder, n, used))
    }

    fn without_encoder(self) -> Self {
        // Without its encoder a prompt that depends on the text is not there: its file is refused then, for what it lacks.
        Self { direct: !self.input_conditioned, ..self }
    }
}
