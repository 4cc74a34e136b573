//! Who passes on to whom: a star, a chain, a tree or a mesh, whichever is done first by the formulas.

use super::mix;

/// What a plan is made from.
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

/// The pattern of a spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Everybody gets everything from the source.
    Star,
    /// Each member passes everything on to the next.
    Chain,
    /// Each member passes everything on to `arity` others.
    Tree {
        /// How many.
        arity: u32,
    },
    /// Everybody passes on to a few random others what they lack.
    Mesh {
        /// How many.
        degree: u32,
    },
}

/// Who is next to whom, and what that should take.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The pattern.
    pub shape: Shape,
    /// Pairs of members that exchange chunks; 0 is the source, `i + 1` receiver `i`. The first of a pair is nearer to the
    /// source.
    pub edges: Vec<(u32, u32)>,
    /// Seconds until everybody has everything, by the formula.
    pub expected_s: f64,
    /// No plan can be faster than this, in seconds.
    pub bound_s: f64,
}

/// Neighbours of a member in a mesh.
const MESH_DEGREE: u32 = 8;
/// How much longer than its pipeline a mesh takes: members find each other's chunks by chance. From the simulation in
/// the tests, rounded up.
const MESH_SLACK: f64 = 1.15;
/// Seconds until the members of a mesh have found each other: they look for neighbours once a second, and until then hear
/// from the source alone.
const MESH_SETUP_S: f64 = 1.0;
/// The widest tree that is considered.
const MAX_ARITY: u32 = 4;

impl Fleet {
    /// The fluid bound: everything must leave the source once, reach the slowest receiver, and be sent once per receiver
    /// by all uplinks together (Kumar and Ross, "Peer-assisted file distribution: the minimum distribution time", 2006).
    pub fn bound_s(&self) -> f64 {
        let bytes = self.bytes as f64;
        let slowest = self.downlinks.iter().copied().fold(f64::INFINITY, f64::min);
        let together = self.source_uplink + self.uplinks.iter().sum::<f64>();
        (bytes / self.source_uplink).max(bytes / slowest).max(bytes * self.uplinks.len() as f64 / together)
    }

    /// Whether it pays that receivers pass on to each other: a mesh is done before each of them has had a copy of its own
    /// from the source, its members' search for each other included.
    pub fn pays_to_spread(&self) -> bool {
        let order: Vec<u32> = (0..self.uplinks.len() as u32).collect();
        let mesh = self.expected_s(Shape::Mesh { degree: MESH_DEGREE }, &order) + MESH_SETUP_S;
        self.uplinks.len() > 1 && mesh < self.expected_s(Shape::Star, &order)
    }

    fn n_chunks(&self) -> f64 {
        self.bytes.div_ceil(self.chunk_bytes.max(1)) as f64
    }

    /// Seconds until the last receiver has everything, with the source first and the receivers in `order`.
    fn expected_s(&self, shape: Shape, order: &[u32]) -> f64 {
        let n = self.uplinks.len() as f64;
        let (bytes, chunk) = (self.bytes as f64, self.chunk_bytes as f64);
        let slowest_down = self.downlinks.iter().copied().fold(f64::INFINITY, f64::min);
        match shape {
            Shape::Star => (n * bytes / self.source_uplink).max(bytes / slowest_down) + self.hop_s,
            Shape::Chain => self.expected_s(Shape::Tree { arity: 1 }, order),
            Shape::Tree { arity } => {
                // Every member with children sends each chunk `arity` times; the slowest of them sets the pace.
                let arity = arity.min(order.len() as u32).max(1);
                let inner = (order.len() as u32 - 1) / arity;
                let senders = order.iter().take(inner as usize).map(|&i| self.uplinks[i as usize]);
                let slowest_up = senders.fold(self.source_uplink, f64::min);
                let per_chunk =
                    f64::from(arity) * chunk / slowest_up.min(slowest_down * f64::from(arity)) + self.hop_s;
                (self.n_chunks() + depth(order.len() as u32, arity) - 1.0) * per_chunk
            }
            Shape::Mesh { .. } => {
                let typical = self.uplinks.iter().sum::<f64>() / n;
                let hops = (n + 1.0).log2().ceil();
                // A hop is told of the chunk, asks for it and gets it: one way more than asking alone.
                let hop_s = chunk / typical.min(slowest_down) + 1.5 * self.hop_s;
                self.bound_s() * MESH_SLACK + hops * hop_s
            }
        }
    }

    /// The plan that should be done first.
    ///
    /// Receivers with fast uplinks stand near the source, so that slow ones are leaves. `seed` draws the mesh.
    pub fn plan(&self, seed: u64) -> Plan {
        let mut order: Vec<u32> = (0..self.uplinks.len() as u32).collect();
        order.sort_by(|&a, &b| self.uplinks[b as usize].total_cmp(&self.uplinks[a as usize]));
        let trees = (2..=MAX_ARITY).map(|arity| Shape::Tree { arity });
        let shapes =
            [Shape::Star, Shape::Chain, Shape::Mesh { degree: MESH_DEGREE }].into_iter().chain(trees);
        let best = shapes
            .map(|shape| (self.expected_s(shape, &order), shape))
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .expect("there are several shapes");
        Plan {
            shape: best.1,
            edges: edges(best.1, &order, seed),
            expected_s: best.0,
            bound_s: self.bound_s(),
        }
    }
}

