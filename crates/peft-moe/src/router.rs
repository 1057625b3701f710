//! Routers: how far each expert's gate is open for a row.
//!
//! With `z = x·W / temperature`, or `z = e·W / temperature` of a task's embedding `e`, and `p = softmax(z)`:
//! - soft: `g = p` (Zadouri et al. 2023, arXiv:2309.05444, section 3.2)
//! - top-k: `g = p` for the `k` largest, divided by their sum, and zero for all others (Shazeer et al. 2017, arXiv:1701.06538; `MixLoRA`, arXiv:2404.15159)
//! - top-p: the same for the fewest experts whose probabilities reach `p` together, the first of equals first (Huang et al. 2024, arXiv:2403.07652)
//! - switch: `g = p` for the largest alone (Fedus et al. 2022, arXiv:2101.03961)
//! - arrow: as top-k, with `z = |x·W| / temperature` (Ostapenko et al. 2024, arXiv:2405.11157)

use burn::module::{Module, Param};
use burn::tensor::{DType, Distribution, Int, Tensor};
use peft_core::kernels::{linear, top_softmax};
use peft_core::{Auxiliary, Error, Result, Site, mask, mean_of_tokens, say_auxiliary, tasks};
use serde::{Deserialize, Serialize};

use crate::balance::{Balance, Rows, entropy, load};
use crate::mixture::{MOST_TASKS, check_count};

/// What opens gates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterConfig {
    /// All gates, as far as the router likes each expert.
    Soft,
    /// The gates of the best alone.
    TopK {
        /// How many.
        k: usize,
    },
    /// The gates of as many as make up this probability.
    TopP {
        /// Between zero and one.
        p: f64,
    },
    /// The gate of the best alone, as far as the router likes it.
    Switch,
    /// The gates of the best alone, by how far a row goes along each expert's direction, whatever the sign; nothing is trained: see [`ArrowConfig`](crate::ArrowConfig).
    Arrow {
        /// How many.
        k: usize,
    },
    /// All gates, as far as the task of a row likes each expert: see [`for_tasks`](peft_core::for_tasks).
    Task {
        /// How many tasks there are.
        num_tasks: usize,
        /// Width of a task's embedding.
        embedding_dim: usize,
    },
}

/// What has gates of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Each token.
    #[default]
    Token,
    /// Each row of the batch, by the mean of its tokens, [padding](peft_core::for_mask) left out: for models that read a text whole.
    Sequence,
}

/// What opens the gates of one place.
#[derive(Module, Debug)]
pub struct Router {
    /// `W`, `[d_in, experts]`, or `[embedding_dim, experts]` of a task router.
    weight: Param<Tensor<2>>,
    /// Of tasks, `[num_tasks, embedding_dim]`.
    embeddings: Option<Param<Tensor<2>>>,
    #[module(skip)]
    config: RouterConfig,
    #[module(skip)]
    look: Look,
    #[module(skip)]
    balance: Balance,
    /// Of the place, for what is said of it.
    #[module(skip)]
    path: String,
}

/// What a router says of the rows of a batch.
#[derive(Clone, Debug)]
pub struct Routing {
    /// `z`, `[rows, experts]`
    pub logits: Tensor<2>,
    /// `p`, `[rows, experts]`
    pub probabilities: Tensor<2>,
    /// 1 for an expert that a row goes through, or, where it goes through all, for the one it likes best: `[rows, experts]`
    pub chosen: Tensor<2>,
    /// `g`, `[rows, experts]`
    pub gates: Tensor<2>,
}

/// How a router looks at its input.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Look {
    pub(crate) level: Level,
    pub(crate) temperature: f64,
    /// Inputs are multiplied by numbers from `1 ± jitter` during training.
    pub(crate) jitter: f64,
}

