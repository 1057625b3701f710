//! Encoders: BERT, RoBERTa, DistilBERT, ViT, DINOv2; alone or with a head.
//!
//! Parameter paths are those of `transformers`, `bert.encoder.layer.0.attention.self.query.weight` or, without a head,
//! `encoder.layer.0.attention.self.query.weight`; so adapters of PEFT attach by their own names. See [`Naming`] for vision models.

pub(crate) mod block;
mod text;
mod vision;

use burn::module::Module;
use burn::nn::{LayerNorm, Linear};
use burn::tensor::{Device, Int, Tensor};
use peft_core::{AdapterAware, Embedded, Named, PromptShape, Prompts, for_mask, linear};

pub use self::block::Naming;
use self::block::{Block, Seen, new_norm, norm};
pub use self::text::Text;
use self::text::TextEmbeddings;
use self::vision::PatchEmbeddings;
use crate::config::{EncoderConfig, Family, InputConfig};
use crate::heads::{Head, Task, fresh_linear};
use crate::{Error, Result};

/// What goes into an encoder.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one a batch; a box would be in every caller's way")]
pub enum Input {
    /// Token ids.
    Text(Text),
    /// `[batch, channels, height, width]`, normalised as the model was trained.
    Pixels(Tensor<4>),
}

/// An encoder with the head for its task.
#[derive(Module, Debug)]
pub struct Encoder {
    body: Named<Body>,
    head: Option<Named<Head>>,
    aware: AdapterAware,
    #[module(skip)]
    config: EncoderConfig,
}

#[derive(Module, Debug)]
struct Body {
    embeddings: Embeddings,
    /// Behind the embeddings of texts alone: images have no language.
    invertible_adapters: Option<Embedded>,
    /// In front of texts alone.
    prompts: Option<Prompts>,
    layers: Named<Vec<Block>>,
    /// After the last block, where blocks norm first.
    norm: Option<Named<LayerNorm>>,
    pooler: Option<Named<Linear>>,
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one model a process; a box would not be a Burn module")]
enum Embeddings {
    Text(TextEmbeddings),
    Patches(PatchEmbeddings),
}

impl EncoderConfig {
    /// What prompts of a text encoder are like.
    fn prompts(&self) -> Option<PromptShape> {
        Some(PromptShape {
            width: self.hidden_size,
            blocks: self.num_hidden_layers,
            kv_heads: self.num_attention_heads,
            head_dim: self.hidden_size / self.num_attention_heads,
            positions: self.max_tokens()?,
            causal: false,
        })
    }

    /// An encoder with random weights `N(0, 0.02²)`, allocated only when first used, under the names of files. Those of the head and the pooler, which a checkpoint may lack, depend on
    /// `seed` and path alone.
    pub fn init(&self, seed: u64, device: &Device) -> Encoder {
        let names = self.family.names(Naming::Files);
        let embeddings = match self.input {
            InputConfig::Text { vocab_size, max_position_embeddings, type_vocab_size, .. } => {
                let rows = [vocab_size, max_position_embeddings, type_vocab_size];
                Embeddings::Text(TextEmbeddings::new(self, rows, device))
            }
            InputConfig::Image { image_size, patch_size, num_channels } => {
                Embeddings::Patches(PatchEmbeddings::new(self, image_size, patch_size, num_channels, device))
            }
        };
        // The models for tokens and spans have none, nor have those of RoBERTa with a head; without a head it is there in either.
        let pooled = match self.task {
            Task::Embedding => matches!(self.family, Family::Bert | Family::Roberta | Family::Vit),
            Task::Classification { .. } => self.family == Family::Bert,
            Task::Tokens { .. } | Task::Span => false,
        };
        let pooler = || fresh_linear("pooler.dense", self.hidden_size, self.hidden_size, seed, device);
        let block = || Block::new(self, &names, device);
        let text = matches!(embeddings, Embeddings::Text(_));
        let body = Body {
            embeddings,
            invertible_adapters: text.then(|| Embedded::new(self.hidden_size, device)),
            prompts: self.prompts().map(|shape| Prompts::new(shape, device)),
            layers: Named::new(names.layers, (0..self.num_hidden_layers).map(|_| block()).collect()),
            norm: self.family.norms_first().then(|| new_norm("layernorm", self, device)),
            pooler: pooled.then(|| Named::new("pooler.dense", pooler())),
        };
        let head = Head::new(self, seed, device);
        Encoder {
            body: Named::new(if head.is_some() { names.body } else { "" }, body),
            head: head.map(|head| Named::new("", head)),
            aware: AdapterAware,
            config: self.clone(),
        }
    }
}

impl Encoder {
    /// The layers after the encoder.
    pub(crate) fn head(&self) -> Option<&Head> {
        self.head.as_deref()
    }

