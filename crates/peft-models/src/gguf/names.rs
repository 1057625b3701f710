//! Architectures, and what their tensors are called and how they lie in a GGUF file compared with Hugging Face's.

use super::metadata::Metadata;
use crate::{Error, Result};

/// The model families that are read. Their GGUF name is also their Hugging Face `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Llama, Mistral, `SmolLM2`.
    Llama,
    Qwen2,
    Qwen3,
    Gpt2,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Gpt2];

    /// The architecture that the file says it has.
    pub(super) fn of(metadata: &Metadata) -> Result<Self> {
        let key = "general.architecture";
        let name = metadata.required(key, metadata.string(key)?)?;
        Self::ALL.into_iter().find(|architecture| architecture.name() == name).ok_or_else(|| {
            let hint = format!("GGUF files of {} are read", Self::ALL.map(Self::name).join(", "));
            Error::Unsupported { what: format!("the architecture `{name}` in {}", metadata.path().display()), hint }
        })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gpt2 => "gpt2",
        }
    }

    /// The metadata key of one of the architecture's own parameters.
    pub(super) fn key(self, parameter: &str) -> String {
        format!("{}.{parameter}", self.name())
    }

    /// Attention heads, as the metadata counts them.
    pub(super) fn heads(self, metadata: &Metadata) -> Result<Heads> {
        let count = |parameter| {
            let key = self.key(parameter);
            let Some(count) = metadata.uint(&key)? else { return Ok(None) };
            // More than a tensor could have rows is as wrong as none.
            match usize::try_from(count) {
                Ok(heads @ 1..=0xffff) => Ok(Some(heads)),
                _ => Err(Error::format(metadata.path(), format!("`{key}` is {count}"))),
            }
        };
        let query = count("attention.head_count")?;
        let query = metadata.required(&self.key("attention.head_count"), query)?;
        Ok(Heads { query, key: count("attention.head_count_kv")?.unwrap_or(query) })
    }

    /// The Hugging Face name of a tensor, and how its values are ordered in the file.
    pub(super) fn translate(self, name: &str, heads: Heads) -> Option<(String, Layout)> {
        let (module, kind) = name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
        let Some((layer, module)) = module.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            let module = if self == Self::Gpt2 { gpt2_module(module) } else { llama_module(module) }?;
            return Some((format!("{module}.{kind}"), Layout::Same));
        };
        // `blk.00` would be a second name of `blk.0`.
        layer.parse::<u32>().ok().filter(|index| index.to_string() == layer)?;
        if self == Self::Gpt2 {
            let (module, is_conv1d) = gpt2_layer_module(module)?;
            let layout = if is_conv1d && kind == "weight" { Layout::Transposed } else { Layout::Same };
            return Some((format!("transformer.h.{layer}.{module}.{kind}"), layout));
        }
        let layout = match (self, module) {
            (Self::Llama, "attn_q") => Layout::Interleaved { heads: heads.query },
            (Self::Llama, "attn_k") => Layout::Interleaved { heads: heads.key },
            _ => Layout::Same,
        };
        Some((format!("model.layers.{layer}.{}.{kind}", llama_layer_module(module)?), layout))
    }
}

/// How the values of a tensor are ordered in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// As Hugging Face has them.
    Same,
    /// `[d_out, d_in]`, where Hugging Face's GPT-2 has a `Conv1D` of `[d_in, d_out]`.
    Transposed,
    /// The rows of each head interleaved: row `2j + i` of a head is Hugging Face's row `i·(head_dim/2) + j`, i in {0,
    /// 1}, because llama.cpp rotates neighbours where Hugging Face rotates halves.
    Interleaved {
        /// Query or key heads.
        heads: usize,
    },
}

/// How many attention heads a layer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heads {
    pub(super) query: usize,
    /// Key and value heads.
    pub(super) key: usize,
}

fn llama_module(module: &str) -> Option<&'static str> {
    Some(match module {
        "token_embd" => "model.embed_tokens",
        "output_norm" => "model.norm",
        "output" => "lm_head",
        _ => return None,
    })
}

fn llama_layer_module(module: &str) -> Option<&'static str> {
    Some(match module {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    })
}

fn gpt2_module(module: &str) -> Option<&'static str> {
    Some(match module {
        "token_embd" => "transformer.wte",
        "position_embd" => "transformer.wpe",
        "output_norm" => "transformer.ln_f",
        "output" => "lm_head",
        _ => return None,
    })
}

/// The module, and whether it is a `Conv1D`.
fn gpt2_layer_module(module: &str) -> Option<(&'static str, bool)> {
    Some(match module {
        "attn_norm" => ("ln_1", false),
        "attn_qkv" => ("attn.c_attn", true),
        "attn_output" => ("attn.c_proj", true),
        "ffn_norm" => ("ln_2", false),
        "ffn_up" => ("mlp.c_fc", true),
        "ffn_down" => ("mlp.c_proj", true),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_hugging_face_names() {
        let heads = Heads { query: 9, key: 3 };
        let llama = |name| Architecture::Llama.translate(name, heads);
        let some = |name: &str, layout| Some((name.to_owned(), layout));
        assert_eq!(
            llama("blk.12.attn_k.bias"),
            some("model.layers.12.self_attn.k_proj.bias", Layout::Interleaved { heads: 3 })
        );
        assert_eq!(llama("output.weight"), some("lm_head.weight", Layout::Same));
        assert_eq!(
            Architecture::Qwen2.translate("blk.0.attn_k.weight", heads),
            some("model.layers.0.self_attn.k_proj.weight", Layout::Same)
        );
        let gpt2 = |name| Architecture::Gpt2.translate(name, heads);
        assert_eq!(gpt2("blk.3.attn_qkv.weight"), some("transformer.h.3.attn.c_attn.weight", Layout::Transposed));
        assert_eq!(gpt2("blk.3.attn_qkv.bias"), some("transformer.h.3.attn.c_attn.bias", Layout::Same));
        for unknown in ["blk.00.attn_q.weight", "blk.0.attn_q", "blk.0.ffn_gate_exps.weight", "blk.x.ffn_up.weight"] {
            assert_eq!(llama(unknown), None, "{unknown}");
        }
    }
}
