//! One artefact to a whole fleet: everybody passes on what it has, the source sends little more than one copy.
//!
//! [`Spread`] is one member's state machine, pure: time comes in as `now`, what to do comes out of [`Spread::poll`].
//! Members pull: a receiver asks a neighbour for a chunk that the neighbour announced, rarest first, so nobody gets a
//! chunk twice; the source super-seeds, that is it announces every chunk to one neighbour only until all have left it
//! once (BitTorrent BEP 16). The surprise: the uploader, not the receiver, decides the order of what was asked for.
//!
//! Map: [`bitmap`] (who has what), `neighbour` (what is known of one), `ask` (what is asked of whom), `near` (who on a local
//! network asks afar), `relayed` (relays carry each chunk once), `offer` (what an idle uplink offers), `super_seed` (what the source shows to
//! whom), [`uplink`] (how fast), [`plan`] (star, chain, tree or mesh, by size and links), [`wire`] (bytes on a stream), [`config`].

mod ask;
pub mod bitmap;
pub mod config;
mod near;
mod neighbour;
mod offer;
pub mod plan;
mod relayed;
mod super_seed;
pub mod uplink;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

pub use bitmap::Bitmap;
pub use config::SpreadConfig;
use neighbour::Neighbour;
pub use plan::Fleet;
use super_seed::SuperSeed;
pub use uplink::Uplink;

use crate::session::Arrival;

/// What members tell each other besides the chunks themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpreadMessage {
    /// All that the sender shows of what it has; the first message to a neighbour.
    Holds(Bitmap),
    /// Chunks that the sender has, or shows, from now on.
    Have(Vec<u32>),
    /// The sender wants this chunk.
    Request(u32),
    /// The sender does not want it any more.
    Cancel(u32),
    /// The sender will not send this chunk, or it is not coming any more.
    Refuse(u32),
    /// The sender has too much to send already; it will offer when it has not.
    Busy(u32),
    /// The sender has this chunk and nothing else to send.
    Offer(u32),
    /// The sender does not need the offered chunk: it is on its way from elsewhere.
    Decline(u32),
    /// The sender has asked for this chunk outside of the local network that it shares with the receiver. Taken back by
    /// [`SpreadMessage::Refuse`].
    Coming {
        /// Which.
        chunk: u32,
        /// Of two that ask at once the one with the smaller lot goes on.
        lot: u32,
    },
}

/// What the owner of a [`Spread`] has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action<P> {
    /// Send a message.
    Send {
        /// To whom.
        to: P,
        /// What.
        message: SpreadMessage,
    },
    /// Send a chunk, then call [`Spread::handle_uploaded`].
    Upload {
        /// To whom.
        to: P,
        /// Which.
        chunk: u32,
    },
    /// Have nothing more to do with a neighbour; it is removed already.
    Drop {
        /// Which.
        peer: P,
        /// Why.
        reason: &'static str,
        /// It sent what it must not send. Who is only slow may be a neighbour again later.
        wrong: bool,
    },
}

/// One member of a spread; `P` names peers.
#[derive(Debug)]
pub struct Spread<P> {
    config: SpreadConfig,
    have: Bitmap,
    neighbours: BTreeMap<P, Neighbour>,
    /// How many neighbours show a chunk.
    availability: Vec<u32>,
    /// How many neighbours on the same local network show a chunk or have it coming, of those that keep their word.
    near_copies: Vec<u32>,
    /// How many neighbours show a chunk without a relay in between, of those that keep their word.
    direct_copies: Vec<u32>,
    /// What was asked for outside of the local network and when, as neighbours in it know.
    announced: BTreeMap<u32, Duration>,
    /// Higher is needed earlier: counts as that many copies fewer.
    urgency: Vec<u8>,
    /// Breaks ties differently at every member.
    ties: Vec<u32>,
    /// Missing and not asked for: rank, tie, chunk.
    wanted: BTreeSet<(u32, u32, u32)>,
    /// At how many neighbours a missing chunk is asked for now.
    asked: BTreeMap<u32, u32>,
    /// Chunks that may be asked for at a time; grows while answers come without queueing.
    window: f64,
    /// No answer has waited in a queue yet: the window grows with every answer instead of with every window of them.
    opening: bool,
    /// When wants were last given out.
    assigned_at: Duration,
    /// When the last new chunk came.
    arrived_at: Duration,
    repeats_left: u32,
    duplicates: u64,
    super_seed: Option<SuperSeed<P>>,
    outbox: VecDeque<Action<P>>,
    uploads: usize,
    last_served: Option<P>,
    uploaded: u64,
}

