//! Prompt tuning: virtual tokens in front of the input are all that is learned.
//!
//! - formula: `x = [P; embed(ids)]`, `P: [num_virtual_tokens, width]`; everything after the embeddings is the model's, positions and norms included
//! - source: Lester et al. 2021, arXiv:2104.08691, section 2
//! - trained: `num_virtual_tokens · width` values
//! - at init: no identity: `P` changes what the model says, whatever it holds

use peft_core::{Error, Method, Result, Site, check_size};
use serde::{Deserialize, Serialize};

use crate::Besides;
use crate::adapter::{PromptAdapter, Use, of_prompts, shape_of};

/// Configuration of prompt tuning; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{module::Module, nn::{Embedding, EmbeddingConfig}, tensor::{Device, Int, Tensor}};
/// use peft_core::{Peft, PromptShape, Prompts, embedding};
/// use peft_prompt::PromptTuningConfig;
///
/// #[derive(Module, Debug)]
/// struct Model { embeddings: Embedding, prompts: Prompts }
///
/// let device = Device::flex().autodiff();
/// let shape = PromptShape { width: 8, blocks: 1, kv_heads: 1, head_dim: 8, positions: 16, causal: true };
/// let model = Model { embeddings: EmbeddingConfig::new(10, 8).init(&device), prompts: Prompts::new(shape, &device) };
/// let model = model.attach(&PromptTuningConfig::new(4))?;
/// assert_eq!(model.trainable().trainable, 4 * 8);
///
/// let ids = Tensor::<2, Int>::zeros([2, 3], &device);
/// let (x, _prompt) = model.prompts.enter(embedding(&model.embeddings, ids.clone()), &ids, None);
/// assert_eq!(x.dims(), [2, 4 + 3, 8]);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptTuningConfig {
    /// Length of the prompt.
    pub num_virtual_tokens: usize,
    /// What the prompt starts as.
    pub prompt_tuning_init: PromptInit,
    /// The text that it starts as, for [`PromptInit::Text`].
    pub prompt_tuning_init_text: Option<String>,
    /// What is trained besides.
    #[serde(rename = "modules_to_save")]
    pub besides: Besides,
}

/// What a prompt starts as. All but random values need the model's embeddings, so they are put in after attaching: [`start_at`](crate::start_at).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptInit {
    /// `N(0, 1)`, as PyTorch's embeddings.
    #[default]
    Random,
    /// Embeddings of random tokens.
    SampleVocab,
    /// Embeddings of the tokens of a text.
    Text,
}

impl Default for PromptTuningConfig {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            prompt_tuning_init: PromptInit::default(),
            prompt_tuning_init_text: None,
            besides: Besides::default(),
        }
    }
}

impl PromptTuningConfig {
    /// A prompt of that length.
    pub fn new(num_virtual_tokens: usize) -> Self {
        Self { num_virtual_tokens, ..Self::default() }
    }
}

impl Method for PromptTuningConfig {
    const PEFT_TYPE: &'static str = "PROMPT_TUNING";

    of_prompts!();

    fn check(&self) -> Result<()> {
        let text = self.prompt_tuning_init_text.as_deref().unwrap_or_default();
        if self.prompt_tuning_init == PromptInit::Text && text.is_empty() {
            return Err(Error::config("prompt_tuning_init_text", "the text that prompt_tuning_init asks for", "none"));
        }
        check_size("num_virtual_tokens", self.num_virtual_tokens)
    }

    fn init(&self, site: &Site, seed: u64) -> Result<PromptAdapter> {
        let shape = shape_of(site, self.num_virtual_tokens)?;
        let values = site.normal([self.num_virtual_tokens, shape.width], 1.0, &mut site.rng(seed))?;
        Ok(PromptAdapter::direct(values, self.num_virtual_tokens, Use::Tokens { placeholder: None }))
    }
}
