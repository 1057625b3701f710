//! What adapters say during a pass besides its output: what routers did, and what of that is to be minimised.

use std::cell::RefCell;

use burn::tensor::Tensor;

use crate::within;

/// What one router did with a batch.
#[derive(Clone, Debug)]
pub struct Auxiliary {
    /// Path of the layer.
    pub path: String,
    /// What is added to the loss, `[1]`; nothing where nothing is balanced.
    pub loss: Option<Tensor<1>>,
    /// The part of the rows that went through each expert, `[experts]`; it sums to one.
    pub load: Tensor<1>,
    /// Mean entropy of the probabilities of the experts, in nats, `[1]`.
    pub entropy: Tensor<1>,
}

thread_local! {
    /// What was said in [`with_auxiliary`], further down this thread's stack.
    static SAID: RefCell<Option<Vec<Auxiliary>>> = const { RefCell::new(None) };
}

/// Computes `forward`, and gives besides what adapters [say](say_auxiliary) in it, in their order.
///
/// ```
/// let (answer, said) = peft_core::with_auxiliary(|| 42);
/// assert!(answer == 42 && said.is_empty());
/// ```
pub fn with_auxiliary<R>(forward: impl FnOnce() -> R) -> (R, Vec<Auxiliary>) {
    within(&SAID, Vec::new(), || (forward(), SAID.take().unwrap_or_default()))
}

/// Says something, if anybody listens; else it is not even computed.
pub fn say_auxiliary(of: impl FnOnce() -> Auxiliary) {
    if SAID.with_borrow(Option::is_some) {
        let auxiliary = of();
        SAID.with_borrow_mut(|said| said.get_or_insert_default().push(auxiliary));
    }
}
