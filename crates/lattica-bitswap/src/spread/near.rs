//! Members on one local network: one of them asks outside for a chunk, the others wait until it shows it.
//!
//! Who asks outside says so to its neighbours inside ([`SpreadMessage::Coming`]); they treat the chunk as if it were shown,
//! for as long as they would wait for an answer. Two that ask at once compare lots, another for each chunk, and one of them
//! takes its request back. A neighbour that does not keep its word, or always has too much to send, counts no more than one that is
//! far away, so that a dead or lying one delays a chunk and no more.

use std::collections::BTreeMap;
use std::time::Duration;

use super::neighbour::{Neighbour, patience};
use super::{Bitmap, Spread, SpreadMessage};

/// Answers in a row that there is too much to send, after which a neighbour is relied on no more. In a local network that all
/// fetch from at once some of them are usual.
const MOST_BUSY: u32 = 16;

/// A neighbour on the local network has asked outside of it for a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Coming {
    /// It is not waited for any longer, however often that is said again.
    until: Duration,
    /// Its lot: who has the smaller one goes on asking.
    lot: u32,
    /// It has not been taken back, nor has the time run out.
    pub(super) live: bool,
}

impl Neighbour {
    /// What counts as a near copy when it is relied on: what it shows and what it has coming.
    fn has_or_gets(&self) -> Vec<u32> {
        let coming = self.coming.iter().filter(|(_, c)| c.live).map(|(&chunk, _)| chunk);
        self.holds.iter().chain(coming).collect()
    }
}

impl<P: Ord + Clone> Spread<P> {
    /// Whether a neighbour is on the same local network. What such a one shows, or says is coming, is asked of nobody
    /// further away, so that little more than one copy comes into the network. One that is reached over a relay is not near,
    /// whatever other way there is to it: chunks would not take that one.
    pub fn set_near(&mut self, peer: &P, near: bool, now: Duration) {
        let Some(neighbour) = self.neighbours.get_mut(peer) else { return };
        let near = near && !neighbour.relayed;
        if std::mem::replace(&mut neighbour.near, near) == near {
            return;
        }
        // What others nearer had was not to be asked of it.
        neighbour.nothing_new = false;
        self.judge(peer);
        let neighbour = &self.neighbours[peer];
        // What it said before it was known to be near.
        let rivals = neighbour.coming.iter().filter(|(_, c)| c.live && neighbour.relied_on);
        let rivals: Vec<(u32, u32)> = rivals.map(|(&chunk, c)| (chunk, c.lot)).collect();
        // The others have heard of these; of what changes now everybody near hears from `assign`.
        let lacks = |chunk: &u32| !neighbour.holds.contains(*chunk);
        let announced: Vec<u32> = self.announced.keys().copied().filter(lacks).collect();
        rivals.into_iter().for_each(|(chunk, lot)| self.give_way(chunk, lot));
        for chunk in announced {
            let message = if near { self.coming(chunk) } else { SpreadMessage::Refuse(chunk) };
            self.send(peer, message);
        }
        self.assign(now);
    }

    /// Whether a neighbour shows a chunk and nobody nearer has it or gets it, or shows it without a relay.
    pub(super) fn may_ask(&self, neighbour: &Neighbour, chunk: u32) -> bool {
        let i = chunk as usize;
        let nearest = neighbour.near || self.near_copies[i] == 0;
        let direct = !neighbour.relayed || self.direct_copies[i] == 0;
        neighbour.holds.contains(chunk) && nearest && direct
    }

    /// Whether a neighbour is relied on from now on, after what changed of it.
    pub(super) fn judge(&mut self, peer: &P) {
        let neighbour = self.neighbours.get_mut(peer).expect("known to the caller");
        let able = neighbour.strikes == 0 && neighbour.busy < MOST_BUSY;
        let (relied_on, direct) = (neighbour.near && able, !neighbour.relayed && able);
        if self.count_direct(peer, direct) && !direct {
            self.look_again();
        }
        let neighbour = self.neighbours.get_mut(peer).expect("known to the caller");
        if std::mem::replace(&mut neighbour.relied_on, relied_on) == relied_on {
            return;
        }
        for chunk in neighbour.has_or_gets() {
            let copies = &mut self.near_copies[chunk as usize];
            *copies = if relied_on { *copies + 1 } else { *copies - 1 };
        }
        if !relied_on {
            self.look_again();
        }
    }

    /// A neighbour that is gone has and gets nothing.
    pub(super) fn forget_near(&mut self, gone: &Neighbour) {
        if gone.relied_on {
            gone.has_or_gets().into_iter().for_each(|chunk| self.near_copies[chunk as usize] -= 1);
            self.look_again();
        }
    }

    /// A neighbour shows `chunk` that it did not show before.
    pub(super) fn shown_near(&mut self, peer: &P, chunk: u32) {
        let neighbour = self.neighbours.get_mut(peer).expect("known to the caller");
        let came = neighbour.coming.remove(&chunk);
        if came.is_some() {
            neighbour.broken = 0;
        }
        let counted = came.is_some_and(|c| c.live);
        self.near_copies[chunk as usize] += u32::from(neighbour.relied_on && !counted);
    }

