//! The small model in this crate: a Llama that `examples/pretrain_tiny.rs` trained on public-domain text. See `tiny/README.md`.

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::tokenizer::{SpecialTokens, Tokenizer};
use crate::{Error, Result};

const CONFIG: &str = include_str!("../tiny/config.json");
const TOKENIZER: &[u8] = include_bytes!("../tiny/tokenizer.json");
const WEIGHTS: &[u8] = include_bytes!("../tiny/model.safetensors");

pub(crate) fn parts() -> Result<(Value, Checkpoint, Tokenizer)> {
    let config: Value = serde_json::from_str(CONFIG).map_err(|e| Error::format("tiny", e.to_string()))?;
    let inner = tokenizers::Tokenizer::from_bytes(TOKENIZER).map_err(|e| Error::format("tiny", e.to_string()))?;
    let id = |key: &str| config.get(key).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
    let special = SpecialTokens { bos: None, eos: id("eos_token_id").into_iter().collect(), pad: id("eos_token_id") };
    let tokenizer = Tokenizer::new(inner, special, None)?;
    Ok((config, Checkpoint::from_bytes("tiny", WEIGHTS)?, tokenizer))
}