/// Levels below the root of a complete tree with `n` other members.
fn depth(n: u32, arity: u32) -> f64 {
    let (mut levels, mut width, mut room) = (0.0, 1u64, 0u64);
    while room < u64::from(n) {
        width *= u64::from(arity);
        room += width;
        levels += 1.0;
    }
    levels
}

/// The pairs of a shape; receivers in `order` from near to far.
pub(super) fn edges(shape: Shape, order: &[u32], seed: u64) -> Vec<(u32, u32)> {
    let n = order.len() as u32;
    // Place p > 0 is receiver order[p - 1].
    let member = |place: u32| if place == 0 { 0 } else { order[place as usize - 1] + 1 };
    match shape {
        Shape::Star => (1..=n).map(|place| (0, member(place))).collect(),
        Shape::Chain => edges(Shape::Tree { arity: 1 }, order, seed),
        Shape::Tree { arity } => {
            (1..=n).map(|place| (member((place - 1) / arity.max(1)), member(place))).collect()
        }
        Shape::Mesh { degree } => {
            // A ring keeps it in one piece; the rest is drawn.
            let mut pairs: std::collections::BTreeSet<(u32, u32)> =
                (1..=n).map(|place| (place - 1, place)).collect();
            let mut draw = seed;
            let mut below = |limit: u32| {
                draw = draw.wrapping_add(0x9e37_79b9_7f4a_7c15);
                ((u128::from(mix(draw)) * u128::from(limit)) >> 64) as u32
            };
            let each = (degree / 2).max(1).min(n);
            for place in 0..=n {
                for _ in 0..each {
                    let other = below(n + 1);
                    if other != place {
                        pairs.insert((place.min(other), place.max(other)));
                    }
                }
            }
            pairs.into_iter().map(|(a, b)| (member(a), member(b))).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
    fn few_small_bytes_go_by_star_and_many_by_relaying() {
        // 4.9 MB to eight on gigabit links: each gets its own copy.
        assert_eq!(fleet(8, 4_900_000, 125e6, 0.05).plan(1).shape, Shape::Star);
        // 16 GB to eight at 300 Mbit/s: the source must not send eight copies.
        let large = fleet(8, 16_000_000_000, 37.5e6, 0.0005).plan(1);
        assert!(!matches!(large.shape, Shape::Star), "{:?}", large.shape);
        assert!(large.expected_s < 1.3 * large.bound_s, "{} of {}", large.expected_s, large.bound_s);
        // A thousand of them: neither.
        let many = fleet(1000, 256 << 20, 2.5e6, 0.05).plan(1);
        assert!(matches!(many.shape, Shape::Mesh { .. }), "{:?}", many.shape);
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
        let order: Vec<u32> = (0..8).collect();
        assert!((fleet.expected_s(Shape::Star, &order) - 3413.0).abs() < 1.0);
        assert!((fleet.bound_s() - 426.7).abs() < 0.1);
        // The chain with the best number of chunks, sqrt((N - 1) M / (b a)): 453 s.
        let m = (7.0f64 * 16e9 / (37.5e6 * 0.05)).sqrt();
        let best = Fleet { chunk_bytes: (16e9 / m) as u64, ..fleet };
        assert!(
            (best.expected_s(Shape::Chain, &order) - 453.0).abs() < 4.5,
            "{}",
            best.expected_s(Shape::Chain, &order)
        );
    }

    proptest! {
        #[test]
        fn plans_reach_everybody_and_slow_uplinks_are_leaves(
            uplinks in proptest::collection::vec(1e5f64..1e8, 1..60), megabytes in 1u64..2000, seed: u64
        ) {
            let n = uplinks.len();
            let fleet = Fleet {
                bytes: megabytes << 20, chunk_bytes: 1 << 20, source_uplink: 1e7,
                downlinks: vec![1e9; n], uplinks: uplinks.clone(), hop_s: 0.02,
            };
            let plan = fleet.plan(seed);
            prop_assert!(plan.expected_s >= plan.bound_s);
            let mut reached = vec![false; n + 1];
            reached[0] = true;
            for _ in 0..=n {
                for &(a, b) in &plan.edges {
                    prop_assert!(a != b && a as usize <= n && b as usize <= n);
                    let either = reached[a as usize] || reached[b as usize];
                    reached[a as usize] = either;
                    reached[b as usize] = either;
                }
            }
            prop_assert!(reached.iter().all(|r| *r));
            let order: Vec<u32> = { let mut o: Vec<u32> = (0..n as u32).collect(); o.sort_by(|&a, &b| uplinks[b as usize].total_cmp(&uplinks[a as usize])); o };
            let tree = edges(Shape::Tree { arity: 2 }, &order, seed);
            let parents: Vec<f64> = tree.iter().filter(|e| e.0 > 0).map(|e| uplinks[e.0 as usize - 1]).collect();
            let leaves: Vec<f64> = (1..=n as u32).filter(|i| tree.iter().all(|e| e.0 != *i)).map(|i| uplinks[i as usize - 1]).collect();
            let slowest_parent = parents.iter().copied().fold(f64::INFINITY, f64::min);
            prop_assert!(leaves.iter().all(|&leaf| leaf <= slowest_parent));
        }
    }
}
