//! What a session knows of one peer: which blocks it has, what it owes us, and how fast it is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::SessionConfig;

/// What we know about one block at one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Knows {
    Unknown,
    /// Assumed because the peer is said to hold the artefact.
    Believed,
    Has,
    Lacks,
}

#[derive(Debug)]
pub(super) struct Peer {
    /// What it was taken for at first: such peers are asked for presences.
    pub(super) started_unknown: bool,
    /// It lied or stalled too often: nothing more is asked of it.
    pub(super) dropped: bool,
    lied: bool,
    /// Blocks it is asked for, and since when.
    pub(super) asked: BTreeMap<u32, Duration>,
    /// Presences it is asked for, and since when.
    pub(super) queries: BTreeMap<u32, Duration>,
    /// Blocks it lacks and will tell us about.
    pub(super) subscribed: BTreeSet<u32>,
    /// Until then it is left alone, after a stall.
    pub(super) resumes_at: Option<Duration>,
    /// Shortest time from want to block so far.
    pub(super) latency: Option<Duration>,
    belief: Vec<Knows>,
    /// How many answers may still come in the form of each block, withdrawn wants included: they may have crossed.
    owed: BTreeMap<u32, u32>,
    outstanding_bytes: u64,
    window_bytes: u64,
    last_progress: Duration,
    stalls: u32,
    /// Bytes per second, smoothed.
    rate: f64,
    /// Bytes since the rate was last looked at, and when that was.
    rate_window: (u64, Duration),
    smoothed_latency: Duration,
}

impl Peer {
    pub(super) fn new(belief: Knows, n_blocks: usize, window_bytes: u64) -> Self {
        Self {
            started_unknown: belief == Knows::Unknown,
            dropped: false,
            lied: false,
            asked: BTreeMap::new(),
            queries: BTreeMap::new(),
            subscribed: BTreeSet::new(),
            resumes_at: None,
            latency: None,
            belief: vec![belief; n_blocks],
            owed: BTreeMap::new(),
            outstanding_bytes: 0,
            window_bytes,
            last_progress: Duration::ZERO,
            stalls: 0,
            rate: 0.0,
            rate_window: (0, Duration::ZERO),
            smoothed_latency: Duration::ZERO,
        }
    }

    pub(super) fn believe_all(&mut self) {
        for belief in self.belief.iter_mut().filter(|b| **b == Knows::Unknown) {
            *belief = Knows::Believed;
        }
    }

    pub(super) fn knows(&self, index: u32) -> Knows {
        self.belief[index as usize]
    }

    pub(super) fn may_have(&self, index: u32) -> bool {
        matches!(self.knows(index), Knows::Has | Knows::Believed) && !self.asked.contains_key(&index)
    }

    /// Whether the block's arrival from this peer is no surprise.
    pub(super) fn owes(&self, index: u32) -> bool {
        !self.lied && self.owed.contains_key(&index)
    }

