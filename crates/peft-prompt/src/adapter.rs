//! The state of a prompt method: what is learned, as it is used or as something computes it.

use burn::module::{Module, Param, Reparameterization};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Int, Tensor};
use peft_core::files::ENCODER_PREFIX;
use peft_core::{Activation, Error, FileTensor, Gate, Places, Prompt, PromptShape, Reading, Result, Site, tasks};

use crate::encoder::Encoder;
use crate::multitask::TaskFactors;

/// What a prompt is used as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Virtual tokens, `[n, width]`: in front, or in the places of a token.
    Tokens { placeholder: Option<u32> },
    /// Keys and values of all blocks or of these, `[n, 2·blocks·kv_heads·head_dim]`.
    Past { blocks: Option<Vec<usize>>, shifts: bool },
}

/// State of a prompt method in a model.
#[derive(Module, Debug)]
pub struct PromptAdapter {
    /// What is used, without an encoder; of several prompts one below the other.
    direct: Option<Param<Tensor<2>>>,
    /// What computes it, during training.
    encoder: Option<Encoder>,
    /// What a task makes of it.
    factors: Option<TaskFactors>,
    /// How much of it each block takes.
    gates: Vec<Gate>,
    /// On what is used; acts only during training.
    dropout: Dropout,
    /// Length of a prompt.
    n: usize,
    #[module(skip)]
    used: Use,
}

impl PromptAdapter {
    /// `values`: `[prompts·n, …]`
    pub(crate) fn direct(values: Param<Tensor<2>>, n: usize, used: Use) -> Self {
        Self { direct: Some(values), ..Self::empty(n, used) }
    }

    pub(crate) fn encoded(encoder: Encoder, n: usize, used: Use) -> Self {
        Self { encoder: Some(encoder), ..Self::empty(n, used) }
    }

    fn empty(n: usize, used: Use) -> Self {
        let dropout = DropoutConfig::new(0.0).init();
        Self { direct: None, encoder: None, factors: None, gates: Vec::new(), dropout, n, used }
    }

    pub(crate) fn with_gates(self, gates: Vec<Gate>) -> Self {
        Self { gates, ..self }
    }

    pub(crate) fn with_dropout(self, dropout: f64) -> Self {
        Self { dropout: DropoutConfig::new(dropout).init(), ..self }
    }

    pub(crate) fn with_factors(self, factors: TaskFactors) -> Self {
        Self { factors: Some(factors), ..self }
    }

    /// What an encoder makes, for the file: without the dropout of training.
    pub(crate) fn computed(&self) -> Option<(&'static str, Tensor<2>)> {
        self.encoder.as_ref().map(|encoder| (KEY, encoder.valid().forward(None).squeeze_dim(0)))
    }

    /// What is learned for the rows of a batch, `[1 or batch, n, values of a token]`.
    fn learned(&self, reading: &Reading<'_>) -> Tensor<3> {
        let values = match (&self.direct, &self.encoder) {
            (Some(values), _) => self.chosen(values.val(), reading),
            (None, Some(encoder)) => encoder.forward(Some(reading)),
            (None, None) => unreachable!("made with one of them"),
        };
        match &self.factors {
            Some(factors) => values * factors.of(&rows_of(reading)),
            None => values,
        }
    }

    /// The prompt of each row's task, where there are several.
    fn chosen(&self, values: Tensor<2>, reading: &Reading<'_>) -> Tensor<3> {
        let [rows, width] = values.dims();
        let prompts = values.reshape([rows / self.n, self.n, width]);
        if rows == self.n { prompts } else { of_tasks(prompts, &rows_of(reading)) }
    }
}

/// The tasks of the rows of a batch.
fn rows_of(reading: &Reading<'_>) -> Vec<usize> {
    tasks(reading.x.dims()[0])
}

/// What belongs to each of these tasks, `[tasks, …]` to `[batch, …]`.
pub(crate) fn of_tasks(all: Tensor<3>, tasks: &[usize]) -> Tensor<3> {
    let [count, _, _] = all.dims();
    let ids: Vec<i64> = tasks.iter().map(|task| *task as i64).collect();
    assert!(tasks.iter().all(|task| *task < count), "tasks {tasks:?} of {count}");
    let ids = Tensor::<1, Int>::from_data(&ids[..], &all.device());
    all.select(0, ids)
}

