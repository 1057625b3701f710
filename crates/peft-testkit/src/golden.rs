//! Logits that another program computed.

use std::path::Path;

use peft_core::Error;
use peft_core::files::decode;
use safetensors::{Dtype, SafeTensors};

/// Token ids and the logits that `transformers` gives for them: a file with the tensors `tokens` and `logits`.
#[derive(Clone, Debug, PartialEq)]
pub struct Golden {
    /// `[batch, seq]`, row-major.
    pub tokens: Vec<i64>,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
    /// `[batch, seq, vocab_size]`, row-major.
    pub logits: Vec<f64>,
}

impl Golden {
    /// Reads a golden file.
    ///
    /// # Errors
    /// When it cannot be read, or lacks one of the tensors in its type and rank.
    pub fn read(path: &Path) -> peft_core::Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let format = |e: safetensors::SafeTensorError| Error::format(path, e.to_string());
        let file = SafeTensors::deserialize(&bytes).map_err(format)?;
        let ids = file.tensor("tokens").map_err(format)?;
        if ids.dtype() != Dtype::I64 {
            return Err(Error::format(path, format!("tokens: expected I64, found {:?}", ids.dtype())));
        }
        let tokens = ids.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        let logits = file.tensor("logits").map_err(format)?;
        let values = decode(logits.dtype(), logits.data());
        let values = values
            .ok_or_else(|| Error::format(path, format!("logits: expected floats, found {:?}", logits.dtype())))?;
        let [batch, seq] = *ids.shape() else {
            return Err(Error::format(path, format!("tokens: expected two dimensions, found {:?}", ids.shape())));
        };
        if !matches!(logits.shape(), [b, s, _] if [*b, *s] == [batch, seq]) {
            let what = format!("logits: expected [{batch}, {seq}, vocab_size], found {:?}", logits.shape());
            return Err(Error::format(path, what));
        }
        Ok(Self { tokens, batch, seq, logits: values.into_iter().map(f64::from).collect() })
    }
}