    /// Everything that may still arrive from this peer.
    pub(super) fn all_owed(&self) -> impl Iterator<Item = u32> + '_ {
        self.owed.keys().copied().filter(|_| !self.lied)
    }

    fn settle(&mut self, index: u32) {
        if let Some(count) = self.owed.get_mut(&index) {
            *count -= 1;
            if *count == 0 {
                self.owed.remove(&index);
            }
        }
    }

    /// A presence came: whether it takes an ask for the block back.
    pub(super) fn presence(&mut self, index: u32, length: u32, have: bool) -> bool {
        let answered = self.queries.remove(&index).is_some() || self.subscribed.remove(&index);
        self.belief[index as usize] = if have { Knows::Has } else { Knows::Lacks };
        if have {
            if answered {
                self.settle(index);
            }
            return false;
        }
        let refused = self.take_ask(index, length);
        if refused || answered {
            self.subscribed.insert(index);
        }
        refused
    }

    pub(super) fn is_usable(&self, now: Duration) -> bool {
        !self.dropped && self.resumes_at.is_none_or(|at| at <= now)
    }

    /// Whether it could be asked for a block that another peer owes.
    pub(super) fn is_idle(&self) -> bool {
        !self.dropped && self.resumes_at.is_none() && self.asked.is_empty()
    }

    fn n_wants(&self) -> usize {
        self.asked.len() + self.queries.len() + self.subscribed.len()
    }

    pub(super) fn has_room(&self, length: u32, config: &SessionConfig) -> bool {
        self.n_wants() < config.max_wants_per_peer
            && (self.asked.is_empty() || self.outstanding_bytes + u64::from(length) <= self.window_bytes)
    }

    pub(super) fn query_room(&self, config: &SessionConfig) -> usize {
        let total = config.max_wants_per_peer.saturating_sub(self.n_wants());
        config.presence_window.saturating_sub(self.queries.len()).min(total)
    }

    pub(super) fn ask(&mut self, index: u32, length: u32, now: Duration) {
        if self.asked.is_empty() && self.queries.is_empty() {
            self.last_progress = now;
        }
        if self.asked.is_empty() {
            self.rate_window = (0, now);
        }
        self.resumes_at = None;
        self.asked.insert(index, now);
        *self.owed.entry(index).or_default() += 1;
        self.outstanding_bytes += u64::from(length);
    }

    pub(super) fn query(&mut self, index: u32, now: Duration) {
        if self.asked.is_empty() && self.queries.is_empty() {
            self.last_progress = now;
        }
        self.resumes_at = None;
        self.queries.insert(index, now);
        // A small block may come in place of its presence.
        *self.owed.entry(index).or_default() += 1;
    }

    /// The block came: learn from how long it took.
    pub(super) fn delivered(&mut self, index: u32, length: u32, now: Duration, config: &SessionConfig) {
        self.last_progress = now;
        self.stalls = 0;
        self.belief[index as usize] = Knows::Has;
        self.settle(index);
        if let Some(&since) = self.asked.get(&index) {
            let took = now.saturating_sub(since);
            self.latency = Some(self.latency.map_or(took, |best| best.min(took)));
            self.smoothed_latency =
                if self.smoothed_latency.is_zero() { took } else { (self.smoothed_latency * 7 + took) / 8 };
        }
        let (bytes, since) = &mut self.rate_window;
        *bytes += u64::from(length);
        let span = now.saturating_sub(*since).as_secs_f64();
        if span >= 0.1 {
            let rate = *bytes as f64 / span;
            self.rate = if self.rate == 0.0 { rate } else { 0.7 * self.rate + 0.3 * rate };
            self.rate_window = (0, now);
            let latency = self.latency.unwrap_or_default().as_secs_f64();
            self.window_bytes = ((2.0 * self.rate * latency) as u64)
                .max(self.window_bytes / 2)
                .clamp(config.min_window_bytes, config.max_window_bytes);
        }
    }

    /// Takes an ask back; `false` when there was none.
    pub(super) fn take_ask(&mut self, index: u32, length: u32) -> bool {
        let asked = self.asked.remove(&index).is_some();
        if asked {
            self.outstanding_bytes -= u64::from(length);
        }
        asked
    }

    /// The block is here: whether the peer had been told that we want it.
    pub(super) fn forget(&mut self, index: u32, length: u32) -> bool {
        let asked = self.take_ask(index, length);
        let queried = self.queries.remove(&index).is_some();
        self.subscribed.remove(&index) || asked || queried
    }

    /// When it counts as stalled, if it owes us anything. Every delivery moves the moment on.
    pub(super) fn deadline(&self, config: &SessionConfig) -> Option<Duration> {
        if self.dropped || (self.asked.is_empty() && self.queries.is_empty()) {
            return None;
        }
        let patience = (self.smoothed_latency * 4).clamp(config.min_timeout, config.max_timeout);
        // One block withheld while others come is noticed too, only later.
        let oldest = self.asked.values().chain(self.queries.values()).min().copied().unwrap_or_default();
        Some((self.last_progress.max(oldest) + patience).min(oldest + patience * 4))
    }

    /// Nothing came in time: what it owed is asked elsewhere, and it rests for a while. Returns the blocks it owed.
    pub(super) fn stall(&mut self, now: Duration, config: &SessionConfig) -> Vec<u32> {
        self.stalls += 1;
        self.queries.clear();
        self.outstanding_bytes = 0;
        self.window_bytes = config.min_window_bytes;
        let released = std::mem::take(&mut self.asked).into_keys().collect();
        if self.stalls >= config.max_stalls {
            self.dropped = true;
        } else {
            let rest = config.min_timeout * (1 << self.stalls.min(4));
            self.resumes_at = Some(now + rest.min(config.max_timeout));
        }
        released
    }

    /// It lied: nothing is asked of it any more. Returns the blocks it owed.
    pub(super) fn drop_all(&mut self) -> Vec<u32> {
        self.dropped = true;
        self.lied = true;
        self.queries.clear();
        self.subscribed.clear();
        self.outstanding_bytes = 0;
        std::mem::take(&mut self.asked).into_keys().collect()
    }

    /// Everything it was told that we want, once.
    pub(super) fn drop_all_known(&mut self) -> impl Iterator<Item = u32> + use<> {
        let mut all: BTreeSet<u32> = std::mem::take(&mut self.asked).into_keys().collect();
        all.extend(std::mem::take(&mut self.queries).into_keys());
        all.append(&mut self.subscribed);
        self.outstanding_bytes = 0;
        all.into_iter()
    }
}
