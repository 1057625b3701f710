//! The activation seam: an adapted layer computed on its input, without ever building the adapted weight.

use std::any::{Any, TypeId};
use std::sync::RwLock;

use burn::module::Param;
use burn::nn::conv::Conv2d;
use burn::nn::{Embedding, LayerNorm, Linear, RmsNorm};
use burn::tensor::{DType, Int, Tensor};
use peft_kernels::{Scores, Weight};

use crate::{End, Gated, GroupedBase, KeysAndValues, Method, Prompt, Quantized, Reading};

/// The activation form of an adapter: what it has of it, for the kinds of layer that it adapts.
///
/// Inputs are folded to matrices: `rows` is the product of all leading dimensions.
pub trait Activation {
    /// The adapted layer on `x` `[rows, d_in]`, giving `[rows, d_out]`. `base` computes the layer without its adapter. `None` when there is only the
    /// weight form, and [`shift`](Self::shift).
    fn linear(&self, x: Tensor<2>, base: &Base<'_>) -> Option<Tensor<2>> {
        let _ = (x, base);
        None
    }

    /// The adapted layers of several experts on `x` `[rows, d_in]`, giving `[rows, d_out]`. `base` computes them without their adapter, and knows the expert of each row. `None` when
    /// there is only the weight form.
    fn grouped(&self, x: Tensor<2>, base: &GroupedBase<'_>) -> Option<Tensor<2>> {
        let _ = (x, base);
        None
    }

    /// The adapted lookup of `ids` `[rows]`, giving `[rows, d_model]`; `None` when there is only the weight form.
    fn embedding(&self, ids: Tensor<1, Int>, base: &Base<'_>) -> Option<Tensor<2>> {
        let _ = (ids, base);
        None
    }

    /// What the adapted layer adds to its output besides its bias `[d_out]`; merging adds it to that bias. `None` when that is nothing; a method for which it may
    /// be something says so in [`Method::needs_activation`].
    fn shift(&self, bias: Option<&Tensor<1>>) -> Option<Tensor<1>> {
        let _ = bias;
        None
    }

    /// What goes on behind an adapted norm, `[batch, seq, width]` to the same.
    fn normed(&self, y: Tensor<3>) -> Tensor<3> {
        y
    }

    /// The adapted end of a sub-layer.
    fn sub_layer(&self, end: End<'_>) -> Tensor<3> {
        end.close()
    }

    /// What stands in front of the rows of a batch.
    fn prompt(&self, reading: &Reading<'_>) -> Prompt {
        let _ = reading;
        Prompt::default()
    }

    /// How many positions of a row that takes.
    fn prompt_positions(&self) -> usize {
        0
    }

    /// The last hidden states of a model, `[batch, seq, width]`, which `pass` computes: as often as the adapter asks, telling it each time how many passes follow.
    fn passes(&self, pass: &mut dyn FnMut(usize) -> Tensor<3>) -> Tensor<3> {
        pass(0)
    }

    /// What is added to the result of an attention, `[batch, seq, heads · head_dim]`, given its queries `[batch, seq, heads, head_dim]`.
    fn attended(&self, queries: Tensor<4>, project: KeysAndValues<'_>) -> Option<Tensor<3>> {
        let _ = (queries, project);
        None
    }

    /// The adapted feed-forward part on `x`, `[batch, seq, width]` to the same.
    fn feed_forward(&self, x: Tensor<3>, parts: &Gated<'_>) -> Tensor<3> {
        parts.forward(x)
    }

    /// Adapted embeddings, `[rows, width]`: what goes into the model's blocks in place of `x`.
    fn embedded(&self, x: Tensor<2>) -> Tensor<2> {
        x
    }

    /// The reverse of [`embedded`](Self::embedded), for hidden states before a head over the vocabulary.
    fn unembedded(&self, x: Tensor<2>) -> Tensor<2> {
        x
    }
}

/// The frozen layer under an adapter, dense or packed.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    weight: &'a Param<Tensor<2>>,
    bias: Option<&'a Param<Tensor<1>>>,
    /// The type of the activations, which need not be that of the weight.
    dtype: DType,
    /// What the rows of the input were before they were folded: `[batch, seq]`.
    leading: [usize; 2],
}

