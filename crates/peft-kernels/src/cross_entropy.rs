//! The output head and the cross-entropy in one operation, some tokens at a time.
//!
//! - logits: `z = x·W`
//! - loss of a token: `(1 − ε)·(L − z[target]) + ε·(L − mean(z))`, `L = log Σ exp(z)`
//! - gradient: `dx = (softmax(z) − (1 − ε)·onehot(target) − ε/vocab)·Wᵀ`, times that of the loss
//! - source: Szegedy et al. 2015, arXiv:1512.00567, section 7 (label smoothing); Hsu et al. 2024, arXiv:2410.10989, section 3.2 (chunks)
//!
//! The gradient of each row is made with its loss, so that logits exist for the tokens of a chunk only, and are computed once.

#[cfg(feature = "cube")]
mod cube;

use std::ops::Range;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
#[cfg(feature = "cube")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend as _, Backend, Dispatch, TensorMetadata as _, backend_extension};
use burn::tensor::{Int, Shape, Slice, Tensor};

use crate::backends::on_backends;
use crate::formula::Float;
#[cfg(feature = "host")]
use crate::host::{
    Factor, Host, Matrix,
    lanes::{exp, max, sum, vectorized},
    product::{Threads, Write, product},
};
use crate::record::{give, record};

/// Logits of a chunk: 8 MiB of them, but never so few tokens that a product would mostly read the head.
const CHUNK: usize = 1 << 21;
const FEWEST_TOKENS: usize = 128;

/// Fused heads.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait CrossEntropyOps: Backend {
    /// Losses `[tokens]`, likeliest entries `[tokens]`, and gradients of `x` `[tokens, width]`, which are empty unless `gradient`.
    #[fusion(meta = |x, _weight, targets, _smoothing, gradient| scores_of(x, targets, *gradient))]
    fn linear_cross_entropy(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        smoothing: f64,
        gradient: bool,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>) {
        plain::linear_cross_entropy::<Self>(x, weight, targets, smoothing, gradient)
    }

    /// The gradient of the weight, `[width, vocab]`, where that of each loss is `grad`; computes the logits again.
    #[fusion(meta = |_grad, x, weight, _targets, _smoothing| TensorSpec::new(weight.shape.clone(), x.dtype))]
    fn linear_cross_entropy_weight(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        smoothing: f64,
    ) -> FloatTensor<Self> {
        plain::linear_cross_entropy_weight::<Self>(grad, x, weight, targets, smoothing)
    }
}

/// What is known of losses, likeliest entries and gradients before they are computed.
#[cfg(feature = "cube")]
fn scores_of(x: &TensorSpec, targets: &TensorSpec, gradient: bool) -> (TensorSpec, TensorSpec, TensorSpec) {
    let [tokens, width] = [x.shape[0], x.shape[1]];
    let rows = if gradient { tokens } else { 0 };
    (TensorSpec::new([tokens].into(), x.dtype), targets.clone(), TensorSpec::new([rows, width].into(), x.dtype))
}

/// What a head says of the tokens that were to come.
#[derive(Clone, Debug)]
pub struct Scores {
    /// Loss of each token, `[tokens]`; zero where the target is negative.
    pub losses: Tensor<1>,
    /// The likeliest entry of the vocabulary, `[tokens]`, in the type of the targets.
    pub best: Tensor<1, Int>,
}

/// The cross-entropy of `x·W` with targets, without ever holding all logits.
///
/// The weight may be of another type than `x`: see [`linear`](crate::linear()).
///
/// # Shapes
/// `x`: `[tokens, width]`; `weight`: `[width, vocab]`; `targets`: `[tokens]`, negative ones are left out
///
/// # Panics
/// When the shapes do not fit, or the tensors live on a backend that this crate was not built for.
pub fn linear_cross_entropy(x: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>, smoothing: f64) -> Scores {
    let ([tokens, width], [d_in, _], [count]) = (x.dims(), weight.dims(), targets.dims());
    assert!(width == d_in && tokens == count, "head: {tokens} tokens of {width}, {count} targets, a weight of {d_in}");
    let weight = weight.into_dispatch();
    let targets = targets.without_autodiff().into_dispatch();
    let (losses, best, _) =
        <Dispatch as CrossEntropyOps>::linear_cross_entropy(x.into_dispatch(), weight, targets, smoothing, false);
    Scores { losses: Tensor::from_dispatch(losses), best: Tensor::from_dispatch(best) }
}

