//! What computes a prompt during training, so that its tokens are learned together; afterwards the prompt alone is needed.
//!
//! With what is learned for each token, `E: [n, in]`:
//! - projection: `f(E·A + a)·B + b`, `f = tanh` (Li & Liang 2021, arXiv:2101.00190, section 4.3)
//! - MLP: `relu(relu(E·A + a)·B + b)·C + c` (PEFT's P-tuning)
//! - LSTM: `relu(lstm(E)·A + a)·B + b`, in both directions (Liu et al. 2021, arXiv:2103.10385, section 3.2); conditioned on the input, it reads the mean `s` of
//!   the text's embeddings before them, `lstm([s; E])`, whose first output is left out
//!
//! Fields have the names of PEFT's modules, so that its encoders could be read.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation};
use peft_core::{Dense, Reading, Result, Site, Start};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::lstm::Lstm;

/// What is between what is learned and what is used.
#[derive(Module, Debug)]
pub struct Encoder {
    /// `[n, in]`
    embedding: Param<Tensor<2>>,
    /// Prefix tuning's layers.
    transform: Vec<Dense>,
    /// What is between them.
    #[module(skip)]
    between: Between,
    /// P-tuning's: reads all tokens in order.
    lstm_head: Option<Lstm>,
    /// P-tuning's layers, with a rectifier between them.
    mlp_head: Vec<Dense>,
    /// Whether the LSTM reads a summary of the text too.
    conditioned: bool,
}

/// What is between the layers of a prefix' projection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Between {
    /// The hyperbolic tangent.
    #[default]
    Tanh,
    /// `max(x, 0)`, as AdapterHub's library may have it.
    Relu,
}

impl Between {
    fn apply(self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Tanh => x.tanh(),
            Self::Relu => activation::relu(x),
        }
    }
}

/// The encoder of P-tuning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum EncoderKind {
    /// Three linear layers, token by token.
    #[default]
    #[serde(rename = "MLP")]
    Mlp,
    /// A long short-term memory in both directions, then two linear layers.
    #[serde(rename = "LSTM")]
    Lstm,
}

impl Encoder {
    /// That of prefix tuning: `[n, width]` through `inner` to `[n, out]`.
    pub(crate) fn projection(
        site: &Site,
        [n, width, inner, out]: [usize; 4],
        between: Between,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        let embedding = site.normal([n, width], 1.0, rng)?;
        let transform = vec![dense(site, width, inner, rng)?, dense(site, inner, out, rng)?];
        Ok(Self { embedding, transform, between, lstm_head: None, mlp_head: Vec::new(), conditioned: false })
    }

    /// Those of P-tuning: `[n, width]` through `inner` to the same.
    pub(crate) fn tokens(
        kind: EncoderKind,
        site: &Site,
        [n, width, inner, depth]: [usize; 4],
        dropout: f64,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        let embedding = site.normal([n, width], 1.0, rng)?;
        let (lstm_head, widths) = match kind {
            EncoderKind::Mlp => (None, vec![width, inner, inner, width]),
            EncoderKind::Lstm => {
                let lstm = Lstm::new(site, [width, inner, depth], dropout, rng)?;
                (Some(lstm), vec![2 * inner, 2 * inner, width])
            }
        };
        let mlp_head = widths.windows(2).map(|pair| dense(site, pair[0], pair[1], rng)).collect::<Result<_>>()?;
        let transform = Vec::new();
        Ok(Self { embedding, transform, between: Between::Tanh, lstm_head, mlp_head, conditioned: false })
    }

    /// The same with prompts that depend on the text; for an LSTM.
    pub(crate) fn conditioned(self) -> Self {
        Self { conditioned: true, ..self }
    }

    /// `[1 or batch, n, out]`; without a text that of one whose mean is zero.
    pub(crate) fn forward(&self, reading: Option<&Reading<'_>>) -> Tensor<3> {
        let x: Tensor<3> = through(&self.transform, self.embedding.val(), |x| self.between.apply(x)).unsqueeze_dim(0);
        let x = match &self.lstm_head {
            Some(lstm) if self.conditioned => behind_summary(lstm, x, reading),
            Some(lstm) => lstm.forward(x),
            None => x,
        };
        let [rows, n, _] = x.dims();
        let x = through(&self.mlp_head, x.flatten(0, 1), activation::relu);
        let width = x.dims()[1];
        x.reshape([rows, n, width])
    }

    /// PEFT's name of a field, and whether it holds the transpose there. It counts nonlinearities among the layers.
    pub(crate) fn key(field: &str) -> Option<(String, bool)> {
        if field == "embedding" {
            return Some(("embedding.weight".to_owned(), false));
        }
        if let Some(field) = field.strip_prefix("lstm_head.") {
            return Some((format!("lstm_head.{}", Lstm::key(field)?), false));
        }
        let mut parts = field.split('.');
        let (layers, at, parameter) = (parts.next()?, parts.next()?.parse::<usize>().ok()?, parts.next()?);
        Some((format!("{layers}.{}.{parameter}", 2 * at), parameter == "weight"))
    }
}

/// What an LSTM makes of `x` `[1, n, width]` behind the mean of each text, `[batch, n, 2·inner]`.
fn behind_summary(lstm: &Lstm, x: Tensor<3>, reading: Option<&Reading<'_>>) -> Tensor<3> {
    let [_, n, width] = x.dims();
    let summary = match reading {
        Some(reading) => reading.mean().cast(x.dtype()),
        None => Tensor::zeros([1, 1, width], (&x.device(), x.dtype())),
    }; // [batch, 1, width]
    let x = x.repeat_dim(0, summary.dims()[0]);
    lstm.forward(Tensor::cat(vec![summary, x], 1)).narrow(1, 1, n)
}

fn through(layers: &[Dense], mut x: Tensor<2>, between: impl Fn(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
    for (at, layer) in layers.iter().enumerate() {
        x = layer.forward(if at > 0 { between(x) } else { x });
    }
    x
}

/// A linear layer as PyTorch starts one.
fn dense(site: &Site, d_in: usize, d_out: usize, rng: &mut impl Rng) -> Result<Dense> {
    Dense::new(site, [d_in, d_out], Start::Kaiming, rng)
}
