//! `config.json` of BERT, RoBERTa, DistilBERT, ViT and DINOv2.

use std::path::Path;

use peft_core::kernels::Nonlinearity;
use serde_json::Value;

use super::Fields;
use crate::heads::Task;
use crate::{Error, Result};

/// The shape of an encoder, and what it is for.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderConfig {
    /// Which family's names and order of operations it has.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// The MLP's nonlinearity.
    pub activation: Nonlinearity,
    /// Added to the variance in `LayerNorm`.
    pub layer_norm_eps: f64,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
    /// What goes in.
    pub input: InputConfig,
    /// What comes out.
    pub task: Task,
}

/// A family of encoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// BERT, and MiniLM, which is a small one. Devlin et al. 2018, arXiv:1810.04805.
    Bert,
    /// RoBERTa. Liu et al. 2019, arXiv:1907.11692.
    Roberta,
    /// DistilBERT. Sanh et al. 2019, arXiv:1910.01108.
    DistilBert,
    /// Vision Transformer. Dosovitskiy et al. 2020, arXiv:2010.11929.
    Vit,
    /// DINOv2. Oquab et al. 2023, arXiv:2304.07193.
    Dinov2,
}

/// What an encoder reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputConfig {
    /// Token ids.
    Text {
        /// Number of tokens.
        vocab_size: usize,
        /// Rows of the position table.
        max_position_embeddings: usize,
        /// Rows of the table of segment types; 0 for none.
        type_vocab_size: usize,
        /// The id that fills a batch.
        pad_token_id: usize,
    },
    /// Pixels.
    Image {
        /// Height and width that the position table was made for.
        image_size: usize,
        /// Height and width of a patch.
        patch_size: usize,
        /// Colours.
        num_channels: usize,
    },
}

impl EncoderConfig {
    /// Whether a `model_type` is that of an encoder.
    pub fn knows(model_type: &str) -> bool {
        Family::of(model_type).is_some()
    }

    /// Reads a `config.json` that is parsed already; `path` is for messages.
    ///
    /// # Errors
    /// Names the field that is missing, of the wrong type or out of range, or the architecture or option that is not supported.
    pub fn from_json(json: &Value, path: &Path) -> Result<Self> {
        let fields = Fields { json, path };
        let model_type = fields.text("model_type")?.unwrap_or_default();
        let config = match Family::of(model_type) {
            Some(family @ (Family::Bert | Family::Roberta)) => fields.bert(family)?,
            Some(Family::DistilBert) => fields.distilbert()?,
            Some(family @ (Family::Vit | Family::Dinov2)) => fields.vision(family)?,
            None => {
                return Err(Error::Unsupported {
                    what: format!("model_type \"{model_type}\" in {}", path.display()),
                    hint: "bert, roberta, distilbert, vit and dinov2 are encoders that can be built".to_owned(),
                });
            }
        };
        if config.hidden_size % config.num_attention_heads != 0 {
            let found = config.num_attention_heads;
            let what = format!("the number of heads: expected a divisor of {}, found {found}", config.hidden_size);
            return Err(Error::format(path, what));
        }
        Ok(config)
    }

    /// The same encoder for another task.
    #[must_use]
    pub fn with_task(mut self, task: Task) -> Self {
        self.task = task;
        self
    }

    /// Number of tokens; `None` for images.
    pub fn vocab_size(&self) -> Option<usize> {
        match self.input {
            InputConfig::Text { vocab_size, .. } => Some(vocab_size),
            InputConfig::Image { .. } => None,
        }
    }

    /// Most tokens of a text; `None` for images.
    pub fn max_tokens(&self) -> Option<usize> {
        match self.input {
            // Positions begin after that of padding.
            InputConfig::Text { max_position_embeddings, pad_token_id, .. } if self.family == Family::Roberta => {
                Some(max_position_embeddings.saturating_sub(pad_token_id + 1))
            }
            InputConfig::Text { max_position_embeddings, .. } => Some(max_position_embeddings),
            InputConfig::Image { .. } => None,
        }
    }

    /// Writes the task into a `config.json` of this encoder: the architecture, and the labels by their names in `transformers`.
    pub fn describe_task(&self, json: &mut Value) {
        let suffix = match (&self.task, &self.input) {
            (Task::Embedding, _) => "Model",
            (Task::Classification { .. }, InputConfig::Text { .. }) => "ForSequenceClassification",
            (Task::Classification { .. }, InputConfig::Image { .. }) => "ForImageClassification",
            (Task::Tokens { .. }, _) => "ForTokenClassification",
            (Task::Span, _) => "ForQuestionAnswering",
        };
        if let Some(fields) = json.as_object_mut() {
            fields.insert("architectures".to_owned(), vec![format!("{}{suffix}", self.family.class())].into());
            self.task.describe(fields);
        }
    }
}

