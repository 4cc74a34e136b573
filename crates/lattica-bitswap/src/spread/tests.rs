//! Whole spreads in virtual time: near the fluid bound, little more than one copy from the source, through deaths and lies.

pub(super) mod trial;

use std::time::Duration;

use trial::{PLAIN, Trial, spread};

use super::*;

#[test]
fn sixteen_receivers_are_done_near_the_bound() {
    let o = spread(&Trial { n: 16, n_chunks: 256, seed: 1, ..PLAIN });
    assert!(o.unfinished == 0 && o.ratio < 1.15 && o.source_copies < 1.1, "{o:?}");
    assert!(o.duplicates <= 5, "{o:?}");
}

#[test]
fn a_hundred_receivers_are_done_near_the_bound() {
    let o = spread(&Trial { n: 100, n_chunks: 128, seed: 2, ..PLAIN });
    assert!(o.unfinished == 0 && o.ratio < 1.35 && o.source_copies < 1.3, "{o:?}");
}

#[test]
fn a_thousand_receivers_are_done_near_the_bound() {
    let o = spread(&Trial { n: 1000, n_chunks: 128, seed: 5, ..PLAIN });
    // 1.26 in this draw; the aim is 1.25.
    assert!(o.unfinished == 0 && o.ratio < 1.3 && o.source_copies < 1.3, "{o:?}");
}

/// Six networks of eight.
const LANS: Trial = Trial { n: 48, lan: 8, lan_rate: 125_000_000, seed: 6, ..PLAIN };

#[test]
fn little_more_than_one_copy_comes_into_a_local_network() {
    let unheeded = spread(&Trial { heeds: false, ..LANS });
    let o = spread(&LANS);
    // 1.29 copies in this draw and 1.03 times the bound; 5.64 and 1.06 where nobody heeds who is near.
    assert!(unheeded.copies_of_a_lan > 4.0, "{unheeded:?}");
    assert!(o.unfinished == 0 && o.copies_of_a_lan < 1.35 && o.source_copies < 1.1, "{o:?}");
    assert!(o.ratio <= unheeded.ratio, "{o:?} {unheeded:?}");
}

#[test]
fn a_local_network_as_slow_as_the_uplinks_brings_one_copy_in_and_takes_longer() {
    let o = spread(&Trial { lan_rate: 0, ..LANS });
    // 1.18 in this draw, 1.13 where nobody heeds who is near: what is near costs as much uplink there.
    assert!(o.unfinished == 0 && o.ratio < 1.35 && o.copies_of_a_lan < 1.2, "{o:?}");
}

#[test]
fn the_dead_and_liars_on_a_local_network_delay_the_others_and_no_more() {
    let o = spread(&Trial { dead: 0.2, ..LANS });
    assert!(o.unfinished == 0 && o.ratio < 1.2 && o.copies_of_a_lan < 1.4, "{o:?}");
    let o = spread(&Trial { liars: 0.1, ..LANS });
    // What liars show is asked for once more elsewhere, by everybody whom they lied to.
    assert!(o.unfinished == 0 && o.ratio < 1.5 && o.copies_of_a_lan < 2.5, "{o:?}");
    let o = spread(&Trial { liars: 0.1, only_promises: true, ..LANS });
    assert!(o.unfinished == 0 && o.ratio < 1.35 && o.copies_of_a_lan < 1.4, "{o:?}");
}

#[test]
fn relays_carry_little_more_than_one_copy_for_each_member_behind_them() {
    let relayed = Trial { n: 24, relayed: 8, seed: 7, ..PLAIN };
    let unheeded = spread(&Trial { heeds: false, ..relayed });
    let o = spread(&relayed);
    // 1.15 copies in this draw and 1.17 times the bound; 1.44 and 1.11 where nobody heeds who is behind a relay.
    assert!(unheeded.copies_over_relays > 1.35, "{unheeded:?}");
    assert!(o.unfinished == 0 && o.copies_over_relays < 1.2 && o.ratio < 1.25, "{o:?}");
    // Where everybody is behind one, all are served none the less.
    let o = spread(&Trial { n: 8, relayed: 8, seed: 8, ..PLAIN });
    assert!(o.unfinished == 0 && o.ratio < 1.3, "{o:?}");
}

