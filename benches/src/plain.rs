//! The same model written with Burn's own layers and operations: what somebody has who uses Burn alone.

use burn::module::{Initializer, Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::Setup;

#[derive(Module, Debug)]
pub(crate) struct PlainLlama {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
}

#[derive(Module, Debug)]
struct Layer {
    heads: usize,
    kv_heads: usize,
    q_proj: Projection,
    k_proj: Projection,
    v_proj: Projection,
    o_proj: Projection,
    gate_proj: Projection,
    up_proj: Projection,
    down_proj: Projection,
    input_layernorm: RmsNorm,
    post_attention_layernorm: RmsNorm,
}

/// `x·W`, and `2·(x·A)·B` where it has factors.
#[derive(Module, Debug)]
struct Projection {
    base: Linear,
    a: Option<Param<Tensor<2>>>,
    b: Option<Param<Tensor<2>>>,
}

impl Projection {
    fn new(d_in: usize, d_out: usize, rank: Option<usize>, device: &Device) -> Self {
        let factor = |shape| Initializer::Normal { mean: 0.0, std: 0.02 }.init(shape, device);
        Self {
            base: LinearConfig::new(d_in, d_out).with_bias(false).init(device).no_grad(),
            a: rank.map(|rank| factor([d_in, rank])),
            b: rank.map(|rank| factor([rank, d_out])),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = self.base.forward(x.clone());
        match (&self.a, &self.b) {
            (Some(a), Some(b)) => {
                let inner = x.matmul(a.val().unsqueeze()) * 2.0;
                y + inner.matmul(b.val().unsqueeze())
            }
            _ => y,
        }
    }
}

impl PlainLlama {
    /// Everything is frozen but the factors.
    pub(crate) fn new(setup: &Setup, rank: Option<usize>, device: &Device) -> Self {
        let Setup { vocab, hidden, heads, kv_heads, intermediate, .. } = *setup;
        let keys = kv_heads * (hidden / heads);
        let norm = || RmsNormConfig::new(hidden).init(device).no_grad();
        let projection = |d_in, d_out| Projection::new(d_in, d_out, rank, device);
        let layer = |_| Layer {
            heads,
            kv_heads,
            q_proj: projection(hidden, hidden),
            k_proj: projection(hidden, keys),
            v_proj: projection(hidden, keys),
            o_proj: projection(hidden, hidden),
            gate_proj: projection(hidden, intermediate),
            up_proj: projection(hidden, intermediate),
            down_proj: projection(intermediate, hidden),
            input_layernorm: norm(),
            post_attention_layernorm: norm(),
        };
        Self {
            embed_tokens: EmbeddingConfig::new(vocab, hidden).init(device).no_grad(),
            layers: (0..setup.layers).map(layer).collect(),
            norm: norm(),
        }
    }

    pub(crate) fn loss(&self, ids: Tensor<2, Int>, targets: Tensor<1, Int>) -> Tensor<1> {
        let [batch, seq] = ids.dims();
        let device = ids.device();
        let mut x = self.embed_tokens.forward(ids);
        let width = x.dims()[2];
        let table = Rotation::new(seq, width / self.layers[0].heads, &device);
        for layer in &self.layers {
            x = x.clone() + layer.attend(layer.input_layernorm.forward(x), &table);
            x = x.clone() + layer.feed_forward(layer.post_attention_layernorm.forward(x));
        }
        let hidden = self.norm.forward(x).reshape([batch * seq, width]);
        let logits = hidden.matmul(self.embed_tokens.weight.val().transpose());
        -log_softmax(logits, 1).gather(1, targets.reshape([batch * seq, 1])).mean()
    }
}

impl Layer {
    fn attend(&self, x: Tensor<3>, table: &Rotation) -> Tensor<3> {
        let ([batch, seq, width], Self { heads, kv_heads, .. }) = (x.dims(), self);
        let head_dim = width / heads;
        let split = |x: Tensor<3>, heads: usize| x.reshape([batch, seq, heads, head_dim]).swap_dims(1, 2);
        let q = table.turn(split(self.q_proj.forward(x.clone()), *heads));
        let k = table.turn(split(self.k_proj.forward(x.clone()), *kv_heads));
        let v = split(self.v_proj.forward(x), *kv_heads);
        let grouped = |x: Tensor<4>| {
            let x = x.unsqueeze_dim::<5>(2).repeat_dim(2, heads / kv_heads);
            x.reshape([batch, *heads, seq, head_dim])
        };
        let scores = q.matmul(grouped(k).swap_dims(2, 3)) / (head_dim as f64).sqrt();
        let mask = table.mask.clone().expand([batch, *heads, seq, seq]);
        let weights = softmax(scores.mask_fill(mask, f32::MIN / 2.0), 3);
        let y = weights.matmul(grouped(v)).swap_dims(1, 2).reshape([batch, seq, width]);
        self.o_proj.forward(y)
    }

    fn feed_forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = silu(self.gate_proj.forward(x.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(x))
    }
}

/// The rotary embedding, half-split, and what is hidden.
struct Rotation {
    cos: Tensor<4>,
    sin: Tensor<4>,
    mask: Tensor<4, Bool>,
}

impl Rotation {
    fn new(seq: usize, head_dim: usize, device: &Device) -> Self {
        let half = head_dim / 2;
        let angle = |at: usize| (at / half) as f64 * 10_000_f64.powf(-((at % half) as f64) / half as f64);
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..seq * half).map(|at| f(angle(at)) as f32).collect();
            Tensor::from_data(TensorData::new(values, [1, 1, seq, half]), device)
        };
        let mask: Vec<bool> = (0..seq * seq).map(|at| at % seq > at / seq).collect();
        let mask = Tensor::from_data(TensorData::new(mask, [1, 1, seq, seq]), device);
        Self { cos: table(f64::cos), sin: table(f64::sin), mask }
    }

    fn turn(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (left, right) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let turned = left.clone() * cos.clone() - right.clone() * sin.clone();
        Tensor::cat(vec![turned, right * cos + left * sin], 3)
    }
}