impl Family {
    fn of(model_type: &str) -> Option<Self> {
        Some(match model_type {
            "bert" => Self::Bert,
            "roberta" => Self::Roberta,
            "distilbert" => Self::DistilBert,
            "vit" => Self::Vit,
            "dinov2" => Self::Dinov2,
            _ => return None,
        })
    }

    /// How the names of its classes begin in `transformers`.
    fn class(self) -> &'static str {
        match self {
            Self::Bert => "Bert",
            Self::Roberta => "Roberta",
            Self::DistilBert => "DistilBert",
            Self::Vit => "ViT",
            Self::Dinov2 => "Dinov2",
        }
    }
}

impl Fields<'_> {
    fn bert(&self, family: Family) -> Result<EncoderConfig> {
        self.refuse_unless("position_embedding_type", "absolute")?;
        for option in ["is_decoder", "add_cross_attention"] {
            if self.flag(option, false)? {
                return Err(self.unsupported(option, "true"));
            }
        }
        Ok(EncoderConfig {
            family,
            hidden_size: self.count_or("hidden_size", 768)?,
            intermediate_size: self.count_or("intermediate_size", 3072)?,
            num_hidden_layers: self.count_or("num_hidden_layers", 12)?,
            num_attention_heads: self.count_or("num_attention_heads", 12)?,
            activation: self.activation("hidden_act")?,
            layer_norm_eps: self.number("layer_norm_eps", Some(1e-12))?,
            qkv_bias: true,
            input: InputConfig::Text {
                vocab_size: self.count("vocab_size")?,
                max_position_embeddings: self.count_or("max_position_embeddings", 512)?,
                type_vocab_size: self.count_or("type_vocab_size", 2)?,
                pad_token_id: self.index_or("pad_token_id", usize::from(family == Family::Roberta))?,
            },
            task: Task::from_json(self.json, self.path)?,
        })
    }

    fn distilbert(&self) -> Result<EncoderConfig> {
        Ok(EncoderConfig {
            family: Family::DistilBert,
            hidden_size: self.count_or("dim", 768)?,
            intermediate_size: self.count_or("hidden_dim", 3072)?,
            num_hidden_layers: self.count_or("n_layers", 6)?,
            num_attention_heads: self.count_or("n_heads", 12)?,
            activation: self.activation("activation")?,
            layer_norm_eps: 1e-12,
            qkv_bias: true,
            input: InputConfig::Text {
                vocab_size: self.count("vocab_size")?,
                max_position_embeddings: self.count_or("max_position_embeddings", 512)?,
                type_vocab_size: 0,
                pad_token_id: self.index_or("pad_token_id", 0)?,
            },
            task: Task::from_json(self.json, self.path)?,
        })
    }

    fn vision(&self, family: Family) -> Result<EncoderConfig> {
        let dinov2 = family == Family::Dinov2;
        if dinov2 && self.flag("use_swiglu_ffn", false)? {
            return Err(self.unsupported("use_swiglu_ffn", "true"));
        }
        let hidden_size = self.count_or("hidden_size", 768)?;
        let (image_size, patch_size) = (self.side("image_size", 224)?, self.side("patch_size", 16)?);
        if image_size < patch_size {
            let expected = format!("a patch of {patch_size} pixels at least");
            return Err(self.wrong("image_size", &expected, self.get("image_size")));
        }
        Ok(EncoderConfig {
            family,
            hidden_size,
            intermediate_size: if dinov2 {
                self.count_or("mlp_ratio", 4)? * hidden_size
            } else {
                self.count_or("intermediate_size", 3072)?
            },
            num_hidden_layers: self.count_or("num_hidden_layers", 12)?,
            num_attention_heads: self.count_or("num_attention_heads", 12)?,
            activation: self.activation("hidden_act")?,
            layer_norm_eps: self.number("layer_norm_eps", Some(if dinov2 { 1e-6 } else { 1e-12 }))?,
            qkv_bias: self.flag("qkv_bias", true)?,
            input: InputConfig::Image { image_size, patch_size, num_channels: self.count_or("num_channels", 3)? },
            task: Task::from_json(self.json, self.path)?,
        })
    }

    /// A number, or height and width where they are equal.
    fn side(&self, name: &str, default: usize) -> Result<usize> {
        let Some(Value::Array(sides)) = self.get(name) else { return self.count_or(name, default) };
        match (sides.first().and_then(Value::as_u64), sides.get(1).and_then(Value::as_u64)) {
            (Some(height), Some(width)) if height == width && sides.len() == 2 => {
                let inner = serde_json::json!({ name: height });
                Fields { json: &inner, path: self.path }.count(name)
            }
            _ => Err(self.wrong(name, "a number, or height and width that are equal", self.get(name))),
        }
    }

    /// A whole number that may be zero.
    pub(super) fn index_or(&self, name: &str, default: usize) -> Result<usize> {
        if self.get(name).and_then(Value::as_u64) == Some(0) { Ok(0) } else { self.count_or(name, default) }
    }

    fn activation(&self, name: &str) -> Result<Nonlinearity> {
        Ok(match self.text(name)?.unwrap_or("gelu") {
            "gelu" => Nonlinearity::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Nonlinearity::GeluTanh,
            "relu" => Nonlinearity::Relu,
            "silu" | "swish" => Nonlinearity::Silu,
            other => return Err(self.unsupported(name, other)),
        })
    }

    fn refuse_unless(&self, name: &str, usual: &str) -> Result<()> {
        match self.text(name)? {
            Some(other) if other != usual => Err(self.unsupported(name, other)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::heads::Problem;

    fn read(json: &Value) -> Result<EncoderConfig> {
        EncoderConfig::from_json(json, Path::new("config.json"))
    }

    fn refused(json: &Value) -> String {
        read(json).unwrap_err().to_string()
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let bert = read(&json!({"model_type": "bert", "vocab_size": 30522})).unwrap();
        assert_eq!((bert.hidden_size, bert.num_hidden_layers, bert.layer_norm_eps), (768, 12, 1e-12));
        assert_eq!((bert.max_tokens(), &bert.task), (Some(512), &Task::Embedding));
        let roberta = read(&json!({"model_type": "roberta", "vocab_size": 9, "max_position_embeddings": 514})).unwrap();
        assert_eq!(roberta.max_tokens(), Some(512));
        let dino = read(
            &json!({"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "patch_size": 14, "image_size": [518, 518]}),
        );
        let dino = dino.unwrap();
        assert_eq!((dino.intermediate_size, dino.layer_norm_eps, dino.max_tokens()), (1536, 1e-6, None));
        assert_eq!(dino.input, InputConfig::Image { image_size: 518, patch_size: 14, num_channels: 3 });
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let bert = |key: &str, value: Value| refused(&json!({"model_type": "bert", "vocab_size": 9, key: value}));
        let found = bert("position_embedding_type", json!("relative_key"));
        assert!(found.contains("position_embedding_type") && found.contains("relative_key"), "{found}");
        let found = bert("num_attention_heads", json!(7));
        assert!(found.contains("a divisor of 768, found 7"), "{found}");
        let found = bert("hidden_act", json!("mish"));
        assert!(found.contains("hidden_act") && found.contains("mish"), "{found}");
        let found = bert("hidden_size", json!(-1));
        assert!(found.contains("`hidden_size`: expected a positive whole number, found -1"), "{found}");
        let found = refused(&json!({"model_type": "dinov2", "use_swiglu_ffn": true}));
        assert!(found.contains("use_swiglu_ffn"), "{found}");
        let found = refused(&json!({"model_type": "vit", "image_size": [224, 192]}));
        assert!(found.contains("image_size") && found.contains("equal"), "{found}");
        let found = refused(&json!({"model_type": "t5"}));
        assert!(found.contains("model_type \"t5\"") && found.contains("distilbert"), "{found}");
    }

    #[test]
    fn a_task_survives_its_description() {
        for (model_type, class) in [("bert", "BertForSequenceClassification"), ("vit", "ViTForImageClassification")] {
            let mut json = json!({"model_type": model_type, "vocab_size": 9, "architectures": ["Other"]});
            let labels = vec!["low".to_owned(), "high".to_owned()];
            let task = Task::Classification { labels, problem: Problem::MultiLabel };
            let config = read(&json).unwrap().with_task(task.clone());
            config.describe_task(&mut json);
            assert_eq!(json["architectures"], json!([class]));
            assert_eq!(json["label2id"], json!({"low": 0, "high": 1}));
            assert_eq!(read(&json).unwrap().task, task);
        }
    }
}
