//! Several prompts of one length in one model: each row of a batch is read behind that of its task.
//!
//! - formula: for a row of task `t` what a prompt or a prefix of its own would be, `Pₜ` of `P: [num_tasks·n, …]`
//! - source: Lester et al. 2021, arXiv:2104.08691, sections 2 (one model for many tasks in a batch) and 6 (ensembles: the same rows once for each prompt, and the mean or
//!   the majority of what they give: [`ensemble`])
//! - trained: `num_tasks` times the values of one
//! - at init: no identity
//!
//! The model is computed inside [`for_tasks`](peft_core::for_tasks), which says of what task each row is.

use burn::tensor::activation::softmax;
use burn::tensor::{Int, Tensor};
use peft_core::files::Values;
use peft_core::{AdapterFile, Error, Method, Result, Site, check_size, for_tasks};
use serde::{Deserialize, Serialize};

use crate::adapter::{KEY, PromptAdapter, Use, of_prompts, shape_of};
use crate::{Besides, PTuningConfig, PrefixTuningConfig, PromptTuningConfig};

/// Configuration of a bank of prompts, or of prefixes. Its file is our own: a prompt's, with the prompts one below the other.
///
/// ```
/// use burn::{module::Module, tensor::{Device, Int, Tensor}};
/// use peft_core::{Peft, PromptShape, Prompts, for_tasks};
/// use peft_prompt::PromptBankConfig;
///
/// #[derive(Module, Debug)]
/// struct Model { prompts: Prompts }
///
/// let device = Device::flex().autodiff();
/// let shape = PromptShape { width: 8, blocks: 1, kv_heads: 1, head_dim: 8, positions: 16, causal: true };
/// let model = Model { prompts: Prompts::new(shape, &device) }.attach(&PromptBankConfig::new(4, 3))?;
/// assert_eq!(model.trainable().trainable, 3 * 4 * 8);
///
/// let (x, ids) = (Tensor::<3>::zeros([2, 5, 8], &device), Tensor::<2, Int>::zeros([2, 5], &device));
/// let (x, _prompt) = for_tasks(&[2, 0], || model.prompts.enter(x, &ids, None));
/// assert_eq!(x.dims(), [2, 4 + 5, 8]);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptBankConfig {
    /// Length of each prompt.
    pub num_virtual_tokens: usize,
    /// How many there are.
    pub num_tasks: usize,
    /// Whether they are prefixes: keys and values in front of those of every block.
    pub prefixes: bool,
    /// What is trained besides.
    #[serde(rename = "modules_to_save")]
    pub besides: Besides,
}

impl Default for PromptBankConfig {
    fn default() -> Self {
        Self { num_virtual_tokens: 20, num_tasks: 1, prefixes: false, besides: Besides::default() }
    }
}

impl PromptBankConfig {
    /// So many prompts of that length.
    pub fn new(num_virtual_tokens: usize, num_tasks: usize) -> Self {
        Self { num_virtual_tokens, num_tasks, ..Self::default() }
    }

    /// So many prefixes of that length.
    pub fn prefixes(num_virtual_tokens: usize, num_tasks: usize) -> Self {
        Self { prefixes: true, ..Self::new(num_virtual_tokens, num_tasks) }
    }

    /// The bank of prompts that were learned one by one, for tasks in that order; encoders are not needed any more and are left out.
    ///
    /// # Errors
    /// When there is none, their lengths or their bases differ, or one has more than a prompt that stands in front of all that is read.
    pub fn of<M: Banked>(files: &[AdapterFile<M>]) -> Result<AdapterFile<Self>> {
        let first = files.first().ok_or_else(|| Error::config("num_tasks", "at least 1", 0))?;
        let mut values = Vec::new();
        let shape = prompt_in(first)?.shape.clone();
        for file in files {
            file.method.check_banked()?;
            let prompt = prompt_in(file)?;
            if prompt.shape != shape {
                return Err(Error::config(KEY, format!("{shape:?}, as in the first"), format!("{:?}", prompt.shape)));
            }
            if (&file.base_fingerprint, &file.base_model) != (&first.base_fingerprint, &first.base_model) {
                return Err(Error::config("base_model_name_or_path", "the base of the first", "another one"));
            }
            values.extend_from_slice(&prompt.values);
        }
        let [n, width] = shape[..] else { return Err(Error::config(KEY, "a matrix", format!("{shape:?}"))) };
        let method = Self { prefixes: M::PREFIXES, ..Self::new(n, files.len()) };
        let tensors = [(KEY.to_owned(), Values { shape: vec![n * files.len(), width], values })].into();
        let (base_model, task_type) = (first.base_model.clone(), first.task_type.clone());
        Ok(AdapterFile { method, base_model, task_type, base_fingerprint: first.base_fingerprint.clone(), tensors })
    }
}

