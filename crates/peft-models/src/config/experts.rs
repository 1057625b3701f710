//! What a `config.json` says of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and V3.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Fields;
use crate::Result;

/// The feed-forward parts that are mixtures of experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertsConfig {
    /// Whether a block has experts, by block; the others are dense.
    pub sparse: Vec<bool>,
    /// Experts of such a block.
    pub num_experts: usize,
    /// How many of them a token goes through.
    pub num_experts_per_tok: usize,
    /// Width inside an expert.
    pub intermediate_size: usize,
    /// What the router makes of its logits.
    pub scoring: Scoring,
    /// Of which experts a token may choose.
    pub groups: Option<ExpertGroups>,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// What these weights are multiplied by in the end.
    pub routed_scaling_factor: f64,
    /// The expert that all tokens go through besides.
    pub shared: Option<SharedExpert>,
    /// What the loss that balances experts is multiplied by; `None` where it is not asked for.
    pub router_aux_loss_coef: Option<f64>,
}

/// What a router makes of its logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scoring {
    /// `softmax`.
    Softmax,
    /// `sigmoid`; experts are chosen by their score and a correction that the file has.
    Sigmoid,
}

/// Experts in groups of the same size, of which a token chooses some before it chooses experts in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertGroups {
    /// How many there are.
    pub n_group: usize,
    /// How many of them a token chooses.
    pub topk_group: usize,
    /// The sum of how many of the best scores in it is the score of a group.
    pub best: usize,
}

/// The expert that all tokens go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedExpert {
    /// Its width inside.
    pub intermediate_size: usize,
    /// Whether its output is multiplied by a gate of its own.
    pub gated: bool,
}

impl Fields<'_> {
    /// The experts of a model of that type with so many blocks, if it has any.
    pub(super) fn experts(&self, model_type: &str, layers: usize) -> Result<Option<ExpertsConfig>> {
        let (deepseek, width) = match model_type {
            "mixtral" => (false, "intermediate_size"),
            "qwen2_moe" | "qwen3_moe" => (false, "moe_intermediate_size"),
            "deepseek_v2" | "deepseek_v3" => (true, "moe_intermediate_size"),
            _ => return Ok(None),
        };
        let names = ["n_routed_experts", "num_local_experts", "num_experts"];
        let name = names.into_iter().find(|name| self.get(name).is_some()).unwrap_or("num_experts");
        let (num_experts, intermediate_size) = (self.count(name)?, self.count(width)?);
        let loss = !deepseek && self.flag("output_router_logits", false)?;
        Ok(Some(ExpertsConfig {
            sparse: self.sparse(model_type, layers)?,
            num_experts,
            num_experts_per_tok: self.experts_per_token(model_type, num_experts)?,
            intermediate_size,
            scoring: if model_type == "deepseek_v3" { Scoring::Sigmoid } else { Scoring::Softmax },
            groups: self.expert_groups(model_type, num_experts)?,
            norm_topk_prob: match model_type {
                "mixtral" => true,
                // The option is there, and without effect.
                "deepseek_v2" => false,
                _ => self.flag("norm_topk_prob", model_type == "deepseek_v3")?,
            },
            routed_scaling_factor: if deepseek { self.number("routed_scaling_factor", Some(1.0))? } else { 1.0 },
            shared: self.shared_expert(model_type, intermediate_size)?,
            router_aux_loss_coef: loss.then(|| self.number("router_aux_loss_coef", Some(0.001))).transpose()?,
        }))
    }

    fn experts_per_token(&self, model_type: &str, experts: usize) -> Result<usize> {
        let usual = match model_type {
            "mixtral" => 2,
            "qwen2_moe" => 4,
            _ => 8,
        };
        let count = self.count_or("num_experts_per_tok", usual)?;
        self.at_most("num_experts_per_tok", count, experts, "experts of a block")?;
        Ok(count)
    }

    fn at_most(&self, name: &str, found: usize, most: usize, what: &str) -> Result<()> {
        let wrong = || self.wrong(name, &format!("at most the {most} {what}"), self.get(name));
        if found > most { Err(wrong()) } else { Ok(()) }
    }

    fn shared_expert(&self, model_type: &str, width: usize) -> Result<Option<SharedExpert>> {
        Ok(match model_type {
            "qwen2_moe" => {
                let intermediate_size = self.count("shared_expert_intermediate_size")?;
                Some(SharedExpert { intermediate_size, gated: true })
            }
            "deepseek_v2" | "deepseek_v3" => {
                let count = self.count("n_shared_experts")?;
                Some(SharedExpert { intermediate_size: count * width, gated: false })
            }
            _ => None,
        })
    }

    fn expert_groups(&self, model_type: &str, experts: usize) -> Result<Option<ExpertGroups>> {
        let best = match (model_type, self.text("topk_method")?.unwrap_or("greedy")) {
            ("deepseek_v3", _) => 2,
            ("deepseek_v2", "group_limited_greedy") => 1,
            ("deepseek_v2", "greedy") => return Ok(None),
            ("deepseek_v2", other) => return Err(self.unsupported("topk_method", other)),
            _ => return Ok(None),
        };
        let (n_group, topk_group) = (self.count("n_group")?, self.count("topk_group")?);
        if !experts.is_multiple_of(n_group) || experts / n_group < best {
            let expected = format!("a divisor of {experts} that leaves at least {best} experts to a group");
            return Err(self.wrong("n_group", &expected, self.get("n_group")));
        }
        self.at_most("topk_group", topk_group, n_group, "groups")?;
        let per_token = self.experts_per_token(model_type, experts)?;
        self.at_most(
            "num_experts_per_tok",
            per_token,
            topk_group * (experts / n_group),
            "experts of the chosen groups",
        )?;
        Ok(Some(ExpertGroups { n_group, topk_group, best }))
    }

    /// Which blocks have experts.
    fn sparse(&self, model_type: &str, layers: usize) -> Result<Vec<bool>> {
        if let "deepseek_v2" | "deepseek_v3" = model_type {
            let dense = self.index_or("first_k_dense_replace", if model_type == "deepseek_v3" { 3 } else { 0 })?;
            return Ok((0..layers).map(|layer| layer >= dense).collect());
        }
        if model_type == "mixtral" {
            return Ok(vec![true; layers]);
        }
        // Each `decoder_sparse_step`-th block of Qwen's models, those in `mlp_only_layers` left out.
        let step = self.count_or("decoder_sparse_step", 1)?;
        let dense = self.get("mlp_only_layers");
        let wrong = || self.wrong("mlp_only_layers", "a list of numbers of blocks", dense);
        let dense = match dense {
            None => Vec::new(),
            Some(list) => {
                let list = list.as_array().ok_or_else(wrong)?;
                list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>().ok_or_else(wrong)?
            }
        };
        Ok((0..layers).map(|layer| (layer + 1) % step == 0 && !dense.contains(&(layer as u64))).collect())
    }
}
