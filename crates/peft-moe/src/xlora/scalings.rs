//! How far each expert counts in a pass, said around it: layers deep in a model read it where they need it.

use std::cell::RefCell;

use burn::tensor::Tensor;
use peft_core::within;

/// How far experts count.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one a pass")]
pub(super) enum Scalings {
    /// All as far, everywhere.
    Same(f64),
    /// Each for itself, `[batch, seq, layers or 1, experts]`.
    Each(Tensor<4>),
}

thread_local! {
    /// What [`with_scalings`] was called with, further down this thread's stack.
    static SCALINGS: RefCell<Option<Scalings>> = const { RefCell::new(None) };
}

/// Computes `pass` with these; it ends with the call and holds on this thread alone.
pub(super) fn with_scalings<R>(scalings: Scalings, pass: impl FnOnce() -> R) -> R {
    within(&SCALINGS, scalings, pass)
}

/// Those of the pass; nothing outside of one, where no expert counts.
pub(super) fn scalings() -> Option<Scalings> {
    SCALINGS.with_borrow(Clone::clone)
}
