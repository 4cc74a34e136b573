//! What a source shows to whom: every chunk to one neighbour first, so that its uplink carries little more than one copy.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::neighbour::Neighbour;
use super::{Bitmap, SpreadConfig};

/// Chunks that a neighbour is shown beyond [`SpreadConfig::reveal_window`] at most: what it may ask for at a time.
const EXTRA_MAX: usize = 64;

/// A chunk that was shown to a neighbour which does not have it yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Promise {
    Shown,
    Sent,
}

#[derive(Debug)]
pub(super) struct SuperSeed<P> {
    /// All chunks by how many neighbours have or are promised them: copies, tie, chunk.
    order: BTreeSet<(u32, u32, u32)>,
    copies: Vec<u32>,
    ties: Vec<u32>,
    /// When each chunk last left.
    sent_at: Vec<Duration>,
    n_sent: u64,
    n_promised: u64,
    promises: BTreeMap<P, BTreeMap<u32, Promise>>,
    /// How many chunks more than usual each neighbour is shown, because the uplink waited for requests.
    extra: BTreeMap<P, usize>,
    /// When a neighbour last got something.
    progress_at: Duration,
}

impl<P: Ord + Clone> SuperSeed<P> {
    pub(super) fn new(ties: &[u32]) -> Self {
        let order = ties.iter().enumerate().map(|(chunk, &tie)| (0, tie, chunk as u32)).collect();
        Self {
            order,
            copies: vec![0; ties.len()],
            ties: ties.to_vec(),
            sent_at: vec![Duration::ZERO; ties.len()],
            n_sent: 0,
            n_promised: 0,
            promises: BTreeMap::new(),
            extra: BTreeMap::new(),
            progress_at: Duration::ZERO,
        }
    }

    /// `chunk` leaves for `peer` now.
    pub(super) fn sending(&mut self, peer: &P, chunk: u32, now: Duration) {
        self.sent_at[chunk as usize] = now;
        self.n_sent += 1;
        if let Some(promise) = self.promises.get_mut(peer).and_then(|p| p.get_mut(&chunk)) {
            *promise = Promise::Sent;
            self.n_promised -= 1;
        }
    }

    /// `chunk` could not be sent to `peer`.
    pub(super) fn failed(&mut self, peer: &P, chunk: u32) {
        self.forget(peer, chunk);
    }

    /// The uplink has nothing to send after a chunk for `peer`. When chunks were shown that nobody has asked for yet, they
    /// were too few for the way to there and back.
    pub(super) fn ran_dry(&mut self, peer: &P, config: &SpreadConfig) {
        if self.n_promised > 0 {
            let extra = self.extra.entry(peer.clone()).or_default();
            *extra = (*extra * 2 + config.reveal_window).min(EXTRA_MAX);
        }
    }

    /// `peer` says at `now` that it has `chunk`.
    pub(super) fn shown(&mut self, peer: &P, chunk: u32, now: Duration) {
        self.progress_at = now;
        self.forget(peer, chunk);
        self.count(chunk, |copies| copies + 1);
    }

    /// `peer`, which had `holds`, is gone.
    pub(super) fn remove(&mut self, peer: &P, holds: &Bitmap) {
        let promised: Vec<u32> =
            self.promises.get(peer).into_iter().flat_map(|p| p.keys().copied()).collect();
        promised.into_iter().for_each(|chunk| self.forget(peer, chunk));
        self.promises.remove(peer);
        self.extra.remove(peer);
        holds.iter().for_each(|chunk| self.count(chunk, |copies| copies - 1));
    }

    /// When the budget of copies is lifted because nobody gets anything any more.
    pub(super) fn stuck_at(&self, config: &SpreadConfig) -> Duration {
        self.progress_at + config.stuck_after
    }

    fn forget(&mut self, peer: &P, chunk: u32) {
        if let Some(promise) = self.promises.get_mut(peer).and_then(|p| p.remove(&chunk)) {
            self.n_promised -= u64::from(promise == Promise::Shown);
            self.count(chunk, |copies| copies - 1);
        }
    }

    fn count(&mut self, chunk: u32, change: impl FnOnce(u32) -> u32) {
        let i = chunk as usize;
        self.order.remove(&(self.copies[i], self.ties[i], chunk));
        self.copies[i] = change(self.copies[i]);
        self.order.insert((self.copies[i], self.ties[i], chunk));
    }

    /// Whom to show what now: chunks that nobody has first, others only within the budget of copies. Beyond it leaves what
    /// its one holder has kept to itself for a while, and anything when nobody gets anything any more.
    pub(super) fn reveal(
        &mut self,
        neighbours: &BTreeMap<P, Neighbour>,
        direct_copies: &[u32],
        have: &Bitmap,
        config: &SpreadConfig,
        now: Duration,
    ) -> Vec<(P, u32)> {
        let budget = (f64::from(have.n_chunks()) * config.source_copies).ceil() as u64;
        let stuck = now >= self.stuck_at(config);
        if stuck {
            self.progress_at = now;
        }
        let some_direct = neighbours.values().any(|n| !n.relayed);
        let total = (config.reveal_total + self.extra.values().sum::<usize>()) as u64;
        let mut reveals = Vec::new();
        loop {
            let before = reveals.len();
            for (name, neighbour) in neighbours {
                let promises = self.promises.entry(name.clone()).or_default();
                let shown = promises.values().filter(|p| **p == Promise::Shown).count();
                let window = config.reveal_window + self.extra.get(name).copied().unwrap_or_default();
                if self.n_promised >= total || shown >= window || neighbour.holds.is_full() {
                    continue;
                }
                // What only a leaf had, others would have to get over its relay.
                let leaf = neighbour.relayed && some_direct && !stuck;
                let within = stuck || self.n_sent + self.n_promised < budget;
                let fits = |&&(copies, _, c): &&(u32, u32, u32)| {
                    let lacks = !neighbour.holds.contains(c) && !promises.contains_key(&c);
                    let kept = copies == 1 && now >= self.sent_at[c as usize] + config.stuck_after;
                    let may = if copies == 0 { !leaf } else { kept || within };
                    have.contains(c) && lacks && may && (!leaf || direct_copies[c as usize] > 0)
                };
                let looked_at = self.order.iter().take_while(|(copies, ..)| within || *copies <= 1);
                let Some(&(.., chunk)) = { looked_at }.find(fits) else { continue };
                promises.insert(chunk, Promise::Shown);
                self.n_promised += 1;
                self.count(chunk, |copies| copies + 1);
                reveals.push((name.clone(), chunk));
            }
            if reveals.len() == before {
                return reveals;
            }
        }
    }
}
