//! What is asked of whom: the rarest first, of the neighbour that should answer first, and again where an answer is late.

use std::time::Duration;

use super::neighbour::Neighbour;
use super::{Spread, SpreadMessage};

impl<P: Ord + Clone> Spread<P> {
    /// Takes a request back from a neighbour.
    pub(super) fn take_back(&mut self, peer: &P, chunk: u32) {
        let neighbour = self.neighbours.get_mut(peer).expect("known to the caller");
        if neighbour.asked.remove(&chunk).is_some() {
            neighbour.cancelled.insert(chunk);
            self.send(peer, SpreadMessage::Cancel(chunk));
            self.release(chunk);
        }
    }

    /// One neighbour fewer is asked for `chunk`.
    pub(super) fn release(&mut self, chunk: u32) {
        if self.unask(chunk) && !self.have.contains(chunk) {
            self.wanted.insert(self.key(chunk));
            for neighbour in self.neighbours.values_mut().filter(|n| n.holds.contains(chunk)) {
                neighbour.nothing_new = false;
            }
        }
    }

    /// Counts one request fewer; `true` when it was the last.
    pub(super) fn unask(&mut self, chunk: u32) -> bool {
        let Some(times) = self.asked.get_mut(&chunk) else { return false };
        *times -= 1;
        let last = *times == 0;
        if last {
            self.asked.remove(&chunk);
        }
        last
    }

    /// Asks neighbours for chunks while there is room: the one that should answer first gets the rarest that it has.
    pub(super) fn assign(&mut self, now: Duration) {
        self.assigned_at = now;
        let mut outstanding: usize = self.neighbours.values().map(|n| n.asked.len()).sum();
        let per_neighbour =
            self.config.per_neighbour.max(self.window as usize / self.neighbours.len().max(1));
        while outstanding < self.window as usize && !self.wanted.is_empty() {
            let open = self
                .neighbours
                .iter()
                .filter(|(_, n)| n.asked.len() < per_neighbour && n.busy_until <= now && !n.nothing_new)
                .min_by_key(|(_, n)| n.order());
            let Some((name, neighbour)) = open else { break };
            let name = name.clone();
            match self.wanted.iter().find(|(_, _, chunk)| self.may_ask(neighbour, *chunk)) {
                Some(&key) => {
                    self.wanted.remove(&key);
                    self.ask(&name, key.2, now);
                    outstanding += 1;
                }
                None => self.neighbours.get_mut(&name).expect("just found").nothing_new = true,
            }
        }
        self.ask_for_rare(now);
        self.ask_again(now);
        self.announce();
    }

    /// Asks for chunks that one neighbour alone shows, beyond the window: it may be the source, which must not wait.
    fn ask_for_rare(&mut self, now: Duration) {
        let idle = |n: &Neighbour| n.asked.is_empty() && n.busy_until <= now && !n.nothing_new;
        let mut n_idle = self.neighbours.values().filter(|n| idle(n)).count();
        // In the order of the chunks; the next one is looked for behind the last one.
        let mut from = (1, 0, 0);
        while n_idle > 0 {
            let found = self.wanted.range(from..(2, 0, 0)).find_map(|&key| {
                let holder = self.neighbours.iter().find(|(_, n)| idle(n) && self.may_ask(n, key.2))?;
                Some((key, holder.0.clone()))
            });
            let Some((key, name)) = found else { return };
            self.wanted.remove(&key);
            self.ask(&name, key.2, now);
            from = key;
            n_idle -= 1;
        }
    }

    pub(super) fn ask(&mut self, name: &P, chunk: u32, now: Duration) {
        *self.asked.entry(chunk).or_default() += 1;
        self.neighbours.get_mut(name).expect("known to the caller").asked.insert(chunk, now);
        self.send(name, SpreadMessage::Request(chunk));
    }

    /// Endgame: an idle neighbour is asked for a chunk that another one has owed for long.
    fn ask_again(&mut self, now: Duration) {
        loop {
            let overdue = self.repeatable().find(|(_, due)| *due <= now);
            let Some((chunk, _)) = overdue else { return };
            let idle = self.neighbours.iter().find(|(_, n)| n.asked.is_empty() && self.may_ask(n, chunk));
            let name = idle.expect("repeatable looked").0.clone();
            self.repeats_left -= 1;
            self.ask(&name, chunk, now);
        }
    }

    /// Chunks that are asked for once while nothing else is wanted and an idle neighbour has them too, and when an answer is due.
    pub(super) fn repeatable(&self) -> impl Iterator<Item = (u32, Duration)> + '_ {
        let open = self.wanted.is_empty() && self.repeats_left > 0;
        let patience = [false, true].map(|near| {
            let usual = self.usual_latency(near);
            usual.map_or(self.config.first_timeout, |usual| usual * 2)
        });
        let asked = self.neighbours.values().filter(move |_| open);
        let asked = asked
            .flat_map(move |n| n.asked.iter().map(move |(&c, &at)| (c, at + patience[usize::from(n.near)])));
        asked.filter(|(chunk, _)| {
            let idle = |n: &Neighbour| n.asked.is_empty() && self.may_ask(n, *chunk);
            self.asked.get(chunk) == Some(&1) && self.neighbours.values().any(idle)
        })
    }
}
