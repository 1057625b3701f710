//! LLaMA-Adapter: learned tokens in the attention of the last layers, behind a gate that starts closed.
//!
//! - formula: in each of the last `adapter_layers` layers `y = o_proj(o) + o_proj(g · softmax(q·Kᵀ/√d)·V)`, `K = k_proj(A)`, `V = v_proj(A)`, `A: [1, adapter_len, width]`, `g: [1]`; `q` are the layer's own queries,
//!   rotated where the model rotates, `K` is not, and each query sees all of it. GPT-2 adds `g · softmax(…)·V` behind the output projection, as PEFT does
//! - source: Zhang et al. 2023, arXiv:2303.16199, section 3; PEFT's `ADAPTION_PROMPT`, whose gate has no tanh and is one for all heads
//! - trained: `adapter_len · width + 1` values a layer
//! - at init: the identity, as `g` is 0, unless `o_proj` has a bias, which is added twice

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor};
use peft_core::{Activation, FileTensor, KeysAndValues, LayerKind, Method, Result, Site, Targets, check_size};
use serde::{Deserialize, Serialize};

/// Configuration of LLaMA-Adapter; its JSON is Hugging Face's `adapter_config.json`.
///
/// ```
/// use burn::{module::Module, tensor::{Device, Tensor}};
/// use peft_core::{Attended, Named, Peft};
/// use peft_prompt::LlamaAdapterConfig;
///
/// #[derive(Module, Debug)]
/// struct Layer { self_attn: Attention }
///
/// #[derive(Module, Debug)]
/// struct Attention { attended: Named<Attended> }
///
/// let device = Device::flex().autodiff();
/// let layers: Vec<_> = (0..3).map(|_| Layer { self_attn: Attention { attended: Attended::new(8, &device) } }).collect();
/// let layers = layers.attach(&LlamaAdapterConfig::new(5, 2))?;
/// assert_eq!(layers.trainable().trainable, 2 * (5 * 8 + 1));
///
/// let queries = Tensor::<4>::ones([1, 7, 4, 2], &device);
/// // Four heads of queries, two of keys and values.
/// let project = |x: Tensor<3>| (x.clone().narrow(2, 0, 4).reshape([1, 5, 2, 2]), x.narrow(2, 4, 4).reshape([1, 5, 2, 2]));
/// assert!(layers[0].self_attn.attended.beside(&queries, &project).is_none());
/// assert_eq!(layers[2].self_attn.attended.beside(&queries, &project).unwrap().dims(), [1, 7, 4 * 2]);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlamaAdapterConfig {
    /// Learned tokens in each layer.
    pub adapter_len: usize,
    /// How many layers have them, counted from the end.
    pub adapter_layers: usize,
    /// Which modules are attention.
    #[serde(default, rename = "target_modules")]
    pub attention: AttentionName,
}

impl LlamaAdapterConfig {
    /// `adapter_len` tokens in each of the last `adapter_layers` layers.
    pub fn new(adapter_len: usize, adapter_layers: usize) -> Self {
        Self { adapter_len, adapter_layers, attention: AttentionName::default() }
    }

    /// In a model where attention is called so.
    #[must_use]
    pub fn with_attention(self, name: &str) -> Self {
        Self { attention: Some(name.to_owned()).into(), ..self }
    }
}

/// What the attention of decoders is called in `transformers`.
const DECODERS: [&str; 2] = ["self_attn", "attn"];

/// What attention is called in a model, that is its modules' whole name or the end of it behind a dot; by default `self_attn` or `attn`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Option<String>", into = "Option<String>")]
pub struct AttentionName {
    name: Option<String>,
    targets: Targets,
}

impl Default for AttentionName {
    fn default() -> Self {
        None.into()
    }
}

impl From<Option<String>> for AttentionName {
    fn from(name: Option<String>) -> Self {
        let targets = match &name {
            Some(name) => Targets::modules([name]),
            None => Targets::modules(DECODERS),
        };
        Self { name, targets }
    }
}

impl From<AttentionName> for Option<String> {
    fn from(attention: AttentionName) -> Self {
        attention.name
    }
}

/// State of LLaMA-Adapter in one attention.
#[derive(Module, Debug)]
pub struct LlamaAdapter {
    /// What the keys and values are projected from, `[1, adapter_len, width]`.
    prompt: Param<Tensor<3>>,
    /// What the result is multiplied by, `[1]`.
    gate: Param<Tensor<1>>,
}

impl Method for LlamaAdapterConfig {
    const PEFT_TYPE: &'static str = "ADAPTION_PROMPT";

    type Adapter = LlamaAdapter;

    fn targets(&self) -> &Targets {
        &self.attention.targets
    }

    fn check(&self) -> Result<()> {
        check_size("adapter_len", self.adapter_len)?;
        check_size("adapter_layers", self.adapter_layers)
    }

    fn kinds(&self) -> &'static [LayerKind] {
        &[LayerKind::Attended]
    }

    fn last(&self) -> Option<(&'static str, usize)> {
        Some(("adapter_layers", self.adapter_layers))
    }

    fn init(&self, site: &Site, seed: u64) -> Result<LlamaAdapter> {
        let prompt = site.normal([1, self.adapter_len, site.d_in], 1.0, &mut site.rng(seed))?;
        Ok(LlamaAdapter { prompt, gate: site.zeros([1])? })
    }

    fn tensors(_kind: LayerKind) -> &'static [FileTensor] {
        &[
            FileTensor { field: "prompt", key: "adaption_prompt", transposed: false },
            FileTensor { field: "gate", key: "adaption_gate", transposed: false },
        ]
    }

    fn activation(adapter: &LlamaAdapter) -> Option<&dyn Activation> {
        Some(adapter)
    }

    fn needs_activation(&self, _site: &Site) -> Option<String> {
        Some("a prompt is read by the queries of an attention".to_owned())
    }

    fn unmergeable(&self, _site: &Site) -> Option<String> {
        Some("a prompt in an attention is no part of any weight".to_owned())
    }
}

/// The weight form: there is none, and what it would change is not read.
impl Reparameterization for LlamaAdapter {
    const NAME: &'static str = "llama_adapter";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for LlamaAdapter {
    fn attended(&self, queries: Tensor<4>, project: KeysAndValues<'_>) -> Option<Tensor<3>> {
        let ([batch, seq, heads, head_dim], dtype) = (queries.dims(), queries.dtype());
        let (keys, values) = project(self.prompt.val().cast(dtype)); // [1, n, kv_heads, head_dim]
        let [_, n, kv_heads, _] = keys.dims();
        let (rows, group) = (batch * seq, heads / kv_heads);
        // The keys are the same for all rows and few, so the queries of a key's heads are one matrix.
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let by_head = |x: Tensor<4>| x.reshape([n, kv_heads, head_dim]).swap_dims(0, 1).cast(wide); // [kv_heads, n, head_dim]
        let queries = queries.cast(wide).reshape([rows, kv_heads, group, head_dim]).swap_dims(0, 1);
        let queries = queries.reshape([kv_heads, rows * group, head_dim]) * (head_dim as f64).sqrt().recip();
        let shares = softmax(queries.matmul(by_head(keys).swap_dims(1, 2)), 2); // [kv_heads, rows · group, n]
        let read = shares.matmul(by_head(values)).reshape([kv_heads, rows, group, head_dim]).swap_dims(0, 1);
        let gate = self.gate.val().cast(wide).unsqueeze();
        Some((read.reshape([batch, seq, heads * head_dim]) * gate).cast(dtype))
    }
}
