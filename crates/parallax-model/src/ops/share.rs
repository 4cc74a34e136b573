//! Independent parts of an operation, shared out over the kernels' threads.

use std::sync::OnceLock;

use parallax_kernels::pool;

/// `f(0), .., f(n - 1)`, in this order, computed in parallel. Kernels called by `f` then run on its thread alone, with
/// the same bits.
pub(crate) fn map<T: Send + Sync>(n: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let slots: Vec<OnceLock<T>> = (0..n).map(|_| OnceLock::new()).collect();
    pool::run(n, |i| {
        // Each index is run once, so the slot is empty.
        let _ = slots[i].set(f(i));
    });
    slots.into_iter().map(|slot| slot.into_inner().expect("every index was run")).collect()
}
