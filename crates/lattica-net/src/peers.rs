//! What a node remembers of its peers: addresses, capped and ranked, and the connections that stand. Pure: time is an
//! argument, and what a connection or a peer carries besides (`C`, `S`) is the shell's business.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;
use swarm_wire::PeerId;

use crate::addr::{ADDRESS_MAX_BYTES, rank};

/// A peer as this node sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PeerInfo {
    /// The peer.
    pub peer: PeerId,
    /// Addresses under which it may be dialled, the most promising first.
    pub addrs: Vec<String>,
    /// Whether a connection stands.
    pub connected: bool,
    /// Whether the best connection goes through a relay.
    pub relayed: bool,
    /// Smoothed round trip, once measured.
    pub rtt_ms: Option<f64>,
}

/// One connection to a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PathInfo {
    /// Names the connection as long as it stands; older ones have smaller keys.
    pub key: u64,
    /// Whether it goes through a relay.
    pub relayed: bool,
    /// Whether this end dialled it.
    pub dialled: bool,
    /// Where it leads.
    pub address: String,
}

/// What a new or lost connection means for the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The first connection stands.
    Connected,
    /// A direct connection stands beside relayed ones.
    BecameDirect,
    /// The last connection is gone.
    Disconnected,
    /// One connection more or less.
    Nothing,
}

/// Which of several connections to a peer is used: the smallest. Both ends come to the same order, so that they never
/// each let go of the connection that the other one uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Whether the connection goes through a relay.
    pub relayed: bool,
    /// Whether the end that dialled has the larger peer id of the two.
    pub dialled_by_larger: bool,
}

/// Every peer that is connected or remembered.
#[derive(Debug)]
pub struct PeerTable<C, S> {
    peers: HashMap<PeerId, Peer<C, S>>,
    peers_limit: usize,
    addresses_limit: usize,
    in_use: fn(&S) -> bool,
}

#[derive(Debug)]
struct Peer<C, S> {
    /// Address and when it was last named or used, newest last.
    addresses: Vec<(String, Duration)>,
    connections: Vec<Connection<C>>,
    last_seen: Duration,
    state: S,
}

#[derive(Debug)]
struct Connection<C> {
    rank: Rank,
    key: u64,
    handle: C,
}

impl<C: Clone, S: Clone + Default> PeerTable<C, S> {
    /// A table of at most `peers_limit` peers that are not connected, each with at most `addresses_limit` addresses. Peers
    /// whose state is `in_use` are forgotten last.
    pub fn new(peers_limit: usize, addresses_limit: usize, in_use: fn(&S) -> bool) -> Self {
        Self { peers: HashMap::new(), peers_limit, addresses_limit, in_use }
    }

    /// Somebody named an address of `peer`. A peer's own connections push it to the front; beyond the limit the address
    /// that was not heard of for the longest time is forgotten.
    pub fn handle_address(&mut self, now: Duration, peer: &PeerId, address: &str) {
        if address.len() > ADDRESS_MAX_BYTES {
            return;
        }
        let limit = self.addresses_limit;
        let entry = self.entry(now, peer);
        entry.addresses.retain(|(known, _)| known != address);
        entry.addresses.push((address.to_owned(), now));
        if entry.addresses.len() > limit {
            entry.addresses.remove(0);
        }
    }

    /// An address did not lead to `peer`.
    pub fn handle_dead_address(&mut self, peer: &PeerId, address: &str) {
        if let Some(entry) = self.peers.get_mut(peer) {
            entry.addresses.retain(|(known, _)| known != address);
        }
    }

    /// A connection stands. `key` orders connections of the same rank: the smaller one is older.
    pub fn handle_connected(
        &mut self,
        now: Duration,
        peer: &PeerId,
        key: u64,
        rank: Rank,
        handle: C,
    ) -> Change {
        let entry = self.entry(now, peer);
        let first = entry.connections.is_empty();
        let all_relayed = entry.connections.iter().all(|c| c.rank.relayed);
        entry.last_seen = now;
        entry.connections.push(Connection { rank, key, handle });
        entry.connections.sort_by_key(|c| (c.rank, c.key));
        match (first, all_relayed && !rank.relayed) {
            (true, _) => Change::Connected,
            (false, true) => Change::BecameDirect,
            (false, false) => Change::Nothing,
        }
    }

    /// A connection is gone.
    pub fn handle_disconnected(&mut self, now: Duration, peer: &PeerId, key: u64) -> Change {
        let Some(entry) = self.peers.get_mut(peer) else { return Change::Nothing };
        let before = entry.connections.len();
        entry.connections.retain(|c| c.key != key);
        entry.last_seen = now;
        let lost_last = before > 0 && entry.connections.is_empty();
        if lost_last { Change::Disconnected } else { Change::Nothing }
    }

