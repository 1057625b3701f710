//! The places of bottleneck adapters: where a sub-layer of a block ends.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::activation::adapter;

/// A field of a model's block that stands for the end of one of its sub-layers, so that adapters can sit there; no parameter of the model.
///
/// By AdapterHub's convention a block calls the field after its attention `attention_adapters` and the one after its feed-forward part `output_adapters`.
///
/// ```
/// use burn::{module::Module, nn::Linear, tensor::Tensor};
/// use peft_core::{SubLayer, linear};
///
/// #[derive(Module, Debug)]
/// struct Block { mlp: Linear, output_adapters: SubLayer }
///
/// impl Block {
///     fn forward(&self, x: Tensor<3>) -> Tensor<3> {
///         let y = linear(&self.mlp, x.clone());
///         self.output_adapters.end(y, x, None) // y + x, with what adapters make of it
///     }
/// }
/// ```
#[derive(Module, Debug)]
pub struct SubLayer {
    /// As long as the model is wide; the adapter sits in it.
    place: Param<Tensor<1>>,
}

/// The norm after a sub-layer, `[batch, seq, width]` to the same.
pub type Norm<'a> = &'a dyn Fn(Tensor<3>) -> Tensor<3>;

/// What the field of a place is called that an adapter sits in.
pub(crate) const PLACE: &str = "place";

/// What an adapter sits in where there is no weight: it is never read, so it is one value that looks as wide as the model.
pub(crate) fn new_place(width: usize, device: &Device) -> Param<Tensor<1>> {
    Param::from_tensor(Tensor::<1>::zeros([1], device).expand([width])).set_require_grad(false)
}

impl SubLayer {
    /// The end of a sub-layer of a model of that width.
    pub fn new(width: usize, device: &Device) -> Self {
        Self { place: new_place(width, device) }
    }

    /// Adds the output of a sub-layer to its input, and norms the sum where the model does so here: `norm(output + input)`.
    ///
    /// # Shapes
    /// all `[batch, seq, width]`
    pub fn end(&self, output: Tensor<3>, input: Tensor<3>, norm: Option<Norm<'_>>) -> Tensor<3> {
        let end = End { output, input, adds_input: true, norm };
        match adapter(&self.place).flatten() {
            Some(adapter) => adapter.sub_layer(end),
            None => end.close(),
        }
    }
}

/// What an adapter finds where a sub-layer ends, or a linear layer.
#[derive(Clone)]
pub struct End<'a> {
    /// What was computed, `[batch, seq, d_out]`.
    pub output: Tensor<3>,
    /// What it was computed from, `[batch, seq, d_in]`; of a sub-layer before any norm of its own: the residual stream.
    pub input: Tensor<3>,
    /// Whether the model adds the input here: behind a sub-layer.
    pub adds_input: bool,
    /// The norm that follows, where the model has one here.
    pub norm: Option<Norm<'a>>,
}

impl End<'_> {
    /// `norm(output + input)`, as the model has it; behind a linear layer the output.
    pub fn close(self) -> Tensor<3> {
        let sum = if self.adds_input { self.output + self.input } else { self.output };
        match self.norm {
            Some(norm) => norm(sum),
            None => sum,
        }
    }
}