impl RouterConfig {
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::TopK { k: 0 } | Self::Arrow { k: 0 } => Err(Error::config("router", "top_k of at least 1", 0)),
            Self::TopP { p } if !(*p > 0.0 && *p <= 1.0) => {
                Err(Error::config("router", "top_p of a probability above 0", p))
            }
            Self::Task { num_tasks, embedding_dim } => {
                check_count("router.num_tasks", 1..=MOST_TASKS, *num_tasks)?;
                check_count("router.embedding_dim", 1..=MOST_TASKS, *embedding_dim)
            }
            _ => Ok(()),
        }
    }

    /// Refuses to open more gates than a layer with so many experts has.
    pub(crate) fn check_experts(&self, experts: usize) -> Result<()> {
        match self {
            Self::TopK { k } | Self::Arrow { k } if *k > experts => {
                Err(Error::config("router", format!("top_k of at most {experts}, the experts of a layer"), k))
            }
            _ => Ok(()),
        }
    }

    /// How many gates of a row are open at most, of `experts`.
    pub(crate) fn most_open(&self, experts: usize) -> usize {
        match self {
            Self::TopK { k } | Self::Arrow { k } => *k.min(&experts),
            Self::Switch => 1,
            Self::Soft | Self::TopP { .. } | Self::Task { .. } => experts,
        }
    }
}

/// 1 for each expert before which those that are more likely, the first of equals before the others, do not make up `p` yet.
fn making_up(probabilities: &Tensor<2>, p: f64) -> Tensor<2> {
    let ([rows, experts], dtype) = (probabilities.dims(), probabilities.dtype());
    let each = |dim| probabilities.clone().detach().unsqueeze_dim::<3>(dim).expand([rows, experts, experts]);
    let (own, other) = (each(2), each(1));
    let numbers = Tensor::<1, Int>::arange(0..experts as i64, &probabilities.device());
    let number = |shape: [usize; 3]| numbers.clone().reshape(shape).expand([rows, experts, experts]);
    let earlier = number([1, 1, experts]).lower(number([1, experts, 1]));
    let equal = other.clone().equal(own.clone());
    let before = other.clone().greater(own).bool_or(equal.bool_and(earlier)).float().cast(dtype);
    let made_up: Tensor<2> = (before * other).sum_dim(2).squeeze_dim(2);
    made_up.lower_elem(p).float().cast(dtype)
}

/// 1 for the `k` largest of each row, the first of equals.
pub(crate) fn best(probabilities: &Tensor<2>, k: usize) -> Tensor<2> {
    one_by_one(probabilities, k).into_iter().reduce(|open, chosen| open + chosen).expect("one at least")
}

/// 1 for the largest of each row; then for the second; and so on until the `k`-th, the first of equals before the others.
pub(crate) fn one_by_one(probabilities: &Tensor<2>, k: usize) -> Vec<Tensor<2>> {
    let [rows, experts] = probabilities.dims();
    let device = probabilities.device();
    let numbers = Tensor::<1, Int>::arange(0..experts as i64, &device).unsqueeze::<2>().expand([rows, experts]);
    let mut left = probabilities.clone().detach();
    let next = |_| {
        let chosen = numbers.clone().equal(left.clone().argmax(1).expand([rows, experts]));
        // Below everything, so that it is not the largest again.
        left = left.clone().mask_fill(chosen.clone(), f32::MIN);
        chosen.float().cast(left.dtype())
    };
    (0..k.min(experts)).map(next).collect()
}

impl Router {
    /// The router of one place, which starts undecided.
    ///
    /// # Errors
    /// As [`Site::param`].
    pub(crate) fn new(
        config: &RouterConfig,
        look: Look,
        balance: &Balance,
        site: &Site,
        experts: usize,
        seed: u64,
    ) -> Result<Self> {
        const STD: f32 = 0.02;
        let mut rng = site.rng(seed);
        let (width, embeddings) = match config {
            RouterConfig::Task { num_tasks, embedding_dim } => {
                (*embedding_dim, Some(site.normal([*num_tasks, *embedding_dim], 1.0, &mut rng)?))
            }
            _ => (site.d_in, None),
        };
        let weight = site.normal([width, experts], STD, &mut rng)?;
        let path = site.path.clone();
        Ok(Self { weight, embeddings, config: config.clone(), look, balance: balance.clone(), path })
    }

