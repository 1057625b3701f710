//! Attention over grouped heads in tiles: memory grows with the sequence, not with its square.
//!
//! - forward: `p = softmax(s·q·kᵀ)` over the keys that a query may see, `o = p·v`; `L = log Σ exp(s·q·kᵀ)` is kept
//! - gradient: `p` again from `L`; `dv = pᵀ·do`, `dz = p·(do·vᵀ − Σ do·o)`, `dq = s·dz·k`, `dk = s·dzᵀ·q`
//! - source: Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4; Ainslie et al. 2023, arXiv:2305.13245 (grouped heads)

#[cfg(feature = "cube")]
mod cube;
mod plain;

#[cfg(feature = "host")]
mod native;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
#[cfg(feature = "cube")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend as _, Backend, Dispatch, ExtensionType, backend_extension};
#[cfg(feature = "cube")]
use burn::tensor::DType;
use burn::tensor::{Int, Tensor};

use crate::backends::on_backends;
use crate::record::{give, record};

/// Which keys a query may see.
///
/// The queries are the last `seq` of all `total` tokens; the keys before them, of a cache or a prefix, stand for tokens that were there first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Only keys of the same token and of earlier ones.
    pub causal: bool,
    /// Only keys fewer than this many tokens back; one at least, the token's own.
    pub window: Option<usize>,
    /// The first keys, which every query sees, whatever its window.
    pub prefix: usize,
}

/// Which sequence each new token belongs to.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "cube"))]
pub enum Segments<B: Backend> {
    /// All of a row to one.
    One,
    /// `[batch, seq]`
    Several(IntTensor<B>),
}

/// Attention with a gradient that holds no matrix of scores.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait AttentionOps: Backend {
    /// `o` `[batch, seq, heads, head_dim]` and `L` `[batch, kv_heads, group · seq]`, whose rows each backend orders as it likes.
    #[fusion(meta = |q, k, _v, _segments, _sight, _scale| (q.clone(), log_sums_of(q, k)))]
    fn attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] segments: Segments<Self>,
        sight: Sight,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        plain::attend::<Self>(q, k, v, segments, sight, scale)
    }

    /// `dq`, `dk`, `dv`
    #[fusion(meta = |_grad, q, k, v, _o, _log_sums, _segments, _sight, _scale| (q.clone(), k.clone(), v.clone()))]
    #[allow(clippy::too_many_arguments, reason = "what a gradient of attention is made of")]
    fn attend_backward(
        grad: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        o: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        #[extension_type] segments: Segments<Self>,
        sight: Sight,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        plain::attend_backward::<Self>(grad, q, k, v, o, log_sums, segments, sight, scale)
    }
}

/// What is known of `L` before it is computed.
#[cfg(feature = "cube")]
fn log_sums_of(q: &TensorSpec, k: &TensorSpec) -> TensorSpec {
    let ([batch, seq, heads], kv_heads) = ([q.shape[0], q.shape[1], q.shape[2]], k.shape[2]);
    let dtype = if q.dtype == DType::F64 { DType::F64 } else { DType::F32 };
    TensorSpec::new([batch, kv_heads, heads / kv_heads * seq].into(), dtype)
}

/// `softmax(s·q·kᵀ)·v` over the keys in sight; query heads `g·i .. g·(i + 1)` share key and value head `i`, with `g = heads / kv_heads`.
///
/// `segments` says which sequence each of the new tokens belongs to, where rows hold several, by numbers from zero: tokens see their own sequence and what was
/// there before.
///
/// # Shapes
/// `q`: `[batch, seq, heads, head_dim]`; `k`, `v`: `[batch, total, kv_heads, head_dim]` with `total >= seq`; `segments`: `[batch, seq]`; result as `q`
///
/// # Panics
/// When the shapes do not fit, the window is empty, or the tensors live on a backend that this crate was not built for.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    segments: Option<Tensor<2, Int>>,
    sight: Sight,
    scale: f64,
) -> Tensor<4> {
    let ([batch, seq, heads, head_dim], [rows, total, kv_heads, width]) = (q.dims(), k.dims());
    assert!(
        k.dims() == v.dims() && (rows, width) == (batch, head_dim) && total >= seq && heads % kv_heads.max(1) == 0,
        "attention: queries {:?}, keys {:?}, values {:?}",
        q.dims(),
        k.dims(),
        v.dims()
    );
    assert_ne!(sight.window, Some(0), "attention: a token sees itself at least");
    if let Some(segments) = &segments {
        assert_eq!(segments.dims(), [batch, seq], "attention: a segment for each query");
    }
    let segments = match segments {
        Some(segments) => Segments::Several(segments.without_autodiff().into_dispatch()),
        None => Segments::One,
    };
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    Tensor::from_dispatch(<Dispatch as AttentionOps>::attend(q, k, v, segments, sight, scale).0)
}

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: Segments<Self>,
        sight: Sight,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct Attend;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            q: FloatTensor<B>,
            k: FloatTensor<B>,
            v: FloatTensor<B>,
            o: FloatTensor<B>,
            log_sums: FloatTensor<B>,
            segments: Segments<B>,
            sight: Sight,
            scale: f64,
        }

        impl<B: AttentionOps> Backward<B, 3> for Attend {
            type State = State<B>;

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [q_node, k_node, v_node] = ops.parents.map(|node| node.map(|node| node.id));
                let State { q, k, v, o, log_sums, segments, sight, scale } = ops.state;
                let grad = grads.consume::<B>(&ops.node);
                let (q, k, v) = B::attend_backward(grad, q, k, v, o, log_sums, segments, sight, scale);
                give::<B>(grads, q_node, q);
                give::<B>(grads, k_node, k);
                give::<B>(grads, v_node, v);
            }
        }

        let ((q, q_node), (k, k_node), (v, v_node)) = (q.into_parts(), k.into_parts(), v.into_parts());
        // The same on both: integers are never tracked.
        let segments = match segments {
            Segments::One => Segments::One,
            Segments::Several(segments) => Segments::Several(segments),
        };
        let mut sums = None;
        let o = record(Attend.prepare::<C>([q_node, k_node, v_node]), |tracked| {
            let (o, log_sums) = B::attend(q.clone(), k.clone(), v.clone(), segments.clone(), sight, scale);
            sums = Some(log_sums.clone());
            let state = tracked.then(|| State { q, k, v, o: o.clone(), log_sums, segments, sight, scale });
            (o, state)
        });
        (o, Self::from_inner(sums.expect("made with the output")))
    }
}

on_backends!(AttentionOps with kernels {
    fn attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: Segments<Self>,
        sight: Sight,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>), by [q, k, v];
    fn attend_backward(
        grad: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        o: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        segments: Segments<Self>,
        sight: Sight,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>), by [grad, q, k, v, o, log_sums];
});
