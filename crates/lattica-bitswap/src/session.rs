//! One fetch: which peer is asked for what, and what happens when it answers, refuses, lies, stalls or leaves.
//!
//! Pure: time comes in as `now` (since any fixed moment), wants go out of [`Session::poll_send`]. After every input call
//! `poll_send` until it returns `None`, and [`Session::handle_timeout`] when [`Session::next_deadline`] has passed.

mod peer;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use swarm_wire::{Cid, PeerId};

use crate::SessionConfig;
use crate::wire::{WantEntry, WantKind};
use peer::{Knows, Peer};

/// A block that a session wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The block.
    pub cid: Cid,
    /// Its length, or the best guess of it.
    pub length: u32,
    /// Higher is asked for first.
    pub priority: i32,
}

/// What a block that came in was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Wanted and new: store it.
    New,
    /// Asked for, but here already.
    Duplicate,
    /// Never asked of this peer in this session.
    Unasked,
}

/// How a fetch stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outlook {
    /// Everything is here.
    Done,
    /// Something is outstanding, or will be asked again.
    Waiting,
    /// Every peer that is left has said that it lacks what is missing.
    NobodyHas,
    /// No peer is left.
    NoPeers,
}

#[derive(Debug)]
struct Slot {
    cid: Cid,
    length: u32,
    done: bool,
    /// Peers that are asked for the block now.
    asked: u32,
    /// When it was first asked for, while it is outstanding.
    asked_at: Duration,
}

/// One fetch of a set of blocks.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    /// In the order in which they are asked for.
    slots: Vec<Slot>,
    index_of: HashMap<Cid, u32>,
    peers: BTreeMap<PeerId, Peer>,
    /// Missing and not asked for.
    queue: BTreeSet<u32>,
    missing: usize,
    endgame_asks_left: usize,
    n_candidates: usize,
    n_asked_peers: usize,
    duplicates: u64,
    outbox: BTreeMap<PeerId, Vec<WantEntry>>,
    stalled: Vec<PeerId>,
}

impl Session {
    /// A fetch of `wanted`; a block that is named twice is fetched once.
    pub fn new(config: SessionConfig, wanted: &[Wanted]) -> Self {
        let mut order: Vec<Wanted> = wanted.to_vec();
        if !order.is_empty() {
            let shift = (config.seed % order.len() as u64) as usize;
            order.rotate_left(shift);
        }
        order.sort_by_key(|w| std::cmp::Reverse(w.priority));
        let mut slots = Vec::with_capacity(order.len());
        let mut index_of = HashMap::with_capacity(order.len());
        for want in order {
            index_of.entry(want.cid).or_insert_with(|| {
                let (cid, length) = (want.cid, want.length);
                slots.push(Slot { cid, length, done: false, asked: 0, asked_at: Duration::ZERO });
                slots.len() as u32 - 1
            });
        }
        let missing = slots.len();
        let endgame_asks_left = ((missing as f64 * config.endgame_fraction) as usize).max(4);
        Self {
            config,
            queue: (0..missing as u32).collect(),
            slots,
            index_of,
            peers: BTreeMap::new(),
            missing,
            endgame_asks_left,
            n_candidates: 0,
            n_asked_peers: 0,
            duplicates: 0,
            outbox: BTreeMap::new(),
            stalled: Vec::new(),
        }
    }

    /// A peer that is believed to have everything: asked for blocks at once.
    pub fn add_holder(&mut self, peer: &PeerId, now: Duration) {
        match self.peers.get_mut(peer) {
            Some(known) if known.dropped => {}
            Some(known) => known.believe_all(),
            None => self.insert(peer, Knows::Believed),
        }
        self.assign(now);
    }

