//! Requests of one model in the order of their numbers, whatever order they come in.

use std::collections::BTreeMap;

/// What became of a request that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// It has its place.
    Taken,
    /// A request of this number came before.
    Repeated,
    /// Too many wait, or it is too far ahead; it may be offered again later.
    Full,
    /// Nothing is taken any more.
    Closed,
}

/// A bounded queue that gives out what it has by number, without gaps.
#[derive(Debug)]
pub(super) struct Ordered<T> {
    next: u64,
    /// `None` is the place of a request that was refused.
    waiting: BTreeMap<u64, Option<T>>,
    limit: u64,
    closed: bool,
}

impl<T> Ordered<T> {
    /// Begins with number 0.
    pub(super) fn new(limit: usize) -> Self {
        Self { next: 0, waiting: BTreeMap::new(), limit: limit as u64, closed: false }
    }

    /// What would become of number `seq`.
    pub(super) fn place(&self, seq: u64) -> Place {
        if self.closed {
            Place::Closed
        } else if seq < self.next || self.waiting.contains_key(&seq) {
            Place::Repeated
        } else if seq - self.next >= self.limit {
            Place::Full
        } else {
            Place::Taken
        }
    }

    /// Takes number `seq`; with `None`, nobody waits for it any longer.
    pub(super) fn offer(&mut self, seq: u64, item: Option<T>) -> Place {
        let place = self.place(seq);
        if place == Place::Taken {
            self.waiting.insert(seq, item);
        }
        place
    }

    /// The next one, if it is here.
    pub(super) fn pop(&mut self) -> Option<T> {
        while let Some(item) = self.waiting.remove(&self.next) {
            self.next += 1;
            if item.is_some() {
                return item;
            }
        }
        None
    }

    /// Whether anything waits for a number that has not come.
    pub(super) fn has_gap(&self) -> bool {
        self.waiting.first_key_value().is_some_and(|(first, _)| *first > self.next)
    }

    /// Waits no longer for the numbers before the first that is here.
    pub(super) fn skip_gap(&mut self) {
        self.next = self.waiting.first_key_value().map_or(self.next, |(first, _)| *first);
    }

    /// From now on nothing is taken.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Everything that waits in a queue that was closed.
    pub(super) fn left(&mut self) -> Option<Vec<T>> {
        self.closed.then(|| std::mem::take(&mut self.waiting).into_values().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refused_requests_keep_their_place_and_lost_ones_are_given_up() {
        let mut queue = Ordered::new(4);
        assert_eq!(queue.offer(1, Some('b')), Place::Taken);
        assert_eq!((queue.pop(), queue.has_gap()), (None, true));
        assert_eq!(queue.offer(0, None), Place::Taken);
        assert_eq!((queue.pop(), queue.pop(), queue.has_gap()), (Some('b'), None, false));
        assert_eq!([0, 1, 2, 5, 6].map(|n| queue.offer(n, Some('x'))), {
            use Place::{Full, Repeated, Taken};
            [Repeated, Repeated, Taken, Taken, Full]
        });
        assert_eq!(queue.pop(), Some('x'));
        assert!(queue.has_gap());
        queue.skip_gap();
        assert_eq!((queue.pop(), queue.pop()), (Some('x'), None));
        assert_eq!(queue.offer(7, Some('y')), Place::Taken);
        assert_eq!(queue.left(), None, "it is open");
        queue.close();
        assert_eq!(queue.offer(8, Some('z')), Place::Closed);
        assert_eq!(queue.left(), Some(vec!['y']));
    }

    proptest! {
        #[test]
        fn any_order_of_arrival_gives_the_same_order(order in Just((0..12u64).collect::<Vec<_>>()).prop_shuffle()) {
            let mut queue = Ordered::new(12);
            let mut out = Vec::new();
            for n in order {
                prop_assert_eq!(queue.offer(n, Some(n)), Place::Taken);
                prop_assert_eq!(queue.offer(n, Some(99)), Place::Repeated);
                out.extend(std::iter::from_fn(|| queue.pop()));
            }
            prop_assert_eq!(out, (0..12).collect::<Vec<_>>());
        }
    }
}
