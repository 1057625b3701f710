//! What says how far each expert counts: dense layers over hidden states.

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;
use burn::tensor::activation::{relu, softmax};
use peft_core::{Dense, Result, Site, Start};
use rand::Rng;

use super::XLoraConfig;

/// A classifier of one model.
#[derive(Module, Debug)]
pub(super) struct Classifier {
    /// By the numbers of PyTorch's `Sequential`, where what has no parameters has one too.
    layers: Vec<Option<Dense>>,
    /// Behind each layer but the last; acts only during training.
    dropout: Dropout,
    /// Whose scalings it gives.
    experts: usize,
    /// Of the softmax over experts, if there is one.
    #[module(skip)]
    temperature: Option<f64>,
}

impl Classifier {
    /// For so many adapted layers and experts.
    ///
    /// # Errors
    /// As [`Site::param`].
    pub(super) fn new(config: &XLoraConfig, site: &Site, layers: usize, rng: &mut impl Rng) -> Result<Self> {
        let experts = config.experts.len();
        let inner = std::iter::repeat_n(config.xlora_size, config.xlora_depth - 1);
        let outputs = if config.layerwise_scalings { layers * experts } else { experts };
        let widths: Vec<usize> = [config.hidden_size].into_iter().chain(inner).chain([outputs]).collect();
        // ReLU, and dropout where there is any.
        let between = if config.xlora_dropout_p > 0.0 { 2 } else { 1 };
        let mut layers = Vec::new();
        for pair in widths.windows(2) {
            if !layers.is_empty() {
                layers.extend((0..between).map(|_| None));
            }
            layers.push(Some(Dense::new(site, [pair[0], pair[1]], Start::Kaiming, rng)?));
        }
        let dropout = DropoutConfig::new(config.xlora_dropout_p).init();
        let temperature = config.enable_softmax.then_some(config.softmax_temperature);
        Ok(Self { layers, dropout, experts, temperature })
    }

    /// `[batch, seq, width]` to `[batch, seq, layers, experts]`, or `[batch, seq, 1, experts]` where layers have the same.
    pub(super) fn forward(&self, hidden: Tensor<3>) -> Tensor<4> {
        let [batch, seq, width] = hidden.dims();
        let mut x = hidden.reshape([batch * seq, width]);
        for (at, layer) in self.layers.iter().flatten().enumerate() {
            if at > 0 {
                x = self.dropout.forward(relu(x));
            }
            x = layer.forward(x.cast(layer.dtype()));
        }
        let outputs = x.dims()[1];
        let z = x.reshape([batch, seq, outputs / self.experts, self.experts]);
        match self.temperature {
            Some(temperature) => softmax(z / temperature, 3),
            None => z,
        }
    }
}
