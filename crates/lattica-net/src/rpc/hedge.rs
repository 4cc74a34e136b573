//! How long calls to a peer take, for deciding when a second peer is worth asking. Pure.

use std::collections::VecDeque;
use std::time::Duration;

/// Durations that are kept.
const WINDOW: usize = 64;
/// With fewer, nothing is known.
const KNOWN_FROM: usize = 8;

/// The durations of the last 64 calls.
#[derive(Debug, Clone, Default)]
pub struct Latencies {
    last: VecDeque<Duration>,
}

impl Latencies {
    /// A call took `duration`.
    pub fn handle_call(&mut self, duration: Duration) {
        if self.last.len() == WINDOW {
            self.last.pop_front();
        }
        self.last.push_back(duration);
    }

    /// The 95th percentile (nearest rank); `None` before eight calls.
    pub fn p95(&self) -> Option<Duration> {
        if self.last.len() < KNOWN_FROM {
            return None;
        }
        let mut sorted: Vec<Duration> = self.last.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get((sorted.len() * 95).div_ceil(100) - 1).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentile_is_that_of_the_last_calls() {
        let mut latencies = Latencies::default();
        for ms in 1..=7 {
            latencies.handle_call(Duration::from_millis(ms));
            assert_eq!(latencies.p95(), None);
        }
        for ms in 8..=164 {
            latencies.handle_call(Duration::from_millis(ms));
        }
        // The last 64 are 101 to 164; 61 of them are at most 161.
        assert_eq!(latencies.p95(), Some(Duration::from_millis(161)));
    }
}
