//! What X-LoRA computes: two passes of a model, and in each layer the experts as far as they count.

use burn::module::{Module, Reparameterization};
use burn::tensor::Tensor;
use burn::tensor::activation::softmax;
use peft_core::{Activation, Auxiliary, Base, say_auxiliary};
use peft_lora::{LoraAdapter, mix};

use super::classifier::Classifier;
use super::scalings::{Scalings, scalings, with_scalings};
use crate::balance::{Rows, entropy, load};
use crate::router::best;

/// State of [`XLoraConfig`](super::XLoraConfig) at one place: the classifier at that of prompts, experts in a layer.
#[derive(Module, Debug)]
pub struct XLoraAdapter {
    pub(super) classifier: Option<Classifier>,
    /// `None` for one that is not in this layer.
    pub(super) experts: Vec<Option<LoraAdapter>>,
    /// The number of the layer among those that are adapted.
    #[module(skip)]
    pub(super) layer: usize,
    #[module(skip)]
    pub(super) path: String,
    #[module(skip)]
    pub(super) mix: Mix,
}

/// What becomes of scalings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix {
    /// Which count at all.
    pub(super) top_k: Option<usize>,
    /// Whether those sum up to one.
    pub(super) softmax: bool,
    /// Of all.
    pub(super) weight: f64,
    /// All of them in the first pass.
    pub(super) first: f64,
}

impl XLoraAdapter {
    /// How far each expert counts for the rows of `x`, `[rows, experts]`; nothing where none does.
    fn gates(&self, x: &Tensor<2>) -> Option<Tensor<2>> {
        let (rows, experts) = (x.dims()[0], self.experts.len());
        let mut scalings = match scalings()? {
            Scalings::Same(0.0) => return None,
            Scalings::Same(value) => Tensor::full([rows, experts], value, (&x.device(), x.dtype())),
            Scalings::Each(all) => {
                let [batch, seq, layers, _] = all.dims();
                assert_eq!(batch * seq, rows, "scalings of {batch} x {seq} tokens for a layer with another number");
                let own = all.narrow(2, self.layer.min(layers - 1), 1).reshape([rows, experts]);
                // Where all layers have the same, the first speaks for all.
                if layers > 1 || self.layer == 0 {
                    let path = if layers > 1 { &self.path } else { "classifier" };
                    say_auxiliary(|| self.said(&own, path, [batch, seq]));
                }
                own
            }
        };
        if let Some(k) = self.mix.top_k {
            scalings = scalings.clone() * best(&scalings, k);
        }
        if self.mix.softmax {
            let shut = scalings.clone().equal_elem(0.0);
            let open = scalings.mask_fill(shut.clone(), f32::MIN);
            scalings = softmax(open, 1).mask_fill(shut, 0.0);
        }
        Some(scalings * self.mix.weight)
    }

    /// What the classifier did with the rows of these scalings, `[rows, experts]`.
    fn said(&self, scalings: &Tensor<2>, path: &str, leading: [usize; 2]) -> Auxiliary {
        let chosen = best(scalings, self.mix.top_k.unwrap_or(1));
        // Without a softmax they may have signs, and another sum than one.
        let size = scalings.clone().detach().abs();
        let parts = size.clone() / size.sum_dim(1).clamp_min(f32::MIN_POSITIVE);
        let rows = Rows::of(leading, parts.dtype());
        Auxiliary { path: path.to_owned(), loss: None, load: load(&chosen, &rows), entropy: entropy(&parts, &rows) }
    }
}

/// The weight form: there is none, as tokens differ.
impl Reparameterization for XLoraAdapter {
    const NAME: &'static str = "xlora";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Activation for XLoraAdapter {
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        let (y, experts) = (base.linear(x.clone()), self.experts.len());
        let Some(gates) = self.gates(&x) else { return Some(y) };
        let (here, present): (Vec<i64>, Vec<&LoraAdapter>) =
            (0_i64..).zip(&self.experts).filter_map(|(number, expert)| Some((number, expert.as_ref()?))).unzip();
        let gates =
            if here.len() == experts { gates } else { gates.select(1, Tensor::from_ints(&here[..], &x.device())) };
        let dtype = y.dtype();
        Some(y + mix(&present, x, gates).cast(dtype))
    }

    fn passes(&self, pass: &mut dyn FnMut(usize) -> Tensor<3>) -> Tensor<3> {
        let Some(classifier) = &self.classifier else { return pass(0) };
        // PEFT lets no gradient through the first pass.
        let hidden = with_scalings(Scalings::Same(self.mix.first), || pass(1)).detach();
        with_scalings(Scalings::Each(classifier.forward(hidden)), || pass(0))
    }
}
