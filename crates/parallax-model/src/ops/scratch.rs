//! Memory that a thread keeps from one operation to the next.

use std::cell::RefCell;

/// Most elements that stay when an operation ends (64 MiB); a larger operation pays for its memory each time, and only it.
const KEPT: usize = 16 << 20;

thread_local! {
    static MEMORY: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with buffers of so many elements, which hold anything.
pub(super) fn with_scratch<const N: usize, R>(lens: [usize; N], f: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    // Taken out, not borrowed: an operation inside another then simply allocates its own.
    let mut kept = MEMORY.take();
    let mut large = Vec::new();
    let total: usize = lens.iter().sum();
    let memory = if total > KEPT { &mut large } else { &mut kept };
    if memory.len() < total {
        *memory = vec![0.0; total];
    }
    let mut rest = memory.as_mut_slice();
    let result = f(lens.map(|len| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
        rest = after;
        part
    }));
    MEMORY.set(kept);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_apart_and_their_memory_comes_back_up_to_a_bound() {
        // What another test on this thread has left.
        drop(MEMORY.take());
        let place = with_scratch([3, 0, 5], |[a, b, c]| {
            assert_eq!((a.len(), b.len(), c.len()), (3, 0, 5));
            a.fill(1.0);
            c.fill(2.0);
            assert_eq!(a, [1.0; 3]);
            // One inside another has memory of its own.
            with_scratch([8], |[inner]| inner.fill(3.0));
            assert_eq!((&*a, &*c), (&[1.0; 3][..], &[2.0; 5][..]));
            a.as_ptr()
        });
        assert_eq!(with_scratch([8], |[a]| a.as_ptr()), place);
        with_scratch([KEPT + 1], |[a]| a[KEPT] = 1.0);
        assert_eq!(MEMORY.take().len(), 8, "a larger one leaves what is kept alone");
    }
}
