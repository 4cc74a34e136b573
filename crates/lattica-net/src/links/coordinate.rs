//! Network coordinates (Vivaldi: Dabek, Cox, Kaashoek, Morris, SIGCOMM 2004): each node has a place such that distances are
//! round trips, so that pairs that never measured each other have an estimate. Pure.
//!
//! A place is three dimensions and a height, the way over a node's own access link, which every path pays. The error says
//! how far predictions lately were from measurements; a fresh node's is 1, and its distances mean nothing.

/// Share of the way to the right distance that one measurement moves a node, and the weight of a new error (the paper's
/// `c_c` and `c_e`).
const GAIN: f64 = 0.25;
/// Nobody is believed to be more exact: who says that its error is 0 would pull everybody.
const ERROR_MIN: f64 = 0.02;
/// The error of who knows nothing.
const ERROR_MAX: f64 = 1.0;
/// One measurement moves a node no further, in milliseconds, whatever coordinate the other end claims.
const STEP_MAX_MS: f64 = 50.0;
/// Places further out are no places on earth.
const PLACE_MAX_MS: f64 = 10_000.0;
/// Shorter round trips count as this one: relative errors of a loopback mean nothing.
const RTT_MIN_MS: f64 = 0.1;

/// Where a node is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coordinate {
    place_ms: [f64; 3],
    height_ms: f64,
    error: f64,
}

impl Default for Coordinate {
    /// The place of a node that has measured nothing.
    fn default() -> Self {
        Self { place_ms: [0.0; 3], height_ms: 0.0, error: ERROR_MAX }
    }
}

impl Coordinate {
    /// A coordinate that a peer claims; `None` when it is no place on earth.
    pub fn checked(place_ms: [f64; 3], height_ms: f64, error: f64) -> Option<Self> {
        let near = |x: f64| x.abs() <= PLACE_MAX_MS;
        let good = place_ms.into_iter().all(near) && near(height_ms) && height_ms >= 0.0;
        (good && (0.0..=ERROR_MAX).contains(&error)).then_some(Self { place_ms, height_ms, error })
    }

    /// The place, in milliseconds of round trip.
    pub fn place_ms(&self) -> [f64; 3] {
        self.place_ms
    }

    /// The part of every round trip that is this node's own.
    pub fn height_ms(&self) -> f64 {
        self.height_ms
    }

    /// The usual relative error of its predictions, 0 to 1.
    pub fn error(&self) -> f64 {
        self.error
    }

    /// The predicted round trip to `other`.
    pub fn rtt_ms(&self, other: &Self) -> f64 {
        norm(self.away_from(other)) + self.height_ms + other.height_ms
    }

    /// A round trip to a node at `other` was measured. `seed` gives the direction in which two nodes at one place part.
    pub fn handle_rtt(&mut self, other: &Self, rtt_ms: f64, seed: u64) {
        if !(rtt_ms.is_finite() && (0.0..=PLACE_MAX_MS).contains(&rtt_ms)) {
            return;
        }
        let rtt_ms = rtt_ms.max(RTT_MIN_MS);
        let predicted_ms = self.rtt_ms(other);
        let believed = other.error.max(ERROR_MIN);
        let weight = self.error / (self.error + believed);
        let off = ((predicted_ms - rtt_ms).abs() / rtt_ms).min(ERROR_MAX);
        self.error = (self.error + GAIN * weight * (off - self.error)).clamp(ERROR_MIN, ERROR_MAX);
        let step_ms = (GAIN * weight * (rtt_ms - predicted_ms)).clamp(-STEP_MAX_MS, STEP_MAX_MS);
        let away = self.away_from(other);
        let length = norm(away) + self.height_ms + other.height_ms;
        // The unit vector of the paper: heights add up, so it has one component more.
        let (direction, up) = if norm(away) > 1e-6 {
            (away.map(|x| x / length), (self.height_ms + other.height_ms) / length)
        } else {
            (direction_of(seed), 0.0)
        };
        for (place, direction) in self.place_ms.iter_mut().zip(direction) {
            *place = (*place + step_ms * direction).clamp(-PLACE_MAX_MS, PLACE_MAX_MS);
        }
        // A height of zero would stay zero for ever; every real node has an access link.
        let up = if up == 0.0 { 0.1 } else { up };
        self.height_ms = (self.height_ms + step_ms * up).clamp(0.0, PLACE_MAX_MS);
    }

    fn away_from(&self, other: &Self) -> [f64; 3] {
        std::array::from_fn(|i| self.place_ms[i] - other.place_ms[i])
    }
}

