//! The place of learned inputs: virtual tokens in front of a model's embeddings, learned keys and values in front of those of its blocks.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::activation::adapter;
use crate::sub_layer::new_place;

/// What the prompts of a model are like.
///
/// Beside a [`Prompts`]' place it says so to every [`ModuleVisitor`](burn::module::ModuleVisitor): it enters a container whose name [`PromptShape::announced`] reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PromptShape {
    /// Width of the embeddings.
    pub width: usize,
    /// Blocks with attention.
    pub blocks: usize,
    /// Heads of keys and values in each.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Most tokens of a row, virtual ones included.
    pub positions: usize,
}

impl PromptShape {
    /// Values of the keys, or of the values, of one token in one block.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The shape that a visitor was told by entering `container`.
    pub(crate) fn announced(container: &str) -> Option<Self> {
        let mut numbers = container.strip_prefix(ANNOUNCED)?.split(' ').map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(Self { width: next()?, blocks: next()?, kv_heads: next()?, head_dim: next()?, positions: next()? })
    }
}

const ANNOUNCED: &str = "PromptShape:";

peft_kernels::marker_module!(PromptShape, |shape| {
    let PromptShape { width, blocks, kv_heads, head_dim, positions } = shape;
    format!("{ANNOUNCED}{width} {blocks} {kv_heads} {head_dim} {positions}")
});

/// A field of a model that takes prompts; no parameter of the model.
///
/// ```
/// use burn::{module::Module, nn::Embedding, tensor::{Int, Tensor}};
/// use peft_core::{Prompts, embedding};
///
/// #[derive(Module, Debug)]
/// struct Model { embeddings: Embedding, prompts: Prompts }
///
/// impl Model {
///     fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
///         let prompt = self.prompts.prompt();
///         let x = prompt.before(embedding(&self.embeddings, ids)); // [batch, virtual + seq, width]
///         // … through blocks, whose keys and values stand behind `prompt.behind_past` …
///         prompt.behind(x) // [batch, seq, width]
///     }
/// }
/// ```
#[derive(Module, Debug)]
pub struct Prompts {
    /// As long as the model is wide; the adapter sits in it.
    place: Param<Tensor<1>>,
    shape: PromptShape,
}

impl Prompts {
    /// The place in a model of that shape.
    pub fn new(shape: PromptShape, device: &Device) -> Self {
        Self { place: new_place(shape.width, device), shape }
    }

    /// What is learned; nothing without an adapter.
    pub fn prompt(&self) -> Prompt {
        adapter(&self.place).flatten().map_or_else(Prompt::default, |adapter| adapter.prompt(&self.shape))
    }
}

/// What stands in front of the rows of a batch.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// Virtual tokens, `[n, width]`.
    pub tokens: Option<Tensor<2>>,
    /// Keys and values of each block, `[n, 2·blocks, kv_heads, head_dim]`: first the keys of the first block, then its values, and so on.
    pub past: Option<Tensor<4>>,
}

impl Prompt {
    /// How many positions it takes.
    pub fn len(&self) -> usize {
        self.num_tokens() + self.num_past()
    }

    /// Whether there is nothing in front.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many virtual tokens there are.
    pub fn num_tokens(&self) -> usize {
        self.tokens.as_ref().map_or(0, |tokens| tokens.dims()[0])
    }

    /// How many keys there are in front of those of a block.
    pub fn num_past(&self) -> usize {
        self.past.as_ref().map_or(0, |past| past.dims()[0])
    }

    /// `x` behind the virtual tokens.
    ///
    /// # Shapes
    /// `[batch, seq, width]` to `[batch, n + seq, width]`
    pub fn before(&self, x: Tensor<3>) -> Tensor<3> {
        match &self.tokens {
            Some(tokens) => {
                let tokens = tokens.clone().cast(x.dtype()).unsqueeze_dim::<3>(0).repeat_dim(0, x.dims()[0]);
                Tensor::cat(vec![tokens, x], 1)
            }
            None => x,
        }
    }

    /// What belongs to the tokens behind the virtual ones.
    ///
    /// # Shapes
    /// `[batch, n + seq, width]` to `[batch, seq, width]`
    pub fn behind(&self, hidden: Tensor<3>) -> Tensor<3> {
        let (n, [_, seq, _]) = (self.num_tokens(), hidden.dims());
        if n == 0 { hidden } else { hidden.narrow(1, n, seq - n) }
    }

    /// The keys and the values of a block behind the learned ones.
    ///
    /// # Shapes
    /// `[batch, seq, kv_heads, head_dim]` to `[batch, n + seq, kv_heads, head_dim]`
    pub fn behind_past(&self, block: usize, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let Some(past) = &self.past else { return (keys, values) };
        let before = |at: usize, x: Tensor<4>| {
            let [n, _, heads, head_dim] = past.dims();
            let learned = past.clone().narrow(1, at, 1).reshape([1, n, heads, head_dim]);
            Tensor::cat(vec![learned.cast(x.dtype()).repeat_dim(0, x.dims()[0]), x], 1)
        };
        (before(2 * block, keys), before(2 * block + 1, values))
    }
}