impl<P: Ord + Clone> Spread<P> {
    /// A member that has `have`. A source shows its chunks one by one when the configuration says so.
    pub fn new(config: SpreadConfig, have: Bitmap, source: bool) -> Self {
        let n = have.n_chunks();
        let ties: Vec<u32> =
            (0..n).map(|chunk| (mix(config.seed ^ u64::from(chunk) << 20) >> 32) as u32).collect();
        let missing = n - have.count();
        let super_seed = (source && config.super_seed).then(|| SuperSeed::new(&ties));
        Self {
            wanted: (0..n).filter(|&c| !have.contains(c)).map(|c| (0, ties[c as usize], c)).collect(),
            availability: vec![0; n as usize],
            near_copies: vec![0; n as usize],
            direct_copies: vec![0; n as usize],
            announced: BTreeMap::new(),
            urgency: vec![0; n as usize],
            window: config.min_outstanding as f64,
            opening: true,
            assigned_at: Duration::ZERO,
            arrived_at: Duration::ZERO,
            repeats_left: ((f64::from(missing) * config.endgame_fraction) as u32).max(4),
            config,
            have,
            neighbours: BTreeMap::new(),
            ties,
            asked: BTreeMap::new(),
            duplicates: 0,
            super_seed,
            outbox: VecDeque::new(),
            uploads: 0,
            last_served: None,
            uploaded: 0,
        }
    }

    /// Makes a chunk count as `urgency` copies rarer than it is, so that what is needed first comes early.
    pub fn set_urgency(&mut self, chunk: u32, urgency: u8) {
        if chunk < self.have.n_chunks() {
            self.rerank(chunk, |spread| spread.urgency[chunk as usize] = urgency);
        }
    }

    /// What this member has.
    pub fn have(&self) -> &Bitmap {
        &self.have
    }

    /// Whether everything is here.
    pub fn is_done(&self) -> bool {
        self.have.is_full()
    }

    /// Chunks that left this member.
    pub fn uploaded(&self) -> u64 {
        self.uploaded
    }

    /// Chunks that came twice.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Neighbours that are in use.
    pub fn neighbours(&self) -> impl Iterator<Item = &P> {
        self.neighbours.keys()
    }

    /// Whether `peer` is in use.
    pub fn is_neighbour(&self, peer: &P) -> bool {
        self.neighbours.contains_key(peer)
    }

    /// Whether `chunk` was asked of `peer`, so that its arrival is no lie.
    pub fn is_owed(&self, peer: &P, chunk: u32) -> bool {
        self.neighbours
            .get(peer)
            .is_some_and(|n| n.asked.contains_key(&chunk) || n.cancelled.contains(&chunk))
    }

    /// Whether new neighbours should be found: there are few, or they have nothing new. The source is a good one then.
    pub fn wants_neighbours(&self, now: Duration) -> bool {
        let feeds = self.super_seed.is_some();
        let starves = !self.is_done() && now > self.arrived_at + self.config.stuck_after * 2;
        let few = self.neighbours.len() < self.config.min_neighbours && (feeds || !self.is_done());
        (few || starves) && self.neighbours.len() < self.config.max_neighbours
    }

    /// A neighbour is there: it is told what this member shows.
    pub fn add_neighbour(&mut self, peer: &P, now: Duration) {
        self.add(peer, false, now);
    }

    /// As [`Spread::add_neighbour`], for one that is reached over a relay for as long as it is a neighbour.
    pub fn add_relayed_neighbour(&mut self, peer: &P, now: Duration) {
        self.add(peer, true, now);
    }

    fn add(&mut self, peer: &P, relayed: bool, now: Duration) {
        if self.neighbours.contains_key(peer) || self.neighbours.len() >= self.config.max_neighbours {
            return;
        }
        let n = self.have.n_chunks();
        let shown = if self.super_seed.is_some() { Bitmap::empty(n) } else { self.have.clone() };
        self.neighbours.insert(peer.clone(), Neighbour::new(n, relayed));
        self.send(peer, SpreadMessage::Holds(shown));
        self.reveal(now);
        self.assign(now);
    }

