//! Feed-forward parts that are mixtures of experts.
//!
//! A router scores the experts for each token, `p = softmax(x·Wᵀ)`; the token goes through the best few, `y = Σₑ wₑ·down(silu(gate) · up)`, whose weights
//! `w` are those of `p`, in some families divided by their sum. A shared expert takes all tokens, times a gate of its own: `y += σ(x·vᵀ)·shared(x)`.
//! Jiang et al. 2024, arXiv:2401.04088 (Mixtral); Dai et al. 2024, arXiv:2401.06066, section 3 (shared experts).
//!
//! The experts are chosen on the host, by one small transfer a block, and only those that have tokens cost anything. Their weights are the fused tensors of
//! `transformers` 5, by its names, whatever a file holds: [`crate::stacked`]. They are never packed.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::kernels::{Groups, Nonlinearity, gated, grouped_linear};
use peft_core::{Auxiliary, Named, linear, say_auxiliary};

use crate::config::ExpertsConfig;
use crate::feed_forward::{INITIALIZER, LlamaMlp, proj};

/// Experts and their router.
#[derive(Module, Debug)]
pub(crate) struct SparseMlp {
    /// The router.
    gate: Linear,
    experts: Experts,
    shared: Option<Named<LlamaMlp>>,
    shared_expert_gate: Option<Linear>,
    #[module(skip)]
    rule: Rule,
}

/// Weights of all experts, as files have them.
#[derive(Module, Debug)]
struct Experts {
    /// `[experts, 2 · inner, hidden]`, the rows of the gate before those of the other.
    gate_up_proj: Param<Tensor<3>>,
    /// `[experts, hidden, inner]`
    down_proj: Param<Tensor<3>>,
}

/// How experts are chosen.
#[derive(Clone, Debug)]
struct Rule {
    layer: usize,
    num_experts: usize,
    num_experts_per_tok: usize,
    norm_topk_prob: bool,
}

/// What the router of a block did.
#[derive(Clone, Debug)]
pub struct Routed {
    /// The number of the block.
    pub layer: usize,
    /// What the router gave, `[tokens, experts]`, rows of the batch one after the other.
    pub logits: Tensor<2>,
    /// The experts of each token, one after the other: `[tokens · num_experts_per_tok]`.
    pub chosen: Vec<usize>,
}

impl SparseMlp {
    pub(crate) fn new(config: &ExpertsConfig, hidden: usize, layer: usize, device: &Device) -> Self {
        let ExpertsConfig { num_experts, num_experts_per_tok, intermediate_size: inner, norm_topk_prob, .. } = *config;
        let shared = |shared: crate::config::SharedExpert| {
            Named::new("shared_expert", LlamaMlp::new(hidden, shared.intermediate_size, false, device))
        };
        Self {
            gate: proj(hidden, num_experts, false, device),
            experts: Experts {
                gate_up_proj: INITIALIZER.init([num_experts, 2 * inner, hidden], device),
                down_proj: INITIALIZER.init([num_experts, hidden, inner], device),
            },
            shared: config.shared.map(shared),
            shared_expert_gate: config.shared.map(|_| proj(hidden, 1, false, device)),
            rule: Rule { layer, num_experts, num_experts_per_tok, norm_topk_prob },
        }
    }

    /// `[batch, seq, hidden]` to the same, and what the router did.
    pub(crate) fn forward(&self, x: Tensor<3>) -> (Tensor<3>, Routed) {
        let dims = x.dims();
        let x = x.flatten::<2>(0, 1); // [tokens, hidden]
        let logits = linear(&self.gate, x.clone());
        let (chosen, weights) = self.rule.choose(&logits);
        let mut y = self.experts.forward(x.clone(), &chosen, weights);
        if let Some(shared) = &self.shared {
            let open = self.shared_expert_gate.as_ref().map(|gate| sigmoid(linear(gate, x.clone()))); // [tokens, 1]
            let shared = shared.forward(x);
            y = y + open.map_or(shared.clone(), |open| shared * open);
        }
        (y.reshape(dims), Routed { layer: self.rule.layer, logits, chosen })
    }
}

