//! The block that all encoders share, and what each family calls its parts.
//!
//! - post-LN (BERT, RoBERTa, DistilBERT): `x = norm(attention(x) + x)`, then `x = norm(mlp(x) + x)`
//! - pre-LN (ViT, DINOv2): `x = s·attention(norm(x)) + x`, then `x = s·mlp(norm(x)) + x`; `s` is one in ViT, learned in DINOv2
//! - `mlp(x) = down(f(up(x)))`

use burn::module::{Initializer, Module, Param};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::{Device, Int, Tensor};
use peft_core::kernels::{Sight, activate, attention};
use peft_core::{Named, Prompt, SubLayer, layer_norm, linear};

use crate::attention::split_heads;
use crate::config::{EncoderConfig, Family};

/// What a family calls a model inside one with a head, its stack of blocks, and the parts of a block.
pub(crate) struct Names {
    pub(crate) body: &'static str,
    pub(crate) layers: &'static str,
    query: &'static str,
    key: &'static str,
    value: &'static str,
    output: &'static str,
    attention_norm: &'static str,
    up: &'static str,
    down: &'static str,
    mlp_norm: &'static str,
}

const BERT: Names = Names {
    body: "bert",
    layers: "encoder.layer",
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    mlp_norm: "output.LayerNorm",
};

const DISTILBERT: Names = Names {
    body: "distilbert",
    layers: "transformer.layer",
    query: "attention.q_lin",
    key: "attention.k_lin",
    value: "attention.v_lin",
    output: "attention.out_lin",
    attention_norm: "sa_layer_norm",
    up: "ffn.lin1",
    down: "ffn.lin2",
    mlp_norm: "output_layer_norm",
};

const VIT: Names = Names {
    body: "vit",
    query: "attention.attention.query",
    key: "attention.attention.key",
    value: "attention.attention.value",
    attention_norm: "layernorm_before",
    mlp_norm: "layernorm_after",
    ..BERT
};

const DINOV2: Names =
    Names { body: "dinov2", attention_norm: "norm1", up: "mlp.fc1", down: "mlp.fc2", mlp_norm: "norm2", ..VIT };

/// What `transformers` 5 calls the projections of the vision models; it still writes files with the old names.
const VIT_MODULES: Names = Names {
    layers: "layers",
    query: "attention.q_proj",
    key: "attention.k_proj",
    value: "attention.v_proj",
    output: "attention.o_proj",
    up: "mlp.fc1",
    down: "mlp.fc2",
    ..VIT
};

const DINOV2_MODULES: Names =
    Names { body: "dinov2", layers: BERT.layers, attention_norm: "norm1", mlp_norm: "norm2", ..VIT_MODULES };

/// By which names the parameters of an encoder go. They differ for ViT and DINOv2 alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Naming {
    /// As the modules are called in `transformers` 5, and so in the adapters that PEFT makes with it.
    #[default]
    Modules,
    /// As in files, and as the modules were called in `transformers` 4.
    Files,
}

impl Family {
    pub(crate) fn names(self, naming: Naming) -> Names {
        match (self, naming) {
            (Self::Bert, _) => BERT,
            (Self::Roberta, _) => Names { body: "roberta", ..BERT },
            (Self::DistilBert, _) => DISTILBERT,
            (Self::Vit, Naming::Files) => VIT,
            (Self::Dinov2, Naming::Files) => DINOV2,
            (Self::Vit, Naming::Modules) => VIT_MODULES,
            (Self::Dinov2, Naming::Modules) => DINOV2_MODULES,
        }
    }

    /// Whether a sub-layer's input is normed, rather than what it comes to.
    pub(crate) fn norms_first(self) -> bool {
        matches!(self, Self::Vit | Self::Dinov2)
    }
}

#[derive(Module, Debug)]
pub(crate) struct Block {
    query: Named<Linear>,
    key: Named<Linear>,
    value: Named<Linear>,
    output: Named<Linear>,
    attention_norm: Named<LayerNorm>,
    layer_scale1: Option<LayerScale>,
    up: Named<Linear>,
    down: Named<Linear>,
    mlp_norm: Named<LayerNorm>,
    layer_scale2: Option<LayerScale>,
    attention_adapters: SubLayer,
    output_adapters: SubLayer,
}

/// A learned factor for each feature. Touvron et al. 2021, arXiv:2103.17239.
#[derive(Module, Debug)]
struct LayerScale {
    lambda1: Param<Tensor<1>>,
}

/// What the tokens of a pass see besides each other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// `[batch, seq]`: tokens of different ones do not see each other.
    pub(crate) segments: Option<Tensor<2, Int>>,
    /// What is learned in front of each row.
    pub(crate) prompt: Prompt,
}