    /// A neighbour is gone: what it was asked for is asked elsewhere.
    pub fn remove_neighbour(&mut self, peer: &P, now: Duration) {
        let Some(gone) = self.neighbours.remove(peer) else { return };
        self.outbox.retain(
            |action| !matches!(action, Action::Send { to, .. } | Action::Upload { to, .. } if to == peer),
        );
        self.uploads -= gone.uploading;
        for chunk in gone.holds.iter() {
            self.rerank(chunk, |spread| spread.availability[chunk as usize] -= 1);
        }
        self.forget_near(&gone);
        self.forget_direct(&gone);
        for &chunk in gone.asked.keys() {
            self.release(chunk);
        }
        if let Some(seed) = &mut self.super_seed {
            seed.remove(peer, &gone.holds);
        }
        self.reveal(now);
        self.assign(now);
    }

    /// A message from a neighbour.
    pub fn handle(&mut self, peer: &P, message: SpreadMessage, now: Duration) {
        if !self.neighbours.contains_key(peer) {
            return;
        }
        match message {
            SpreadMessage::Holds(bitmap) if bitmap.n_chunks() == self.have.n_chunks() => {
                let chunks: Vec<u32> = bitmap.iter().collect();
                self.shown(peer, &chunks, now);
            }
            SpreadMessage::Holds(_) => {
                return self.drop_neighbour(peer, "a bitmap of another artefact", true, now);
            }
            SpreadMessage::Have(chunks) => self.shown(peer, &chunks, now),
            SpreadMessage::Request(chunk) => self.requested(peer, chunk),
            SpreadMessage::Cancel(chunk) => {
                if let Some(neighbour) = self.neighbours.get_mut(peer) {
                    neighbour.requests.retain(|&c| c != chunk);
                }
            }
            SpreadMessage::Refuse(chunk) => self.refused(peer, chunk, now),
            SpreadMessage::Busy(chunk) => {
                let pause = self.usual_latency(self.neighbours[peer].near).unwrap_or(self.config.min_timeout);
                let neighbour = self.neighbours.get_mut(peer).expect("checked above");
                if neighbour.asked.remove(&chunk).is_some() {
                    neighbour.busy_until = now + pause;
                    neighbour.busy += 1;
                    self.release(chunk);
                    self.judge(peer);
                }
            }
            SpreadMessage::Offer(chunk) => self.offered(peer, chunk, now),
            SpreadMessage::Coming { chunk, lot } => self.comes(peer, chunk, lot, now),
            SpreadMessage::Decline(chunk) => {
                if let Some(neighbour) = self.neighbours.get_mut(peer) {
                    // Only what was offered, so that a neighbour cannot make us remember more.
                    if neighbour.answered(chunk) {
                        neighbour.declined.insert(chunk);
                    }
                }
            }
        }
        self.reveal(now);
        self.assign(now);
    }

    /// A chunk came whose bytes match its hash. The caller stores it when it is [`Arrival::New`].
    pub fn handle_chunk(&mut self, peer: &P, chunk: u32, now: Duration) -> Arrival {
        let Some(neighbour) = self.neighbours.get_mut(peer) else { return Arrival::Unasked };
        let near = neighbour.near;
        if let Some(took) = neighbour.delivered(chunk, now) {
            self.unask(chunk);
            let alike = self.neighbours.values().filter(|n| n.near == near);
            let fastest = alike.filter_map(|n| n.latency).min().unwrap_or(took);
            if took <= fastest * 2 {
                let step = if self.opening { 1.0 } else { 1.0 / self.window };
                self.window = (self.window + step).min(self.config.max_outstanding as f64);
            } else {
                self.opening = false;
            }
            self.judge(peer);
        } else if !neighbour.cancelled.remove(&chunk) {
            return Arrival::Unasked;
        }
        if !self.have.insert(chunk) {
            self.duplicates += 1;
            self.assign(now);
            return Arrival::Duplicate;
        }
        self.arrived_at = now;
        self.wanted.remove(&self.key(chunk));
        self.asked.remove(&chunk);
        self.announced.remove(&chunk);
        let mut sends = Vec::new();
        for (name, neighbour) in &mut self.neighbours {
            neighbour.nothing_to_offer = false;
            if neighbour.coming.remove(&chunk).is_some_and(|c| c.live) && neighbour.relied_on {
                self.near_copies[chunk as usize] -= 1;
            }
            if neighbour.asked.remove(&chunk).is_some() {
                neighbour.cancelled.insert(chunk);
                sends.push((name.clone(), SpreadMessage::Cancel(chunk)));
            }
            if !neighbour.holds.contains(chunk) {
                sends.push((name.clone(), SpreadMessage::Have(vec![chunk])));
            }
        }
        for (to, message) in sends {
            self.send(&to, message);
        }
        self.assign(now);
        Arrival::New
    }