fn norm(v: [f64; 3]) -> f64 {
    v.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// A unit vector drawn by `seed`.
fn direction_of(seed: u64) -> [f64; 3] {
    let mut state = seed;
    let v: [f64; 3] = std::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 31) as f64 - 0.5
    });
    let length = norm(v);
    if length > 1e-6 { v.map(|x| x / length) } else { [1.0, 0.0, 0.0] }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Nodes at real places (two dimensions and an access link); `rtt(a, b)` is what they measure.
    struct World {
        places: Vec<([f64; 2], f64)>,
        coordinates: Vec<Coordinate>,
        draw: u64,
    }

    impl World {
        fn new(places: Vec<([f64; 2], f64)>, seed: u64) -> Self {
            Self { coordinates: vec![Coordinate::default(); places.len()], places, draw: seed }
        }

        fn rtt(&self, a: usize, b: usize) -> f64 {
            let ((p, h), (q, k)) = (self.places[a], self.places[b]);
            (p[0] - q[0]).hypot(p[1] - q[1]) + h + k
        }

        fn below(&mut self, n: usize) -> usize {
            self.draw = self.draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.draw >> 33) as usize % n
        }

        /// Every node measures a few fixed neighbours, `rounds` times; `lie` gives what a node claims instead of its place.
        fn run(&mut self, rounds: usize, lie: impl Fn(usize, usize) -> Option<Coordinate>) {
            let n = self.places.len();
            for round in 0..rounds {
                for a in 0..n {
                    // Always the same eight, so that other pairs are really predicted.
                    let b = (a + 1 + (self.below(8) * n) / 9) % n;
                    if a != b {
                        let claimed = lie(b, round).unwrap_or(self.coordinates[b]);
                        let (rtt, seed) = (self.rtt(a, b), self.below(1 << 20) as u64);
                        self.coordinates[a].handle_rtt(&claimed, rtt, seed);
                    }
                }
            }
        }

        /// Relative errors of all pairs among `nodes`, sorted.
        fn errors(&self, nodes: std::ops::Range<usize>) -> Vec<f64> {
            let mut errors: Vec<f64> = nodes
                .clone()
                .flat_map(|a| nodes.clone().filter(move |b| a < *b).map(move |b| (a, b)))
                .map(|(a, b)| {
                    let rtt = self.rtt(a, b);
                    (self.coordinates[a].rtt_ms(&self.coordinates[b]) - rtt).abs() / rtt
                })
                .collect();
            errors.sort_by(f64::total_cmp);
            errors
        }
    }

    fn places(n: usize) -> impl Strategy<Value = Vec<([f64; 2], f64)>> {
        proptest::collection::vec((-80f64..80.0, -80f64..80.0, 1f64..10.0), n)
            .prop_map(|v| v.into_iter().map(|(x, y, h)| ([x, y], h)).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn predictions_converge_and_say_how_good_they_are(places in places(40), seed: u64) {
            let mut world = World::new(places, seed);
            world.run(600, |_, _| None);
            let errors = world.errors(0..40);
            // Of 3000 worlds the worst had 0.17 and 0.42: a few nodes may settle on the wrong side of the others.
            let (median, p75) = (errors[errors.len() / 2], errors[errors.len() * 3 / 4]);
            prop_assert!(median < 0.25 && p75 < 0.6, "median {median}, p75 {p75}");
            let said = world.coordinates.iter().map(Coordinate::error).sum::<f64>() / 40.0;
            prop_assert!(said < 0.25, "they say {said}");
        }

        #[test]
        fn a_few_liars_do_not_carry_the_others_away(places in places(40), seed: u64, far in 100f64..10_000.0) {
            let mut world = World::new(places, seed);
            // Two of forty claim another far place each time, and to be sure of it.
            world.run(600, |who, round| {
                let x = if round % 2 == 0 { far } else { -far };
                (who < 2).then(|| Coordinate::checked([x, far, 0.0], 0.0, 0.0).expect("near enough"))
            });
            let errors = world.errors(2..40);
            prop_assert!(errors[errors.len() / 2] < 0.75, "median {}", errors[errors.len() / 2]);
        }

        #[test]
        fn whatever_is_claimed_a_coordinate_stays_a_place(
            claims in proptest::collection::vec((any::<f64>(), any::<f64>(), any::<f64>(), any::<f64>(), any::<u64>()), 0..200)
        ) {
            let mut own = Coordinate::default();
            for (x, y, e, rtt, seed) in claims {
                if let Some(other) = Coordinate::checked([x, y, x], y.abs(), e) {
                    let before = own;
                    own.handle_rtt(&other, rtt, seed);
                    let moved = norm(own.away_from(&before));
                    prop_assert!(moved <= STEP_MAX_MS + 1e-6, "moved {moved}");
                }
                prop_assert!(Coordinate::checked(own.place_ms, own.height_ms, own.error).is_some(), "{own:?}");
            }
        }
    }

    #[test]
    fn two_nodes_at_one_place_part_and_agree_on_their_distance() {
        let (mut a, mut b) = (Coordinate::default(), Coordinate::default());
        for seed in 0..200 {
            a.handle_rtt(&b, 30.0, seed);
            b.handle_rtt(&a, 30.0, seed + 1000);
        }
        assert!((a.rtt_ms(&b) - 30.0).abs() < 1.0, "{}", a.rtt_ms(&b));
    }

    #[test]
    fn what_is_no_place_is_refused() {
        assert!(Coordinate::checked([f64::NAN, 0.0, 0.0], 0.0, 0.5).is_none());
        assert!(Coordinate::checked([0.0, 1e9, 0.0], 0.0, 0.5).is_none());
        assert!(Coordinate::checked([0.0; 3], -1.0, 0.5).is_none());
        assert!(Coordinate::checked([0.0; 3], 0.0, 1.5).is_none());
        assert!(Coordinate::checked([0.0; 3], 0.0, 0.0).is_some());
    }
}
