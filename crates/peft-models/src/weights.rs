//! Named tensors on disk: what a Hugging Face directory and a GGUF file have in common.

use std::path::Path;

use peft_core::kernels::PackedData;

use crate::Result;

/// What `transformers` calls a model inside one with a head.
const OUTERMOST: [&str; 6] = ["transformer", "bert", "roberta", "distilbert", "vit", "dinov2"];

/// Name, shape and stored type of one tensor, as Hugging Face `transformers` would call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// For instance `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// In the file's own order: `[d_out, d_in]` for a linear layer.
    pub shape: Vec<usize>,
    /// For instance `F32`, `BF16`, `Q4_1`, `NF4`.
    pub dtype: String,
    /// Bytes in the file.
    pub bytes: u64,
    /// Whether it is the rows `[d_out, d_in]` of a packed linear layer, also where `transformers` stores that layer the other way.
    pub packed_rows: bool,
}

/// A source of named tensors. Reading one tensor never reads the others.
pub trait Weights: Sync {
    /// The file or folder, for messages.
    fn path(&self) -> &Path;

    /// All tensors, sorted by name.
    fn tensors(&self) -> &[TensorInfo];

    /// The values of one tensor in row-major order, as f32.
    ///
    /// # Errors
    /// When the file cannot be read, or is shorter than its header says.
    fn read(&self, info: &TensorInfo) -> Result<Vec<f32>>;

    /// A matrix that is stored packed, as the rows `[d_out, d_in]` that a linear layer multiplies by; `None` for any other tensor.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn packed(&self, info: &TensorInfo) -> Result<Option<PackedData>> {
        let _ = info;
        Ok(None)
    }

    /// The tensor that `transformers` calls `name`, also where a checkpoint leaves out the outermost part of it, as that of a model without a head does,
    /// or has one more; and where a norm's parameters have their old names.
    fn find_parameter(&self, name: &str) -> Option<&TensorInfo> {
        let old = match name.rsplit_once('.') {
            Some((module, "weight")) => Some(format!("{module}.gamma")),
            Some((module, "bias")) => Some(format!("{module}.beta")),
            _ => None,
        };
        let named = |name: &str| {
            let inner = name.split_once('.').filter(|(outermost, _)| OUTERMOST.contains(outermost));
            let found = self.find(name).or_else(|| self.find(inner?.1));
            found.or_else(|| OUTERMOST.iter().find_map(|outermost| self.find(&format!("{outermost}.{name}"))))
        };
        named(name).or_else(|| named(&old?))
    }

    /// The tensor of that name.
    fn find(&self, name: &str) -> Option<&TensorInfo> {
        let tensors = self.tensors();
        tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok().map(|i| &tensors[i])
    }
}