    /// Peers that may have something: asked for presences first. Ignored once enough such peers are asked.
    pub fn add_candidates<'a>(&mut self, peers: impl IntoIterator<Item = &'a PeerId>, now: Duration) {
        let enough = self.config.max_candidates.max(self.config.max_presences / self.slots.len().max(1));
        for peer in peers {
            if self.n_candidates < enough && !self.peers.contains_key(peer) {
                self.n_candidates += 1;
                self.insert(peer, Knows::Unknown);
            }
        }
        self.assign(now);
    }

    fn insert(&mut self, peer: &PeerId, belief: Knows) {
        self.n_asked_peers += 1;
        let state = Peer::new(belief, self.slots.len(), self.config.initial_window_bytes);
        self.peers.insert(peer.clone(), state);
    }

    /// The connection to `peer` is gone: what it was asked for is asked elsewhere.
    pub fn remove_peer(&mut self, peer: &PeerId, now: Duration) {
        self.outbox.remove(peer);
        if let Some(gone) = self.peers.remove(peer) {
            if gone.started_unknown {
                self.n_candidates -= 1;
            }
            for &index in gone.asked.keys() {
                self.release(index);
            }
        }
        self.assign(now);
    }

    /// `peer` lied: it gets no more wants, and whatever it still sends is [`Arrival::Unasked`].
    pub fn drop_peer(&mut self, peer: &PeerId, now: Duration) {
        self.outbox.remove(peer);
        let released = self.peers.get_mut(peer).map(Peer::drop_all).unwrap_or_default();
        for index in released {
            self.release(index);
        }
        self.assign(now);
    }

    /// `peer` has, or has not, the block.
    pub fn handle_presence(&mut self, peer: &PeerId, cid: &Cid, have: bool, now: Duration) {
        let Some(&index) = self.index_of.get(cid) else { return };
        let Some(from) = self.peers.get_mut(peer).filter(|p| !p.dropped) else { return };
        if from.presence(index, self.slots[index as usize].length, have) {
            // The peer keeps our interest, so that it tells us should it get the block.
            let entry = self.outbox.entry(peer.clone()).or_default();
            entry.push(WantEntry::Cancel { cid: *cid });
            let kind = WantKind::Have;
            entry.push(WantEntry::Want { cid: *cid, kind, priority: 0, send_dont_have: false });
            self.release(index);
            self.assign(now);
        } else {
            self.assign_to(peer, now);
        }
    }

    /// A block came from `peer`. The caller stores it when it is [`Arrival::New`], and nothing else.
    pub fn handle_block(&mut self, peer: &PeerId, cid: &Cid, now: Duration) -> Arrival {
        let Some(&index) = self.index_of.get(cid) else { return Arrival::Unasked };
        let length = self.slots[index as usize].length;
        let Some(from) = self.peers.get_mut(peer).filter(|p| p.owes(index)) else { return Arrival::Unasked };
        from.delivered(index, length, now, &self.config);
        let slot = &mut self.slots[index as usize];
        if slot.done {
            self.duplicates += 1;
            self.assign(now);
            return Arrival::Duplicate;
        }
        slot.done = true;
        self.missing -= 1;
        self.queue.remove(&index);
        // Bitswap: whoever else was told of this want hears that it is over.
        for (other, state) in &mut self.peers {
            if state.forget(index, length) && other != peer {
                self.outbox.entry(other.clone()).or_default().push(WantEntry::Cancel { cid: *cid });
            }
        }
        self.assign(now);
        Arrival::New
    }

    /// Marks a block as here that did not come through this session.
    pub fn mark_stored(&mut self, cid: &Cid, now: Duration) {
        let Some(&index) = self.index_of.get(cid) else { return };
        let slot = &mut self.slots[index as usize];
        if slot.done {
            return;
        }
        slot.done = true;
        let length = slot.length;
        self.missing -= 1;
        self.queue.remove(&index);
        for (other, state) in &mut self.peers {
            if state.forget(index, length) {
                self.outbox.entry(other.clone()).or_default().push(WantEntry::Cancel { cid: *cid });
            }
        }
        self.assign(now);
    }

    /// Acts on deadlines that have passed.
    pub fn handle_timeout(&mut self, now: Duration) {
        for peer in self.peers.values_mut() {
            peer.resumes_at = peer.resumes_at.filter(|&at| at > now);
        }
        let late: Vec<PeerId> = self
            .peers
            .iter()
            .filter(|(_, p)| p.deadline(&self.config).is_some_and(|d| d <= now))
            .map(|(p, _)| p.clone())
            .collect();
        for peer in late {
            let state = self.peers.get_mut(&peer).expect("listed above");
            let released = state.stall(now, &self.config);
            self.stalled.push(peer.clone());
            let outbox = self.outbox.entry(peer).or_default();
            outbox.extend(released.iter().map(|&i| WantEntry::Cancel { cid: self.slots[i as usize].cid }));
            for index in released {
                self.release(index);
            }
        }
        self.assign(now);
    }

    /// When [`Session::handle_timeout`] has something to do next.
    pub fn next_deadline(&self) -> Option<Duration> {
        let peers = self.peers.values();
        let ends = peers
            .clone()
            .filter_map(|p| p.deadline(&self.config).into_iter().chain(p.resumes_at).min())
            .min();
        let duplicate = (self.queue.is_empty() && self.endgame_asks_left > 0)
            .then(|| {
                let idle = || self.peers.values().filter(|p| p.is_idle());
                let under_way = self.peers.values().flat_map(|p| p.asked.keys().copied());
                under_way
                    .filter(|&i| self.slots[i as usize].asked == 1 && idle().any(|p| p.may_have(i)))
                    .map(|i| self.slots[i as usize].asked_at + self.endgame_age())
                    .min()
            })
            .flatten();
        ends.into_iter().chain(duplicate).min()
    }

    /// The next changes to our wantlist at a peer, at most what one message holds.
    pub fn poll_send(&mut self) -> Option<(PeerId, Vec<WantEntry>)> {
        while let Some((peer, entries)) = self.outbox.pop_first() {
            if !entries.is_empty() {
                return Some((peer, entries));
            }
        }
        None
    }

    /// Takes the peers that stalled since the last call, for the ledger.
    pub fn take_stalled(&mut self) -> Vec<PeerId> {
        std::mem::take(&mut self.stalled)
    }

    /// How the fetch stands.
    pub fn outlook(&self) -> Outlook {
        if self.missing == 0 {
            return Outlook::Done;
        }
        let mut usable = self.peers.values().filter(|p| !p.dropped).peekable();
        if usable.peek().is_none() {
            return Outlook::NoPeers;
        }
        let open = |p: &Peer| {
            !p.asked.is_empty()
                || !p.queries.is_empty()
                || (0..self.slots.len() as u32)
                    .any(|i| !self.slots[i as usize].done && p.knows(i) != Knows::Lacks)
        };
        if usable.any(open) { Outlook::Waiting } else { Outlook::NobodyHas }
    }

    /// Blocks that are not here yet.
    pub fn missing(&self) -> usize {
        self.missing
    }

    /// Peers that were ever part of this fetch.
    pub fn asked_peers(&self) -> usize {
        self.n_asked_peers
    }

    /// Blocks that came twice.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Whether `cid` was asked of `peer` in this session, so that its arrival is no lie.
    pub fn has_asked(&self, peer: &PeerId, cid: &Cid) -> bool {
        self.index_of.get(cid).is_some_and(|&i| self.peers.get(peer).is_some_and(|p| p.owes(i)))
    }

    /// Blocks that may still arrive although this session is over: wants and cancels cross on the wire.
    pub fn still_owed(&self) -> Vec<(PeerId, Cid)> {
        let name = |i: u32| self.slots[i as usize].cid;
        self.peers.iter().flat_map(|(peer, p)| p.all_owed().map(move |i| (peer.clone(), name(i)))).collect()
    }

    /// Wants to take back at every peer when the fetch is given up.
    pub fn cancel_all(&mut self) -> Vec<(PeerId, Vec<WantEntry>)> {
        let slots = &self.slots;
        self.outbox.clear();
        self.peers
            .iter_mut()
            .map(|(peer, state)| {
                let wants = state.drop_all_known();
                (
                    peer.clone(),
                    wants.map(|i| WantEntry::Cancel { cid: slots[i as usize].cid }).collect::<Vec<_>>(),
                )
            })
            .filter(|(_, cancels)| !cancels.is_empty())
            .collect()
    }

    fn release(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.asked -= 1;
        if slot.asked == 0 && !slot.done {
            self.queue.insert(index);
        }
    }

    fn endgame_age(&self) -> Duration {
        let fastest = self.peers.values().filter_map(|p| p.latency).min().unwrap_or_default();
        (fastest * 2).max(Duration::from_millis(500))
    }

    /// Gives every peer with room something to do.
    fn assign(&mut self, now: Duration) {
        if self.missing == 0 {
            return;
        }
        // Round robin, one block a turn, so that the first peer does not take everything that is left.
        let names: Vec<PeerId> =
            self.peers.iter().filter(|(_, p)| p.is_usable(now)).map(|(n, _)| n.clone()).collect();
        let mut turn: Vec<&PeerId> = names.iter().collect();
        while !turn.is_empty() {
            turn.retain(|name| self.ask_one(name, now));
        }
        for name in &names {
            self.ask_presences(name, now);
        }
        if self.queue.is_empty() {
            for name in &names {
                self.ask_again(name, now);
            }
        }
    }

    /// Gives `name` something to do when only what is known of it has changed: among many peers, each that answers would
    /// otherwise have all the others looked at.
    fn assign_to(&mut self, name: &PeerId, now: Duration) {
        if self.missing == 0 || !self.peers.get(name).is_some_and(|peer| peer.is_usable(now)) {
            return;
        }
        while self.ask_one(name, now) {}
        self.ask_presences(name, now);
        if self.queue.is_empty() {
            self.ask_again(name, now);
        }
    }

    /// Asks `name` for its next block; `false` when it has no room or nothing to give.
    fn ask_one(&mut self, name: &PeerId, now: Duration) -> bool {
        let peer = self.peers.get_mut(name).expect("named by assign");
        let Some(index) = self.queue.iter().copied().find(|&i| peer.may_have(i)) else { return false };
        let slot = &mut self.slots[index as usize];
        if !peer.has_room(slot.length, &self.config) {
            return false;
        }
        self.queue.remove(&index);
        slot.asked = 1;
        slot.asked_at = now;
        Self::ask(peer, slot, index, now, self.outbox.entry(name.clone()).or_default());
        true
    }

    fn ask(peer: &mut Peer, slot: &Slot, index: u32, now: Duration, outbox: &mut Vec<WantEntry>) {
        peer.ask(index, slot.length, now);
        let (cid, priority) = (slot.cid, i32::MAX - index.min(i32::MAX as u32) as i32);
        outbox.push(WantEntry::Want { cid, kind: WantKind::Block, priority, send_dont_have: true });
    }

    fn ask_presences(&mut self, name: &PeerId, now: Duration) {
        let peer = self.peers.get_mut(name).expect("named by assign");
        if !peer.started_unknown {
            return;
        }
        let room = peer.query_room(&self.config);
        let unknown: Vec<u32> = self
            .queue
            .iter()
            .copied()
            .filter(|&i| peer.knows(i) == Knows::Unknown && !peer.queries.contains_key(&i))
            .take(room)
            .collect();
        if unknown.is_empty() {
            return;
        }
        let outbox = self.outbox.entry(name.clone()).or_default();
        for index in unknown {
            peer.query(index, now);
            let cid = self.slots[index as usize].cid;
            outbox.push(WantEntry::Want { cid, kind: WantKind::Have, priority: 1, send_dont_have: true });
        }
    }

    /// Endgame: an idle peer is asked for a block that another one has owed for long.
    fn ask_again(&mut self, name: &PeerId, now: Duration) {
        let age = self.endgame_age();
        let peer = self.peers.get_mut(name).expect("named by assign");
        if self.endgame_asks_left == 0 || !peer.asked.is_empty() {
            return;
        }
        let oldest = (0..self.slots.len() as u32)
            .filter(|&i| {
                let slot = &self.slots[i as usize];
                !slot.done && slot.asked == 1 && now >= slot.asked_at + age && peer.may_have(i)
            })
            .min_by_key(|&i| self.slots[i as usize].asked_at);
        if let Some(index) = oldest {
            self.endgame_asks_left -= 1;
            let slot = &mut self.slots[index as usize];
            slot.asked += 1;
            Self::ask(peer, slot, index, now, self.outbox.entry(name.clone()).or_default());
        }
    }
}

#[cfg(test)]
mod tests;