impl Experts {
    /// `x` `[tokens, hidden]` through the experts of each token, by their weights `[tokens, per token]`.
    fn forward(&self, x: Tensor<2>, chosen: &[usize], weights: Tensor<2>) -> Tensor<2> {
        let ([tokens, hidden], [_, each]) = (x.dims(), weights.dims());
        let groups = Groups::new(self.gate_up_proj.lazy_shape()[0], chosen);
        // A row for each pair of a token and its expert.
        let pairs = x.unsqueeze_dim::<3>(1).expand([tokens, each, hidden]).reshape([tokens * each, hidden]);
        let inner = grouped_linear(pairs, self.gate_up_proj.val(), &groups);
        let width = inner.dims()[1] / 2;
        let (gate, up) = (inner.clone().narrow(1, 0, width), inner.narrow(1, width, width));
        let y = grouped_linear(gated(gate, up, Nonlinearity::Silu), self.down_proj.val(), &groups);
        (y.reshape([tokens, each, hidden]) * weights.unsqueeze_dim(2)).sum_dim(1).reshape([tokens, hidden])
    }
}

impl Rule {
    /// The experts of each token by the logits `[tokens, experts]`, and their weights `[tokens, per token]`.
    fn choose(&self, logits: &Tensor<2>) -> (Vec<usize>, Tensor<2>) {
        let scores = softmax(logits.clone(), 1);
        let host: Vec<f32> = scores.clone().into_data().iter::<f32>().collect();
        let chosen: Vec<usize> =
            host.chunks(self.num_experts).flat_map(|scores| best(scores, self.num_experts_per_tok)).collect();
        let indices: Vec<i64> = chosen.iter().map(|expert| *expert as i64).collect();
        let shape = [logits.dims()[0], self.num_experts_per_tok];
        let indices = Tensor::<2, Int>::from_data(TensorData::new(indices, shape), &logits.device());
        let weights = scores.gather(1, indices);
        (chosen, if self.norm_topk_prob { weights.clone() / weights.sum_dim(1) } else { weights })
    }
}

/// The `count` places with the largest scores; of equal ones the first.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    if count < places.len() {
        places.select_nth_unstable_by(count, |a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        places.truncate(count);
    }
    // In the order of the experts, so that sums do not depend on how they were found.
    places.sort_unstable();
    places
}

impl Routed {
    /// The part of all choices that fell on each expert, `[experts]`.
    fn load(&self) -> Tensor<1> {
        let counts = self.counts().into_iter().map(|count| count / self.chosen.len() as f32).collect::<Vec<_>>();
        Tensor::from_data(TensorData::new(counts, [self.logits.dims()[1]]), &self.logits.device())
    }

    fn counts(&self) -> Vec<f32> {
        let mut counts = vec![0.0; self.logits.dims()[1]];
        self.chosen.iter().for_each(|expert| counts[*expert] += 1.0);
        counts
    }

    /// Mean entropy of the probabilities, `[1]`.
    fn entropy(&self) -> Tensor<1> {
        let p = softmax(self.logits.clone().detach(), 1);
        -(p.clone() * p.clamp_min(1e-9).log()).sum_dim(1).mean()
    }
}

/// The loss that balances experts, `[1]`: `experts · Σₑ fₑ·pₑ` of the parts `f` of the tokens of all blocks that chose an expert, and of its mean probability `p` there.
/// `None` without routers. Padding counts as tokens do.
///
/// Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, over all blocks at once as in `transformers`.
pub fn load_balancing_loss(routed: &[Routed]) -> Option<Tensor<1>> {
    let sum = |sum: Vec<f32>, counts: Vec<f32>| sum.into_iter().zip(counts).map(|(sum, count)| sum + count).collect();
    let counts = routed.iter().map(Routed::counts).reduce(sum)?;
    let logits = Tensor::cat(routed.iter().map(|each| each.logits.clone()).collect::<Vec<_>>(), 0);
    let [rows, experts] = logits.dims();
    let chosen = counts.into_iter().map(|count| count / rows as f32).collect::<Vec<_>>();
    let chosen = Tensor::<1>::from_data(TensorData::new(chosen, [experts]), &logits.device());
    let mean = softmax(logits, 1).mean_dim(0).reshape([experts]);
    Some((chosen * mean).sum() * experts as f64)
}

/// Tells who listens what the routers of a pass did. The loss is one for all blocks, so the last of them has it.
pub(crate) fn say(routed: &[Routed], coefficient: Option<f64>) {
    for (at, each) in routed.iter().enumerate() {
        say_auxiliary(|| {
            let coefficient = coefficient.filter(|_| at + 1 == routed.len());
            let loss = coefficient.and_then(|coefficient| Some(load_balancing_loss(routed)? * coefficient));
            let path = format!("model.layers.{}.mlp.gate", each.layer);
            Auxiliary { path, loss, load: each.load(), entropy: each.entropy() }
        });
    }
}
