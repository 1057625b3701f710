//! `config.json` of the Llama family, with experts or without, and GPT-2, in the forms that `transformers` 4 and 5 write; and of encoders.

mod encoder;
mod experts;
mod latent;
mod rope;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::encoder::{EncoderConfig, Family, InputConfig};
pub use self::experts::{ExpertGroups, ExpertsConfig, Scoring, SharedExpert};
pub use self::latent::LatentConfig;
use crate::{Error, Result};

/// The shape of a model of the Llama family: Llama, Mistral, Qwen2, Qwen2.5, Qwen3, SmolLM2, and with experts Mixtral, Qwen2-MoE, Qwen3-MoE,
/// DeepSeek-V2 and V3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves an equal group of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; of latent attention, the wider of its keys and its values.
    pub head_dim: usize,
    /// Added to the mean square in `RMSNorm`.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Longest sequence that the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection of the attention.
    pub o_bias: bool,
    /// Bias on the MLP's projections.
    pub mlp_bias: bool,
    /// `RMSNorm` on queries and keys, per head (Qwen3).
    pub qk_norm: bool,
    /// How many tokens back a token sees, itself included, by block; `None` sees all.
    pub sliding_window: Vec<Option<usize>>,
    /// The blocks whose MLP is a mixture of experts.
    pub experts: Option<ExpertsConfig>,
    /// Multi-head latent attention (`DeepSeek`).
    pub latent: Option<LatentConfig>,
}

/// Frequencies of the rotary position embedding. Su et al. 2021, arXiv:2104.09864.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// Stretching of rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by the factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// `YaRN`: low frequencies divided by the factor, high ones kept, a straight passage between; and longer vectors. Peng et al. 2023, arXiv:2309.00071.
    Yarn {
        /// The factor.
        factor: f64,
        /// Pairs that turn more often than this in the original context are kept.
        beta_fast: f64,
        /// Pairs that turn less often than this are divided.
        beta_slow: f64,
        /// The context that the model was pretrained on.
        original_max_position_embeddings: f64,
        /// What turned pairs are multiplied by.
        attention_factor: f64,
        /// Whether the ends of the passage are whole pairs.
        truncate: bool,
    },
    /// Llama 3.1: low frequencies divided by the factor, high ones kept, a smooth passage between.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths longer than the original length over this are divided.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original length over this are kept.
        high_freq_factor: f64,
        /// The context that the model was pretrained on.
        original_max_position_embeddings: f64,
    },
}

/// The shape of a GPT-2 model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpt2Config {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Longest sequence: the position table's rows.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Number of blocks.
    pub n_layer: usize,
    /// Heads.
    pub n_head: usize,
    /// Width inside the MLP.
    pub n_inner: usize,
    /// Added to the variance in `LayerNorm`.
    pub layer_norm_epsilon: f64,
}

/// The shape of a model that this crate can build.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "there is one a model; a box would be in every reader's way")]
pub enum ModelConfig {
    /// The Llama family.
    Llama(LlamaConfig),
    /// GPT-2.
    Gpt2(Gpt2Config),
}

/// The shape of any model that this crate can build.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "there is one a model; a box would be in every reader's way")]
pub enum Architecture {
    /// A model that continues text.
    Decoder(ModelConfig),
    /// A model that reads a text or an image at once.
    Encoder(EncoderConfig),
}

impl Architecture {
    /// Reads a `config.json` that is parsed already, whichever of the two it describes; `path` is for messages.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`].
    pub fn from_json(json: &Value, path: &Path) -> Result<Self> {
        if EncoderConfig::knows(Fields { json, path }.text("model_type")?.unwrap_or_default()) {
            return EncoderConfig::from_json(json, path).map(Self::Encoder);
        }
        ModelConfig::from_json(json, path).map(Self::Decoder)
    }
}