    /// A chunk came whose bytes do not match its hash: its sender is dropped.
    pub fn handle_wrong(&mut self, peer: &P, now: Duration) {
        self.drop_neighbour(peer, "sent wrong bytes", true, now);
    }

    /// An upload has left, or failed.
    pub fn handle_uploaded(&mut self, peer: &P, chunk: u32, sent: bool, now: Duration) {
        self.uploaded += u64::from(sent);
        if let Some(neighbour) = self.neighbours.get_mut(peer) {
            // A neighbour that left and came back has none under way.
            if neighbour.uploading > 0 {
                neighbour.uploading -= 1;
                self.uploads -= 1;
            }
        }
        let idle = self.uploads == 0 && self.neighbours.values().all(|n| n.requests.is_empty());
        if let Some(seed) = self.super_seed.as_mut().filter(|_| self.neighbours.contains_key(peer)) {
            if !sent {
                seed.failed(peer, chunk);
            }
            if idle {
                seed.ran_dry(peer, &self.config);
            }
        }
        self.reveal(now);
    }

    /// Acts on requests that have waited too long.
    pub fn handle_timeout(&mut self, now: Duration) {
        let usual = [false, true].map(|near| self.usual_latency(near));
        self.wait_no_longer(now);
        let late: Vec<(P, Vec<u32>)> = self
            .neighbours
            .iter()
            .map(|(name, n)| (name.clone(), n.late(now, usual[usize::from(n.near)], &self.config)))
            .filter(|(_, late)| !late.is_empty())
            .collect();
        for (name, chunks) in late {
            for &chunk in &chunks {
                self.take_back(&name, chunk);
            }
            let neighbour = self.neighbours.get_mut(&name).expect("listed above");
            neighbour.strikes += 1;
            if neighbour.strikes >= self.config.max_strikes {
                self.drop_neighbour(&name, "lets requests wait", false, now);
            } else {
                self.judge(&name);
            }
        }
        self.reveal(now);
        self.assign(now);
    }

    /// When [`Spread::handle_timeout`] has something to do next.
    pub fn next_deadline(&self) -> Option<Duration> {
        let usual = [false, true].map(|near| self.usual_latency(near));
        let deadline = |n: &Neighbour| n.deadline(usual[usize::from(n.near)], &self.config);
        let late = self.neighbours.values().filter_map(deadline).min();
        let repeat = self.repeatable().map(|(_, due)| due).min();
        let incomplete = || {
            self.neighbours.values().any(|n| !n.holds.is_full() && n.requests.is_empty() && n.uploading == 0)
        };
        let stuck = self.super_seed.as_ref().filter(|_| incomplete()).map(|seed| seed.stuck_at(&self.config));
        let busy = self.neighbours.values().map(|n| n.busy_until).filter(|_| !self.wanted.is_empty());
        let resumes = busy.filter(|&at| at > self.assigned_at).min();
        late.into_iter().chain(repeat).chain(stuck).chain(resumes).chain(self.waits_until()).min()
    }

    /// What to do next.
    pub fn poll(&mut self, now: Duration) -> Option<Action<P>> {
        if self.outbox.is_empty() {
            let upload = self.next_upload(now);
            if upload.is_some() {
                return upload;
            }
            self.offer(now);
        }
        self.outbox.pop_front()
    }

    fn send(&mut self, to: &P, message: SpreadMessage) {
        self.outbox.push_back(Action::Send { to: to.clone(), message });
    }

    fn shown(&mut self, peer: &P, chunks: &[u32], now: Duration) {
        for &chunk in chunks {
            let neighbour = self.neighbours.get_mut(peer).expect("checked by handle");
            neighbour.answered(chunk);
            if neighbour.declined.remove(&chunk) {
                neighbour.nothing_to_offer = false;
            }
            if neighbour.holds.insert(chunk) {
                neighbour.nothing_new = false;
                let direct = neighbour.direct;
                self.rerank(chunk, |spread| spread.availability[chunk as usize] += 1);
                self.direct_copies[chunk as usize] += u32::from(direct);
                self.shown_near(peer, chunk);
                if let Some(seed) = &mut self.super_seed {
                    seed.shown(peer, chunk, now);
                }
            }
        }
    }

