//! Sessions against simulated peers in virtual time: honest, slow, empty, lying and leaving ones.

use std::collections::{BTreeMap, BinaryHeap};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::{Block, HashKind};

fn peer(n: u8) -> PeerId {
    PeerId::from_ed25519(&[n; 32])
}

fn cid(n: u32) -> Cid {
    *Block::new(HashKind::Blake3, Bytes::from(n.to_le_bytes().to_vec())).unwrap().cid()
}

fn wanted(n: u32) -> Vec<Wanted> {
    (0..n).map(|i| Wanted { cid: cid(i), length: 1 << 20, priority: 0 }).collect()
}

const MS: Duration = Duration::from_millis(1);

/// What a simulated peer does.
#[derive(Debug, Clone, Default)]
struct Behaviour {
    has: Vec<u32>,
    latency_ms: u64,
    /// Answers every want with garbage.
    liar: bool,
    /// Drops every n-th want without a word.
    loses_every: Option<u32>,
    leaves_at_ms: Option<u64>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Block(PeerId, u32),
    Garbage(PeerId),
    Presence(PeerId, u32, bool),
    Leave(PeerId),
}

/// Result of a run: outcome, virtual time, how often each peer was asked for each block.
struct Run {
    outlook: Outlook,
    took: Duration,
    asks: BTreeMap<(PeerId, u32), u32>,
    duplicates: u64,
}

fn run(n: u32, peers: &[(Behaviour, bool)], config: SessionConfig) -> Run {
    let number: BTreeMap<Vec<u8>, u32> = (0..n).map(|i| (cid(i).to_bytes(), i)).collect();
    let mut session = Session::new(config, &wanted(n));
    let mut events: BinaryHeap<std::cmp::Reverse<(u64, u64, Event)>> = BinaryHeap::new();
    let mut sequence = 0;
    let mut wants_seen: BTreeMap<PeerId, u32> = BTreeMap::new();
    let mut cancelled: BTreeMap<(PeerId, u32), u64> = BTreeMap::new();
    let mut asks = BTreeMap::new();
    let mut now = 0u64;
    for (i, (behaviour, holder)) in peers.iter().enumerate() {
        let name = peer(i as u8);
        if *holder {
            session.add_holder(&name, Duration::ZERO);
        } else {
            session.add_candidates([&name], Duration::ZERO);
        }
        if let Some(at) = behaviour.leaves_at_ms {
            events.push(std::cmp::Reverse((at, u64::MAX, Event::Leave(name))));
        }
    }
    let mut gone: Vec<PeerId> = Vec::new();
    for _ in 0..200_000 {
        while let Some((to, entries)) = session.poll_send() {
            assert!(!gone.contains(&to), "asked a peer that left");
            let behaviour = &peers[usize::from(to.ed25519_public_key().unwrap()[0])].0;
            for entry in entries {
                let (cid, kind, deny) = match entry {
                    WantEntry::Cancel { cid } => {
                        cancelled.insert((to.clone(), number[&cid.to_bytes()]), now);
                        continue;
                    }
                    WantEntry::Want { cid, kind, send_dont_have, .. } => (cid, kind, send_dont_have),
                };
                let index = number[&cid.to_bytes()];
                let seen = wants_seen.entry(to.clone()).or_default();
                *seen += 1;
                if kind == WantKind::Block {
                    *asks.entry((to.clone(), index)).or_insert(0) += 1;
                }
                if behaviour.loses_every.is_some_and(|every| seen.is_multiple_of(every)) {
                    continue;
                }
                let event = match (behaviour.has.contains(&index), kind) {
                    (true, _) if behaviour.liar && kind == WantKind::Block => Event::Garbage(to.clone()),
                    (true, WantKind::Block) => Event::Block(to.clone(), index),
                    (true, WantKind::Have) => Event::Presence(to.clone(), index, true),
                    (false, _) if deny => Event::Presence(to.clone(), index, false),
                    (false, _) => continue,
                };
                sequence += 1;
                // One block takes 10 ms on every link, after the latency.
                let at = now + behaviour.latency_ms.max(1) + if kind == WantKind::Block { 10 } else { 0 };
                events.push(std::cmp::Reverse((at, sequence, event)));
            }
        }
        let outlook = session.outlook();
        let next_event = events.peek().map(|e| e.0.0);
        let next_timer = session.next_deadline().map(|d| d.as_millis() as u64 + 1);
        let next = next_event.into_iter().chain(next_timer).min();
        let (Outlook::Waiting, Some(next)) = (outlook, next) else {
            return Run { outlook, took: MS * now as u32, asks, duplicates: session.duplicates() };
        };
        now = now.max(next);
        let at = MS * now as u32;
        if next_event == Some(next) {
            let std::cmp::Reverse((_, _, event)) = events.pop().unwrap();
            match event {
                Event::Block(from, i) if !gone.contains(&from) => {
                    let arrival = session.handle_block(&from, &cid(i), at);
                    assert_ne!(arrival, Arrival::Unasked, "an honest peer is never taken for a liar");
                }
                Event::Garbage(from) if !gone.contains(&from) => {
                    assert_eq!(session.handle_block(&from, &cid(u32::MAX), at), Arrival::Unasked);
                    session.drop_peer(&from, at);
                }
                Event::Presence(from, i, have) if !gone.contains(&from) => {
                    session.handle_presence(&from, &cid(i), have, at);
                }
                Event::Leave(from) => {
                    session.remove_peer(&from, at);
                    gone.push(from);
                }
                _ => {}
            }
        } else {
            session.handle_timeout(at);
        }
    }
    panic!("the session does not come to an end");
}