impl ModelConfig {
    /// Reads a `config.json` that is parsed already; `path` is for messages.
    ///
    /// # Errors
    /// Names the field that is missing, of the wrong type or out of range, or the architecture or option that is not supported.
    pub fn from_json(json: &Value, path: &Path) -> Result<Self> {
        let fields = Fields { json, path };
        let model_type = fields.text("model_type")?.unwrap_or_default();
        match model_type {
            "llama" | "mistral" | "qwen2" | "qwen3" | "mixtral" | "qwen2_moe" | "qwen3_moe" | "deepseek_v2"
            | "deepseek_v3" => Ok(Self::Llama(fields.llama(model_type)?)),
            "gpt2" => Ok(Self::Gpt2(fields.gpt2()?)),
            encoder if EncoderConfig::knows(encoder) => Err(Error::Unsupported {
                what: format!("model_type \"{encoder}\" in {} where a model is to continue text", path.display()),
                hint: "it is an encoder: load it with PretrainedEncoder".to_owned(),
            }),
            other => Err(Error::Unsupported {
                what: format!("model_type \"{other}\" in {}", path.display()),
                hint: "llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe, deepseek_v2, deepseek_v3 and gpt2 are; any \
                       other Burn model can be adapted from Rust"
                    .to_owned(),
            }),
        }
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Llama(c) => c.vocab_size,
            Self::Gpt2(c) => c.vocab_size,
        }
    }

    /// Longest sequence that the model was made for.
    pub fn max_positions(&self) -> usize {
        match self {
            Self::Llama(c) => c.max_position_embeddings,
            Self::Gpt2(c) => c.n_positions,
        }
    }

    /// Number of transformer blocks.
    pub fn num_layers(&self) -> usize {
        match self {
            Self::Llama(c) => c.num_hidden_layers,
            Self::Gpt2(c) => c.n_layer,
        }
    }

    /// Whether keys and values are made of one narrow vector a token.
    pub(crate) fn is_latent(&self) -> bool {
        matches!(self, Self::Llama(LlamaConfig { latent: Some(_), .. }))
    }

    /// Whether the output head is the embedding table.
    pub fn is_tied(&self) -> bool {
        match self {
            Self::Llama(c) => c.tie_word_embeddings,
            Self::Gpt2(_) => true,
        }
    }
}

/// The fields of a `config.json`, checked one by one.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) json: &'a Value,
    /// For messages.
    pub(crate) path: &'a Path,
}

