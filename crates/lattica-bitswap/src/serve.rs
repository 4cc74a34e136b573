//! Which wanted block goes to whom next: peers take turns, within a budget of bytes under way.
//!
//! Pure. A want for a block that is not here stays on the peer's list, as Bitswap has it: when the block arrives
//! ([`Server::block_arrived`]) the peer gets it, or hears that we have it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use swarm_wire::{Cid, PeerId};

use crate::ServeConfig;
use crate::wire::{MESSAGE_TARGET_BYTES, WantEntry, WantKind};

/// The next thing to send to one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// To whom.
    pub peer: PeerId,
    /// Blocks to load and send.
    pub blocks: Vec<Cid>,
    /// Presences to tell.
    pub presences: Vec<(Cid, bool)>,
    /// What this batch takes of the budget; pass it to [`Server::handle_sent`].
    pub bytes: u64,
    /// Bytes that stay queued for the peer.
    pub pending_bytes: u32,
}

#[derive(Debug, Clone, Copy)]
struct Want {
    kind: WantKind,
    priority: i32,
    /// The block's length when it is here.
    length: Option<usize>,
    /// Said what there was to say; only the block's arrival brings it up again.
    answered: bool,
}

#[derive(Debug, Default)]
struct Client {
    wants: HashMap<Cid, Want>,
    /// Blocks to send, highest priority first, then first come first served.
    ready: BTreeMap<(std::cmp::Reverse<i32>, u64), Cid>,
    presences: VecDeque<(Cid, bool)>,
    in_flight_bytes: u64,
}

/// The wants of all peers.
#[derive(Debug)]
pub struct Server {
    config: ServeConfig,
    clients: HashMap<PeerId, Client>,
    /// Peers with something to send, in the order of their turns.
    turns: VecDeque<PeerId>,
    /// Who waits for a block that is not here.
    waiting: HashMap<Cid, HashSet<PeerId>>,
    in_flight_bytes: u64,
    n_seen: u64,
}

impl Server {
    /// A server that owes nobody anything.
    pub fn new(config: ServeConfig) -> Self {
        Self {
            config,
            clients: HashMap::new(),
            turns: VecDeque::new(),
            waiting: HashMap::new(),
            in_flight_bytes: 0,
            n_seen: 0,
        }
    }

    /// Changes to the wantlist of `peer`. `length_of` says how long a block is, if it is here.
    pub fn handle_wantlist(
        &mut self,
        peer: &PeerId,
        entries: &[WantEntry],
        full: bool,
        length_of: impl Fn(&Cid) -> Option<usize>,
    ) {
        if full {
            let in_flight_bytes = self.clients.get(peer).map_or(0, |c| c.in_flight_bytes);
            self.forget_wants(peer);
            if in_flight_bytes > 0 {
                self.clients.insert(peer.clone(), Client { in_flight_bytes, ..Client::default() });
            }
        }
        if !self.clients.contains_key(peer) && self.clients.len() >= self.config.max_peers {
            return;
        }
        for entry in entries {
            match entry {
                WantEntry::Cancel { cid } => self.cancel(peer, cid),
                WantEntry::Want { cid, kind, priority, send_dont_have } => {
                    self.want(peer, *cid, *kind, *priority, *send_dont_have, length_of(cid));
                }
            }
        }
        self.take_turn(peer);
    }

    fn want(
        &mut self,
        peer: &PeerId,
        cid: Cid,
        kind: WantKind,
        priority: i32,
        send_dont_have: bool,
        length: Option<usize>,
    ) {
        let client = self.clients.entry(peer.clone()).or_default();
        let known = client.wants.get(&cid).copied();
        if known.is_none() && client.wants.len() >= self.config.max_wants_per_peer {
            return;
        }
        // A want for the block is not weakened by a later want for its presence; a repeated one is queued once.
        if known.is_some_and(|k| k.length.is_some() && !k.answered && k.kind == WantKind::Block) {
            return;
        }
        self.n_seen += 1;
        let mut want = Want { kind, priority, length, answered: true };
        match length {
            None if send_dont_have => client.presences.push_back((cid, false)),
            None => {}
            Some(bytes) if kind == WantKind::Have && bytes > self.config.inline_block_bytes => {
                client.presences.push_back((cid, true));
            }
            Some(_) => {
                want.answered = false;
                want.kind = WantKind::Block;
                client.ready.insert((std::cmp::Reverse(priority), self.n_seen), cid);
            }
        }
        // Presences are as bounded as wants: repeating one question does not grow the answers without end.
        while client.presences.len() > 2 * self.config.max_wants_per_peer {
            client.presences.pop_front();
        }
        if length.is_none() {
            self.waiting.entry(cid).or_default().insert(peer.clone());
        }
        client.wants.insert(cid, want);
    }