impl<'a> Base<'a> {
    /// `x·W + b`, `[rows, d_in]` to `[rows, d_out]`.
    pub fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        let y = match self.quantized() {
            Some(quantized) => quantized.packed().linear(x),
            None => product(x, self.weight.base()),
        };
        self.biased(y)
    }

    /// The end of the layer, as that of a sub-layer: what it makes of `x`, `[rows, d_in]`, with rows as they were before they were folded.
    pub fn end(&self, x: Tensor<2>) -> End<'static> {
        let ([batch, seq], [_, d_in]) = (self.leading, x.dims());
        let output = self.linear(x.clone());
        let d_out = output.dims()[1];
        let (output, input) = (output.reshape([batch, seq, d_out]), x.reshape([batch, seq, d_in]));
        End { output, input, adds_input: false, norm: None }
    }

    /// The same with the adapted weight.
    fn with_weight(&self, x: Tensor<2>) -> Tensor<2> {
        let (weight, dtype) = (self.weight.val(), x.dtype());
        self.biased(product(x.cast(weight.dtype()), weight)).cast(dtype)
    }

    /// What the rows of the input were before they were folded, `[batch, seq]`; a matrix has one token a row of the batch.
    pub fn leading(&self) -> [usize; 2] {
        self.leading
    }

    fn biased(&self, y: Tensor<2>) -> Tensor<2> {
        match self.bias {
            Some(bias) => {
                let bias = bias.val().cast(y.dtype());
                y + bias.unsqueeze()
            }
            None => y,
        }
    }

    /// `x·W + b + scale·(x·A)·B`; in one operation where the types are the same and the weight is frozen: [`peft_kernels::low_rank_linear`].
    ///
    /// `dropped` is what the update sees in place of `x`.
    pub fn low_rank(
        &self,
        x: Tensor<2>,
        dropped: Option<Tensor<2>>,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
    ) -> Tensor<2> {
        let dense = self.weight.base();
        let weight = self.quantized().map_or(Weight::Dense(&dense), |quantized| Weight::Packed(quantized.packed()));
        let mixed = dense.dtype() == DType::BF16 && x.dtype() == DType::F32;
        let alike = x.dtype() == a.dtype() && (dense.dtype() == a.dtype() || mixed);
        if dropped.is_some() || !alike || dense.is_require_grad() {
            let inner = dropped.unwrap_or_else(|| x.clone()).cast(a.dtype());
            let dtype = x.dtype();
            return self.linear(x) + product(product(inner, a) * scale, b).cast(dtype);
        }
        self.biased(peft_kernels::low_rank_linear(x, weight, a, b, scale))
    }

    /// The rows `ids` of `W` in the type of the activations, `[rows]` to `[rows, d_model]`.
    pub fn embedding(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        self.weight.base().select(0, ids).cast(self.dtype)
    }

    /// The dense weight `[d_in, d_out]`.
    pub fn weight(&self) -> Tensor<2> {
        let dense = self.weight.base();
        self.quantized().map_or(dense.clone(), |packed| packed.dense(dense.dtype()))
    }

    /// The adapter's activation form: `Some(None)` for an adapter that has none.
    fn adapter(&self) -> Option<Option<&'a dyn Activation>> {
        adapter(self.quantized().map_or(self.weight, Quantized::<2>::carrier))
    }

    fn quantized(&self) -> Option<&'a Quantized> {
        self.weight.reparameterization()
    }
}

/// A linear layer through the activation seam: `layer.forward(x)`, but an attached adapter is computed on activations.
///
/// # Shapes
/// `[..., d_in]` to `[..., d_out]`
///
/// ```
/// # use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
/// let layer = LinearConfig::new(4, 8).init(&Device::flex());
/// let y = peft_core::linear(&layer, Tensor::<3>::ones([2, 3, 4], &Device::flex()));
/// assert_eq!(y.dims(), [2, 3, 8]);
/// ```
pub fn linear<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    linear_with(&layer.weight, layer.bias.as_ref(), x)
}

