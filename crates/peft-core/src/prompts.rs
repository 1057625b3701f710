//! The place of learned inputs: virtual tokens in front of a model's embeddings, learned keys and values in front of those of its blocks. It is the place of what
//! belongs to a model as a whole, so a model lets itself be computed more than once there too: [`Prompts::passes`].

use burn::module::{Module, Param};
use burn::tensor::{Bool, Device, Int, Tensor};

use crate::Gate;
use crate::activation::{Activation, adapter};
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
    /// Whether a token sees only those before it.
    pub causal: bool,
}

impl PromptShape {
    /// Values of the keys, or of the values, of one token in one block.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The shape that a visitor was told by entering `container`.
    pub(crate) fn announced(container: &str) -> Option<Self> {
        let mut numbers = container.strip_prefix(ANNOUNCED)?.split(' ').map(str::parse::<usize>);
        let mut next = || numbers.next()?.ok();
        let (width, blocks, kv_heads, head_dim) = (next()?, next()?, next()?, next()?);
        Some(Self { width, blocks, kv_heads, head_dim, positions: next()?, causal: next()? == 1 })
    }
}

const ANNOUNCED: &str = "PromptShape:";

peft_kernels::marker_module!(PromptShape, |shape| {
    let PromptShape { width, blocks, kv_heads, head_dim, positions, causal } = shape;
    format!("{ANNOUNCED}{width} {blocks} {kv_heads} {head_dim} {positions} {}", usize::from(*causal))
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
///         self.prompts.passes(|_following| {
///             let x = embedding(&self.embeddings, ids.clone());
///             let (x, prompt) = self.prompts.enter(x, &ids, None); // [batch, virtual + seq, width]
///             // … through blocks, whose keys and values stand behind `prompt.behind_past` …
///             prompt.behind(x) // [batch, seq, width]
///         })
///     }
/// }
/// ```
#[derive(Module, Debug)]
pub struct Prompts {
    /// As long as the model is wide; the adapter sits in it.
    place: Param<Tensor<1>>,
    shape: PromptShape,
}

/// The batch that a prompt is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// The model.
    pub shape: &'a PromptShape,
    /// Embeddings of the text, `[batch, seq, width]`.
    pub x: &'a Tensor<3>,
    /// `[batch, seq]`: 1 for a token of the text, 0 for padding; nothing when there is none.
    pub mask: Option<&'a Tensor<2, Int>>,
}

impl Reading<'_> {
    /// The mean of the embeddings of each text, `[batch, 1, width]`.
    pub fn mean(&self) -> Tensor<3> {
        mean_of_tokens(self.x.clone(), self.mask)
    }
}

/// The mean of `x` `[batch, seq, width]` over the tokens where `mask` `[batch, seq]` is 1, or over all: `[batch, 1, width]`.
pub fn mean_of_tokens(x: Tensor<3>, mask: Option<&Tensor<2, Int>>) -> Tensor<3> {
    let Some(mask) = mask else { return x.mean_dim(1) };
    // A row of padding alone has no mean; zero is what it gets.
    let count = mask.clone().sum_dim(1).clamp_min(1).float().cast(x.dtype()); // [batch, 1]
    let sum = mask.clone().float().cast(x.dtype()).unsqueeze_dim::<3>(1).matmul(x);
    sum / count.unsqueeze_dim::<3>(2)
}

impl Prompts {
    /// The place in a model of that shape.
    pub fn new(shape: PromptShape, device: &Device) -> Self {
        Self { place: new_place(shape.width, device), shape }
    }

    /// How many positions of a row are taken by what is learned; none without an adapter.
    pub fn positions(&self) -> usize {
        adapter(&self.place).flatten().map_or(0, Activation::prompt_positions)
    }

    /// The model's last hidden states, `[batch, seq, width]`: those of the one pass of a model without an adapter that asks for more. `pass` computes one, given how many follow; each
    /// has a cache of its own.
    pub fn passes(&self, mut pass: impl FnMut(usize) -> Tensor<3>) -> Tensor<3> {
        match adapter(&self.place).flatten() {
            Some(adapter) => adapter.passes(&mut pass),
            None => pass(0),
        }
    }

    /// The embeddings of a batch with its virtual tokens, and what stands in front of it besides; `x` and nothing without an adapter.
    ///
    /// # Shapes
    /// `x`: `[batch, seq, width]`; `ids`, and `mask` with 0 for padding: `[batch, seq]`; result `[batch, n + seq, width]`
    pub fn enter(&self, x: Tensor<3>, ids: &Tensor<2, Int>, mask: Option<&Tensor<2, Int>>) -> (Tensor<3>, Prompt) {
        let Some(adapter) = adapter(&self.place).flatten() else { return (x, Prompt::default()) };
        let prompt = adapter.prompt(&Reading { shape: &self.shape, x: &x, mask });
        (prompt.join(x, ids), prompt)
    }
}

