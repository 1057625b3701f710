//! Multitask prompt tuning: one prompt that tasks share, and for each a factor of low rank that makes it the task's own.
//!
//! - formula: for a row of task `t`, `x = [P ⊙ (Cₜ·Rₜ); embed(ids)]`, `P: [n, width]`, `C: [num_tasks, n, num_ranks]`, `R: [num_tasks, num_ranks, width]`
//! - source: Wang et al. 2023, arXiv:2303.02861, section 3.1; ranks above the paper's one are PEFT's
//! - trained: `n·width + num_tasks·num_ranks·(n + width)` values
//! - at init: no identity
//!
//! The model is computed inside [`for_tasks`](peft_core::for_tasks), which says of what task each row is.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use peft_core::files::Values;
use peft_core::{AdapterFile, Error, Method, Result, Site, check_size};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::adapter::{KEY, PromptAdapter, Use, of_prompts, of_tasks, shape_of};
use crate::{Besides, PromptTuningConfig};

/// Configuration of multitask prompt tuning; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{module::Module, tensor::{Device, Int, Tensor}};
/// use peft_core::{Peft, PromptShape, Prompts, for_tasks};
/// use peft_prompt::MultitaskPromptTuningConfig;
///
/// #[derive(Module, Debug)]
/// struct Model { prompts: Prompts }
///
/// let device = Device::flex().autodiff();
/// let shape = PromptShape { width: 8, blocks: 1, kv_heads: 1, head_dim: 8, positions: 16, causal: true };
/// let model = Model { prompts: Prompts::new(shape, &device) }.attach(&MultitaskPromptTuningConfig::new(4, 3))?;
/// assert_eq!(model.trainable().trainable, 4 * 8 + 3 * (4 + 8));
///
/// let (x, ids) = (Tensor::<3>::zeros([2, 5, 8], &device), Tensor::<2, Int>::zeros([2, 5], &device));
/// let (x, _prompt) = for_tasks(&[2, 0], || model.prompts.enter(x, &ids, None)); // a row of task 2, one of task 0
/// assert_eq!(x.dims(), [2, 4 + 5, 8]);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MultitaskPromptTuningConfig {
    /// Length of the prompt.
    pub num_virtual_tokens: usize,
    /// How many tasks there are.
    pub num_tasks: usize,
    /// Rank of a task's factor.
    pub num_ranks: usize,
    /// What is trained besides.
    #[serde(rename = "modules_to_save")]
    pub besides: Besides,
}

/// What a new task takes from earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceTasks {
    /// The shared prompt, and the mean of their factors.
    Average,
    /// The shared prompt, and the factors of that task.
    Exact(usize),
}

impl Default for MultitaskPromptTuningConfig {
    fn default() -> Self {
        Self { num_virtual_tokens: 20, num_tasks: 1, num_ranks: 1, besides: Besides::default() }
    }
}

/// What makes the shared prompt that of a task.
#[derive(Module, Debug)]
pub struct TaskFactors {
    /// `C`, `[num_tasks, n, num_ranks]`
    cols: Param<Tensor<3>>,
    /// `R`, `[num_tasks, num_ranks, width]`
    rows: Param<Tensor<3>>,
}

impl TaskFactors {
    fn new(site: &Site, [tasks, n, ranks, width]: [usize; 4], rng: &mut impl Rng) -> Result<Self> {
        let (cols, rows) = ([tasks, n, ranks], [tasks, ranks, width]);
        Ok(Self { cols: site.normal(cols, 0.02, rng)?, rows: site.normal(rows, 0.02, rng)? })
    }

    /// Of each of these tasks, `[batch, n, width]`.
    pub(crate) fn of(&self, tasks: &[usize]) -> Tensor<3> {
        of_tasks(self.cols.val(), tasks).matmul(of_tasks(self.rows.val(), tasks))
    }
}

impl MultitaskPromptTuningConfig {
    /// A prompt of that length for so many tasks, with factors of rank one.
    pub fn new(num_virtual_tokens: usize, num_tasks: usize) -> Self {
        Self { num_virtual_tokens, num_tasks, ..Self::default() }
    }

