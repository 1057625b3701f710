//! Initial values of LoRA, as `init_lora_weights` says them.

use serde::{Deserialize, Serialize};

/// Initial values of an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitWeights {
    /// `A ~ U(±1/√d_in)`, `B = 0`: Kaiming with `a = √5`, PEFT's default. Embeddings: `A = 0`, `B ~ N(0, 1)`.
    #[default]
    Kaiming,
    /// `A ~ N(0, 1/rank²)`, `B = 0`.
    Gaussian,
    /// Both random, so the adapter is no identity: for tests.
    Random,
}

impl Serialize for InitWeights {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Kaiming => serializer.serialize_bool(true),
            Self::Random => serializer.serialize_bool(false),
            Self::Gaussian => serializer.serialize_str("gaussian"),
        }
    }
}

impl<'de> Deserialize<'de> for InitWeights {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::Bool(true) => Ok(Self::Kaiming),
            serde_json::Value::Bool(false) => Ok(Self::Random),
            serde_json::Value::String(s) if s == "gaussian" => Ok(Self::Gaussian),
            other => Err(serde::de::Error::custom(format!(
                "init_lora_weights: expected true, false or \"gaussian\", found {other}"
            ))),
        }
    }
}