    /// The connection that new calls and streams use: the one of the smallest [`Rank`], then the oldest.
    pub fn best(&self, peer: &PeerId) -> Option<C> {
        self.peers.get(peer)?.connections.first().map(|c| c.handle.clone())
    }

    /// Every connection to a peer, in the order in which they are used.
    pub fn connections(&self, peer: &PeerId) -> Vec<C> {
        self.peers
            .get(peer)
            .map_or_else(Vec::new, |p| p.connections.iter().map(|c| c.handle.clone()).collect())
    }

    /// Whether connection `key` is the one that new calls and streams use.
    pub fn is_best(&self, peer: &PeerId, key: u64) -> bool {
        self.peers.get(peer).and_then(|p| p.connections.first()).is_some_and(|c| c.key == key)
    }

    /// Whether a connection stands, and whether the best one is relayed.
    pub fn connected(&self, peer: &PeerId) -> Option<Relayed> {
        self.peers.get(peer)?.connections.first().map(|c| Relayed(c.rank.relayed))
    }

    /// What the shell keeps for a peer, made on first use.
    pub fn state(&mut self, now: Duration, peer: &PeerId) -> S {
        self.entry(now, peer).state.clone()
    }

    /// What the shell keeps for a peer, if the peer is known.
    pub fn known_state(&self, peer: &PeerId) -> Option<S> {
        self.peers.get(peer).map(|p| p.state.clone())
    }

    /// What the shell keeps for peers that have been away for `absence` or longer.
    pub fn absent(&self, now: Duration, absence: Duration) -> impl Iterator<Item = &S> {
        let absent = move |p: &&Peer<C, S>| p.connections.is_empty() && now >= p.last_seen + absence;
        self.peers.values().filter(absent).map(|p| &p.state)
    }

    /// Addresses to dial, the most promising first.
    pub fn addresses(&self, peer: &PeerId) -> Vec<String> {
        let Some(entry) = self.peers.get(peer) else { return Vec::new() };
        let mut addresses: Vec<String> = entry.addresses.iter().rev().map(|(a, _)| a.clone()).collect();
        addresses.sort_by_key(|a| rank(a));
        addresses
    }

    /// Peers with a connection.
    pub fn connected_peers(&self) -> Vec<PeerId> {
        self.peers.iter().filter(|(_, p)| !p.connections.is_empty()).map(|(id, _)| id.clone()).collect()
    }

    /// Everything, in the order of peer ids. `rtt_ms` reads the round trip out of the shell's state and the connection in use.
    pub fn infos(&self, rtt_ms: impl Fn(&S, Option<&C>) -> Option<f64>) -> Vec<PeerInfo> {
        let mut infos: Vec<PeerInfo> = self
            .peers
            .iter()
            .map(|(peer, entry)| PeerInfo {
                peer: peer.clone(),
                addrs: self.addresses(peer),
                connected: !entry.connections.is_empty(),
                relayed: entry.connections.first().is_some_and(|c| c.rank.relayed),
                rtt_ms: rtt_ms(&entry.state, entry.connections.first().map(|c| &c.handle)),
            })
            .collect();
        infos.sort_by(|a, b| a.peer.cmp(&b.peer));
        infos
    }

    /// Peers remembered.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether no peer is remembered.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    fn entry(&mut self, now: Duration, peer: &PeerId) -> &mut Peer<C, S> {
        if !self.peers.contains_key(peer) {
            self.make_room();
        }
        self.peers.entry(peer.clone()).or_insert_with(|| Peer {
            addresses: Vec::new(),
            connections: Vec::new(),
            last_seen: now,
            state: S::default(),
        })
    }

    /// Forgets the longest unseen peer that is not connected when the table is full. Connected peers always stay: their
    /// number has a limit of its own.
    fn make_room(&mut self) {
        if self.peers.len() < self.peers_limit {
            return;
        }
        let idle = self.peers.iter().filter(|(_, p)| p.connections.is_empty());
        let last = idle.min_by_key(|(_, p)| ((self.in_use)(&p.state), p.last_seen));
        if let Some(oldest) = last.map(|(id, _)| id.clone()) {
            self.peers.remove(&oldest);
        }
    }
}

