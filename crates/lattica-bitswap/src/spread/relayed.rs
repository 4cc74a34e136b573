//! Members behind relays are leaves: what a relay carries is paid for by others, so that it carries each chunk about once.
//!
//! A chunk that a neighbour shows directly is asked of nobody over a relay, and a source shows chunks that nobody has to
//! direct neighbours, from whom everybody gets them. Who has no direct neighbours asks over relays as others ask directly.

use super::Spread;
use super::neighbour::Neighbour;

impl<P: Ord + Clone> Spread<P> {
    /// Counts what a neighbour shows as what may be had directly, or not any more; `true` when that has changed.
    pub(super) fn count_direct(&mut self, peer: &P, direct: bool) -> bool {
        let neighbour = self.neighbours.get_mut(peer).expect("known to the caller");
        let changed = std::mem::replace(&mut neighbour.direct, direct) != direct;
        for chunk in neighbour.holds.iter().filter(|_| changed) {
            let copies = &mut self.direct_copies[chunk as usize];
            *copies = if direct { *copies + 1 } else { *copies - 1 };
        }
        changed
    }

    /// A neighbour that is gone shows nothing.
    pub(super) fn forget_direct(&mut self, gone: &Neighbour) {
        if gone.direct {
            gone.holds.iter().for_each(|chunk| self.direct_copies[chunk as usize] -= 1);
            self.look_again();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::{holds, member, only_the_second_is_asked_until_it_leaves, requests};
    use super::super::{Action, Bitmap, SpreadConfig, SpreadMessage};
    use super::*;

    const NOW: Duration = Duration::ZERO;

    /// A member that lacks so many chunks, with neighbour 1 behind a relay and 2 not.
    fn with_leaf(n_chunks: u32) -> Spread<u32> {
        let mut spread = member(n_chunks);
        spread.add_relayed_neighbour(&1, NOW);
        spread.add_neighbour(&2, NOW);
        spread
    }

    #[test]
    fn what_is_shown_directly_is_not_asked_over_a_relay_until_its_holder_leaves() {
        only_the_second_is_asked_until_it_leaves(&mut with_leaf(2));
    }

    #[test]
    fn a_direct_neighbour_that_owes_an_answer_does_not_keep_others_from_being_asked() {
        let mut spread = with_leaf(1);
        spread.handle(&2, holds(1, &[0]), NOW);
        spread.handle(&1, holds(1, &[0]), NOW);
        assert_eq!(requests(&mut spread, NOW), [(2, 0)]);
        let late = spread.next_deadline().unwrap();
        spread.handle_timeout(late);
        assert_eq!(requests(&mut spread, late), [(1, 0)]);
    }

    #[test]
    fn a_leaf_is_not_near_whatever_other_way_there_is_to_it() {
        let mut spread = with_leaf(1);
        spread.set_near(&1, true, NOW);
        spread.handle(&2, holds(1, &[0]), NOW);
        spread.handle(&1, holds(1, &[0]), NOW);
        assert_eq!(requests(&mut spread, NOW), [(2, 0)]);
        // What were left to the near one, and over a relay to the direct one, nobody would be asked for.
        spread.handle(&2, SpreadMessage::Busy(0), NOW);
        let later = spread.next_deadline().unwrap();
        spread.handle_timeout(later);
        assert_eq!(requests(&mut spread, later), [(2, 0)]);
    }

    #[test]
    fn one_that_is_alone_is_asked_over_the_relay_and_what_others_show_directly_is_counted() {
        let mut spread = member(2);
        spread.add_relayed_neighbour(&1, NOW);
        spread.handle(&1, holds(2, &[0]), NOW);
        assert_eq!(requests(&mut spread, NOW), [(1, 0)]);
        spread.add_neighbour(&2, NOW);
        spread.handle(&2, holds(2, &[1]), NOW);
        assert_eq!(requests(&mut spread, NOW), [(2, 1)]);
        assert_eq!(spread.direct_copies, [0, 1]);
        spread.remove_neighbour(&2, NOW);
        assert_eq!(spread.direct_copies, [0, 0]);
    }

    #[test]
    fn a_source_shows_a_leaf_only_what_others_get_too() {
        let shown = |source: &mut Spread<u32>| {
            let mut shown = [Vec::new(), Vec::new()];
            while let Some(action) = source.poll(NOW) {
                if let Action::Send { to, message: SpreadMessage::Have(chunks) } = action {
                    shown[to as usize].extend(chunks);
                }
            }
            shown
        };
        let mut source = Spread::new(SpreadConfig::default(), Bitmap::full(8), true);
        source.add_relayed_neighbour(&0, NOW);
        assert_eq!(shown(&mut source)[0].len(), 2, "there is nobody else");
        let mut source = Spread::new(SpreadConfig::default(), Bitmap::full(8), true);
        source.add_neighbour(&1, NOW);
        source.add_relayed_neighbour(&0, NOW);
        let [leaf, direct] = shown(&mut source);
        assert!(direct.len() == 2 && leaf.is_empty(), "{leaf:?} {direct:?}");
        source.handle(&1, SpreadMessage::Have(vec![direct[0]]), NOW);
        assert_eq!(shown(&mut source)[0], [direct[0]]);
    }
}