fn all(n: u32, latency_ms: u64) -> Behaviour {
    Behaviour { has: (0..n).collect(), latency_ms, ..Behaviour::default() }
}

#[test]
fn one_holder_gives_everything_and_is_asked_once_for_each() {
    let result = run(50, &[(all(50, 5), true)], SessionConfig::default());
    assert_eq!(result.outlook, Outlook::Done);
    assert!(result.asks.values().all(|&n| n == 1));
    assert_eq!(result.asks.len(), 50);
}

#[test]
fn equal_holders_share_the_work() {
    let peers: Vec<_> = (0..4).map(|_| (all(80, 5), true)).collect();
    let result = run(80, &peers, SessionConfig::default());
    for i in 0..4 {
        let share = result.asks.keys().filter(|(p, _)| *p == peer(i)).count();
        assert!((10..=30).contains(&share), "peer {i} was asked for {share} of 80");
    }
    assert_eq!(result.duplicates, 0);
}

#[test]
fn one_holder_among_many_candidates_is_found_in_two_round_trips() {
    for holder in [0, 31, 63] {
        let mut peers: Vec<_> =
            (0..64).map(|_| (Behaviour { latency_ms: 20, ..Behaviour::default() }, false)).collect();
        peers[holder] = (all(1, 20), false);
        let result = run(1, &peers, SessionConfig::default());
        assert_eq!(result.outlook, Outlook::Done);
        assert!(result.took <= MS * (2 * 20 + 10), "{:?}", result.took);
    }
}

#[test]
fn presences_of_many_blocks_are_asked_of_few_peers() {
    let mut session = Session::new(SessionConfig::default(), &wanted(1000));
    session.add_candidates(&(0..64).map(peer).collect::<Vec<_>>(), Duration::ZERO);
    assert_eq!(session.asked_peers(), SessionConfig::default().max_candidates);
}

#[test]
fn who_answers_is_asked_on_alone_and_who_refuses_leaves_its_blocks_to_the_others() {
    let config = SessionConfig { presence_window: 2, ..SessionConfig::default() };
    let mut session = Session::new(config, &wanted(6));
    session.add_candidates(&[peer(1), peer(2)], Duration::ZERO);
    while session.poll_send().is_some() {}
    session.handle_presence(&peer(1), &cid(0), false, MS);
    let (to, entries) = session.poll_send().unwrap();
    assert!(to == peer(1) && matches!(entries[..], [WantEntry::Want { kind: WantKind::Have, .. }]));
    assert!(session.poll_send().is_none(), "nothing has changed for the other");
    // Both have block 1, one is asked for it and has lost it.
    for i in [1, 2] {
        session.handle_presence(&peer(i), &cid(1), true, MS);
    }
    while session.poll_send().is_some() {}
    session.handle_presence(&peer(1), &cid(1), false, MS * 2);
    let asked = std::iter::from_fn(|| session.poll_send()).any(|(to, entries)| {
        let for_it = |e: &WantEntry| matches!(e, WantEntry::Want { cid: c, kind: WantKind::Block, .. } if *c == cid(1));
        to == peer(2) && entries.iter().any(for_it)
    });
    assert!(asked);
}

#[test]
fn what_nobody_has_is_said_so() {
    let peers = vec![(all(3, 5), false), (all(3, 9), true)];
    assert_eq!(run(4, &peers, SessionConfig::default()).outlook, Outlook::NobodyHas);
    assert_eq!(run(4, &[], SessionConfig::default()).outlook, Outlook::NoPeers);
    assert_eq!(run(0, &[], SessionConfig::default()).outlook, Outlook::Done);
}

#[test]
fn a_liar_is_dropped_at_its_first_lie_and_the_rest_comes_from_others() {
    let liar = Behaviour { liar: true, ..all(40, 1) };
    let result = run(40, &[(liar, true), (all(40, 30), true)], SessionConfig::default());
    assert_eq!(result.outlook, Outlook::Done);
    let to_liar = result.asks.keys().filter(|(p, _)| *p == peer(0)).count();
    assert!(to_liar <= 4, "the liar was asked {to_liar} times: more than its first window");
    let only_liar = Behaviour { liar: true, ..all(4, 1) };
    assert_eq!(run(4, &[(only_liar, true)], SessionConfig::default()).outlook, Outlook::NoPeers);
}

