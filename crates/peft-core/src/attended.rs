//! The place of prompts inside attention: what the model's own queries find besides its text.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use crate::Named;
use crate::activation::adapter;
use crate::sub_layer::new_place;

/// A field of a decoder's attention that stands beside its result, so that an adapter can add what the queries make of learned tokens; no parameter of the model.
///
/// It has no name in paths: an adapter there belongs to the attention module, as in PEFT's files.
///
/// ```
/// use burn::{module::Module, nn::Linear, tensor::Tensor};
/// use peft_core::{Attended, Named, linear};
///
/// #[derive(Module, Debug)]
/// struct Attention { k_proj: Linear, v_proj: Linear, o_proj: Linear, attended: Named<Attended> }
///
/// impl Attention {
///     /// `queries`: `[batch, seq, heads, head_dim]`; `result`: `[batch, seq, heads · head_dim]`
///     fn finish(&self, queries: &Tensor<4>, result: Tensor<3>, [kv_heads, head_dim]: [usize; 2]) -> Tensor<3> {
///         let split = |x: Tensor<3>| { let [batch, n, _] = x.dims(); x.reshape([batch, n, kv_heads, head_dim]) };
///         let project = |x: Tensor<3>| (split(linear(&self.k_proj, x.clone())), split(linear(&self.v_proj, x)));
///         let y = linear(&self.o_proj, result);
///         match self.attended.beside(queries, &project) {
///             Some(more) => y + linear(&self.o_proj, more),
///             None => y,
///         }
///     }
/// }
/// ```
#[derive(Module, Debug)]
pub struct Attended {
    /// As long as the model is wide; the adapter sits in it.
    place: Param<Tensor<1>>,
}

/// The keys and the values of hidden vectors, by the attention's own projections and without positions: `[1, n, width]` to two of `[1, n, kv_heads, head_dim]`.
pub type KeysAndValues<'a> = &'a dyn Fn(Tensor<3>) -> (Tensor<4>, Tensor<4>);

impl Attended {
    /// The place in the attention of a model of that width.
    pub fn new(width: usize, device: &Device) -> Named<Self> {
        Named::new("", Self { place: new_place(width, device) })
    }

    /// What an adapter adds to the attention's result, as wide as that; nothing without one. The queries are those that meet the keys of the text, rotated where these are.
    ///
    /// # Shapes
    /// `queries`: `[batch, seq, heads, head_dim]`; result `[batch, seq, heads · head_dim]`
    pub fn beside(&self, queries: &Tensor<4>, project: KeysAndValues<'_>) -> Option<Tensor<3>> {
        adapter(&self.place).flatten()?.attended(queries.clone(), project)
    }
}
