//! Several prompts of one length in one model: each row of a batch is read behind that of its task.
//!
//! - formula: for a row of task `t` what a prompt or a prefix of its own would be, `Pₜ` of `P: [num_tasks·n, …]`
//! - source: Lester et al. 2021, arXiv:2104.08691, sections 2 (one model for many tasks in a batch) and 6 (ensembles: the same rows once for each prompt, and the mean or
//!   the majority of what they give)
//! - trained: `num_tasks` times the values of one
//! - at init: no identity
//!
//! The model is computed inside [`for_tasks`](peft_core::for_tasks), which says of what task each row is.

use peft_core::files::Values;
use peft_core::{AdapterFile, Error, Method, Result, Site};
use serde::{Deserialize, Serialize};

use crate::Besides;
use crate::adapter::{KEY, PromptAdapter, Use, check_count, of_prompts, shape_of};

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
    /// When there is none, their lengths differ, or a file holds something besides its prompt.
    pub fn of<M: Method<Adapter = PromptAdapter>>(files: &[AdapterFile<M>]) -> Result<AdapterFile<Self>> {
        let first = files.first().ok_or_else(|| Error::config("num_tasks", "at least 1", 0))?;
        let mut values = Vec::new();
        let shape = prompt_in(first)?.shape.clone();
        for file in files {
            let prompt = prompt_in(file)?;
            if prompt.shape != shape {
                return Err(Error::config(KEY, format!("{shape:?}, as in the first"), format!("{:?}", prompt.shape)));
            }
            values.extend_from_slice(&prompt.values);
        }
        let [n, width] = shape[..] else { return Err(Error::config(KEY, "a matrix", format!("{shape:?}"))) };
        let prefixes = M::PEFT_TYPE == crate::PrefixTuningConfig::PEFT_TYPE;
        let method = Self { prefixes, ..Self::new(n, files.len()) };
        let tensors = [(KEY.to_owned(), Values { shape: vec![n * files.len(), width], values })].into();
        let (base_model, task_type) = (first.base_model.clone(), first.task_type.clone());
        Ok(AdapterFile { method, base_model, task_type, base_fingerprint: first.base_fingerprint.clone(), tensors })
    }
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
        if self.num_tasks == 0 {
            return Err(Error::config("num_tasks", "at least 1", 0));
        }
        check_count(self.num_virtual_tokens)
    }

    fn init(&self, site: &Site, seed: u64) -> Result<PromptAdapter> {
        let n = self.num_virtual_tokens;
        let shape = shape_of(site, n)?;
        let (width, used) = if self.prefixes {
            (2 * shape.blocks * shape.kv_width(), Use::Past { blocks: None, shifts: true })
        } else {
            (shape.width, Use::Tokens { placeholder: None })
        };
        let values = site.normal([self.num_tasks * n, width], 1.0, &mut site.rng(seed));
        Ok(PromptAdapter::direct(values, n, used))
    }
}