    /// The same encoder for another task.
    pub(crate) fn with_head(self, task: Task, head: Head) -> Self {
        let mut config = self.config;
        config.task = task;
        Self { head: Some(Named::new("", head)), config, ..self }
    }

    /// The shape of the model, and its task.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// The same model under other names.
    #[must_use]
    pub fn renamed(self, naming: Naming) -> Self {
        let names = self.config.family.names(naming);
        let body = self.body.into_inner();
        let blocks = body.layers.into_inner().into_iter().map(|block| block.renamed(&names)).collect();
        let body = Body { layers: Named::new(names.layers, blocks), ..body };
        Self { body: Named::new(if self.head.is_some() { names.body } else { "" }, body), ..self }
    }

    /// Last hidden states, normed: `[batch, seq, hidden_size]`; of an image, those of the token before all, then of patches. At padded places they mean nothing.
    ///
    /// # Panics
    /// When [`check`](Self::check) fails.
    pub fn hidden(&self, input: &Input) -> Tensor<3> {
        self.checked(input);
        self.read(input).0
    }

    fn checked(&self, input: &Input) {
        if let Err(error) = self.check(input) {
            panic!("{error}");
        }
    }

    /// Most tokens of a text, behind what is learned in front of it; `None` for images.
    pub fn max_tokens(&self) -> Option<usize> {
        Some(self.config.max_tokens()?.saturating_sub(self.body.prompts.as_ref().map_or(0, Prompts::positions)))
    }

    /// Embeddings of tokens, without positions and norm: `[batch, seq]` to `[batch, seq, hidden_size]`. What a prompt may start from.
    ///
    /// # Panics
    /// For a model of images.
    pub fn embed(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        match &self.body.embeddings {
            Embeddings::Text(table) => table.words(ids),
            Embeddings::Patches(_) => panic!("a model of images has no tokens"),
        }
    }

    /// Keys and values of a text, `[1, seq]` to `[seq, 2·blocks, heads, head_dim]`: what a prefix may start from.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden).
    pub fn past_of(&self, ids: Tensor<2, Int>) -> Tensor<4> {
        let input = Input::Text(Text::new(ids));
        self.checked(&input);
        let mut past = Vec::new();
        self.read_with(&input, |block, x| past.extend(block.keys_values(x, &self.config)));
        Tensor::cat(past.into_iter().map(|x| x.swap_dims(0, 1)).collect(), 1)
    }

    /// The hidden states, and what a head for a text or an image as a whole reads: the state of the first token, be it virtual.
    fn read(&self, input: &Input) -> (Tensor<3>, Tensor<3>) {
        self.read_with(input, |_, _| ())
    }

    /// [`read`](Self::read), and shows each block with its input in the last pass.
    fn read_with(&self, input: &Input, mut show: impl FnMut(&Block, &Tensor<3>)) -> (Tensor<3>, Tensor<3>) {
        let Some(prompts) = &self.body.prompts else { return self.pass(input, show) };
        let mut state = None;
        let hidden = prompts.passes(|following| {
            let (hidden, of_pass) = match following {
                0 => self.pass(input, &mut show),
                _ => self.pass(input, |_, _| ()),
            };
            state = Some(of_pass);
            hidden
        });
        let state = state.unwrap_or_else(|| first(hidden.clone(), input));
        (hidden, state)
    }

    fn pass(&self, input: &Input, mut show: impl FnMut(&Block, &Tensor<3>)) -> (Tensor<3>, Tensor<3>) {
        let mut seen = Seen::default();
        let (mut x, input) = match (&self.body.embeddings, input, &self.config.input) {
            (Embeddings::Text(table), Input::Text(text), InputConfig::Text { pad_token_id, .. }) => {
                let mut words = table.words(text.ids.clone());
                if let Some(prompts) = &self.body.prompts {
                    (words, seen.prompt) = prompts.enter(words, &text.ids, text.mask.as_ref());
                }
                let text = text.behind(seen.prompt.num_tokens(), *pad_token_id);
                seen.segments = text.segments();
                let x = table.forward(words, &text, seen.prompt.shift, &self.config, *pad_token_id);
                (x, Input::Text(text))
            }
            (Embeddings::Patches(patches), Input::Pixels(pixels), _) => {
                (patches.forward(pixels.clone()), input.clone())
            }
            _ => unreachable!("checked above"),
        };
        if let Some(place) = &self.body.invertible_adapters {
            x = place.enter(x);
        }
        let mask = match &input {
            Input::Text(text) => text.mask.clone(),
            Input::Pixels(_) => None,
        };
        x = for_mask(mask, || {
            self.body.layers.iter().enumerate().fold(x, |x, (at, block)| {
                show(block, &x);
                block.forward(x, &self.config, &seen, at)
            })
        });
        if let Some(of) = &self.body.norm {
            x = norm(of, x, self.config.layer_norm_eps);
        }
        let first = first(x.clone(), &input);
        (seen.prompt.behind(x), first)
    }