/// Whether the best connection goes through a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relayed(pub bool);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_ed25519(&[n; 32])
    }

    fn table() -> PeerTable<u64, ()> {
        PeerTable::new(4, 3, |()| false)
    }

    #[test]
    fn a_peer_whose_state_is_in_use_is_forgotten_last() {
        let mut table: PeerTable<u64, std::sync::Arc<()>> =
            PeerTable::new(2, 3, |state| std::sync::Arc::strong_count(state) > 1);
        let used = table.state(Duration::ZERO, &peer(1));
        for n in 2..6 {
            table.state(Duration::from_secs(n.into()), &peer(n));
        }
        assert_eq!((table.len(), table.known_state(&peer(1)).is_some()), (2, true));
        drop(used);
        table.state(Duration::from_secs(9), &peer(9));
        assert!(table.known_state(&peer(1)).is_none());
    }

    #[test]
    fn a_peer_that_comes_and_goes_is_absent_since_it_went_last() {
        let mut table = table();
        let (s, rank) = (Duration::from_secs, Rank { relayed: false, dialled_by_larger: false });
        table.handle_connected(s(0), &peer(1), 1, rank, 1);
        table.handle_disconnected(s(1), &peer(1), 1);
        table.handle_connected(s(10), &peer(1), 2, rank, 2);
        assert_eq!(table.absent(s(99), s(30)).count(), 0, "it is here");
        table.handle_disconnected(s(100), &peer(1), 2);
        // Somebody names an address of it: that is not the peer itself.
        table.handle_address(s(120), &peer(1), "/ip4/127.0.0.1/tcp/1");
        assert_eq!(table.absent(s(129), s(30)).count(), 0);
        assert_eq!(table.absent(s(130), s(30)).count(), 1);
    }

    #[test]
    fn direct_connections_are_preferred_and_changes_are_told_once() {
        let mut table = table();
        let now = Duration::ZERO;
        let rank = |relayed| Rank { relayed, dialled_by_larger: false };
        assert_eq!(table.handle_connected(now, &peer(1), 1, rank(true), 1), Change::Connected);
        assert_eq!(table.connected(&peer(1)), Some(Relayed(true)));
        assert_eq!(table.handle_connected(now, &peer(1), 2, rank(false), 2), Change::BecameDirect);
        assert_eq!(table.handle_connected(now, &peer(1), 3, rank(false), 3), Change::Nothing);
        assert_eq!(table.best(&peer(1)), Some(2));
        assert!(table.is_best(&peer(1), 2) && !table.is_best(&peer(1), 3));
        assert_eq!(table.handle_disconnected(now, &peer(1), 2), Change::Nothing);
        assert_eq!(table.best(&peer(1)), Some(3));
        assert_eq!(table.handle_disconnected(now, &peer(1), 3), Change::Nothing);
        assert_eq!(table.handle_disconnected(now, &peer(1), 1), Change::Disconnected);
        assert_eq!(table.handle_disconnected(now, &peer(1), 1), Change::Nothing);
        assert_eq!(table.best(&peer(1)), None);
    }

    #[test]
    fn both_ends_of_two_crossing_dials_use_the_same_connection() {
        let crossing = [(1, false), (2, true)]
            .map(|(key, larger)| (key, Rank { relayed: false, dialled_by_larger: larger }));
        let mut chosen = Vec::new();
        for order in [[0, 1], [1, 0]] {
            let mut table = table();
            for (key, i) in order.into_iter().enumerate() {
                let (connection, rank) = crossing[i];
                table.handle_connected(Duration::ZERO, &peer(1), key as u64, rank, connection);
            }
            chosen.push(table.best(&peer(1)));
        }
        assert_eq!(chosen, [Some(1), Some(1)]);
    }

    #[test]
    fn old_addresses_give_way_and_the_best_is_first() {
        let mut table = table();
        for (i, port) in [1, 2, 3, 4].into_iter().enumerate() {
            table.handle_address(
                Duration::from_secs(i as u64),
                &peer(1),
                &format!("/ip4/127.0.0.1/tcp/{port}"),
            );
        }
        table.handle_address(Duration::from_secs(9), &peer(1), "/ip4/127.0.0.1/udp/5/quic-v1");
        assert_eq!(
            table.addresses(&peer(1)),
            ["/ip4/127.0.0.1/udp/5/quic-v1", "/ip4/127.0.0.1/tcp/4", "/ip4/127.0.0.1/tcp/3"]
        );
        table.handle_dead_address(&peer(1), "/ip4/127.0.0.1/tcp/4");
        assert_eq!(table.addresses(&peer(1)).len(), 2);
    }

    proptest! {
        // Strangers can name any number of peers and addresses: memory stays bounded and connected peers stay known.
        #[test]
        fn floods_of_names_never_pass_the_limits(names in proptest::collection::vec((0u8..40, 0u16..40), 0..300)) {
            let mut table = table();
            let rank = Rank { relayed: false, dialled_by_larger: false };
            table.handle_connected(Duration::ZERO, &peer(200), 1, rank, 1);
            for (i, (who, port)) in names.iter().enumerate() {
                table.handle_address(Duration::from_secs(i as u64), &peer(*who), &format!("/ip4/127.0.0.1/tcp/{port}"));
                prop_assert!(table.len() <= 4);
                prop_assert!(table.addresses(&peer(*who)).len() <= 3);
            }
            prop_assert_eq!(table.best(&peer(200)), Some(1));
        }
    }
}
