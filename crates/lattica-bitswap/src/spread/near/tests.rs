//! What one member does when its neighbours on the local network show, announce, take back, and lie.

use super::super::tests::{holds, member, only_the_second_is_asked_until_it_leaves, requests};
use super::*;
use crate::spread::{Action, SpreadConfig};

/// A member that lacks two chunks, with neighbour 1 far away and 2 near.
fn with_near() -> Spread<u32> {
    let mut spread = member(2);
    spread.add_neighbour(&1, Duration::ZERO);
    spread.add_neighbour(&2, Duration::ZERO);
    spread.set_near(&2, true, Duration::ZERO);
    spread
}

fn coming(chunk: u32, lot: u32) -> SpreadMessage {
    SpreadMessage::Coming { chunk, lot }
}

fn sent_to_near(spread: &mut Spread<u32>) -> Vec<SpreadMessage> {
    std::iter::from_fn(|| spread.poll(Duration::ZERO))
        .filter_map(|action| match action {
            Action::Send { to: 2, message } if !matches!(message, SpreadMessage::Holds(_)) => Some(message),
            _ => None,
        })
        .collect()
}

/// What is said of chunks that are asked for outside, and to whom.
fn announcements(spread: &mut Spread<u32>) -> Vec<(u32, SpreadMessage)> {
    std::iter::from_fn(|| spread.poll(Duration::ZERO))
        .filter_map(|action| match action {
            Action::Send {
                to,
                message: message @ (SpreadMessage::Coming { .. } | SpreadMessage::Refuse(_)),
            } => Some((to, message)),
            _ => None,
        })
        .collect()
}

#[test]
fn what_a_near_neighbour_shows_is_asked_of_nobody_else_until_it_leaves() {
    only_the_second_is_asked_until_it_leaves(&mut with_near());
}

#[test]
fn what_comes_to_a_near_neighbour_is_waited_for_until_it_is_late_and_only_once() {
    let now = Duration::ZERO;
    let mut spread = with_near();
    spread.handle(&2, coming(0, 0), now);
    spread.handle(&1, holds(2, &[0]), now);
    spread.handle(&1, SpreadMessage::Offer(0), now);
    assert_eq!(requests(&mut spread, now), []);
    let late = spread.next_deadline().unwrap();
    assert_eq!(late, SpreadConfig::default().first_timeout);
    // Saying it again, or taking it back between, wins no time.
    spread.handle(&2, coming(0, 0), late / 2);
    assert_eq!(spread.next_deadline(), Some(late));
    spread.handle_timeout(late);
    assert_eq!(requests(&mut spread, late), [(1, 0)]);
    spread.handle(&2, coming(0, 0), late);
    assert_eq!(requests(&mut spread, late), []);
    assert!(spread.is_owed(&1, 0), "not taken back for one who did not keep its word");
}

#[test]
fn what_does_not_come_after_all_is_asked_for() {
    let now = Duration::ZERO;
    for leaves in [false, true] {
        let mut spread = with_near();
        spread.handle(&2, coming(0, 0), now);
        spread.handle(&1, holds(2, &[0]), now);
        assert_eq!(requests(&mut spread, now), []);
        if leaves {
            spread.set_near(&2, false, now);
        } else {
            spread.handle(&2, SpreadMessage::Refuse(0), now);
        }
        assert_eq!(requests(&mut spread, now), [(1, 0)]);
    }
}

#[test]
fn of_two_that_ask_at_once_the_smaller_lot_goes_on() {
    let now = Duration::ZERO;
    for (lot, goes_on) in [(0, false), (u32::MAX, true)] {
        let mut spread = with_near();
        spread.handle(&1, holds(2, &[1]), now);
        let own = SpreadMessage::Coming { chunk: 1, lot: spread.ties[1] };
        assert_eq!(sent_to_near(&mut spread), [own]);
        spread.handle(&2, coming(1, lot), now);
        let taken_back: Vec<_> = sent_to_near(&mut spread);
        assert_eq!(taken_back == [SpreadMessage::Refuse(1)], !goes_on, "{taken_back:?}");
        assert_eq!(spread.neighbours[&1].asked.contains_key(&1), goes_on);
        // What was under way already counts all the same.
        assert!(spread.is_owed(&1, 1));
    }
}