    /// Gates for `x` `[batch, seq, d_in]`; says what they are to who listens.
    pub(crate) fn route(&self, x: Tensor<3>) -> Routing {
        let [batch, seq, _] = x.dims();
        let routing = self.decide(x);
        say_auxiliary(|| {
            let rows = Rows::of([batch, seq], routing.logits.dtype());
            let load = load(&routing.chosen, &rows);
            let loss = self.balance.loss(&routing, &load, &rows);
            Auxiliary { path: self.path.clone(), loss, load, entropy: entropy(&routing.probabilities, &rows) }
        });
        routing
    }

    /// How many gates of a row are open at most.
    pub(crate) fn most_open(&self) -> usize {
        self.config.most_open(self.weight.lazy_shape()[1])
    }

    fn decide(&self, x: Tensor<3>) -> Routing {
        let ([batch, seq, d_in], Self { config, look, .. }) = (x.dims(), self);
        let weight = self.weight.val();
        let dtype = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let weight = weight.cast(dtype);
        let (rows, repeat) = match (&self.embeddings, look.level) {
            (Some(embeddings), _) => {
                let of: Vec<i64> = tasks(batch).into_iter().map(|task| task as i64).collect();
                let [count, _] = embeddings.lazy_shape().dims();
                assert!(of.iter().all(|task| (*task as usize) < count), "tasks {of:?} of {count}");
                let of = Tensor::<1, Int>::from_data(&of[..], &x.device());
                (embeddings.val().cast(dtype).select(0, of), seq)
            }
            (None, Level::Sequence) => {
                let mean = mean_of_tokens(x.cast(dtype), mask([batch, seq]).as_ref());
                (jittered(mean.squeeze_dim(1), look.jitter), seq)
            }
            (None, Level::Token) => (jittered(x.cast(dtype).reshape([batch * seq, d_in]), look.jitter), 1),
        };
        let logits = linear(rows, weight) / look.temperature;
        let logits = if matches!(config, RouterConfig::Arrow { .. }) { logits.abs() } else { logits };
        let [count, experts] = logits.dims();
        // One decision for all tokens of a row.
        let logits = match repeat {
            1 => logits,
            _ => logits.unsqueeze_dim::<3>(1).repeat_dim(1, repeat).reshape([count * repeat, experts]),
        };
        let probabilities = top_softmax(logits.clone(), experts);
        let best = || top_softmax(logits.clone().detach(), 1); // one, and so 1
        let (chosen, gates) = match config {
            RouterConfig::Soft | RouterConfig::Task { .. } => (best(), probabilities.clone()),
            RouterConfig::Switch => {
                let chosen = best();
                (chosen.clone(), probabilities.clone() * chosen)
            }
            RouterConfig::TopK { k } | RouterConfig::Arrow { k } => {
                // What is left of the probabilities, divided by its sum.
                let gates = top_softmax(logits.clone(), (*k).min(experts));
                (gates.clone().detach().greater_elem(0.0).float().cast(dtype), gates)
            }
            RouterConfig::TopP { p } => {
                let chosen = making_up(&probabilities, *p);
                let gates = probabilities.clone() * chosen.clone();
                (chosen, gates.clone() / gates.sum_dim(1))
            }
        };
        Routing { logits, probabilities, chosen, gates }
    }
}

fn jittered(x: Tensor<2>, jitter: f64) -> Tensor<2> {
    if jitter == 0.0 || !x.device().is_autodiff() {
        return x;
    }
    let noise = x.random_like(Distribution::Uniform(1.0 - jitter, 1.0 + jitter));
    x * noise
}
