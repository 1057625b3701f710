//! The place of invertible adapters: between a model's embeddings and its blocks, and again before a head over the vocabulary.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::Activation;
use crate::activation::adapter;
use crate::sub_layer::new_place;

/// A field of a model that stands behind its embeddings, so that an adapter can sit there; no parameter of the model.
///
/// By AdapterHub's convention a model calls the field `invertible_adapters`. Whether an adapter sits in it is the method's to say
/// ([`Method::embeds`](crate::Method::embeds)), not that of its targets.
///
/// ```
/// use burn::{module::Module, nn::Embedding, tensor::{Int, Tensor}};
/// use peft_core::{Embedded, embedding};
///
/// #[derive(Module, Debug)]
/// struct Model { embeddings: Embedding, invertible_adapters: Embedded }
///
/// impl Model {
///     fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
///         self.invertible_adapters.enter(embedding(&self.embeddings, ids)) // and then through the blocks
///     }
///
///     fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
///         self.invertible_adapters.leave(hidden).matmul(self.embeddings.weight.val().transpose())
///     }
/// }
/// ```
#[derive(Module, Debug)]
pub struct Embedded {
    /// As long as the model is wide; the adapter sits in it.
    place: Param<Tensor<1>>,
}

impl Embedded {
    /// The place behind embeddings of that width.
    pub fn new(width: usize, device: &Device) -> Self {
        Self { place: new_place(width, device) }
    }

    /// What goes into the blocks, given the output of all that embeds: `x` itself without an adapter.
    ///
    /// # Shapes
    /// `[..., width]` to the same
    pub fn enter<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.through(x, |adapter, rows| adapter.embedded(rows))
    }

    /// The reverse, for hidden states before a head over the vocabulary.
    ///
    /// # Shapes
    /// `[..., width]` to the same
    pub fn leave<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.through(x, |adapter, rows| adapter.unembedded(rows))
    }

    fn through<const D: usize>(
        &self,
        x: Tensor<D>,
        form: impl Fn(&dyn Activation, Tensor<2>) -> Tensor<2>,
    ) -> Tensor<D> {
        let Some(adapter) = adapter(&self.place).flatten() else { return x };
        let dims = x.dims();
        let width = dims[D - 1];
        form(adapter, x.reshape([dims.iter().product::<usize>() / width.max(1), width])).reshape(dims)
    }
}
