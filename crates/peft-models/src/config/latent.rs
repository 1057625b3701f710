//! What a `config.json` says of multi-head latent attention.

use serde::{Deserialize, Serialize};

use super::rope::yarn_scale;
use super::{Fields, RopeScaling};
use crate::Result;

/// Attention whose keys and values are made of one narrow vector a token. DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatentConfig {
    /// Width of the vector that queries are made of; they are made of the hidden states where there is none.
    pub q_lora_rank: Option<usize>,
    /// Width of the vector that keys and values are made of.
    pub kv_lora_rank: usize,
    /// Width of the part of queries and keys that knows no position.
    pub qk_nope_head_dim: usize,
    /// Width of the part that is turned by its position; all heads share that of the keys.
    pub qk_rope_head_dim: usize,
    /// Width of a head's values.
    pub v_head_dim: usize,
    /// Whether the pairs that are turned are neighbours, not in the two halves.
    pub rope_interleave: bool,
    /// What the scores are multiplied by.
    pub scale: f64,
}

impl LatentConfig {
    /// Width of a head's queries and keys.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// The wider of keys and values, which both have in the attention.
    pub(crate) fn width(&self) -> usize {
        self.qk_head_dim().max(self.v_head_dim)
    }
}

impl Fields<'_> {
    /// The latent attention of a model of that type, if it has one.
    pub(super) fn latent(&self, model_type: &str) -> Result<Option<LatentConfig>> {
        let interleave = match model_type {
            "deepseek_v2" => true,
            "deepseek_v3" => self.flag("rope_interleave", true)?,
            _ => return Ok(None),
        };
        let rotated = self.count("qk_rope_head_dim")?;
        if rotated % 2 != 0 {
            let expected = "an even number, as the rotary embedding turns pairs";
            return Err(self.wrong("qk_rope_head_dim", expected, self.get("qk_rope_head_dim")));
        }
        let mut latent = LatentConfig {
            q_lora_rank: self.get("q_lora_rank").map(|_| self.count("q_lora_rank")).transpose()?,
            kv_lora_rank: self.count("kv_lora_rank")?,
            qk_nope_head_dim: self.count("qk_nope_head_dim")?,
            qk_rope_head_dim: rotated,
            v_head_dim: self.count("v_head_dim")?,
            rope_interleave: interleave,
            scale: 1.0,
        };
        latent.scale = self.score_scale()? / (latent.qk_head_dim() as f64).sqrt();
        Ok(Some(latent))
    }

    /// What a longer context adds to the scale of scores.
    fn score_scale(&self) -> Result<f64> {
        let scaled = !matches!(self.rope()?.scaling, RopeScaling::Default);
        let Some(json) = self.get("rope_parameters").or_else(|| self.get("rope_scaling")).filter(|_| scaled) else {
            return Ok(1.0);
        };
        let inner = Fields { json, path: self.path };
        let Some(_) = inner.get("mscale_all_dim") else { return Ok(1.0) };
        let all = inner.number_or_zero("mscale_all_dim")?;
        Ok(if all == 0.0 { 1.0 } else { yarn_scale(inner.number("factor", None)?, all).powi(2) })
    }
}
