//! What a `config.json` says of the rotary position embedding.

use super::{Fields, Rope, RopeScaling};
use crate::Result;

impl Fields<'_> {
    /// `transformers` 4 has `rope_theta` and `rope_scaling`, 5 has `rope_parameters` with both.
    pub(super) fn rope(&self) -> Result<Rope> {
        let outer = self.number("rope_theta", Some(10_000.0))?;
        let Some(json) = self.get("rope_parameters").or_else(|| self.get("rope_scaling")) else {
            return Ok(Rope { theta: outer, scaling: RopeScaling::Default });
        };
        let inner = Fields { json, path: self.path };
        let kind = inner.text("rope_type")?.or(inner.text("type")?).unwrap_or("default");
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: inner.number("factor", None)? },
            "llama3" => RopeScaling::Llama3 {
                factor: inner.number("factor", None)?,
                low_freq_factor: inner.number("low_freq_factor", None)?,
                high_freq_factor: inner.number("high_freq_factor", None)?,
                original_max_position_embeddings: inner.number("original_max_position_embeddings", None)?,
            },
            "yarn" => inner.yarn()?,
            other => return Err(self.unsupported("rope_type", other)),
        };
        Ok(Rope { theta: inner.number("rope_theta", Some(outer))?, scaling })
    }

    fn yarn(&self) -> Result<RopeScaling> {
        let factor = self.number("factor", None)?;
        let some = |name: &str| self.get(name).map(|_| self.number_or_zero(name)).transpose();
        let attention_factor = match (some("attention_factor")?, some("mscale")?, some("mscale_all_dim")?) {
            (Some(given), ..) => given,
            (None, Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => {
                yarn_scale(factor, scale) / yarn_scale(factor, all)
            }
            _ => yarn_scale(factor, 1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: self.number("beta_fast", Some(32.0))?,
            beta_slow: self.number("beta_slow", Some(1.0))?,
            original_max_position_embeddings: self.number("original_max_position_embeddings", None)?,
            attention_factor,
            truncate: self.flag("truncate", true)?,
        })
    }

    /// A number that may be zero.
    pub(super) fn number_or_zero(&self, name: &str) -> Result<f64> {
        let zero = self.get(name).and_then(serde_json::Value::as_f64) == Some(0.0);
        if zero { Ok(0.0) } else { self.number(name, None) }
    }
}

/// How much longer vectors become in a context that is longer by `factor`.
pub(super) fn yarn_scale(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}
