//! Whether it pays to spread: a star (everybody gets a copy from the source) or a mesh (receivers pass on to each other),
//! whichever is done first by the formulas. Chains and trees, which some plan with, stop at their first slow or dead member;
//! members of a mesh find their way around one, and fetch over Bitswap what a star would bring.

/// What is planned from.
#[derive(Debug, Clone, PartialEq)]
pub struct Fleet {
    /// Bytes that everybody is to get.
    pub bytes: u64,
    /// Bytes of one chunk.
    pub chunk_bytes: u64,
    /// What the source can send, bytes per second.
    pub source_uplink: f64,
    /// What each receiver can send, bytes per second.
    pub uplinks: Vec<f64>,
    /// What each receiver can take, bytes per second.
    pub downlinks: Vec<f64>,
    /// Between two members, from a chunk asked for to its first byte, in seconds.
    pub hop_s: f64,
}

/// How much longer than its pipeline a mesh takes: members find each other's chunks by chance. From the simulation in
/// the tests, rounded up.
const MESH_SLACK: f64 = 1.15;
/// Seconds until the members of a mesh have found each other: they look for neighbours once a second, and until then hear
/// from the source alone.
const MESH_SETUP_S: f64 = 1.0;

impl Fleet {
    /// The fluid bound: everything must leave the source once, reach the slowest receiver, and be sent once per receiver
    /// by all uplinks together (Kumar and Ross, "Peer-assisted file distribution: the minimum distribution time", 2006).
    pub fn bound_s(&self) -> f64 {
        let bytes = self.bytes as f64;
        let together = self.source_uplink + self.uplinks.iter().sum::<f64>();
        (bytes / self.source_uplink)
            .max(bytes / self.slowest_down())
            .max(bytes * self.uplinks.len() as f64 / together)
    }

    /// Whether it pays that receivers pass on to each other: a mesh is done before each of them has had a copy of its own
    /// from the source, its members' search for each other included.
    pub fn pays_to_spread(&self) -> bool {
        self.uplinks.len() > 1 && self.mesh_s() + MESH_SETUP_S < self.star_s()
    }

    fn slowest_down(&self) -> f64 {
        self.downlinks.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Seconds until the last of the receivers has had a copy of its own from the source.
    fn star_s(&self) -> f64 {
        let (n, bytes) = (self.uplinks.len() as f64, self.bytes as f64);
        (n * bytes / self.source_uplink).max(bytes / self.slowest_down()) + self.hop_s
    }

    /// Seconds until the last of the receivers has everything, when all pass on what they have.
    fn mesh_s(&self) -> f64 {
        let n = self.uplinks.len() as f64;
        let typical = self.uplinks.iter().sum::<f64>() / n;
        let hops = (n + 1.0).log2().ceil();
        // A hop is told of the chunk, asks for it and gets it: one way more than asking alone.
        let hop_s = self.chunk_bytes as f64 / typical.min(self.slowest_down()) + 1.5 * self.hop_s;
        self.bound_s() * MESH_SLACK + hops * hop_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(n: usize, bytes: u64, rate: f64, hop_s: f64) -> Fleet {
        Fleet {
            bytes,
            chunk_bytes: 1 << 20,
            source_uplink: rate,
            uplinks: vec![rate; n],
            downlinks: vec![rate; n],
            hop_s,
        }
    }

    #[test]
    fn an_adapter_for_a_few_is_no_mesh_and_weights_for_many_are() {
        // 269 kB for three workers at 100 Mbit/s, and for the one that there is.
        assert!(!fleet(3, 269_000, 12.5e6, 0.001).pays_to_spread());
        assert!(!fleet(1, 16_000_000_000, 12.5e6, 0.05).pays_to_spread());
        assert!(!fleet(0, 1 << 30, 12.5e6, 0.05).pays_to_spread());
        // The same adapter for 200 of them, 5 MB for eight, 16 GB for two.
        assert!(fleet(200, 269_000, 12.5e6, 0.05).pays_to_spread());
        assert!(fleet(8, 5_000_000, 12.5e6, 0.05).pays_to_spread());
        assert!(fleet(2, 16_000_000_000, 37.5e6, 0.05).pays_to_spread());
    }

    #[test]
    fn formulas_give_the_published_figures() {
        // 8 receivers, 50 ms a hop, 16 GB at 300 Mbit/s: star 3413 s; floor 427 s.
        let fleet = fleet(8, 16_000_000_000, 37.5e6, 0.05);
        assert!((fleet.star_s() - 3413.0).abs() < 1.0);
        assert!((fleet.bound_s() - 426.7).abs() < 0.1);
        assert!((fleet.bound_s()..1.2 * fleet.bound_s()).contains(&fleet.mesh_s()), "{}", fleet.mesh_s());
    }
}
