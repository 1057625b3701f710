//! Values that hold for a call: what adapters deep in a model read where they need it, so that a model's `forward` has no argument for it, be it of whatever crate.

use std::cell::RefCell;
use std::thread::LocalKey;

/// Computes `forward` while `cell` holds `value`, on this thread alone. What held before holds again afterwards, whatever way `forward` ends.
///
/// ```
/// use std::cell::RefCell;
///
/// use peft_core::within;
///
/// thread_local! {
///     static DEPTH: RefCell<Option<usize>> = const { RefCell::new(None) };
/// }
/// assert_eq!(within(&DEPTH, 2, || DEPTH.with_borrow(Clone::clone)), Some(2));
/// assert_eq!(DEPTH.take(), None);
/// ```
pub fn within<T, R>(cell: &'static LocalKey<RefCell<Option<T>>>, value: T, forward: impl FnOnce() -> R) -> R {
    struct Before<T: 'static> {
        cell: &'static LocalKey<RefCell<Option<T>>>,
        held: Option<T>,
    }
    impl<T> Drop for Before<T> {
        fn drop(&mut self) {
            self.cell.set(self.held.take());
        }
    }
    let _before = Before { cell, held: cell.replace(Some(value)) };
    forward()
}