/// [`linear`] for a layer of another type, given its weight `[d_in, d_out]` and bias `[d_out]`.
pub fn linear_with<const D: usize>(
    weight: &Param<Tensor<2>>,
    bias: Option<&Param<Tensor<1>>>,
    x: Tensor<D>,
) -> Tensor<D> {
    let mut dims = x.dims();
    let (batch, tokens) = leading(&dims);
    let base = Base { weight, bias, dtype: x.dtype(), leading: [batch, tokens] };
    let adapter = base.adapter().flatten();
    let x = x.reshape([batch * tokens, dims[D - 1]]);
    let y = match adapter.and_then(|adapter| adapter.linear(x.clone(), &base)) {
        Some(y) => y,
        None if base.adapter().is_none() && (base.quantized().is_some() || weight.base().dtype() != x.dtype()) => {
            base.linear(x)
        }
        // A plain weight, or an adapter that has its weight form only.
        None => shifted(base.with_weight(x), adapter, bias),
    }; // [rows, d_out]
    dims[D - 1] = y.dims()[1];
    y.reshape(dims)
}

/// The output `[..., d_out]` of a layer with an adapted weight, and what the adapter adds besides.
fn shifted<const D: usize>(
    y: Tensor<D>,
    adapter: Option<&dyn Activation>,
    bias: Option<&Param<Tensor<1>>>,
) -> Tensor<D> {
    let bias = bias.map(Param::val);
    match adapter.and_then(|adapter| adapter.shift(bias.as_ref())) {
        Some(shift) => {
            let dtype = y.dtype();
            y + shift.cast(dtype).unsqueeze()
        }
        None => y,
    }
}

/// `LayerNorm` through the activation seam. Burn's layer does not tell its `epsilon`.
///
/// # Shapes
/// `[..., width]` to the same
pub fn layer_norm<const D: usize>(layer: &LayerNorm, x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    let beta = layer.beta.as_ref().map(Param::val);
    let y = peft_kernels::layer_norm(x, layer.gamma.val(), beta, epsilon);
    normed(y, adapter(&layer.gamma).flatten(), layer.beta.as_ref())
}

/// `RMSNorm` through the activation seam.
///
/// # Shapes
/// `[..., width]` to the same
pub fn rms_norm<const D: usize>(layer: &RmsNorm, x: Tensor<D>) -> Tensor<D> {
    normed(peft_kernels::rms_norm(x, layer.gamma.val(), layer.epsilon), adapter(&layer.gamma).flatten(), None)
}

/// The output `[..., width]` of a norm with an adapted scale, and what the adapter makes of it.
fn normed<const D: usize>(
    y: Tensor<D>,
    adapter: Option<&dyn Activation>,
    bias: Option<&Param<Tensor<1>>>,
) -> Tensor<D> {
    let Some(of) = adapter else { return y };
    let y = shifted(y, adapter, bias);
    let dims = y.dims();
    let (batch, tokens) = leading(&dims);
    of.normed(y.reshape([batch, tokens, dims[D - 1]])).reshape(dims)
}

/// Rows of the batch, and how many tokens each has, in a tensor of that shape whose last dimension is a token's.
fn leading(dims: &[usize]) -> (usize, usize) {
    let rows = &dims[..dims.len() - 1];
    rows.split_first().map_or((1, 1), |(batch, rest)| (*batch, rest.iter().product()))
}

/// A convolution through the activation seam.
///
/// # Shapes
/// `[batch, channels_in, height, width]` to `[batch, channels_out, height, width]`
pub fn conv2d(layer: &Conv2d, x: Tensor<4>) -> Tensor<4> {
    let y = layer.forward(x).permute([0, 2, 3, 1]); // [batch, height, width, channels_out]
    shifted(y, adapter(&layer.weight).flatten(), layer.bias.as_ref()).permute([0, 3, 1, 2])
}