    fn cancel(&mut self, peer: &PeerId, cid: &Cid) {
        if let Some(client) = self.clients.get_mut(peer) {
            if client.wants.remove(cid).is_some_and(|w| w.length.is_some()) {
                client.ready.retain(|_, c| c != cid);
            }
            Self::unwait(&mut self.waiting, cid, peer);
        }
    }

    fn unwait(waiting: &mut HashMap<Cid, HashSet<PeerId>>, cid: &Cid, peer: &PeerId) {
        if let Some(peers) = waiting.get_mut(cid) {
            peers.remove(peer);
            if peers.is_empty() {
                waiting.remove(cid);
            }
        }
    }

    fn forget_wants(&mut self, peer: &PeerId) {
        if let Some(client) = self.clients.remove(peer) {
            for cid in client.wants.keys() {
                Self::unwait(&mut self.waiting, cid, peer);
            }
        }
        self.turns.retain(|p| p != peer);
    }

    /// The connection to `peer` is gone.
    pub fn remove_peer(&mut self, peer: &PeerId) {
        let under_way = self.clients.get(peer).map_or(0, |c| c.in_flight_bytes);
        self.in_flight_bytes -= under_way;
        self.forget_wants(peer);
    }

    /// A block of `length` bytes is here now: whoever waits for it is served or told.
    pub fn block_arrived(&mut self, cid: &Cid, length: usize) {
        for peer in self.waiting.remove(cid).unwrap_or_default() {
            let want = self.clients.get(&peer).and_then(|c| c.wants.get(cid)).copied();
            if let Some(want) = want {
                self.want(&peer, *cid, want.kind, want.priority, false, Some(length));
                self.take_turn(&peer);
            }
        }
    }

    /// The next batch that the budget allows.
    pub fn poll(&mut self) -> Option<Batch> {
        for _ in 0..self.turns.len() {
            let peer = self.turns.pop_front()?;
            let client = self.clients.get_mut(&peer)?;
            let batch = Self::next_batch(&self.config, &peer, client, self.in_flight_bytes);
            let more = !client.ready.is_empty() || !client.presences.is_empty();
            if let Some(batch) = &batch {
                client.in_flight_bytes += batch.bytes;
                self.in_flight_bytes += batch.bytes;
            }
            if more {
                self.turns.push_back(peer);
            }
            if batch.is_some() {
                return batch;
            }
        }
        None
    }

    fn next_batch(
        config: &ServeConfig,
        peer: &PeerId,
        client: &mut Client,
        all_in_flight: u64,
    ) -> Option<Batch> {
        let presences: Vec<_> = client.presences.drain(..).collect();
        let mut blocks = Vec::new();
        let mut bytes = 0u64;
        while let Some(entry) = client.ready.first_entry() {
            let cid = *entry.get();
            let length = client.wants.get(&cid).and_then(|w| w.length).unwrap_or(0) as u64;
            let sum = bytes + length;
            let first = blocks.is_empty();
            // One block may always go to a peer that has nothing under way, whatever the limits.
            let fits = (first || sum <= MESSAGE_TARGET_BYTES as u64)
                && (client.in_flight_bytes + sum <= config.max_in_flight_bytes_per_peer
                    || (first && client.in_flight_bytes == 0))
                && (all_in_flight + sum <= config.max_in_flight_bytes || (first && all_in_flight == 0));
            if !fits {
                break;
            }
            entry.remove();
            client.wants.remove(&cid);
            blocks.push(cid);
            bytes = sum;
        }
        if blocks.is_empty() && presences.is_empty() {
            return None;
        }
        let pending: u64 =
            client.ready.values().filter_map(|c| client.wants.get(c)?.length).map(|l| l as u64).sum();
        let pending_bytes = pending.min(i32::MAX as u64) as u32;
        Some(Batch { peer: peer.clone(), blocks, presences, bytes, pending_bytes })
    }

    /// A batch of `bytes` has left for `peer`, or never will.
    pub fn handle_sent(&mut self, peer: &PeerId, bytes: u64) {
        // A peer that was removed gave its bytes back then.
        if let Some(client) = self.clients.get_mut(peer) {
            let bytes = bytes.min(client.in_flight_bytes);
            client.in_flight_bytes -= bytes;
            self.in_flight_bytes -= bytes;
            if client.wants.is_empty() && client.presences.is_empty() && client.in_flight_bytes == 0 {
                self.clients.remove(peer);
            }
        }
    }

    /// Block bytes on their way to all peers.
    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    /// Wants of `peer` that are kept.
    pub fn n_wants(&self, peer: &PeerId) -> usize {
        self.clients.get(peer).map_or(0, |c| c.wants.len())
    }

    fn take_turn(&mut self, peer: &PeerId) {
        let has_work = self.clients.get(peer).is_some_and(|c| !c.ready.is_empty() || !c.presences.is_empty());
        if has_work && !self.turns.contains(peer) {
            self.turns.push_back(peer.clone());
        }
    }
}

#[cfg(test)]
mod tests;