impl<B: CrossEntropyOps, C: CheckpointStrategy> CrossEntropyOps for Autodiff<B, C> {
    fn linear_cross_entropy(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        smoothing: f64,
        _gradient: bool,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct CrossEntropy;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            /// The gradient of each row, were that of its loss one.
            x_grad: FloatTensor<B>,
            x: FloatTensor<B>,
            weight: FloatTensor<B>,
            targets: IntTensor<B>,
            smoothing: f64,
        }

        impl<B: CrossEntropyOps> Backward<B, 2> for CrossEntropy {
            type State = State<B>;

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [x_node, weight_node] = ops.parents;
                let State { x_grad, x, weight, targets, smoothing } = ops.state;
                let grad = grads.consume::<B>(&ops.node);
                if let Some(node) = weight_node {
                    let dtype = weight.dtype();
                    let weight = B::linear_cross_entropy_weight(grad.clone(), x, weight, targets, smoothing);
                    grads.register::<B>(node.id, Float::<B>(weight).cast(dtype).0);
                }
                let each = Float::<B>(grad).reshape([x_grad.shape()[0], 1]);
                give::<B>(grads, x_node.map(|node| node.id), (Float(x_grad) * each).0);
            }
        }

        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        let mut rest = None;
        let losses = record(CrossEntropy.prepare::<C>([x_node, weight_node]), |tracked| {
            let (losses, best, x_grad) =
                B::linear_cross_entropy(x.clone(), weight.clone(), targets.clone(), smoothing, tracked);
            rest = Some((best, x_grad.clone()));
            (losses, tracked.then(|| State { x_grad, x, weight, targets, smoothing }))
        });
        let (best, x_grad) = rest.expect("made with the losses");
        (losses, best, Self::from_inner(x_grad))
    }
}

/// [`linear_cross_entropy`] of logits `[tokens, vocab]` that are there already: those of a head that is adapted or packed.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>, smoothing: f64) -> Scores {
    let ([tokens, _], best) = (logits.dims(), logits.clone().without_autodiff().argmax(1).flatten(0, 1));
    let targets = targets.reshape([tokens, 1]);
    // The largest logit is a constant to the gradient.
    let shifted = logits.clone() - logits.detach().max_dim(1);
    let log_sum = shifted.clone().exp().sum_dim(1).log();
    let target = shifted.clone().gather(1, targets.clone().clamp_min(0)) * (1.0 - smoothing);
    let losses = log_sum - target - shifted.mean_dim(1) * smoothing;
    Scores { losses: losses.mask_fill(targets.lower_elem(0), 0.0).flatten(0, 1), best }
}

on_backends!(CrossEntropyOps with kernels {
    fn linear_cross_entropy(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        smoothing: f64,
        gradient: bool,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>), by [x];
    fn linear_cross_entropy_weight(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        smoothing: f64,
    ) -> FloatTensor<Self>, by [grad, x];
});

/// The tokens of each chunk; one chunk of none when there are none.
fn chunks(tokens: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    let most = (CHUNK / vocab.max(1)).max(FEWEST_TOKENS);
    (0..tokens.max(1)).step_by(most).map(move |start| start..(start + most).min(tokens))
}

/// Body of Burn's operations.
mod plain {
    use burn::backend::get_or_init_device_settings;
    use burn::backend::tensor::BoolTensor;
    use burn::tensor::{DType, IndexingUpdateOp};

    use super::*;

    pub(super) fn linear_cross_entropy<B: Backend>(
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        targets: IntTensor<B>,
        smoothing: f64,
        gradient: bool,
    ) -> (FloatTensor<B>, IntTensor<B>, FloatTensor<B>) {
        let (empty, tokens) = (Shape::new([0, x.shape()[1]]), x.shape()[0]);
        let (device, dtype, ints) = (x.device(), x.dtype(), targets.dtype().into());
        let (mut losses, mut best, mut x_grads) = (Vec::new(), Vec::new(), Vec::new());
        for chunk in chunks(tokens, weight.shape()[1]) {
            let (count, dtype) = (chunk.len(), x.dtype());
            let rows = Rows::<B>::new(&chunk, &x, &weight, &targets);
            best.push(B::int_reshape(B::float_argmax(rows.z.0.clone(), 1, ints), Shape::new([count])));
            let shifted = rows.shifted();
            let at_target = Float::<B>(B::float_gather(1, shifted.0.clone(), rows.target.clone()));
            let log_sum = shifted.clone().exp().sum(1).log();
            let loss = log_sum - at_target * (1.0 - smoothing) - shifted.mean(1) * smoothing;
            losses.push(loss.fill(rows.ignored.clone(), 0.0).reshape([count]).cast(dtype).0);
            if gradient {
                let weight = B::float_swap_dims(weight.clone(), 0, 1);
                x_grads.push(rows.gradient(smoothing).cast(dtype).times_frozen(Float(weight)).0);
            }
        }
        let x_grad = match x_grads.is_empty() {
            true => B::float_zeros(empty, &device, dtype.into()),
            false => B::float_cat(x_grads, 0),
        };
        (B::float_cat(losses, 0), B::int_cat(best, 0), x_grad)
    }

