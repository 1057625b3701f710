//! How an operation enters the autodiff graph.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, OpsKind, OpsPrep};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

/// Records an operation that was prepared with the nodes of its tracked inputs. `forward` is told whether anybody asks for a gradient, and gives the
/// output and, if so, what the gradient needs.
pub(crate) fn record<B, C, O, const N: usize>(
    operation: OpsPrep<O, B, O::State, C, N>,
    forward: impl FnOnce(bool) -> (FloatTensor<B>, Option<O::State>),
) -> FloatTensor<Autodiff<B, C>>
where
    B: Backend,
    C: CheckpointStrategy,
    O: Backward<B, N>,
{
    match operation.compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let (output, state) = forward(true);
            prep.finish(state.expect("what a gradient needs"), output)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward(false).0),
    }
}

/// Gives a parent its gradient, if it asks for one.
pub(crate) fn give<B: Backend>(grads: &mut Gradients, parent: Option<NodeId>, grad: FloatTensor<B>) {
    if let Some(id) = parent {
        grads.register::<B>(id, grad);
    }
}