#[test]
fn what_was_said_before_both_were_known_to_be_near_counts_then() {
    let now = Duration::ZERO;
    for (lot, goes_on) in [(0, false), (u32::MAX, true)] {
        let mut spread = member(2);
        spread.add_neighbour(&1, now);
        spread.add_neighbour(&2, now);
        spread.handle(&1, holds(2, &[1]), now);
        spread.handle(&2, coming(1, lot), now);
        assert!(spread.neighbours[&1].asked.contains_key(&1), "it may be of another network");
        spread.set_near(&2, true, now);
        assert_eq!(spread.neighbours[&1].asked.contains_key(&1), goes_on);
        let own = (2, spread.coming(1));
        assert_eq!(announcements(&mut spread), if goes_on { vec![own] } else { vec![] });
    }
}

#[test]
fn who_is_near_from_now_on_or_no_more_hears_what_is_coming_and_nobody_else() {
    let now = Duration::ZERO;
    let mut spread = with_near();
    spread.add_neighbour(&3, now);
    spread.handle(&1, holds(2, &[1]), now);
    let own = spread.coming(1);
    assert_eq!(announcements(&mut spread), [(2, own.clone())]);
    for (peer, near) in [(3, true), (3, false), (2, false), (2, true)] {
        spread.set_near(&peer, near, now);
        let heard = if near { own.clone() } else { SpreadMessage::Refuse(1) };
        assert_eq!(announcements(&mut spread), [(peer, heard)]);
    }
}

#[test]
fn how_fast_a_near_neighbour_answers_says_nothing_of_what_comes_to_it() {
    let mut spread = with_near();
    for (peer, seconds) in [(1, 1), (2, 5)] {
        spread.neighbours.get_mut(&peer).unwrap().latency = Some(Duration::from_secs(seconds));
    }
    spread.handle(&2, coming(0, 0), Duration::ZERO);
    // Eight usual answers from outside.
    assert_eq!(spread.next_deadline(), Some(Duration::from_secs(8)));
}

#[test]
fn one_that_owes_an_answer_is_not_relied_on_and_who_is_far_counts_when_it_is_near() {
    let now = Duration::ZERO;
    let mut spread = with_near();
    spread.handle(&2, holds(2, &[0]), now);
    assert_eq!(requests(&mut spread, now), [(2, 0)]);
    spread.handle(&1, holds(2, &[0]), now);
    let late = spread.next_deadline().unwrap();
    spread.handle_timeout(late);
    assert!(spread.may_ask(&spread.neighbours[&1], 0));
    spread.handle(&1, coming(1, 0), now);
    assert_eq!(spread.near_copies, [0, 0]);
    // Both ends measure, one of them first.
    spread.set_near(&1, true, now);
    assert_eq!(spread.near_copies, [1, 1]);
}

#[test]
fn as_much_may_be_coming_as_may_be_asked_for() {
    let now = Duration::ZERO;
    let mut spread = member(1000);
    spread.add_neighbour(&2, now);
    spread.set_near(&2, true, now);
    (0..1000).for_each(|chunk| spread.handle(&2, coming(chunk, 0), now));
    assert_eq!(spread.neighbours[&2].coming.len(), SpreadConfig::default().max_outstanding);
    spread.handle(&2, coming(5000, 0), now);
    spread.remove_neighbour(&2, now);
    assert!(spread.near_copies.iter().all(|&copies| copies == 0));
}

#[test]
fn one_that_is_always_busy_is_not_waited_for() {
    let mut now = Duration::ZERO;
    let mut spread = with_near();
    spread.handle(&2, holds(2, &[0]), now);
    spread.handle(&1, holds(2, &[0]), now);
    for _ in 1..MOST_BUSY {
        assert_eq!(requests(&mut spread, now), [(2, 0)]);
        spread.handle(&2, SpreadMessage::Busy(0), now);
        now = spread.next_deadline().unwrap();
        spread.handle_timeout(now);
    }
    assert!(!spread.is_owed(&1, 0));
    spread.handle(&2, SpreadMessage::Busy(0), now);
    assert!(spread.is_owed(&1, 0));
}

#[test]
fn one_that_turns_out_to_be_near_is_asked_beside_another() {
    let now = Duration::ZERO;
    let mut spread = member(200);
    let all: Vec<u32> = (0..200).collect();
    for peer in [1, 2] {
        spread.add_neighbour(&peer, now);
    }
    spread.set_near(&2, true, now);
    spread.handle(&2, holds(200, &all), now);
    spread.handle(&1, holds(200, &all), now);
    assert!(requests(&mut spread, now).iter().all(|(peer, _)| *peer == 2));
    spread.set_near(&1, true, now);
    spread.handle_chunk(&2, *spread.neighbours[&2].asked.keys().next().unwrap(), now);
    assert!(requests(&mut spread, now).iter().any(|(peer, _)| *peer == 1));
}
