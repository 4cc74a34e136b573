//! Limits and timers of a spread, with their units.

use std::time::Duration;

/// How one member of a spread behaves.
#[derive(Debug, Clone)]
pub struct SpreadConfig {
    /// Chunks that are sent at the same time.
    pub upload_slots: usize,
    /// Chunks asked for at a time at first, at all neighbours together.
    pub min_outstanding: usize,
    /// The most that this grows to while answers come without queueing.
    pub max_outstanding: usize,
    /// Chunks asked of one neighbour at a time; more when there are few neighbours.
    pub per_neighbour: usize,
    /// Requests that wait at a member, of all neighbours together; who comes later is told that it is busy.
    pub max_queue: usize,
    /// Requests that are kept of one neighbour; more are refused.
    pub max_requests: usize,
    /// Fewer neighbours than this, and a member looks for more.
    pub min_neighbours: usize,
    /// More are not taken.
    pub max_neighbours: usize,
    /// How long the first request may wait; later ones wait in proportion to measured answers.
    pub first_timeout: Duration,
    /// No request is given up earlier.
    pub min_timeout: Duration,
    /// A neighbour that let requests wait, or refused them, this often in a row is dropped.
    pub max_strikes: u32,
    /// Share of the chunks that may be asked twice at the end.
    pub endgame_fraction: f64,
    /// Whether a source shows each chunk to one neighbour first.
    pub super_seed: bool,
    /// Chunks shown to a neighbour of the source and not taken yet.
    pub reveal_window: usize,
    /// The same at all neighbours together: more would only wait for the source's uplink.
    pub reveal_total: usize,
    /// Copies that a super-seeding source sends while every chunk is held elsewhere too.
    pub source_copies: f64,
    /// When no neighbour of the source got anything for this long, the source sends beyond that.
    pub stuck_after: Duration,
    /// Makes members prefer different chunks among equally rare ones.
    pub seed: u64,
}

impl Default for SpreadConfig {
    fn default() -> Self {
        Self {
            upload_slots: 4,
            min_outstanding: 4,
            max_outstanding: 64,
            per_neighbour: 2,
            max_queue: 4,
            max_requests: 64,
            min_neighbours: 6,
            max_neighbours: 64,
            first_timeout: Duration::from_secs(20),
            min_timeout: Duration::from_secs(2),
            max_strikes: 3,
            endgame_fraction: 0.02,
            super_seed: true,
            reveal_window: 2,
            reveal_total: 8,
            source_copies: 1.2,
            stuck_after: Duration::from_secs(4),
            seed: 0,
        }
    }
}