    /// A neighbour says that it has asked for `chunk` outside. It may know before this member does that they are near.
    pub(super) fn comes(&mut self, peer: &P, chunk: u32, lot: u32, now: Duration) {
        let usual = self.usual_latency(false);
        let neighbour = self.neighbours.get_mut(peer).expect("checked by handle");
        let n_live = neighbour.coming.values().filter(|c| c.live).count();
        let heard = neighbour.broken < self.config.max_strikes && n_live < self.config.max_outstanding;
        let lacks = |have: &Bitmap| chunk < have.n_chunks() && !have.contains(chunk);
        if !heard || !lacks(&self.have) || !lacks(&neighbour.holds) {
            return;
        }
        // Its own answers tell nothing of those from outside.
        let until = now + patience(usual, &self.config);
        let coming = neighbour.coming.entry(chunk).or_insert(Coming { until, lot, live: false });
        if coming.until <= now {
            return;
        }
        coming.lot = lot;
        let was_live = std::mem::replace(&mut coming.live, true);
        if !neighbour.relied_on {
            return;
        }
        self.near_copies[chunk as usize] += u32::from(!was_live);
        self.give_way(chunk, lot);
    }

    /// Takes back what is asked for outside where a near neighbour that has asked for it, too, has the smaller lot.
    fn give_way(&mut self, chunk: u32, lot: u32) {
        if lot >= self.ties[chunk as usize] {
            return;
        }
        let afar = self.neighbours.iter().filter(|(_, n)| !n.near && n.asked.contains_key(&chunk));
        let afar: Vec<P> = afar.map(|(name, _)| name.clone()).collect();
        afar.iter().for_each(|name| self.take_back(name, chunk));
    }

    /// A neighbour says that `chunk` is not coming any more.
    pub(super) fn comes_not(&mut self, peer: &P, chunk: u32) {
        let neighbour = self.neighbours.get_mut(peer).expect("checked by handle");
        let Some(coming) = neighbour.coming.get_mut(&chunk) else { return };
        if std::mem::take(&mut coming.live) && neighbour.relied_on {
            self.near_copies[chunk as usize] -= 1;
            self.look_again();
        }
    }

    /// What has not come in time is not waited for.
    pub(super) fn wait_no_longer(&mut self, now: Duration) {
        let mut late = false;
        for neighbour in self.neighbours.values_mut() {
            let mut broken = false;
            for (&chunk, coming) in neighbour.coming.iter_mut().filter(|(_, c)| c.live && c.until <= now) {
                coming.live = false;
                broken = true;
                self.near_copies[chunk as usize] -= u32::from(neighbour.relied_on);
            }
            neighbour.broken += u32::from(broken);
            late |= broken;
        }
        if late {
            self.look_again();
        }
    }

    /// When something that is coming has not come in time.
    pub(super) fn waits_until(&self) -> Option<Duration> {
        let coming = self.neighbours.values().flat_map(|n| n.coming.values());
        coming.filter(|c| c.live).map(|c| c.until).min()
    }

    /// Tells neighbours on the local network what is asked for outside of it, and what is not any more.
    pub(super) fn announce(&mut self) {
        if !self.neighbours.values().any(|n| n.near) {
            self.announced.clear();
            return;
        }
        let mut afar = BTreeMap::new();
        for (&chunk, &at) in self.neighbours.values().filter(|n| !n.near).flat_map(|n| &n.asked) {
            let latest = afar.entry(chunk).or_insert(at);
            *latest = at.max(*latest);
        }
        if afar == self.announced {
            return;
        }
        let news: Vec<(u32, bool)> = afar
            .iter()
            .filter(|(chunk, at)| self.announced.get(chunk) != Some(at))
            .map(|(&chunk, _)| (chunk, true))
            .chain(
                self.announced.keys().filter(|chunk| !afar.contains_key(chunk)).map(|&chunk| (chunk, false)),
            )
            .collect();
        self.announced = afar;
        for (chunk, comes) in news {
            let message = if comes { self.coming(chunk) } else { SpreadMessage::Refuse(chunk) };
            let near = self.neighbours.iter().filter(|(_, n)| n.near && !n.holds.contains(chunk));
            let near: Vec<P> = near.map(|(name, _)| name.clone()).collect();
            near.iter().for_each(|name| self.send(name, message.clone()));
        }
    }

    fn coming(&self, chunk: u32) -> SpreadMessage {
        SpreadMessage::Coming { chunk, lot: self.ties[chunk as usize] }
    }

    /// Neighbours may have something to ask for after all, when what was near is not.
    pub(super) fn look_again(&mut self) {
        self.neighbours.values_mut().for_each(|n| n.nothing_new = false);
    }
}

#[cfg(test)]
mod tests;