/// A method whose prompts a bank can hold.
pub trait Banked: Method<Adapter = PromptAdapter> {
    /// Whether they are prefixes.
    const PREFIXES: bool = false;

    /// Refuses a prompt that does not stand in front of all that is read, the same for every text, which is all that a row of a bank can have of its own.
    ///
    /// # Errors
    /// [`Error::Config`].
    fn check_banked(&self) -> Result<()> {
        Ok(())
    }
}

impl Banked for PromptTuningConfig {}

impl Banked for PTuningConfig {
    fn check_banked(&self) -> Result<()> {
        if let Some(token) = self.placeholder_token_id {
            return Err(Error::config("placeholder_token_id", "null in a bank", token));
        }
        if self.input_conditioned {
            return Err(Error::config("input_conditioned", "false in a bank", true));
        }
        Ok(())
    }
}

impl Banked for PrefixTuningConfig {
    const PREFIXES: bool = true;

    fn check_banked(&self) -> Result<()> {
        if self.unshifted {
            return Err(Error::config("unshifted", "false in a bank", true));
        }
        if self.layers_to_transform.is_some() || !self.leave_out.is_empty() {
            let found = format!("{:?} without {:?}", self.layers_to_transform, self.leave_out);
            return Err(Error::config("layers_to_transform", "all blocks in a bank", found));
        }
        Ok(())
    }
}

/// What all prompts of a bank say of a text together: the mean of the probabilities that each of them gives, in one batch.
///
/// `forward` is the model, given the text once for each prompt.
///
/// # Shapes
/// `ids`: `[batch, seq]`; logits `[prompts · batch, …, classes]`; result `[batch, …, classes]`, whose last dimension sums to one
///
/// # Panics
/// Without a prompt.
pub fn ensemble<const D: usize>(
    prompts: usize,
    ids: Tensor<2, Int>,
    forward: impl FnOnce(Tensor<2, Int>) -> Tensor<D>,
) -> Tensor<D> {
    let [batch, _] = ids.dims();
    let tasks: Vec<usize> = (0..prompts).flat_map(|prompt| std::iter::repeat_n(prompt, batch)).collect();
    let logits = for_tasks(&tasks, || forward(ids.repeat_dim(0, prompts)));
    let p = softmax(logits, D - 1);
    let each = (0..prompts).map(|prompt| p.clone().narrow(0, prompt * batch, batch));
    each.reduce(|sum, p| sum + p).expect("a prompt at least") / prompts as f64
}

/// The prompt in a file, which holds nothing else that is used.
fn prompt_in<M>(file: &AdapterFile<M>) -> Result<&Values> {
    let used = |key: &&String| !key.starts_with(peft_core::files::ENCODER_PREFIX);
    let mut keys = file.tensors.keys().filter(used);
    match keys.find(|key| *key != KEY) {
        Some(key) => Err(Error::config(key, "a prompt alone, which is all that a row can have of its own", "more")),
        None => file.tensors.get(KEY).ok_or_else(|| Error::config(KEY, "a prompt", "none")),
    }
}

impl Method for PromptBankConfig {
    const PEFT_TYPE: &'static str = "PROMPT_BANK";

    of_prompts!();

    fn num_tasks(&self) -> Option<usize> {
        Some(self.num_tasks)
    }

    fn check(&self) -> Result<()> {
        check_size("num_tasks", self.num_tasks)?;
        check_size("num_virtual_tokens", self.num_virtual_tokens)
    }

    fn init(&self, site: &Site, seed: u64) -> Result<PromptAdapter> {
        let n = self.num_virtual_tokens;
        let shape = shape_of(site, n)?;
        let (width, used) = if self.prefixes {
            (2 * shape.blocks * shape.kv_width(), Use::Past { blocks: None, shifts: true })
        } else {
            (shape.width, Use::Tokens { placeholder: None })
        };
        let values = site.normal([self.num_tasks * n, width], 1.0, &mut site.rng(seed))?;
        Ok(PromptAdapter::direct(values, n, used))
    }
}