    /// What the task asks for.
    ///
    /// # Shapes
    /// `[batch, 1, labels]` for a text or an image as a whole; `[batch, seq, labels]` for tokens; `[batch, seq, 2]` for spans, starts then ends;
    /// `[batch, 1, hidden_size]` without a head, see [`embedding`](Self::embedding).
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden).
    pub fn forward(&self, input: &Input) -> Tensor<3> {
        let Some(head) = &self.head else { return self.embedding(input).unsqueeze_dim(1) };
        self.checked(input);
        let (hidden, first) = self.read(input);
        let features = match (&self.config.task, self.config.family) {
            (Task::Classification { .. }, family) if head.reads_first(family) => first,
            (Task::Classification { .. }, Family::Bert) => self.pool(first),
            (Task::Classification { .. }, Family::Dinov2) => {
                let patches = hidden.dims()[1] - 1;
                let mean = hidden.clone().narrow(1, 1, patches).mean_dim(1);
                Tensor::cat(vec![first, mean], 2)
            }
            (Task::Classification { .. }, _) => first,
            _ => hidden,
        };
        head.forward(features, self.config.family)
    }

    /// The vector of each row, `[batch, hidden_size]`, of length one: of a text the mean over its tokens, as sentence-transformers takes it; of an image the token
    /// before all.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden).
    pub fn embedding(&self, input: &Input) -> Tensor<2> {
        let hidden = self.hidden(input);
        let vector: Tensor<2> = match input {
            Input::Text(text) => text.mean(hidden),
            Input::Pixels(_) => hidden.narrow(1, 0, 1),
        }
        .squeeze_dim(1);
        let length = vector.clone().square().sum_dim(1).sqrt().clamp_min(1e-12); // [batch, 1]
        vector / length
    }

    /// The pooler's output for hidden states: `tanh(dense(h₀))`, `[batch, hidden_size]`; `None` for a model without one.
    pub fn pooled(&self, hidden: Tensor<3>, input: &Input) -> Option<Tensor<2>> {
        self.body.pooler.as_ref().map(|_| self.pool(first(hidden, input)).squeeze_dim(1))
    }

    /// Whether the model can read `input`.
    ///
    /// # Errors
    /// Says what was expected and what was found: of the kind of input, its length or its size.
    pub fn check(&self, input: &Input) -> Result<()> {
        let refuse = |expected: String, found: String| Err(Error::Input { expected, found });
        match (&self.config.input, input) {
            (InputConfig::Text { .. }, Input::Text(text)) => {
                let dims @ [_, seq] = text.ids.dims();
                let most = self.max_tokens().unwrap_or_default();
                if !(1..=most).contains(&seq) {
                    return refuse(format!("1 to {most} tokens a row"), format!("{seq}; cut the text"));
                }
                for (what, tensor) in [("mask", &text.mask), ("types", &text.types)] {
                    if let Some(found) = tensor.as_ref().map(Tensor::dims).filter(|found| *found != dims) {
                        return refuse(format!("{what} of shape {dims:?}, as the ids"), format!("{found:?}"));
                    }
                }
                Ok(())
            }
            (InputConfig::Image { patch_size, num_channels, .. }, Input::Pixels(pixels)) => {
                let [_, channels, height, width] = pixels.dims();
                if channels != *num_channels || height < *patch_size || width < *patch_size {
                    let expected = format!("{num_channels} channels and sides of {patch_size} pixels at least");
                    return refuse(expected, format!("{channels} channels of {height} × {width}"));
                }
                Ok(())
            }
            (InputConfig::Text { .. }, Input::Pixels(_)) => refuse("text".to_owned(), "pixels".to_owned()),
            (InputConfig::Image { .. }, Input::Text(_)) => refuse("pixels".to_owned(), "text".to_owned()),
        }
    }

    /// `[batch, 1, hidden]` to the same.
    fn pool(&self, first: Tensor<3>) -> Tensor<3> {
        match &self.body.pooler {
            Some(pooler) => linear(pooler, first).tanh(),
            None => first,
        }
    }
}

/// The state of the first token that is no padding: `[batch, 1, hidden]`.
fn first(hidden: Tensor<3>, input: &Input) -> Tensor<3> {
    match input {
        Input::Text(text) => text.first(hidden),
        Input::Pixels(_) => hidden.narrow(1, 0, 1),
    }
}