#[test]
fn a_silent_peer_is_given_up_and_its_blocks_are_asked_elsewhere() {
    let silent = Behaviour { loses_every: Some(1), ..all(10, 1) };
    let result = run(10, &[(silent.clone(), true), (all(10, 5), true)], SessionConfig::default());
    assert_eq!(result.outlook, Outlook::Done);
    assert!(result.took < Duration::from_secs(8), "{:?}", result.took);
    assert_eq!(run(10, &[(silent, true)], SessionConfig::default()).outlook, Outlook::NoPeers);
}

#[test]
fn a_slow_last_block_is_asked_twice_but_not_everything() {
    let slow = all(100, 2500);
    let result = run(100, &[(slow, true), (all(100, 5), true)], SessionConfig::default());
    assert_eq!(result.outlook, Outlook::Done);
    assert!(result.took < Duration::from_millis(2400), "{:?}", result.took);
    assert!(result.duplicates <= 4);
}

#[test]
fn urgent_blocks_are_asked_first() {
    let mut wanted = wanted(10);
    wanted[7].priority = 5;
    let mut session = Session::new(SessionConfig { seed: 3, ..SessionConfig::default() }, &wanted);
    session.add_holder(&peer(1), Duration::ZERO);
    let (_, entries) = session.poll_send().unwrap();
    assert!(matches!(entries[0], WantEntry::Want { cid: first, .. } if first == cid(7)));
}

#[test]
fn outstanding_bytes_and_wants_are_bounded() {
    let config = SessionConfig::default();
    let mut session = Session::new(config.clone(), &wanted(3000));
    session.add_holder(&peer(1), Duration::ZERO);
    let (_, entries) = session.poll_send().unwrap();
    assert_eq!(entries.len() as u64, config.initial_window_bytes >> 20);
    let small: Vec<Wanted> = (0..3000).map(|i| Wanted { cid: cid(i), length: 10, priority: 0 }).collect();
    let mut session = Session::new(config, &small);
    session.add_holder(&peer(1), Duration::ZERO);
    assert_eq!(session.poll_send().unwrap().1.len(), 1024);
    assert!(session.poll_send().is_none());
}

#[test]
fn a_peer_that_gets_a_block_later_is_asked_when_it_says_so() {
    let mut session = Session::new(SessionConfig::default(), &wanted(1));
    session.add_candidates([&peer(1)], Duration::ZERO);
    session.poll_send().unwrap();
    session.handle_presence(&peer(1), &cid(0), false, MS);
    assert_eq!(session.outlook(), Outlook::NobodyHas);
    session.handle_presence(&peer(1), &cid(0), true, MS * 2);
    assert_eq!(session.outlook(), Outlook::Waiting);
    let (_, entries) = session.poll_send().unwrap();
    assert!(matches!(entries[..], [WantEntry::Want { kind: WantKind::Block, .. }]));
    assert_eq!(session.handle_block(&peer(1), &cid(0), MS * 3), Arrival::New);
    assert_eq!(session.outlook(), Outlook::Done);
}

#[test]
fn an_unasked_block_is_no_gift() {
    let mut session = Session::new(SessionConfig::default(), &wanted(2));
    session.add_candidates([&peer(1)], Duration::ZERO);
    assert_eq!(session.handle_block(&peer(2), &cid(0), MS), Arrival::Unasked);
    assert_eq!(session.handle_block(&peer(1), &cid(9), MS), Arrival::Unasked);
    assert_eq!(session.missing(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// The naive model: the fetch ends complete exactly when each block is held by somebody who is honest, stays, and
    /// does not lose wants; whatever else the others do.
    #[test]
    fn a_fetch_completes_iff_reliable_peers_hold_everything(
        n in 1u32..40,
        peers in proptest::collection::vec(
            (any::<u64>(), 0u64..200, 0u8..10, any::<bool>()), 1..7),
        seed in any::<u64>(),
    ) {
        let behaviours: Vec<(Behaviour, bool)> = peers.iter().map(|&(mask, latency_ms, kind, holder)| {
            let has = (0..n).filter(|i| kind % 2 == 0 || mask >> i & 1 == 1).collect();
            let base = Behaviour { has, latency_ms, ..Behaviour::default() };
            (match kind {
                0 => Behaviour { liar: true, ..base },
                1 => Behaviour { loses_every: Some(2), ..base },
                2 => Behaviour { leaves_at_ms: Some(100), ..base },
                3 => Behaviour { loses_every: Some(1), ..base },
                _ => base,
            }, holder)
        }).collect();
        let reliable: Vec<&Behaviour> = behaviours.iter().map(|b| &b.0)
            .filter(|b| !b.liar && b.leaves_at_ms.is_none() && b.loses_every.is_none()).collect();
        let complete = (0..n).all(|i| reliable.iter().any(|b| b.has.contains(&i)));
        let result = run(n, &behaviours, SessionConfig { seed, ..SessionConfig::default() });
        if complete {
            prop_assert_eq!(result.outlook, Outlook::Done);
        }
        let anyone = (0..n).all(|i| behaviours.iter().any(|(b, _)| !b.liar && b.has.contains(&i)));
        if !anyone {
            prop_assert_ne!(result.outlook, Outlook::Done);
        }
    }
}
