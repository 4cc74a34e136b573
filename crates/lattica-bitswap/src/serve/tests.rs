//! Serving: fairness, budgets, and what is remembered.

use bytes::Bytes;

use super::*;
use crate::{Block, HashKind};

fn peer(n: u8) -> PeerId {
    PeerId::from_ed25519(&[n; 32])
}

fn cid(n: u32) -> Cid {
    *Block::new(HashKind::Blake3, Bytes::from(n.to_le_bytes().to_vec())).unwrap().cid()
}

fn want(n: u32, kind: WantKind, priority: i32) -> WantEntry {
    WantEntry::Want { cid: cid(n), kind, priority, send_dont_have: false }
}

fn wants(range: std::ops::Range<u32>) -> Vec<WantEntry> {
    range.map(|n| want(n, WantKind::Block, 1)).collect()
}

const MIB: usize = 1 << 20;

#[test]
fn peers_take_turns_and_a_greedy_one_does_not_delay_the_others() {
    let mut server =
        Server::new(ServeConfig { max_in_flight_bytes_per_peer: 1 << 40, ..ServeConfig::default() });
    server.handle_wantlist(&peer(1), &wants(0..100), false, |_| Some(MIB));
    server.handle_wantlist(&peer(2), &wants(0..3), false, |_| Some(MIB));
    server.handle_wantlist(&peer(3), &wants(0..3), false, |_| Some(MIB));
    let first: Vec<PeerId> = (0..9).map(|_| server.poll().unwrap().peer).collect();
    for other in [peer(2), peer(3)] {
        assert_eq!(first.iter().filter(|p| **p == other).count(), 3, "{first:?}");
    }
}

#[test]
fn budgets_hold_until_something_was_sent() {
    let config = ServeConfig {
        max_in_flight_bytes_per_peer: 2 * MIB as u64,
        max_in_flight_bytes: 3 * MIB as u64,
        ..ServeConfig::default()
    };
    let mut server = Server::new(config);
    server.handle_wantlist(&peer(1), &wants(0..10), false, |_| Some(MIB));
    server.handle_wantlist(&peer(2), &wants(0..10), false, |_| Some(MIB));
    let mut under_way = Vec::new();
    while let Some(batch) = server.poll() {
        under_way.push(batch);
    }
    assert_eq!(server.in_flight_bytes(), 3 * MIB as u64);
    let batch = under_way.remove(0);
    server.handle_sent(&batch.peer, batch.bytes);
    assert_eq!(server.poll().unwrap().bytes, MIB as u64);
    assert_eq!(server.poll(), None);
    server.remove_peer(&peer(1));
    server.remove_peer(&peer(2));
    assert_eq!(server.in_flight_bytes(), 0);
    for batch in under_way {
        server.handle_sent(&batch.peer, batch.bytes);
    }
    assert_eq!(server.in_flight_bytes(), 0, "bytes of a removed peer are given back once");
}

#[test]
fn a_batch_fills_one_message_with_small_blocks_in_order_of_priority() {
    let mut server = Server::new(ServeConfig::default());
    let entries: Vec<WantEntry> = (0..10).map(|n| want(n, WantKind::Block, n as i32)).collect();
    server.handle_wantlist(&peer(1), &entries, false, |_| Some(MIB / 4));
    let batch = server.poll().unwrap();
    assert_eq!(batch.blocks, [cid(9), cid(8), cid(7), cid(6)]);
    assert_eq!(batch.pending_bytes as usize, 6 * MIB / 4);
}

#[test]
fn absent_blocks_are_denied_only_when_asked_and_served_when_they_arrive() {
    let mut server = Server::new(ServeConfig::default());
    let asking = WantEntry::Want { cid: cid(1), kind: WantKind::Block, priority: 1, send_dont_have: true };
    server.handle_wantlist(&peer(1), &[asking, want(2, WantKind::Have, 1)], false, |_| None);
    let batch = server.poll().unwrap();
    assert_eq!((batch.presences, batch.blocks), (vec![(cid(1), false)], vec![]));
    assert_eq!(server.poll(), None);
    server.block_arrived(&cid(2), MIB);
    assert_eq!(server.poll().unwrap().presences, [(cid(2), true)]);
    server.block_arrived(&cid(1), MIB);
    assert_eq!(server.poll().unwrap().blocks, [cid(1)]);
}

#[test]
fn a_small_block_is_sent_in_place_of_its_presence() {
    let mut server = Server::new(ServeConfig::default());
    server.handle_wantlist(&peer(1), &[want(1, WantKind::Have, 1)], false, |_| Some(1024));
    server.handle_wantlist(&peer(1), &[want(2, WantKind::Have, 1)], false, |_| Some(1025));
    let batch = server.poll().unwrap();
    assert_eq!((batch.blocks, batch.presences), (vec![cid(1)], vec![(cid(2), true)]));
}

#[test]
fn cancelled_and_replaced_wants_are_not_served() {
    let mut server = Server::new(ServeConfig::default());
    server.handle_wantlist(&peer(1), &wants(0..3), false, |_| Some(MIB));
    server.handle_wantlist(&peer(1), &[WantEntry::Cancel { cid: cid(1) }], false, |_| Some(MIB));
    assert_eq!(server.n_wants(&peer(1)), 2);
    server.handle_wantlist(&peer(1), &wants(7..8), true, |_| Some(MIB));
    assert_eq!(server.poll().unwrap().blocks, [cid(7)]);
    assert_eq!(server.poll(), None);
}

#[test]
fn one_peer_cannot_make_the_server_remember_without_end() {
    let config = ServeConfig { max_peers: 2, ..ServeConfig::default() };
    let mut server = Server::new(config);
    for round in 0..4 {
        let entries: Vec<WantEntry> = (0..2000)
            .map(|n| WantEntry::Want {
                cid: cid(round * 2000 + n),
                kind: WantKind::Have,
                priority: 1,
                send_dont_have: true,
            })
            .collect();
        server.handle_wantlist(&peer(1), &entries, false, |_| None);
    }
    assert_eq!(server.n_wants(&peer(1)), 1024);
    assert!(server.poll().unwrap().presences.len() <= 2048);
    assert!(server.waiting.len() <= 1024);
    server.handle_wantlist(&peer(2), &wants(0..1), false, |_| Some(1));
    server.handle_wantlist(&peer(3), &wants(0..1), false, |_| Some(1));
    assert_eq!(server.n_wants(&peer(3)), 0, "a third peer finds no place");
}
