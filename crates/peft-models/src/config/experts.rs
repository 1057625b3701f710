//! What a `config.json` says of experts: Mixtral, Qwen2-MoE, Qwen3-MoE.

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
    /// Whether the weights of the chosen experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// The expert that all tokens go through besides.
    pub shared: Option<SharedExpert>,
    /// What the loss that balances experts is multiplied by; `None` where it is not asked for.
    pub router_aux_loss_coef: Option<f64>,
}

/// The expert that all tokens go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedExpert {
    /// Its width inside.
    pub intermediate_size: usize,
}

impl Fields<'_> {
    /// The experts of a model of that type with so many blocks, if it has any.
    pub(super) fn experts(&self, model_type: &str, layers: usize) -> Result<Option<ExpertsConfig>> {
        let (width, per_token, shared) = match model_type {
            "mixtral" => ("intermediate_size", 2, None),
            "qwen2_moe" => {
                let intermediate_size = self.count("shared_expert_intermediate_size")?;
                ("moe_intermediate_size", 4, Some(SharedExpert { intermediate_size }))
            }
            "qwen3_moe" => ("moe_intermediate_size", 8, None),
            _ => return Ok(None),
        };
        // `transformers` 5 writes the first name for all.
        let experts = if self.get("num_local_experts").is_some() { "num_local_experts" } else { "num_experts" };
        let num_experts = self.count(experts)?;
        let num_experts_per_tok = self.count_or("num_experts_per_tok", per_token)?;
        if num_experts_per_tok > num_experts {
            let expected = format!("at most the {num_experts} experts of a block");
            return Err(self.wrong("num_experts_per_tok", &expected, self.get("num_experts_per_tok")));
        }
        let loss = self.flag("output_router_logits", false)?;
        let router_aux_loss_coef = loss.then(|| self.number("router_aux_loss_coef", Some(0.001))).transpose()?;
        Ok(Some(ExpertsConfig {
            sparse: self.sparse(model_type, layers)?,
            num_experts,
            num_experts_per_tok,
            intermediate_size: self.count(width)?,
            norm_topk_prob: model_type == "mixtral" || self.flag("norm_topk_prob", false)?,
            shared,
            router_aux_loss_coef,
        }))
    }

    /// Each `decoder_sparse_step`-th block of Qwen's models has experts, those in `mlp_only_layers` left out.
    fn sparse(&self, model_type: &str, layers: usize) -> Result<Vec<bool>> {
        if model_type == "mixtral" {
            return Ok(vec![true; layers]);
        }
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
