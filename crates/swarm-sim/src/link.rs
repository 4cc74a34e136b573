//! One direction between two nodes: latency, bandwidth, loss, reordering, duplication.

use crate::seed::Stream;

/// How a link behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkConfig {
    /// Time of flight. Default: 10 ms.
    pub latency_us: u64,
    /// Up to this much is added to each flight at random. Default: 1 ms.
    pub jitter_us: u64,
    /// Bytes per second; 0 is no limit. Default: 0.
    pub bytes_per_s: u64,
    /// Fraction of messages that vanish. Default: 0.
    pub loss: f64,
    /// Fraction of messages that may overtake earlier ones; the others keep their order. Default: 0.
    pub reorder: f64,
    /// Fraction of messages that arrive twice. Default: 0.
    pub duplicate: f64,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self { latency_us: 10_000, jitter_us: 1000, bytes_per_s: 0, loss: 0.0, reorder: 0.0, duplicate: 0.0 }
    }
}

/// A link and what is on it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) config: LinkConfig,
    random: Stream,
    /// Until when the sender's side is busy with earlier messages.
    busy_until_us: u64,
    last_arrival_us: u64,
}

impl Link {
    pub(crate) fn new(config: LinkConfig, random: Stream) -> Self {
        Self { config, random, busy_until_us: 0, last_arrival_us: 0 }
    }

    /// When a message of `bytes` sent now arrives: not at all, once or twice.
    pub(crate) fn arrivals(&mut self, now_us: u64, bytes: u64) -> Vec<u64> {
        let sending_us = match self.config.bytes_per_s {
            0 => 0,
            rate => (u128::from(bytes) * 1_000_000).div_ceil(u128::from(rate)) as u64,
        };
        self.busy_until_us = self.busy_until_us.max(now_us) + sending_us;
        if self.random.chance(self.config.loss) {
            return Vec::new();
        }
        let copies = 1 + usize::from(self.random.chance(self.config.duplicate));
        (0..copies).map(|_| self.arrival()).collect()
    }

    fn arrival(&mut self) -> u64 {
        let flight_us = self.config.latency_us + self.random.below(self.config.jitter_us + 1);
        let arrival_us = self.busy_until_us + flight_us;
        if self.random.chance(self.config.reorder) {
            return arrival_us;
        }
        self.last_arrival_us = self.last_arrival_us.max(arrival_us);
        self.last_arrival_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::Seed;

    fn link(config: LinkConfig) -> Link {
        Link::new(config, Seed(1).stream("link", 0))
    }

    #[test]
    fn bandwidth_queues_messages_one_after_the_other() {
        let config =
            LinkConfig { latency_us: 100, jitter_us: 0, bytes_per_s: 1_000_000, ..LinkConfig::default() };
        let mut link = link(config);
        assert_eq!(link.arrivals(0, 500), [600]);
        assert_eq!(link.arrivals(0, 500), [1100]);
        assert_eq!(link.arrivals(5000, 1), [5101]);
    }

    #[test]
    fn order_holds_unless_reordering_is_asked_for() {
        let arrivals = |reorder| {
            let mut link =
                link(LinkConfig { latency_us: 10, jitter_us: 500, reorder, ..LinkConfig::default() });
            (0..200).flat_map(|i| link.arrivals(i * 10, 1)).collect::<Vec<_>>()
        };
        assert!(arrivals(0.0).is_sorted());
        assert!(!arrivals(0.5).is_sorted());
    }

    #[test]
    fn loss_and_duplication_come_at_their_rates() {
        let mut link = link(LinkConfig { loss: 0.2, duplicate: 0.5, ..LinkConfig::default() });
        let copies: Vec<usize> = (0..10_000).map(|_| link.arrivals(0, 1).len()).collect();
        let count = |n| copies.iter().filter(|c| **c == n).count();
        assert!(
            (1800..2200).contains(&count(0)) && (3700..4300).contains(&count(2)),
            "{} {}",
            count(0),
            count(2)
        );
    }
}