/// The key of the prompt in PEFT's files.
pub(crate) const KEY: &str = peft_core::files::PROMPT_KEY;

/// What the keys of gates have, before the number of the gate.
pub(crate) const GATES: &str = "prefix_gates";

/// The key of a field: that of the prompt, of a task's factors, or one of the encoder's file.
pub(crate) fn key(field: &str) -> Option<(String, bool)> {
    if field == "direct" {
        return Some((KEY.to_owned(), false));
    }
    if let Some(factor) = field.strip_prefix("factors.") {
        return Some((format!("prefix_task_{factor}"), false));
    }
    if let Some(gate) = field.strip_prefix("gates.") {
        let (number, parameter) = gate.split_once(".dense.")?;
        return Some((format!("{GATES}.{number}.{parameter}"), parameter == "weight"));
    }
    let (key, transposed) = Encoder::key(field.strip_prefix("encoder.")?)?;
    Some((format!("{ENCODER_PREFIX}{key}"), transposed))
}

/// Whether the key is that of something without a path: all but gates, which are in blocks.
pub(crate) fn is_of_model(key: &str) -> bool {
    key.starts_with(ENCODER_PREFIX) || TENSORS.iter().any(|tensor| tensor.key == key)
}

/// Whether the key is that of something of a prompt.
pub(crate) fn holds(key: &str) -> bool {
    is_of_model(key) || key.contains(&format!(".{GATES}."))
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
            &$crate::adapter::TENSORS
        }

        fn key(_kind: peft_core::LayerKind, field: &str) -> Option<(String, bool)> {
            $crate::adapter::key(field)
        }

        fn is_of_model(key: &str) -> bool {
            $crate::adapter::is_of_model(key)
        }

        fn holds(key: &str) -> bool {
            $crate::adapter::holds(key)
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

/// What the files of prompt methods hold, each of it as far as the method has it.
pub(crate) const TENSORS: [FileTensor; 3] = [
    FileTensor { field: "direct", key: KEY, transposed: false },
    FileTensor { field: "factors.cols", key: "prefix_task_cols", transposed: false },
    FileTensor { field: "factors.rows", key: "prefix_task_rows", transposed: false },
];

/// The shape of the model that prompts are for, which must have room for `n` virtual tokens and some text.
pub(crate) fn shape_of(site: &Site, n: usize) -> Result<PromptShape> {
    let shape = site.prompt.ok_or_else(|| Error::config("num_virtual_tokens", "a place for prompts", &site.path))?;
    if n >= shape.positions {
        let expected = format!("fewer than the {} positions of the model", shape.positions);
        return Err(Error::config("num_virtual_tokens", expected, n));
    }
    Ok(shape)
}

/// The weight form: there is none, and what it would change is not read.
impl Reparameterization for PromptAdapter {
    const NAME: &'static str = "prompt";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for PromptAdapter {
    fn prompt(&self, reading: &Reading<'_>) -> Prompt {
        let (values, shape) = (self.learned(reading), reading.shape);
        match &self.used {
            Use::Tokens { placeholder } => {
                let places = placeholder.map_or(Places::Front, Places::Token);
                Prompt { tokens: Some(values), places, ..Prompt::default() }
            }
            Use::Past { blocks, shifts } => {
                let [rows, n, _] = values.dims();
                let count = blocks.as_ref().map_or(shape.blocks, Vec::len);
                let values = self.dropout.forward(values);
                let past = values.reshape([rows, n, 2 * count, shape.kv_heads, shape.head_dim]);
                let shift = if *shifts { n } else { 0 };
                Prompt {
                    past: Some(past),
                    blocks: blocks.clone(),
                    gates: self.gates.clone(),
                    shift,
                    ..Prompt::default()
                }
            }
        }
    }

    fn prompt_positions(&self) -> usize {
        match self.used {
            Use::Tokens { placeholder: Some(_) } | Use::Past { shifts: false, .. } => 0,
            _ => self.n,
        }
    }
}