impl Block {
    pub(crate) fn new(config: &EncoderConfig, names: &Names, device: &Device) -> Self {
        let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
        let proj = |name: &'static str, d_in, d_out, bias| {
            let layer = LinearConfig::new(d_in, d_out).with_bias(bias).with_initializer(initializer.clone());
            Named::new(name, layer.init(device))
        };
        let scale = || {
            let scaled = config.family == Family::Dinov2;
            scaled.then(|| LayerScale { lambda1: Initializer::Ones.init([config.hidden_size], device) })
        };
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Self {
            query: proj(names.query, hidden, hidden, config.qkv_bias),
            key: proj(names.key, hidden, hidden, config.qkv_bias),
            value: proj(names.value, hidden, hidden, config.qkv_bias),
            output: proj(names.output, hidden, hidden, true),
            attention_norm: new_norm(names.attention_norm, config, device),
            layer_scale1: scale(),
            up: proj(names.up, hidden, inner, true),
            down: proj(names.down, inner, hidden, true),
            mlp_norm: new_norm(names.mlp_norm, config, device),
            layer_scale2: scale(),
            attention_adapters: SubLayer::new(hidden, device),
            output_adapters: SubLayer::new(hidden, device),
        }
    }

    pub(crate) fn renamed(self, names: &Names) -> Self {
        Self {
            query: self.query.renamed(names.query),
            key: self.key.renamed(names.key),
            value: self.value.renamed(names.value),
            output: self.output.renamed(names.output),
            up: self.up.renamed(names.up),
            down: self.down.renamed(names.down),
            ..self
        }
    }

    /// `x`: `[batch, seq, hidden]`; `at`: which block this is.
    pub(crate) fn forward(&self, x: Tensor<3>, config: &EncoderConfig, seen: &Seen, at: usize) -> Tensor<3> {
        let attended = self.attend(start(x.clone(), &self.attention_norm, config), config, seen, at);
        let attended = scaled(attended, self.layer_scale1.as_ref());
        let x = finish(&self.attention_adapters, attended, x, &self.attention_norm, config);
        let inner = activate(linear(&self.up, start(x.clone(), &self.mlp_norm, config)), config.activation);
        let output = linear(&self.down, inner);
        let output = scaled(output, self.layer_scale2.as_ref());
        finish(&self.output_adapters, output, x, &self.mlp_norm, config)
    }

    /// Keys and values for the block's input `x`, `[batch, seq, hidden]` to `[batch, seq, heads, head_dim]` each.
    pub(crate) fn keys_values(&self, x: &Tensor<3>, config: &EncoderConfig) -> [Tensor<4>; 2] {
        self.projected(&start(x.clone(), &self.attention_norm, config), config)
    }

    fn projected(&self, x: &Tensor<3>, config: &EncoderConfig) -> [Tensor<4>; 2] {
        let project = |layer: &Linear| split_heads(linear(layer, x.clone()), config.num_attention_heads);
        [project(&self.key), project(&self.value)]
    }

    fn attend(&self, x: Tensor<3>, config: &EncoderConfig, seen: &Seen, at: usize) -> Tensor<3> {
        let q = split_heads(linear(&self.query, x.clone()), config.num_attention_heads);
        let [k, v] = self.projected(&x, config);
        let (k, v) = seen.prompt.behind_past(at, &x, k, v);
        let scale = (q.dims()[3] as f64).sqrt().recip();
        let sight = Sight { prefix: seen.prompt.num_past(at), ..Sight::default() };
        let attended = attention(q, k, v, seen.segments.clone(), sight, scale);
        linear(&self.output, attended.flatten(2, 3))
    }
}

/// What a sub-layer reads of the residual stream.
fn start(input: Tensor<3>, norm_of: &LayerNorm, config: &EncoderConfig) -> Tensor<3> {
    if config.family.norms_first() { norm(norm_of, input, config.layer_norm_eps) } else { input }
}

/// The residual stream after a sub-layer that made `output` of it.
fn finish(
    sub_layer: &SubLayer,
    output: Tensor<3>,
    input: Tensor<3>,
    norm_of: &LayerNorm,
    config: &EncoderConfig,
) -> Tensor<3> {
    let normed = |sum| norm(norm_of, sum, config.layer_norm_eps);
    sub_layer.end(output, input, if config.family.norms_first() { None } else { Some(&normed) })
}

fn scaled(x: Tensor<3>, scale: Option<&LayerScale>) -> Tensor<3> {
    match scale {
        Some(scale) => x * scale.lambda1.val().unsqueeze::<3>(),
        None => x,
    }
}

pub(crate) fn new_norm(name: &'static str, config: &EncoderConfig, device: &Device) -> Named<LayerNorm> {
    let norm = LayerNormConfig::new(config.hidden_size).with_epsilon(config.layer_norm_eps);
    Named::new(name, norm.init(device))
}

pub(crate) fn norm(norm: &LayerNorm, x: Tensor<3>, epsilon: f64) -> Tensor<3> {
    layer_norm(norm, x, epsilon)
}
