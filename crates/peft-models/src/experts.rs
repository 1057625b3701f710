//! Feed-forward parts that are mixtures of experts.
//!
//! A router scores the experts for each token, `p = softmax(x·Wᵀ)`; the token goes through the best few, `y = Σₑ wₑ·down(silu(gate) · up)`, whose weights
//! `w` are those of `p`, in some families divided by their sum. A shared expert takes all tokens, times a gate of its own: `y += σ(x·vᵀ)·shared(x)`.
//! Jiang et al. 2024, arXiv:2401.04088 (Mixtral); Dai et al. 2024, arXiv:2401.06066, section 3 (shared experts).
//!
//! DeepSeek-V2 has experts in groups: a token chooses the best groups first, by their best expert. In V3 `p = σ(x·Wᵀ)`, experts are chosen by `p` and a correction of
//! each, groups by their best two, and weights are `p` alone. DeepSeek-AI 2024, arXiv:2405.04434, section 2.2.2, and arXiv:2412.19437, section 2.1.2.
//!
//! The experts are chosen on the host, by one small transfer a block, and only those that have tokens cost anything. Their weights are the fused tensors of
//! `transformers` 5, by its names, whatever a file holds: [`crate::stacked`]. Packed, each expert is for itself.

use burn::module::{Initializer, Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::kernels::{Groups, Nonlinearity, gated};
use peft_core::{Auxiliary, GroupedLinear, Named, linear, say_auxiliary};

use crate::config::{ExpertGroups, ExpertsConfig, LlamaConfig, Scoring, SharedExpert};
use crate::feed_forward::{INITIALIZER, LlamaMlp, proj};

/// Experts and their router.
#[derive(Module, Debug)]
pub(crate) struct SparseMlp {
    /// The router.
    gate: Linear,
    experts: Experts,
    shared: Option<Named<LlamaMlp>>,
    shared_expert_gate: Option<Linear>,
    /// Beside the router's weight in files.
    correction: Option<Named<Correction>>,
    #[module(skip)]
    layer: usize,
    #[module(skip)]
    config: ExpertsConfig,
}

/// What is added to scores where experts are chosen, `[experts]`. It is never trained by gradients.
#[derive(Module, Debug)]
struct Correction {
    e_score_correction_bias: Param<Tensor<1>>,
}

/// Weights of all experts, as files have them.
#[derive(Module, Debug)]
struct Experts {
    /// `[experts, 2 · inner, hidden]`, the rows of the gate before those of the other.
    gate_up_proj: GroupedLinear,
    /// `[experts, hidden, inner]`
    down_proj: GroupedLinear,
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
    /// `p`
    scores: Tensor<2>,
}

impl SparseMlp {
    pub(crate) fn new(config: &LlamaConfig, experts: &ExpertsConfig, layer: usize, device: &Device) -> Self {
        let (hidden, inner, count) = (config.hidden_size, experts.intermediate_size, experts.num_experts);
        let shared = |shared: SharedExpert| {
            let name = if shared.gated { "shared_expert" } else { "shared_experts" };
            Named::new(name, LlamaMlp::new(hidden, shared.intermediate_size, config.mlp_bias, device))
        };
        let gated = experts.shared.is_some_and(|shared| shared.gated);
        let correction = || Correction { e_score_correction_bias: Initializer::Zeros.init([count], device) };
        Self {
            gate: proj(hidden, count, false, device),
            experts: Experts {
                gate_up_proj: GroupedLinear::new(INITIALIZER.init([count, 2 * inner, hidden], device)),
                down_proj: GroupedLinear::new(INITIALIZER.init([count, hidden, inner], device)),
            },
            shared: experts.shared.map(shared),
            shared_expert_gate: gated.then(|| proj(hidden, 1, false, device)),
            correction: (experts.scoring == Scoring::Sigmoid).then(|| Named::new("gate", correction())),
            layer,
            config: experts.clone(),
        }
    }

    /// `[batch, seq, hidden]` to the same, and what the router did.
    pub(crate) fn forward(&self, x: Tensor<3>) -> (Tensor<3>, Routed) {
        let (dims, whole) = (x.dims(), x.clone());
        let x = x.flatten::<2>(0, 1); // [tokens, hidden]
        let (routed, weights) = self.route(x.clone());
        let mut y = self.experts.forward(x.clone(), &routed.chosen, weights);
        if let Some(shared) = &self.shared {
            let open = self.shared_expert_gate.as_ref().map(|gate| sigmoid(linear(gate, x))); // [tokens, 1]
            let shared = shared.forward(whole).flatten(0, 1);
            y = y + open.map_or(shared.clone(), |open| shared * open);
        }
        (y.reshape(dims), routed)
    }

    /// The experts of each token of `x` `[tokens, hidden]`, and their weights `[tokens, per token]`.
    fn route(&self, x: Tensor<2>) -> (Routed, Tensor<2>) {
        let ExpertsConfig { num_experts, num_experts_per_tok, scoring, groups, .. } = self.config;
        let logits = linear(&self.gate, x);
        let scores = match scoring {
            Scoring::Softmax => softmax(logits.clone(), 1),
            Scoring::Sigmoid => sigmoid(logits.clone()),
        };
        let corrected = match &self.correction {
            Some(correction) => scores.clone() + correction.e_score_correction_bias.val().unsqueeze(),
            None => scores.clone(),
        };
        let host: Vec<f32> = corrected.into_data().iter::<f32>().collect();
        let of_token = |scores| choose(scores, num_experts_per_tok, groups);
        let chosen: Vec<usize> = host.chunks(num_experts).flat_map(of_token).collect();
        let indices: Vec<i64> = chosen.iter().map(|expert| *expert as i64).collect();
        let shape = [logits.dims()[0], num_experts_per_tok];
        let indices = Tensor::<2, Int>::from_data(TensorData::new(indices, shape), &logits.device());
        let mut weights = scores.clone().gather(1, indices);
        if self.config.norm_topk_prob {
            // All scores of a sigmoid may be tiny.
            weights = weights.clone() / (weights.sum_dim(1) + 1e-20);
        }
        let weights = weights * self.config.routed_scaling_factor;
        (Routed { layer: self.layer, logits, chosen, scores }, weights)
    }
}

impl Experts {
    /// `x` `[tokens, hidden]` through the experts of each token, by their weights `[tokens, per token]`.
    fn forward(&self, x: Tensor<2>, chosen: &[usize], weights: Tensor<2>) -> Tensor<2> {
        let ([tokens, hidden], [_, each]) = (x.dims(), weights.dims());
        let groups = Groups::new(self.gate_up_proj.experts(), chosen);
        // A row for each pair of a token and its expert.
        let pairs = x.unsqueeze_dim::<3>(1).expand([tokens, each, hidden]).reshape([tokens * each, hidden]);
        let inner = self.gate_up_proj.forward(pairs, &groups);
        let width = inner.dims()[1] / 2;
        let (gate, up) = (inner.clone().narrow(1, 0, width), inner.narrow(1, width, width));
        let y = self.down_proj.forward(gated(gate, up, Nonlinearity::Silu), &groups);
        (y.reshape([tokens, each, hidden]) * weights.unsqueeze_dim(2)).sum_dim(1).reshape([tokens, hidden])
    }
}

/// The `count` experts of a token, in the order of all; of groups only those in the best.
fn choose(scores: &[f32], count: usize, groups: Option<ExpertGroups>) -> Vec<usize> {
    let Some(ExpertGroups { n_group, topk_group, best }) = groups else { return self::best(scores, count) };
    let size = scores.len() / n_group;
    let score = |group: &[f32]| self::best(group, best).into_iter().map(|expert| group[expert]).sum();
    let of_groups: Vec<f32> = scores.chunks(size).map(score).collect();
    let groups = self::best(&of_groups, topk_group);
    let experts: Vec<usize> = groups.into_iter().flat_map(|group| group * size..(group + 1) * size).collect();
    let left: Vec<f32> = experts.iter().map(|expert| scores[*expert]).collect();
    self::best(&left, count).into_iter().map(|at| experts[at]).collect()
}

/// The `count` places with the largest scores, of equal ones the first. In their own order, so that no sum depends on how they were found.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    if count < places.len() {
        places.select_nth_unstable_by(count, |a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        places.truncate(count);
    }
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
        let scores = self.scores.clone().detach();
        let p = scores.clone() / scores.sum_dim(1);
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