#[test]
fn the_dead_slow_the_others_little() {
    let o = spread(&Trial { n: 40, n_chunks: 128, dead: 0.2, seed: 3, ..PLAIN });
    assert!(o.unfinished == 0 && o.ratio < 1.5 && o.source_copies < 1.3, "{o:?}");
}

#[test]
fn liars_are_dropped_and_the_honest_finish() {
    // Five of the source's six neighbours lie in this draw; the others find the source themselves.
    let o = spread(&Trial { n: 40, n_chunks: 128, liars: 0.1, seed: 4, ..PLAIN });
    assert!(o.unfinished == 0 && o.ratio < 4.0, "{o:?}");
}

pub(super) fn member(n_chunks: u32) -> Spread<u32> {
    Spread::new(SpreadConfig::default(), Bitmap::empty(n_chunks), false)
}

pub(super) fn requests(spread: &mut Spread<u32>, now: Duration) -> Vec<(u32, u32)> {
    std::iter::from_fn(|| spread.poll(now))
        .filter_map(|action| match action {
            Action::Send { to, message: SpreadMessage::Request(chunk) } => Some((to, chunk)),
            _ => None,
        })
        .collect()
}

pub(super) fn holds(n_chunks: u32, chunks: &[u32]) -> SpreadMessage {
    let mut bitmap = Bitmap::empty(n_chunks);
    chunks.iter().for_each(|&c| assert!(bitmap.insert(c)));
    SpreadMessage::Holds(bitmap)
}

/// Of two chunks that neighbour 1 has, and 2 one of, with 2 nearer in one way or the other.
pub(super) fn only_the_second_is_asked_until_it_leaves(spread: &mut Spread<u32>) {
    let now = Duration::ZERO;
    spread.handle(&2, holds(2, &[0]), now);
    spread.handle(&1, holds(2, &[0, 1]), now);
    let mut asked = requests(spread, now);
    asked.sort_unstable();
    assert_eq!(asked, [(1, 1), (2, 0)]);
    // Too busy just now: its chunk waits for it also when it is offered, and is asked elsewhere when it is gone.
    spread.handle(&2, SpreadMessage::Busy(0), now);
    spread.handle(&1, SpreadMessage::Offer(0), now);
    assert_eq!(requests(spread, now), []);
    spread.remove_neighbour(&2, now);
    assert_eq!(requests(spread, now), [(1, 0)]);
}

#[test]
fn the_rarest_chunk_is_asked_for_first_unless_another_is_urgent() {
    let now = Duration::ZERO;
    for (urgent, expected) in [(None, 2), (Some(1), 1)] {
        let config = SpreadConfig { min_outstanding: 1, ..SpreadConfig::default() };
        let mut spread = Spread::new(config, Bitmap::empty(4), false);
        for peer in 1..=3 {
            spread.add_neighbour(&peer, now);
        }
        // The only request that there is room for, until all is known.
        spread.handle(&1, holds(4, &[3]), now);
        assert_eq!(requests(&mut spread, now), [(1, 3)]);
        for (peer, chunks) in [(1, &[0, 1, 2, 3][..]), (2, &[0, 1, 2]), (3, &[0, 1])] {
            spread.handle(&peer, holds(4, chunks), now);
        }
        if let Some(chunk) = urgent {
            spread.set_urgency(chunk, 9);
        }
        requests(&mut spread, now);
        spread.handle_chunk(&1, 3, now);
        assert_eq!(requests(&mut spread, now)[0].1, expected, "urgent {urgent:?}");
    }
}

#[test]
fn a_chunk_is_asked_of_one_neighbour_and_again_elsewhere_when_that_one_leaves() {
    let now = Duration::ZERO;
    let mut spread = member(1);
    spread.add_neighbour(&1, now);
    spread.add_neighbour(&2, now);
    spread.handle(&1, holds(1, &[0]), now);
    spread.handle(&2, holds(1, &[0]), now);
    assert_eq!(requests(&mut spread, now), [(1, 0)]);
    spread.remove_neighbour(&1, now);
    assert_eq!(requests(&mut spread, now), [(2, 0)]);
    assert_eq!(spread.handle_chunk(&1, 0, now), Arrival::Unasked);
    assert_eq!(spread.handle_chunk(&2, 0, now), Arrival::New);
    assert!(spread.is_done());
}

