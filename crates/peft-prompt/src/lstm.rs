//! A long short-term memory that reads the tokens of prompts in both directions.
//!
//! - formula: for each token `x` in order, `i, f, g, o = x·Wᵀ + b + s·Uᵀ + u`; `c ← σ(f)·c + σ(i)·tanh(g)`; `s ← σ(o)·tanh(c)`; the output is `s` of either direction, side by side
//! - source: Hochreiter & Schmidhuber 1997; the order of gates and the two biases are PyTorch's
//! - trained: `8·(e·in + e² + 2·e)` values a layer, `in` being `2·e` from the second layer on
//!
//! Burn's own draws its initial values on the device; those of an adapter depend on its seed alone.

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Tensor, activation};
use peft_core::{Result, Site};
use rand::Rng;

/// Layers in both directions.
#[derive(Module, Debug)]
pub struct Lstm {
    layers: Vec<Layer>,
    /// Between layers.
    dropout: Dropout,
}

#[derive(Module, Debug)]
struct Layer {
    forward: Direction,
    reverse: Direction,
}

/// Four gates, stacked: input, forget, cell, output.
#[derive(Module, Debug)]
struct Direction {
    /// `W`, `[4·e, in]`
    weight_ih: Param<Tensor<2>>,
    /// `U`, `[4·e, e]`
    weight_hh: Param<Tensor<2>>,
    /// `b`, `[4·e]`
    bias_ih: Param<Tensor<1>>,
    /// `u`, `[4·e]`
    bias_hh: Param<Tensor<1>>,
}

impl Lstm {
    /// `depth` layers from `width` features to `2·inner`.
    pub(crate) fn new(
        site: &Site,
        [width, inner, depth]: [usize; 3],
        dropout: f64,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        let layer = |at: usize| -> Result<Layer> {
            let d_in = if at == 0 { width } else { 2 * inner };
            let mut direction = || Direction::new(site, d_in, inner, rng);
            Ok(Layer { forward: direction()?, reverse: direction()? })
        };
        let layers = (0..depth).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, dropout: DropoutConfig::new(dropout).init() })
    }

    /// `[batch, n, width]` to `[batch, n, 2·inner]`
    pub(crate) fn forward(&self, mut x: Tensor<3>) -> Tensor<3> {
        for (at, layer) in self.layers.iter().enumerate() {
            if at > 0 {
                x = self.dropout.forward(x);
            }
            let reverse = layer.reverse.forward(x.clone().flip([1])).flip([1]);
            x = Tensor::cat(vec![layer.forward.forward(x), reverse], 2);
        }
        x
    }

    /// PyTorch's name of a field.
    pub(crate) fn key(field: &str) -> Option<String> {
        let mut parts = field.strip_prefix("layers.")?.split('.');
        let (at, direction, parameter) = (parts.next()?, parts.next()?, parts.next()?);
        let end = if direction == "reverse" { "_reverse" } else { "" };
        Some(format!("{parameter}_l{at}{end}"))
    }
}

impl Direction {
    fn new(site: &Site, d_in: usize, inner: usize, rng: &mut impl Rng) -> Result<Self> {
        let bound = 1.0 / (inner as f32).sqrt();
        Ok(Self {
            weight_ih: site.uniform([4 * inner, d_in], bound, rng)?,
            weight_hh: site.uniform([4 * inner, inner], bound, rng)?,
            bias_ih: site.uniform([4 * inner], bound, rng)?,
            bias_hh: site.uniform([4 * inner], bound, rng)?,
        })
    }

    /// `[batch, n, in]` to `[batch, n, inner]`, from the first token to the last.
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, n, _] = x.dims();
        let inner = self.weight_hh.val().dims()[1];
        let bias = (self.bias_ih.val() + self.bias_hh.val()).unsqueeze();
        let read = x.matmul(self.weight_ih.val().transpose().unsqueeze()) + bias; // [batch, n, 4·inner]
        let remember = self.weight_hh.val().transpose();
        let mut state = Tensor::<2>::zeros([batch, inner], (&read.device(), read.dtype()));
        let mut cell = state.clone();
        let mut states = Vec::with_capacity(n);
        for at in 0..n {
            let gates = read.clone().narrow(1, at, 1).squeeze_dim::<2>(1) + state.matmul(remember.clone());
            let gate = |number: usize| gates.clone().narrow(1, number * inner, inner);
            let (input, forget, output) = (sigmoid(gate(0)), sigmoid(gate(1)), sigmoid(gate(3)));
            cell = forget * cell + input * gate(2).tanh();
            state = output * cell.clone().tanh();
            states.push(state.clone());
        }
        Tensor::stack(states, 1)
    }
}

fn sigmoid(x: Tensor<2>) -> Tensor<2> {
    activation::sigmoid(x)
}
