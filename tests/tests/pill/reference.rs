//! A decoder of Llama's family with PILL in it, once more in double precision and without tensors: one sequence at a time.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use peft_core::Modality::{self, Image};
use peft_core::{ParamVisitor, PathStack, visit_params};
use peft_models::config::LlamaConfig;
use peft_testkit::Matrix;

/// Every parameter of a model, `path` of the base's and `path:field` of adapters'; a vector is a matrix of one row.
#[derive(Clone, Default)]
pub(crate) struct State(pub(crate) BTreeMap<String, Matrix>);

impl State {
    pub(crate) fn of<T: Module>(module: &T) -> Self {
        let mut state = Self::default();
        visit_params(module, &mut state);
        state
    }

    fn get(&self, path: &str) -> &Matrix {
        self.0.get(path).unwrap_or_else(|| panic!("{path} is none of {:?}", self.0.keys()))
    }

    /// `x·W`
    fn through(&self, x: &Matrix, path: &str) -> Matrix {
        x.times(self.get(path)).unwrap()
    }

    fn normed(&self, x: &Matrix, path: &str, epsilon: f64) -> Matrix {
        let scaled = rows(x).into_iter().flat_map(|row| {
            let mean = row.iter().map(|value| value * value).sum::<f64>() / row.len() as f64;
            row.into_iter().map(move |value| value / (mean + epsilon).sqrt()).collect::<Vec<_>>()
        });
        let scaled = Matrix::new(x.rows(), x.columns(), scaled.collect()).unwrap();
        scaled.scale_by(self.get(&format!("{path}.gamma"))).unwrap()
    }

    /// `x + (silu(x·G) ⊙ (x·D))·U`
    fn expert(&self, x: &Matrix, path: &str, name: &str) -> Matrix {
        let field = |field: &str| format!("{path}:{name}.{field}");
        let inner = silu(&self.through(x, &field("gate"))).scale_by(&self.through(x, &field("down"))).unwrap();
        x.plus(&self.through(&inner, &field("up"))).unwrap()
    }

    /// What the features of an image become in the model.
    pub(crate) fn projected(&self, features: &Matrix) -> Matrix {
        let hidden = self.through(features, "model.prompts:hidden.weight");
        let hidden = hidden.plus(self.get("model.prompts:hidden.bias")).unwrap();
        self.through(&hidden.map(gelu), "model.prompts:projection")
    }

    /// Last hidden states of `x` `[seq, width]`, normed.
    pub(crate) fn hidden(&self, config: &LlamaConfig, x: Matrix, tokens: &[Modality]) -> Matrix {
        let mut x = x;
        for layer in 0..config.num_hidden_layers {
            let path = |name: &str| format!("model.layers.{layer}.{name}");
            let normed = self.normed(&x, &path("input_layernorm"), config.rms_norm_eps);
            let seen = self.expert(&normed, &path("input_layernorm"), "shared");
            x = x.plus(&self.attention(config, &seen, tokens, &path("self_attn"))).unwrap();
            let normed = self.normed(&x, &path("post_attention_layernorm"), config.rms_norm_eps);
            let [text, image] =
                ["text", "image"].map(|name| rows(&self.expert(&normed, &path("post_attention_layernorm"), name)));
            let chosen = tokens.iter().enumerate().flat_map(|(at, token)| match token {
                Image => image[at].clone(),
                Modality::Text => text[at].clone(),
            });
            let seen = Matrix::new(x.rows(), x.columns(), chosen.collect()).unwrap();
            let gate = silu(&self.through(&seen, &path("mlp.gate_proj.weight")));
            let inner = gate.scale_by(&self.through(&seen, &path("mlp.up_proj.weight"))).unwrap();
            x = x.plus(&self.through(&inner, &path("mlp.down_proj.weight"))).unwrap();
        }
        self.normed(&x, "model.norm", config.rms_norm_eps)
    }

    fn attention(&self, config: &LlamaConfig, x: &Matrix, tokens: &[Modality], path: &str) -> Matrix {
        let (width, group) = (config.head_dim, config.num_attention_heads / config.num_key_value_heads);
        let of = |name: &str| rows(&self.through(x, &format!("{path}.{name}.weight")));
        let turned = |of: Vec<Vec<f64>>| -> Vec<Vec<f64>> {
            let turn = |(at, row): (usize, Vec<f64>)| {
                row.chunks(width).flat_map(|head| turned(head, at as f64, config.rope.theta)).collect()
            };
            of.into_iter().enumerate().map(turn).collect()
        };
        let (q, k, mut v) = (turned(of("q_proj")), turned(of("k_proj")), of("v_proj"));
        let open = rows(&self.through(x, &format!("{path}.v_proj:opening")));
        for at in (0..tokens.len()).filter(|at| tokens[*at] == Image) {
            v[at].iter_mut().enumerate().for_each(|(i, value)| *value *= open[at][i / width].tanh());
        }
        let mut read = Vec::new();
        for (at, queries) in q.iter().enumerate() {
            for (head, query) in queries.chunks(width).enumerate() {
                let here = head / group * width..(head / group + 1) * width;
                let score = |key: &Vec<f64>| -> f64 {
                    let product: f64 = query.iter().zip(&key[here.clone()]).map(|(a, b)| a * b).sum();
                    product / (width as f64).sqrt()
                };
                let scores: Vec<f64> = k[..=at].iter().map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = scores.into_iter().map(|score| (score - largest).exp()).collect();
                let sum: f64 = powers.iter().sum();
                let mean = |i: usize| powers.iter().zip(&v).map(|(power, value)| power / sum * value[i]).sum::<f64>();
                read.extend(here.clone().map(mean));
            }
        }
        let read = Matrix::new(x.rows(), q[0].len(), read).unwrap();
        self.through(&read, &format!("{path}.o_proj.weight"))
    }
}

impl ParamVisitor for State {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        let name = match location.field {
            Some(field) => format!("{}:{field}", location.module),
            None => at.path(),
        };
        let values: Vec<f64> = param.base().into_data().iter().collect();
        let columns = *param.lazy_shape().last().unwrap();
        self.0.insert(name, Matrix::new(values.len() / columns, columns, values).unwrap());
    }
}

pub(crate) fn rows(matrix: &Matrix) -> Vec<Vec<f64>> {
    matrix.values().chunks(matrix.columns()).map(<[f64]>::to_vec).collect()
}

fn silu(x: &Matrix) -> Matrix {
    x.map(|value| value / (1.0 + (-value).exp()))
}

/// `x·Φ(x)`, `Φ` by Simpson's rule.
fn gelu(x: f64) -> f64 {
    const STEPS: usize = 2000;
    let density = |t: f64| (-t * t / 2.0).exp() / std::f64::consts::TAU.sqrt();
    let step = x / STEPS as f64;
    let weight = |at: usize| if at == 0 || at == STEPS { 1.0 } else { 2.0 + 2.0 * (at % 2) as f64 };
    let area: f64 = (0..=STEPS).map(|at| weight(at) * density(at as f64 * step)).sum::<f64>() * step / 3.0;
    x * (0.5 + area)
}

/// Pairs of the two halves, turned by their angles at that position.
fn turned(head: &[f64], position: f64, theta: f64) -> Vec<f64> {
    let half = head.len() / 2;
    let value = |i: usize| {
        let (sin, cos) = (position * theta.powf(-2.0 * (i % half) as f64 / head.len() as f64)).sin_cos();
        if i < half { head[i] * cos - head[i + half] * sin } else { head[i] * cos + head[i - half] * sin }
    };
    (0..head.len()).map(value).collect()
}