#[test]
fn what_was_cancelled_may_still_come_and_counts_once() {
    let mut spread = member(1);
    spread.add_neighbour(&1, Duration::ZERO);
    spread.handle(&1, holds(1, &[0]), Duration::ZERO);
    assert_eq!(requests(&mut spread, Duration::ZERO), [(1, 0)]);
    let late = spread.next_deadline().unwrap();
    spread.handle_timeout(late);
    assert_eq!(spread.handle_chunk(&1, 0, late), Arrival::New);
    assert_eq!(spread.handle_chunk(&1, 0, late), Arrival::Duplicate);
    assert_eq!(spread.handle_chunk(&1, 0, late), Arrival::Unasked);
}

#[test]
fn who_shows_what_it_does_not_send_is_dropped() {
    let now = Duration::ZERO;
    let mut spread = member(8);
    spread.add_neighbour(&1, now);
    spread.handle(&1, holds(8, &[0, 1, 2, 3, 4, 5, 6, 7]), now);
    let mut dropped = false;
    for _ in 0..20 {
        let actions: Vec<_> = std::iter::from_fn(|| spread.poll(now)).collect();
        dropped |= actions.iter().any(|a| matches!(a, Action::Drop { peer: 1, .. }));
        for action in actions {
            if let Action::Send { to, message: SpreadMessage::Request(chunk) } = action {
                spread.handle(&to, SpreadMessage::Refuse(chunk), now);
            }
        }
    }
    assert!(dropped && spread.neighbours().count() == 0);
}

#[test]
fn only_who_sends_what_is_wrong_is_told_to_be_wrong() {
    let now = Duration::ZERO;
    let drops = |spread: &mut Spread<u32>, now| {
        let actions = std::iter::from_fn(|| spread.poll(now)).collect::<Vec<_>>();
        actions.into_iter().find_map(|a| match a {
            Action::Drop { peer: 1, wrong, .. } => Some(wrong),
            _ => None,
        })
    };
    let mut slow = member(8);
    slow.add_neighbour(&1, now);
    slow.handle(&1, holds(8, &[0, 1, 2, 3]), now);
    let mut dropped = None;
    for _ in 0..10 {
        let Some(late) = slow.next_deadline() else { break };
        slow.handle_timeout(late);
        dropped = dropped.or_else(|| drops(&mut slow, late));
    }
    assert_eq!(dropped, Some(false));
    let mut lied_to = member(8);
    lied_to.add_neighbour(&1, now);
    lied_to.handle_wrong(&1, now);
    assert_eq!(drops(&mut lied_to, now), Some(true));
}

#[test]
fn declining_what_was_not_offered_is_not_remembered() {
    let now = Duration::ZERO;
    let mut spread = Spread::new(SpreadConfig::default(), Bitmap::full(8), false);
    spread.add_neighbour(&1, now);
    for chunk in 0..8 {
        spread.handle(&1, SpreadMessage::Decline(chunk), now);
    }
    let actions: Vec<_> = std::iter::from_fn(|| spread.poll(now)).collect();
    assert!(spread.neighbours[&1].declined.is_empty());
    assert!(actions.iter().any(|a| matches!(a, Action::Send { message: SpreadMessage::Offer(_), .. })));
}

#[test]
fn a_source_shows_every_chunk_once_before_any_twice() {
    let now = Duration::ZERO;
    let mut source = Spread::new(SpreadConfig::default(), Bitmap::full(20), true);
    (1..=5).for_each(|peer: u32| source.add_neighbour(&peer, now));
    let mut shown = Vec::new();
    for _ in 0..400 {
        match source.poll(now) {
            Some(Action::Send { to, message: SpreadMessage::Have(chunks) }) => {
                shown.extend(&chunks);
                source.handle(&to, SpreadMessage::Request(chunks[0]), now);
            }
            Some(Action::Upload { to, chunk }) => {
                source.handle_uploaded(&to, chunk, true, now);
                source.handle(&to, SpreadMessage::Have(vec![chunk]), now);
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut first: Vec<u32> = shown[..20].to_vec();
    first.sort_unstable();
    assert_eq!(first, (0..20).collect::<Vec<_>>());
    // Beyond the first pass only within the budget of 1.2 copies.
    assert_eq!(source.uploaded(), 24);
}