    /// An adapter for one new task, from what earlier ones learned: the paper's target adaptation, section 3.3.
    ///
    /// # Errors
    /// When there is no such task.
    pub fn of_source(source: &AdapterFile<Self>, from: SourceTasks) -> Result<AdapterFile<Self>> {
        let count = source.method.num_tasks;
        let tasks = match from {
            SourceTasks::Average => (0..count).collect(),
            SourceTasks::Exact(task) => vec![source.method.known(task)?],
        };
        let mut file = source.clone();
        file.method.num_tasks = 1;
        for (key, values) in file.tensors.iter_mut().filter(|(key, _)| FACTORS.contains(&key.as_str())) {
            let parts = tasks.iter().map(|task| part(values, *task, key)).collect::<Result<Vec<_>>>()?;
            let mean = |at: usize| parts.iter().map(|part| part[at]).sum::<f32>() / parts.len() as f32;
            let values_of_one = (0..parts[0].len()).map(mean).collect();
            let mut shape = values.shape.clone();
            shape[0] = 1;
            *values = Values { shape, values: values_of_one };
        }
        Ok(file)
    }

    /// The prompt of one task as a plain one, which takes no task and which any tool can use: `P ⊙ (Cₜ·Rₜ)`.
    ///
    /// # Errors
    /// When there is no such task, or a tensor is missing.
    pub fn prompt_of(file: &AdapterFile<Self>, task: usize) -> Result<AdapterFile<PromptTuningConfig>> {
        let method = &file.method;
        method.known(task)?;
        let tensor =
            |key: &str| file.tensors.get(key).ok_or_else(|| Error::config(key, "a tensor of the file", "none"));
        let [cols, rows] = FACTORS.map(|key| tensor(key).and_then(|values| part(values, task, key)));
        let (cols, rows, shared) = (cols?, rows?, tensor(KEY)?);
        let (n, ranks) = (method.num_virtual_tokens, method.num_ranks);
        let width = rows.len() / ranks.max(1);
        if width == 0 || shared.shape != [n, width] || cols.len() != n * ranks || rows.len() != ranks * width {
            let expected = format!("{n} tokens of {width} values, and factors of rank {ranks} for them");
            return Err(Error::config(KEY, expected, format!("{:?}", shared.shape)));
        }
        let factor = |at: usize| -> f32 {
            let (token, feature) = (at / width, at % width);
            (0..ranks).map(|rank| cols[token * ranks + rank] * rows[rank * width + feature]).sum()
        };
        let values = shared.values.iter().enumerate().map(|(at, value)| value * factor(at)).collect();
        let mut tensors = file.tensors.clone();
        tensors.retain(|key, _| !FACTORS.contains(&key.as_str()));
        tensors.insert(KEY.to_owned(), Values { shape: shared.shape.clone(), values });
        let method = PromptTuningConfig {
            besides: method.besides.clone(),
            ..PromptTuningConfig::new(method.num_virtual_tokens)
        };
        let (base_model, task_type) = (file.base_model.clone(), file.task_type.clone());
        Ok(AdapterFile { method, base_model, task_type, base_fingerprint: file.base_fingerprint.clone(), tensors })
    }

    fn known(&self, task: usize) -> Result<usize> {
        let count = self.num_tasks;
        if task < count { Ok(task) } else { Err(Error::config("task", format!("one below {count}"), task)) }
    }
}

/// The keys of the factors.
const FACTORS: [&str; 2] = ["prefix_task_cols", "prefix_task_rows"];

/// What belongs to one task.
fn part<'a>(values: &'a Values, task: usize, key: &str) -> Result<&'a [f32]> {
    let part = match values.shape[..] {
        [count, rows, columns] if task < count => values.values.get(task * rows * columns..(task + 1) * rows * columns),
        _ => None,
    };
    part.ok_or_else(|| Error::config(key, format!("a matrix for task {task}"), format!("{:?}", values.shape)))
}

impl Method for MultitaskPromptTuningConfig {
    const PEFT_TYPE: &'static str = "MULTITASK_PROMPT_TUNING";

    of_prompts!();

    fn num_tasks(&self) -> Option<usize> {
        Some(self.num_tasks)
    }

    fn check(&self) -> Result<()> {
        check_size("num_tasks", self.num_tasks)?;
        check_size("num_ranks", self.num_ranks)?;
        check_size("num_virtual_tokens", self.num_virtual_tokens)
    }

    fn init(&self, site: &Site, seed: u64) -> Result<PromptAdapter> {
        let (n, mut rng) = (self.num_virtual_tokens, site.rng(seed));
        let width = shape_of(site, n)?.width;
        let shared =
            PromptAdapter::direct(site.normal([n, width], 1.0, &mut rng)?, n, Use::Tokens { placeholder: None });
        Ok(shared.with_factors(TaskFactors::new(site, [self.num_tasks, n, self.num_ranks, width], &mut rng)?))
    }
}