    fn requested(&mut self, peer: &P, chunk: u32) {
        let can = self.have.contains(chunk);
        let waiting: usize = self.neighbours.values().map(|n| n.requests.len()).sum();
        let full = waiting >= self.config.max_queue && self.super_seed.is_none();
        let neighbour = self.neighbours.get_mut(peer).expect("checked by handle");
        neighbour.answered(chunk);
        if neighbour.requests.contains(&chunk) {
            return;
        }
        if !can || neighbour.requests.len() >= self.config.max_requests {
            self.send(peer, SpreadMessage::Refuse(chunk));
        } else if full {
            self.send(peer, SpreadMessage::Busy(chunk));
        } else {
            neighbour.requests.push_back(chunk);
        }
    }

    fn refused(&mut self, peer: &P, chunk: u32, now: Duration) {
        if !self.neighbours[peer].asked.contains_key(&chunk) {
            return self.comes_not(peer, chunk);
        }
        self.take_back(peer, chunk);
        let neighbour = self.neighbours.get_mut(peer).expect("checked by handle");
        if neighbour.holds.remove(chunk) {
            neighbour.nothing_to_offer = false;
            let (relied_on, direct) = (neighbour.relied_on, neighbour.direct);
            self.rerank(chunk, |spread| spread.availability[chunk as usize] -= 1);
            self.near_copies[chunk as usize] -= u32::from(relied_on);
            self.direct_copies[chunk as usize] -= u32::from(direct);
        }
        let neighbour = self.neighbours.get_mut(peer).expect("checked by handle");
        neighbour.strikes += 1;
        if neighbour.strikes >= self.config.max_strikes {
            self.drop_neighbour(peer, "shows what it does not send", false, now);
        } else {
            self.judge(peer);
        }
    }

    fn drop_neighbour(&mut self, peer: &P, reason: &'static str, wrong: bool, now: Duration) {
        if self.neighbours.contains_key(peer) {
            self.remove_neighbour(peer, now);
            self.outbox.push_back(Action::Drop { peer: peer.clone(), reason, wrong });
        }
    }

    fn key(&self, chunk: u32) -> (u32, u32, u32) {
        let i = chunk as usize;
        let rank = self.availability[i].saturating_sub(u32::from(self.urgency[i]));
        (rank, self.ties[i], chunk)
    }

    /// Changes what decides a chunk's rank and moves it there.
    fn rerank(&mut self, chunk: u32, change: impl FnOnce(&mut Self)) {
        let was_wanted = self.wanted.remove(&self.key(chunk));
        change(self);
        if was_wanted {
            self.wanted.insert(self.key(chunk));
        }
    }

    fn reveal(&mut self, now: Duration) {
        let Some(seed) = &mut self.super_seed else { return };
        let reveals = seed.reveal(&self.neighbours, &self.direct_copies, &self.have, &self.config, now);
        for (to, chunk) in reveals {
            self.send(&to, SpreadMessage::Have(vec![chunk]));
        }
    }

    /// How long an answer takes, on the local network or further away.
    fn usual_latency(&self, near: bool) -> Option<Duration> {
        let known = self.neighbours.values().filter(|n| n.near == near).filter_map(|n| n.latency);
        let (sum, n) = known.fold((Duration::ZERO, 0u32), |(sum, n), latency| (sum + latency, n + 1));
        (n > 0).then(|| sum / n.max(1))
    }

    /// The next chunk to send, while uploads are free: neighbours in turn.
    fn next_upload(&mut self, now: Duration) -> Option<Action<P>> {
        if self.uploads >= self.config.upload_slots {
            return None;
        }
        let waiting = |(name, n): (&P, &Neighbour)| n.requests.front().map(|&chunk| (name.clone(), chunk));
        use std::ops::Bound::{Excluded, Unbounded};
        let after = self
            .last_served
            .as_ref()
            .and_then(|last| self.neighbours.range((Excluded(last.clone()), Unbounded)).find_map(waiting));
        let (to, chunk) = after.or_else(|| self.neighbours.iter().find_map(waiting))?;
        let neighbour = self.neighbours.get_mut(&to).expect("just found");
        neighbour.requests.pop_front();
        neighbour.uploading += 1;
        self.uploads += 1;
        if let Some(seed) = &mut self.super_seed {
            seed.sending(&to, chunk, now);
        }
        self.last_served = Some(to.clone());
        Some(Action::Upload { to, chunk })
    }
}

/// Scrambles a number (the finaliser of SplitMix64, Steele et al. 2014).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests;