    pub(super) fn linear_cross_entropy_weight<B: Backend>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        targets: IntTensor<B>,
        smoothing: f64,
    ) -> FloatTensor<B> {
        let (dtype, tokens) = (x.dtype(), x.shape()[0]);
        let of_chunk = |chunk: Range<usize>| {
            let (slice, count) = (Slice::from(chunk.clone()), chunk.len());
            let z_grad = Rows::<B>::new(&chunk, &x, &weight, &targets).gradient(smoothing);
            let each = Float::<B>(B::float_slice(grad.clone(), &[slice])).reshape([count, 1]).cast(z_grad.dtype());
            let x = Float::<B>(B::float_slice(x.clone(), &[slice, Slice::full()]));
            x.swap(0, 1).matmul((z_grad * each).cast(dtype))
        };
        let sum = chunks(tokens, weight.shape()[1]).map(of_chunk).reduce(|sum, each| sum + each);
        sum.map_or_else(|| B::float_zeros(weight.shape(), &weight.device(), dtype.into()), |sum| sum.0)
    }

    /// The logits of a chunk, in f32 at least.
    struct Rows<B: Backend> {
        z: Float<B>,
        /// `[count, 1]`, not negative.
        target: IntTensor<B>,
        /// `[count, 1]`
        ignored: BoolTensor<B>,
    }

    impl<B: Backend> Rows<B> {
        fn new(chunk: &Range<usize>, x: &FloatTensor<B>, weight: &FloatTensor<B>, targets: &IntTensor<B>) -> Self {
            let bools = get_or_init_device_settings::<B>(&x.device()).bool_dtype;
            let rows = Slice::from(chunk.clone());
            let x_rows = Float::<B>(B::float_slice(x.clone(), &[rows, Slice::full()]));
            let z = x_rows.times_frozen(Float(weight.clone())).cast(if x.dtype() == DType::F64 {
                DType::F64
            } else {
                DType::F32
            });
            let column = B::int_reshape(B::int_slice(targets.clone(), &[rows]), Shape::new([chunk.len(), 1]));
            let ignored = B::int_lower_elem(column.clone(), 0.into(), bools);
            Self { z, target: B::int_clamp_min(column, 0.into()), ignored }
        }

        fn shifted(&self) -> Float<B> {
            self.z.clone() - self.z.clone().max(1)
        }

        /// `softmax(z) − (1 − ε)·onehot(target) − ε/vocab`, zero where the target is ignored.
        fn gradient(self, smoothing: f64) -> Float<B> {
            let (shape, e) = (self.z.shape(), self.shifted().exp());
            let z_grad = e.clone() / e.sum(1) - smoothing / shape[1] as f64;
            let ones = B::float_ones(Shape::new([shape[0], 1]), &z_grad.0.device(), z_grad.dtype().into());
            let hit = Float::<B>(ones) * (smoothing - 1.0);
            let z_grad = B::float_scatter(1, z_grad.0, self.target, hit.0, IndexingUpdateOp::Add);
            Float(z_grad).fill(B::bool_expand(self.ignored, shape), 0.0)
        }
    }
}

/// The path on the CPU: logits turn into their gradient in place.
#[cfg(feature = "host")]
mod native {
    use rayon::prelude::*;

    use super::*;

    /// What a row of logits says.
    #[derive(Clone, Copy, Debug, Default)]
    struct Score {
        loss: f32,
        best: usize,
    }