/// Where virtual tokens stand.
#[derive(Clone, Debug, Default)]
#[allow(clippy::large_enum_variant, reason = "one a pass; a box would be in every caller's way")]
pub enum Places {
    /// In front of the text.
    #[default]
    Front,
    /// In the places of that token in the text, in their order.
    Token(u32),
    /// In these places of the text, in their order: `[batch, seq]`.
    Marked(Tensor<2, Bool>),
}

/// What stands in front of the rows of a batch. What is the same for all rows is there once.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// Virtual tokens, `[1 or batch, n, width]`.
    pub tokens: Option<Tensor<3>>,
    /// Where the virtual tokens stand.
    pub places: Places,
    /// Keys and values of blocks, `[1 or batch, n, 2·blocks, kv_heads, head_dim]`: first the keys of the first block, then its values, and so on.
    pub past: Option<Tensor<5>>,
    /// The blocks that have keys and values in `past`; all when `None`.
    pub blocks: Option<Vec<usize>>,
    /// How much of its keys and values each of these blocks takes, one number for both or one for each; all where there is none.
    pub gates: Vec<Gate>,
    /// How many positions later the text begins because of `past`.
    pub shift: usize,
}

impl Prompt {
    /// How many virtual tokens stand in front.
    pub fn num_tokens(&self) -> usize {
        match self.places {
            Places::Front => self.tokens.as_ref().map_or(0, |tokens| tokens.dims()[1]),
            Places::Token(_) | Places::Marked(_) => 0,
        }
    }

    /// How many learned keys stand in front of those of that block.
    pub fn num_past(&self, block: usize) -> usize {
        self.past.as_ref().filter(|_| self.at(block).is_some()).map_or(0, |past| past.dims()[1])
    }

    /// Which of the blocks in `past` that one is.
    fn at(&self, block: usize) -> Option<usize> {
        match &self.blocks {
            Some(blocks) => blocks.iter().position(|each| *each == block),
            None => Some(block),
        }
    }

    /// `x` with the virtual tokens.
    fn join(&self, x: Tensor<3>, ids: &Tensor<2, Int>) -> Tensor<3> {
        let Some(tokens) = &self.tokens else { return x };
        let tokens = rows(tokens.clone().cast(x.dtype()), x.dims()[0]);
        let [_, n, width] = tokens.dims();
        // [batch, seq]
        let here = match &self.places {
            Places::Front => return Tensor::cat(vec![tokens, x], 1),
            Places::Token(token) => ids.clone().equal_elem(*token),
            Places::Marked(here) => here.clone(),
        };
        // Each place gets the virtual token of its number in the row; the last one stands for those that are missing.
        let number = (here.clone().int().cumsum(1) - 1).clamp(0, n as i64 - 1);
        let token = tokens.gather(1, number.unsqueeze_dim::<3>(2).repeat_dim(2, width)); // [batch, seq, width]
        x.mask_where(here.unsqueeze_dim::<3>(2).repeat_dim(2, width), token)
    }

    /// What belongs to the tokens behind the virtual ones.
    ///
    /// # Shapes
    /// `[batch, n + seq, width]` to `[batch, seq, width]`
    pub fn behind(&self, hidden: Tensor<3>) -> Tensor<3> {
        let (n, [_, seq, _]) = (self.num_tokens(), hidden.dims());
        if n == 0 { hidden } else { hidden.narrow(1, n, seq - n) }
    }

    /// The keys and the values of a block behind the learned ones; `x` is what they are made of.
    ///
    /// # Shapes
    /// `x`: `[batch, seq, width]`; `[batch, seq, kv_heads, head_dim]` to `[batch, n + seq, kv_heads, head_dim]`
    pub fn behind_past(
        &self,
        block: usize,
        x: &Tensor<3>,
        keys: Tensor<4>,
        values: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        let (Some(past), Some(at)) = (&self.past, self.at(block)) else { return (keys, values) };
        let open = self.gates.get(at).map(|gate| gate.forward(x.clone())); // [batch, 1, 1 or 2]
        let before = |which: usize, x: Tensor<4>| {
            let learned = past.clone().narrow(2, 2 * at + which, 1).squeeze_dim::<4>(2);
            let mut learned = rows(learned, x.dims()[0]);
            if let Some(open) = &open {
                let number = which.min(open.dims()[2] - 1);
                learned = learned * open.clone().narrow(2, number, 1).unsqueeze_dim::<4>(3);
            }
            Tensor::cat(vec![learned.cast(x.dtype()), x], 1)
        };
        (before(0, keys), before(1, values))
    }
}

/// `[1 or batch, …]` to `[batch, …]`.
fn rows<const D: usize>(learned: Tensor<D>, batch: usize) -> Tensor<D> {
    if learned.dims()[0] == 1 {
        return learned.repeat_dim(0, batch);
    }
    assert_eq!(learned.dims()[0], batch, "a prompt for each row of the batch");
    learned
}
