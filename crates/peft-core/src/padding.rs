//! Which tokens of a batch are padding, for adapters that look at several tokens at once.

use std::cell::RefCell;

use burn::tensor::{Int, Tensor};

use crate::within;

thread_local! {
    /// What [`for_mask`] was called with, further down this thread's stack.
    static MASK: RefCell<Option<Option<Tensor<2, Int>>>> = const { RefCell::new(None) };
}

/// Computes `forward` for a batch with that mask, `[batch, seq]`: 1 for a token, 0 for padding. Without one, or without the call, there is no padding.
///
/// A model that is told of padding calls it around its blocks. It ends with the call and holds on this thread alone.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use peft_core::{for_mask, mask};
///
/// let padded = Tensor::<2, Int>::from_data([[1, 1, 0]], &Device::flex());
/// assert!(for_mask(Some(padded), || mask([1, 3])).is_some());
/// assert!(mask([1, 3]).is_none());
/// ```
pub fn for_mask<R>(mask: Option<Tensor<2, Int>>, forward: impl FnOnce() -> R) -> R {
    within(&MASK, mask, forward)
}

/// The mask of a batch of that many rows and tokens; nothing where none is padding, or the mask is of another batch.
pub fn mask(leading: [usize; 2]) -> Option<Tensor<2, Int>> {
    MASK.with_borrow(Clone::clone).flatten().filter(|mask| mask.dims() == leading)
}
