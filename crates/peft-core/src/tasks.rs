//! Which task each row of a batch is of, for adapters that differ by task.

use std::cell::RefCell;

use crate::within;

thread_local! {
    /// What [`for_tasks`] was called with, further down this thread's stack.
    static TASKS: RefCell<Option<Vec<usize>>> = const { RefCell::new(None) };
}

/// Computes `forward` for a batch whose rows are of these tasks: one for each row, or one for all.
///
/// Adapters deep in a model read it where they need it, so a model's `forward` has no argument for it, be it of whatever crate. It ends with the call and holds on
/// this thread alone.
///
/// ```
/// use peft_core::{for_tasks, tasks};
///
/// assert_eq!(for_tasks(&[0, 2], || tasks(2)), [0, 2]);
/// assert_eq!(for_tasks(&[1], || tasks(3)), [1, 1, 1]);
/// ```
pub fn for_tasks<R>(tasks: &[usize], forward: impl FnOnce() -> R) -> R {
    within(&TASKS, tasks.to_vec(), forward)
}

/// The task of each of the rows of a batch.
///
/// # Panics
/// Outside of [`for_tasks`], and when that has neither one task nor one for each row.
pub fn tasks(batch: usize) -> Vec<usize> {
    let tasks =
        TASKS.with_borrow(Clone::clone).expect("an adapter that differs by task is computed inside `for_tasks`");
    if let [task] = tasks[..] {
        return vec![task; batch];
    }
    assert_eq!(tasks.len(), batch, "a task for each row of the batch");
    tasks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_held_before_holds_again() {
        for_tasks(&[1], || {
            assert_eq!(for_tasks(&[2, 3], || tasks(2)), [2, 3]);
            assert_eq!(tasks(1), [1]);
            let failed = std::panic::catch_unwind(|| for_tasks(&[4], || panic!("on purpose")));
            assert!(failed.is_err());
            assert_eq!(tasks(2), [1, 1]);
        });
        assert!(std::panic::catch_unwind(|| tasks(1)).is_err());
    }
}
