//! The place of adapters that compute a gated feed-forward part anew, as mixtures of whole ones do.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::Named;
use crate::activation::adapter;

/// A field of a model's gated feed-forward part `down(f(gate(x)) · up(x))`, so that an adapter can stand in for the whole; no parameter of the model.
///
/// It has no name in paths: an adapter there belongs to the feed-forward module.
///
/// ```
/// use burn::{module::Module, nn::Linear, tensor::{Tensor, activation::silu}};
/// use peft_core::{FeedForward, Gated, Named, linear};
///
/// #[derive(Module, Debug)]
/// struct Mlp { gate_proj: Linear, up_proj: Linear, down_proj: Linear, whole: Named<FeedForward> }
///
/// impl Mlp {
///     fn forward(&self, x: Tensor<3>) -> Tensor<3> {
///         self.whole.forward(x, &Gated {
///             gate: &|x| linear(&self.gate_proj, x),
///             up: &|x| linear(&self.up_proj, x),
///             inner: &|gate, up| silu(gate) * up,
///             down: &|inner| linear(&self.down_proj, inner),
///         })
///     }
/// }
/// ```
#[derive(Module, Debug)]
pub struct FeedForward {
    /// One value that looks as large as the matrix of `gate`; the adapter sits in it.
    place: Param<Tensor<2>>,
}

/// A map of `[batch, seq, width]` in its last dimension.
type Map<'a> = &'a dyn Fn(Tensor<3>) -> Tensor<3>;

/// A gated feed-forward part by its parts.
#[derive(Clone, Copy)]
pub struct Gated<'a> {
    /// `[batch, seq, width]` to `[batch, seq, intermediate]`.
    pub gate: Map<'a>,
    /// The same.
    pub up: Map<'a>,
    /// `f(gate) · up`
    pub inner: &'a dyn Fn(Tensor<3>, Tensor<3>) -> Tensor<3>,
    /// Back to `[batch, seq, width]`.
    pub down: Map<'a>,
}

impl Gated<'_> {
    /// `down(f(gate(x)) · up(x))`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        (self.down)((self.inner)((self.gate)(x.clone()), (self.up)(x)))
    }
}

impl FeedForward {
    /// The place in a feed-forward part from `width` to `intermediate` and back.
    pub fn new(width: usize, intermediate: usize, device: &Device) -> Named<Self> {
        let place = Tensor::<2>::zeros([1, 1], device).expand([width, intermediate]);
        Named::new("", Self { place: Param::from_tensor(place).set_require_grad(false) })
    }

    /// The part, or what an adapter makes of it.
    ///
    /// # Shapes
    /// `[batch, seq, width]` to the same
    pub fn forward(&self, x: Tensor<3>, parts: &Gated<'_>) -> Tensor<3> {
        match adapter(&self.place).flatten() {
            Some(adapter) => adapter.feed_forward(x, parts),
            None => parts.forward(x),
        }
    }
}
