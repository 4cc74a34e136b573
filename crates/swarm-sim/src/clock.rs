//! Virtual time in microseconds, and what is due when. Things due at the same time come in the order they were set.

use std::collections::BTreeMap;

/// A heap of timers with stable order.
#[derive(Debug, Clone)]
pub struct Timers<T> {
    due: BTreeMap<(u64, u64), T>,
    set: u64,
    now_us: u64,
}

impl<T> Default for Timers<T> {
    fn default() -> Self {
        Self { due: BTreeMap::new(), set: 0, now_us: 0 }
    }
}

impl<T> Timers<T> {
    /// Microseconds since the start.
    pub fn now_us(&self) -> u64 {
        self.now_us
    }

    /// Sets `what` to be due at `at_us`, at once when that has passed.
    pub fn set_at(&mut self, at_us: u64, what: T) {
        self.due.insert((at_us.max(self.now_us), self.set), what);
        self.set += 1;
    }

    /// When the next thing is due.
    pub fn next_at_us(&self) -> Option<u64> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    /// Moves time to the next thing due and takes it, if that is not after `limit_us`.
    pub fn pop_until(&mut self, limit_us: u64) -> Option<T> {
        if self.next_at_us()? > limit_us {
            return None;
        }
        let ((at, _), what) = self.due.pop_first()?;
        self.now_us = at;
        Some(what)
    }

    /// Moves time forward to `at_us`; never back, and never over something due.
    pub fn advance_to(&mut self, at_us: u64) {
        let limit = self.next_at_us().unwrap_or(u64::MAX);
        self.now_us = self.now_us.max(at_us.min(limit));
    }

    /// How many things are set.
    pub fn len(&self) -> usize {
        self.due.len()
    }

    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self.due.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_things_come_in_time_then_in_setting_order() {
        let mut timers = Timers::default();
        for (at, what) in [(5, 'c'), (1, 'a'), (5, 'd'), (2, 'b')] {
            timers.set_at(at, what);
        }
        let mut order = Vec::new();
        while let Some(what) = timers.pop_until(5) {
            order.push((timers.now_us(), what));
        }
        assert_eq!(order, [(1, 'a'), (2, 'b'), (5, 'c'), (5, 'd')]);
    }

    #[test]
    fn time_neither_skips_nor_goes_back() {
        let mut timers = Timers::default();
        timers.set_at(10, ());
        timers.advance_to(50);
        assert_eq!(timers.now_us(), 10);
        assert_eq!(timers.pop_until(9), None);
        timers.pop_until(10).unwrap();
        timers.set_at(3, ());
        assert_eq!(timers.next_at_us(), Some(10));
    }
}