/// `x·W` in the type of `x` ([`peft_kernels::linear`]); a weight of another type that is trained is multiplied in its own.
///
/// # Shapes
/// `x`: `[rows, d_in]`; `weight`: `[d_in, d_out]`; result `[rows, d_out]`
pub fn product(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let dtype = x.dtype();
    let x = if weight.is_require_grad() { x.cast(weight.dtype()) } else { x };
    peft_kernels::linear(x, weight).cast(dtype)
}

/// A bias-free output head through the activation seam, and the cross-entropy of its logits with targets; where the head is neither adapted nor packed, the
/// logits of all tokens never exist at once: [`peft_kernels::linear_cross_entropy`].
///
/// # Shapes
/// `x`: `[tokens, d_in]`; `targets`: `[tokens]`, negative ones are left out
pub fn cross_entropy(head: &Linear, x: Tensor<2>, targets: Tensor<1, Int>, smoothing: f64) -> Scores {
    let base = Base { weight: &head.weight, bias: head.bias.as_ref(), dtype: x.dtype(), leading: [x.dims()[0], 1] };
    if base.adapter().is_none() && base.quantized().is_none() && head.bias.is_none() {
        peft_kernels::linear_cross_entropy(x, head.weight.val(), targets, smoothing)
    } else {
        peft_kernels::cross_entropy(linear(head, x), targets, smoothing)
    }
}

/// An embedding layer through the activation seam: `layer.forward(ids)`, but an attached adapter is computed on the looked-up rows.
///
/// # Shapes
/// `[batch, seq]` to `[batch, seq, d_model]`
pub fn embedding(layer: &Embedding, ids: Tensor<2, Int>) -> Tensor<3> {
    let dtype = layer.weight.base().dtype();
    embedding_as(layer, ids, dtype)
}

/// [`embedding`] with rows in `dtype`: for a table in 16 bits under activations in f32, so that an adapter's small changes are not rounded away.
pub fn embedding_as(layer: &Embedding, ids: Tensor<2, Int>, dtype: DType) -> Tensor<3> {
    let [batch, seq] = ids.dims();
    let base = Base { weight: &layer.weight, bias: None, dtype, leading: [batch, seq] };
    match base.adapter().flatten().and_then(|adapter| adapter.embedding(ids.clone().reshape([batch * seq]), &base)) {
        Some(y) => {
            let width = y.dims()[1];
            y.reshape([batch, seq, width])
        }
        None => layer.forward(ids).cast(dtype),
    }
}

type Lookup = for<'a> fn(&'a dyn Any) -> Option<Option<&'a dyn Activation>>;

/// One lookup per method that was attached in this process. A parameter hands out its adapter only to who names its type, and the set
/// of types is open, so attaching leaves the one function here that knows the type.
static LOOKUPS: RwLock<Vec<(TypeId, Lookup)>> = RwLock::new(Vec::new());

pub(crate) fn register<M: Method>() {
    fn of_rank<M: Method, const D: usize>(param: &dyn Any) -> Option<&M::Adapter> {
        param.downcast_ref::<Param<Tensor<D>>>()?.reparameterization()
    }
    // The ranks of what adapters sit in.
    fn lookup<M: Method>(param: &dyn Any) -> Option<Option<&dyn Activation>> {
        let adapter = of_rank::<M, 2>(param).or_else(|| of_rank::<M, 1>(param));
        let adapter = adapter.or_else(|| of_rank::<M, 3>(param)).or_else(|| of_rank::<M, 4>(param));
        adapter.map(M::activation)
    }
    let mut lookups = LOOKUPS.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let id = TypeId::of::<M>();
    if lookups.iter().all(|(known, _)| *known != id) {
        lookups.push((id, lookup::<M>));
    }
}

/// The activation form of the adapter in a parameter: `Some(None)` for an adapter that has none.
pub(crate) fn adapter<const D: usize>(param: &Param<Tensor<D>>) -> Option<Option<&dyn Activation>> {
    // The lock guards a list that is only ever appended to, so a poisoned one is still whole.
    let lookups = LOOKUPS.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    lookups.iter().find_map(|(_, lookup)| lookup(param))
}
