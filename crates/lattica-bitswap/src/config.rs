//! Limits and timers of the exchange, with their units.

use std::time::Duration;

/// How one fetch asks its peers.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// Bytes outstanding at a peer before its speed is known.
    pub initial_window_bytes: u64,
    /// Smallest number of bytes outstanding at a peer. One block is always allowed.
    pub min_window_bytes: u64,
    /// Largest number of bytes outstanding at a peer.
    pub max_window_bytes: u64,
    /// Wants (blocks and presences together) at one peer. Helia refuses more than 1024.
    pub max_wants_per_peer: usize,
    /// Presences asked of one peer at a time.
    pub presence_window: usize,
    /// Peers, beyond the known holders, that are asked for presences when much is missing.
    pub max_candidates: usize,
    /// More of them are asked while presences asked for, over all blocks and peers, stay below this: for few blocks
    /// everybody is asked at once, so that one holder among many is found in one round trip.
    pub max_presences: usize,
    /// A peer that delivers nothing for this long is asked no more for a while; grows with the measured latency.
    pub min_timeout: Duration,
    /// Upper bound of that time.
    pub max_timeout: Duration,
    /// A peer that stalled this often is dropped from the fetch.
    pub max_stalls: u32,
    /// Share of the blocks that may be asked twice at the end, when only slow peers are left.
    pub endgame_fraction: f64,
    /// Rotates the order of equally urgent blocks, so that several receivers do not all ask for the same ones.
    pub seed: u64,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            initial_window_bytes: 4 << 20,
            min_window_bytes: 512 << 10,
            max_window_bytes: 32 << 20,
            max_wants_per_peer: 1024,
            presence_window: 256,
            max_candidates: 8,
            max_presences: 512,
            min_timeout: Duration::from_secs(3),
            max_timeout: Duration::from_secs(30),
            max_stalls: 3,
            endgame_fraction: 0.02,
            seed: 0,
        }
    }
}

/// What is served to whom at a time.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Wants that are kept of one peer; more are dropped, the lowest priority first.
    pub max_wants_per_peer: usize,
    /// Peers whose wants are kept.
    pub max_peers: usize,
    /// Block bytes on their way to one peer.
    pub max_in_flight_bytes_per_peer: u64,
    /// Block bytes on their way to all peers.
    pub max_in_flight_bytes: u64,
    /// A want for the presence of a block of at most this many bytes is answered with the block.
    pub inline_block_bytes: usize,
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            max_wants_per_peer: 1024,
            max_peers: 1024,
            max_in_flight_bytes_per_peer: 4 << 20,
            max_in_flight_bytes: 32 << 20,
            inline_block_bytes: 1024,
        }
    }
}

/// Everything about the exchange that can be set.
#[derive(Debug, Clone)]
pub struct ExchangeConfig {
    /// How fetches ask.
    pub session: SessionConfig,
    /// How wants are served.
    pub serve: ServeConfig,
    /// Length of the blocks that are published, 1 byte to 2 MiB.
    pub leaf_bytes: usize,
    /// A fetch that gets no new block for this long gives up; what it has is kept.
    pub give_up_after: Duration,
    /// Bytes per second that spreads may send from here, at least 1; `None`: as fast as it goes.
    pub spread_bytes_per_s: Option<f64>,
    /// Once every asked peer has said that it lacks what is missing, wait this long for one of them to get it.
    pub dont_have_grace: Duration,
}

impl Default for ExchangeConfig {
    fn default() -> Self {
        Self {
            session: SessionConfig::default(),
            serve: ServeConfig::default(),
            leaf_bytes: crate::chunker::LEAF_BYTES,
            give_up_after: Duration::from_secs(30),
            spread_bytes_per_s: None,
            dont_have_grace: Duration::from_secs(2),
        }
    }
}
