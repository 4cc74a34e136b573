//! How kernels share work: always by outputs, never by the terms of a sum, so the thread count cannot change a bit.

use std::marker::PhantomData;
use std::ops::Range;

use crate::pool;

/// Multiply-adds (or comparable operations) below which waking another thread costs more than it saves.
const MIN_WORK: usize = 1 << 15;
/// Tasks per thread: enough that a thread which starts late does not hold up the others for long.
const TASKS_PER_THREAD: usize = 4;

/// Number of tasks for `items` items of `work_per_item` operations each.
pub(crate) fn task_count(items: usize, work_per_item: usize) -> usize {
    let threads = pool::threads();
    if threads == 1 {
        return items.min(1);
    }
    let by_work = items.saturating_mul(work_per_item.max(1)) / MIN_WORK;
    by_work.clamp(1, threads * TASKS_PER_THREAD).min(items)
}

/// The items of task `task` out of `tasks`: contiguous, sizes differing by at most one.
pub(crate) fn share(items: usize, tasks: usize, task: usize) -> Range<usize> {
    items * task / tasks..items * (task + 1) / tasks
}

/// Calls `f` with contiguous ranges that cover `0..items`, in parallel.
pub(crate) fn for_ranges(items: usize, work_per_item: usize, f: impl Fn(Range<usize>) + Sync) {
    let tasks = task_count(items, work_per_item);
    pool::run(tasks, |task| f(share(items, tasks, task)));
}

/// Calls `f` with ranges of rows and the elements of those rows in `y`, in parallel. `y` holds whole rows of `width`.
pub(crate) fn for_rows<T: Send>(
    y: &mut [T],
    width: usize,
    work_per_row: usize,
    f: impl Fn(Range<usize>, &mut [T]) + Sync,
) {
    let rows = y.len().checked_div(width).unwrap_or(0);
    let y = Shared::new(y);
    for_ranges(rows, work_per_row, |range| {
        // SAFETY: the ranges of different tasks are disjoint, so no element is reachable twice.
        let chunk = unsafe { y.slice(range.start * width..range.end * width) };
        f(range, chunk);
    });
}

/// A mutable slice that tasks take disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: the parts handed out are disjoint by the contract of `slice`, and `&mut [T]` may be sent where `T` may.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above; a shared reference to this only allows taking disjoint parts.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No other live slice taken from this value may overlap `range`.
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "shared slice: range outside the slice");
        // SAFETY: the range was checked against the slice this was made from, which is borrowed for 'a; the caller
        // promises that no other live slice overlaps it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once() {
        for items in [0, 1, 7, 64] {
            for tasks in 1..9 {
                let covered: Vec<usize> = (0..tasks).flat_map(|t| share(items, tasks, t)).collect();
                assert_eq!(covered, (0..items).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn rows_are_handed_out_with_their_elements() {
        let mut y = vec![0usize; 7 * 3];
        for_rows(&mut y, 3, 1 << 20, |rows, chunk| {
            for (row, values) in rows.zip(chunk.chunks_exact_mut(3)) {
                values.fill(row);
            }
        });
        assert_eq!(y, (0..21).map(|i| i / 3).collect::<Vec<_>>());
    }
}