/// No field of a real model comes near; a hostile one must not become an allocation.
const LARGEST: u64 = 1 << 26;

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.json.get(name).filter(|v| !v.is_null())
    }

    fn wrong(&self, name: &str, expected: &str, found: Option<&Value>) -> Error {
        let found = found.map_or_else(|| "nothing".to_owned(), Value::to_string);
        Error::format(self.path, format!("`{name}`: expected {expected}, found {found}"))
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>> {
        let parse = |v: &'a Value| v.as_str().ok_or_else(|| self.wrong(name, "a string", Some(v)));
        self.get(name).map(parse).transpose()
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool> {
        let parse = |v: &Value| v.as_bool().ok_or_else(|| self.wrong(name, "true or false", Some(v)));
        self.get(name).map_or(Ok(default), parse)
    }

    pub(crate) fn count_or(&self, name: &str, default: usize) -> Result<usize> {
        let in_range =
            |v: &Value| v.as_u64().filter(|n| (1..=LARGEST).contains(n)).and_then(|n| usize::try_from(n).ok());
        let parse = |v: &Value| in_range(v).ok_or_else(|| self.wrong(name, "a positive whole number", Some(v)));
        self.get(name).map_or(Ok(default), parse)
    }

    fn count(&self, name: &str) -> Result<usize> {
        match self.get(name) {
            Some(_) => self.count_or(name, 0),
            None => Err(self.wrong(name, "a positive whole number", None)),
        }
    }

    fn number(&self, name: &str, default: Option<f64>) -> Result<f64> {
        let value = match (self.get(name), default) {
            (Some(v), _) => v.as_f64(),
            (None, default) => default,
        };
        value.filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| self.wrong(name, "a positive number", self.get(name)))
    }

    fn llama(&self, model_type: &str) -> Result<LlamaConfig> {
        let hidden_size = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let latent = self.latent(model_type)?;
        let kv_heads = if latent.is_some() { heads } else { self.count_or("num_key_value_heads", heads)? };
        let head_dim = match &latent {
            Some(latent) => latent.width(),
            None => self.count_or("head_dim", hidden_size / heads)?,
        };
        if heads % kv_heads != 0 {
            return Err(self.wrong(
                "num_key_value_heads",
                &format!("a divisor of {heads}"),
                self.get("num_key_value_heads"),
            ));
        }
        if latent.is_none() && (head_dim % 2 != 0 || head_dim == 0) {
            return Err(self.wrong(
                "head_dim",
                "an even number, as the rotary embedding turns pairs",
                self.get("head_dim"),
            ));
        }
        match self.text("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => {}
            other => return Err(self.unsupported("hidden_act", other)),
        }
        let num_hidden_layers = self.count("num_hidden_layers")?;
        let (qwen2, qwen2_moe) = (model_type == "qwen2", model_type == "qwen2_moe");
        let bias = self.flag("attention_bias", false)?;
        let qkv_bias = if qwen2_moe { self.flag("qkv_bias", true)? } else { qwen2 || bias };
        Ok(LlamaConfig {
            vocab_size: self.count("vocab_size")?,
            hidden_size,
            intermediate_size: self.count("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: self.number("rms_norm_eps", Some(1e-6))?,
            rope: self.rope()?,
            max_position_embeddings: self.count_or("max_position_embeddings", 2048)?,
            tie_word_embeddings: self.flag("tie_word_embeddings", false)?,
            qkv_bias,
            o_bias: !qwen2 && !qwen2_moe && bias,
            mlp_bias: self.flag("mlp_bias", false)?,
            qk_norm: matches!(model_type, "qwen3" | "qwen3_moe"),
            sliding_window: self.sliding_window(model_type, num_hidden_layers)?,
            experts: self.experts(model_type, num_hidden_layers)?,
            latent,
        })
    }

    fn sliding_window(&self, model_type: &str, layers: usize) -> Result<Vec<Option<usize>>> {
        let window = match model_type {
            "mistral" | "mixtral" => self.get("sliding_window").map(|_| self.count("sliding_window")).transpose()?,
            "qwen2" | "qwen3" | "qwen2_moe" | "qwen3_moe" if self.flag("use_sliding_window", false)? => {
                Some(self.count_or("sliding_window", 4096)?)
            }
            _ => None,
        };
        let full = self.count_or("max_window_layers", layers)?;
        // `transformers` 5 spells each block out where they differ.
        let types = self.get("layer_types").and_then(Value::as_array);
        let slides = |layer: usize| match (types.and_then(|t| t.get(layer)).and_then(Value::as_str), model_type) {
            (Some(kind), _) => kind == "sliding_attention",
            (None, "mistral" | "mixtral" | "qwen3_moe") => true,
            // Every second one of the first blocks.
            (None, "qwen2_moe") => layer.is_multiple_of(2) && layer < full,
            // The first blocks see everything.
            (None, _) => layer >= full,
        };
        Ok((0..layers).map(|layer| window.filter(|_| slides(layer))).collect())
    }

    fn gpt2(&self) -> Result<Gpt2Config> {
        let (n_embd, n_head) = (self.count("n_embd")?, self.count("n_head")?);
        if n_embd % n_head != 0 {
            return Err(self.wrong("n_head", &format!("a divisor of {n_embd}"), self.get("n_head")));
        }
        match self.text("activation_function")?.unwrap_or("gelu_new") {
            "gelu_new" | "gelu_pytorch_tanh" => {}
            other => return Err(self.unsupported("activation_function", other)),
        }
        for (option, usual) in [
            ("scale_attn_weights", true),
            ("scale_attn_by_inverse_layer_idx", false),
            ("add_cross_attention", false),
            ("tie_word_embeddings", true),
        ] {
            if self.flag(option, usual)? != usual {
                return Err(self.unsupported(option, &(!usual).to_string()));
            }
        }
        Ok(Gpt2Config {
            vocab_size: self.count("vocab_size")?,
            n_positions: self.count_or("n_positions", 1024)?,
            n_embd,
            n_layer: self.count("n_layer")?,
            n_head,
            n_inner: self.count_or("n_inner", 4 * n_embd)?,
            layer_norm_epsilon: self.number("layer_norm_epsilon", Some(1e-5))?,
        })
    }

    fn unsupported(&self, field: &str, value: &str) -> Error {
        Error::Unsupported {
            what: format!("`{field}` \"{value}\" in {}", self.path.display()),
            hint: "the logits would not be those of the original model".to_owned(),
        }
    }
}
