//! An idle uplink offers: whoever has nothing to send shows the neighbour that has least a chunk that it lacks.
//!
//! Pulling alone leaves uplinks idle while others have a queue, because a receiver cannot know whose queue is short. An
//! offer costs one round trip and no chunk is sent twice: the receiver takes it only when it has not asked elsewhere.

use std::time::Duration;

use super::neighbour::Neighbour;
use super::{Spread, SpreadMessage};

/// Offers that are open at a time.
const MAX_OPEN: usize = 3;

impl<P: Ord + Clone> Spread<P> {
    /// Offers something when nothing is asked of this member.
    pub(super) fn offer(&mut self, now: Duration) {
        let waits = self.config.min_timeout;
        let is_open = |n: &Neighbour| n.offer.is_some_and(|(_, at)| now < at + waits);
        let busy = self.uploads >= self.config.upload_slots
            || self.neighbours.values().any(|n| !n.requests.is_empty());
        let mut open = self.neighbours.values().filter(|n| is_open(n)).count();
        if busy || self.super_seed.is_some() || self.have.count() == 0 {
            return;
        }
        while open < MAX_OPEN {
            let takers = self
                .neighbours
                .iter()
                .filter(|(_, n)| !n.nothing_to_offer && !is_open(n) && n.uploading == 0);
            let Some((name, taker)) = takers.min_by_key(|(_, n)| n.holds.count()) else { return };
            let lacks = self.have.minus(&taker.holds).filter(|c| !taker.declined.contains(c));
            let (name, chunk) = (name.clone(), lacks.min_by_key(|&c| self.key(c)));
            let neighbour = self.neighbours.get_mut(&name).expect("just found");
            let Some(chunk) = chunk else {
                neighbour.nothing_to_offer = true;
                continue;
            };
            neighbour.offer = Some((chunk, now));
            self.send(&name, SpreadMessage::Offer(chunk));
            open += 1;
        }
    }

    /// A neighbour offers `chunk`.
    pub(super) fn offered(&mut self, peer: &P, chunk: u32, now: Duration) {
        if self.have.contains(chunk) {
            return self.send(peer, SpreadMessage::Have(vec![chunk]));
        }
        self.shown(peer, &[chunk], now);
        let neighbour = &self.neighbours[peer];
        let room = neighbour.asked.len() <= self.config.per_neighbour;
        if room
            && chunk < self.have.n_chunks()
            && self.may_ask(neighbour, chunk)
            && self.wanted.remove(&self.key(chunk))
        {
            self.ask(peer, chunk, now);
        } else {
            self.send(peer, SpreadMessage::Decline(chunk));
        }
    }
}
