//! What a member knows of one neighbour, and what they owe each other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::near::Coming;
use super::{Bitmap, SpreadConfig};

/// A request waits this many usual answers before it is given up.
const PATIENCE: u32 = 8;

#[derive(Debug)]
pub(super) struct Neighbour {
    /// What it shows.
    pub(super) holds: Bitmap,
    /// It is on the same local network, and reached without a relay.
    pub(super) near: bool,
    /// It is, and keeps its word: what it has or gets is asked of nobody further away.
    pub(super) relied_on: bool,
    /// It is reached over a relay.
    pub(super) relayed: bool,
    /// It is not, and keeps its word: what it shows is asked of nobody over a relay.
    pub(super) direct: bool,
    /// What it asked for outside of the local network.
    pub(super) coming: BTreeMap<u32, Coming>,
    /// How often in a row that did not come in time.
    pub(super) broken: u32,
    /// How often in a row it had too much to send.
    pub(super) busy: u32,
    /// What it is asked for, and since when.
    pub(super) asked: BTreeMap<u32, Duration>,
    /// What it was asked for once and may still send: requests and cancels cross on the wire.
    pub(super) cancelled: BTreeSet<u32>,
    /// What it wants of us, oldest first.
    pub(super) requests: VecDeque<u32>,
    /// The chunk that was offered to it, and when, until it answers.
    pub(super) offer: Option<(u32, Duration)>,
    /// It has too much to send until about then.
    pub(super) busy_until: Duration,
    /// Chunks that it gets from elsewhere.
    pub(super) declined: BTreeSet<u32>,
    /// Chunks that are on their way to it.
    pub(super) uploading: usize,
    /// From request to chunk, smoothed over about four answers.
    pub(super) latency: Option<Duration>,
    /// Requests in a row that it let wait or refused.
    pub(super) strikes: u32,
    /// It has nothing that is wanted: not looked at again until it shows more or something is wanted again.
    pub(super) nothing_new: bool,
    /// There is nothing to offer it: not looked at again until something arrives or it lacks more.
    pub(super) nothing_to_offer: bool,
}

impl Neighbour {
    pub(super) fn new(n_chunks: u32, relayed: bool) -> Self {
        Self {
            holds: Bitmap::empty(n_chunks),
            near: false,
            relayed,
            direct: !relayed,
            relied_on: false,
            coming: BTreeMap::new(),
            broken: 0,
            busy: 0,
            asked: BTreeMap::new(),
            cancelled: BTreeSet::new(),
            requests: VecDeque::new(),
            offer: None,
            busy_until: Duration::ZERO,
            declined: BTreeSet::new(),
            uploading: 0,
            latency: None,
            strikes: 0,
            nothing_new: false,
            nothing_to_offer: false,
        }
    }

    /// It said something of `chunk`: an offer of it is over. Whether it was offered.
    pub(super) fn answered(&mut self, chunk: u32) -> bool {
        self.offer.take_if(|(offered, _)| *offered == chunk).is_some()
    }

    /// A chunk came: how long it took, `None` when it was not asked for.
    pub(super) fn delivered(&mut self, chunk: u32, now: Duration) -> Option<Duration> {
        let took = now.saturating_sub(self.asked.remove(&chunk)?);
        self.latency = Some(self.latency.map_or(took, |latency| (latency * 3 + took) / 4));
        self.strikes = 0;
        self.busy = 0;
        Some(took)
    }

    /// Who is asked next has the least to do for us, then is near, or keeps its word without a relay; what was quick lately breaks ties,
    /// but is soon out of date.
    pub(super) fn order(&self) -> (usize, bool, bool, Option<Duration>) {
        (self.asked.len(), !self.near, !self.direct, self.latency)
    }

    fn patience(&self, usual: Option<Duration>, config: &SpreadConfig) -> Duration {
        patience(self.latency.max(usual), config)
    }

    /// Requests that have waited too long at `now`, when an answer usually takes `usual`.
    pub(super) fn late(&self, now: Duration, usual: Option<Duration>, config: &SpreadConfig) -> Vec<u32> {
        let patience = self.patience(usual, config);
        self.asked.iter().filter(|(_, at)| **at + patience <= now).map(|(&chunk, _)| chunk).collect()
    }

    /// When the oldest request has waited too long.
    pub(super) fn deadline(&self, usual: Option<Duration>, config: &SpreadConfig) -> Option<Duration> {
        self.asked.values().min().map(|&at| at + self.patience(usual, config))
    }
}

/// How long an answer is waited for that usually takes `usual`.
pub(super) fn patience(usual: Option<Duration>, config: &SpreadConfig) -> Duration {
    usual.map_or(config.first_timeout, |usual| (usual * PATIENCE).max(config.min_timeout))
}