    pub(super) fn linear_cross_entropy<B: Host>(
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        targets: IntTensor<B>,
        smoothing: f64,
        gradient: bool,
    ) -> (FloatTensor<B>, IntTensor<B>, FloatTensor<B>) {
        let ([tokens, width], ints) = ([x.shape()[0], x.shape()[1]], targets.dtype().into());
        let (x, weight, targets) = (B::values(&x), B::factor(&weight), B::ints(targets));
        let mut scores = vec![Score::default(); tokens];
        let mut x_grad = vec![0.0; if gradient { tokens * width } else { 0 }];
        let places = |chunk: &Range<usize>| chunk.start * width..chunk.end * width;
        each_chunk(&x, &weight, &targets, smoothing, &mut scores, |chunk, z_grad| {
            if gradient {
                weight.transposed().apply(&mut x_grad[places(&chunk)], z_grad);
            }
        });
        let losses = scores.iter().map(|score| score.loss).collect();
        let best = scores.iter().map(|score| score.best as i64).collect();
        let rows = if gradient { tokens } else { 0 };
        (
            B::tensor(losses, Shape::new([tokens])),
            B::int_cast(B::int_tensor(best, Shape::new([tokens])), ints),
            B::tensor(x_grad, Shape::new([rows, width])),
        )
    }

    pub(super) fn linear_cross_entropy_weight<B: Host>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        weight: FloatTensor<B>,
        targets: IntTensor<B>,
        smoothing: f64,
    ) -> FloatTensor<B> {
        let (shape, width) = (weight.shape(), x.shape()[1]);
        let (grad, x, weight, targets) = (B::values(&grad), B::values(&x), B::factor(&weight), B::ints(targets));
        // The gradient of a loss scales its row, that of the input here.
        let scaled: Vec<f32> =
            x.chunks_exact(width).zip(&*grad).flat_map(|(x, g)| x.iter().map(move |x| x * g)).collect();
        let vocab = shape[1];
        let mut out = vec![0.0; width * vocab];
        let mut scores = vec![Score::default(); targets.len()];
        each_chunk(&x, &weight, &targets, smoothing, &mut scores, |chunk, z_grad| {
            let x = Matrix::contiguous(&scaled[chunk.start * width..chunk.end * width], chunk.len(), width);
            product((&mut out, vocab), &x.transposed(), z_grad, 1.0, Write::Add, Threads::All);
        });
        B::tensor(out, shape)
    }

    /// Scores all tokens, and shows the gradient of the logits of each chunk.
    fn each_chunk(
        x: &[f32],
        weight: &Factor<'_>,
        targets: &[i64],
        smoothing: f64,
        scores: &mut [Score],
        mut work: impl FnMut(Range<usize>, &Matrix<'_>),
    ) {
        let [width, vocab] = weight.dims();
        let mut logits = Vec::new();
        for chunk in chunks(targets.len(), vocab) {
            let count = chunk.len();
            logits.resize(count * vocab, 0.0);
            let x = Matrix::contiguous(&x[chunk.start * width..chunk.end * width], count, width);
            weight.apply(&mut logits, &x);
            rows(&mut logits, &mut scores[chunk.clone()], &targets[chunk.clone()], smoothing as f32);
            work(chunk, &Matrix::contiguous(&*logits, count, vocab));
        }
    }

    /// Scores rows of logits and leaves their gradient in their place.
    fn rows(logits: &mut [f32], scores: &mut [Score], targets: &[i64], smoothing: f32) {
        let vocab = logits.len() / targets.len().max(1);
        let rows = logits.par_chunks_mut(vocab).zip(scores).zip(targets);
        rows.for_each(|((z, place), target)| *place = vectorized!(score(z, *target, smoothing)));
    }

    /// Scores a row of logits and leaves its gradient in its place.
    #[inline(always)]
    fn score(z: &mut [f32], target: i64, smoothing: f32) -> Score {
        let highest = max(z);
        let best = z.iter().position(|z| *z == highest).unwrap_or(0);
        let Ok(target) = usize::try_from(target) else {
            z.fill(0.0);
            return Score { loss: 0.0, best };
        };
        let (at_target, mean) = (z[target] - highest, sum([z], |[z]| z - highest) / z.len() as f32);
        z.iter_mut().for_each(|z| *z = exp(*z - highest));
        let total = sum([z], |[z]| z);
        let (inverse, level) = (1.0 / total, smoothing / z.len() as f32);
        z.iter_mut().for_each(|z| *z = *z * inverse - level);
        z[target] -= 1.0 - smoothing;
        let loss = total.ln() - (1.0 - smoothing) * at_target - smoothing * mean;
        Score { loss, best }
    }
}
