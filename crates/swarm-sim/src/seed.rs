//! One seed, many independent streams, each with a name: adding a draw to one part of a simulation changes no other.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The root of all randomness of a simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seed(pub u64);

impl Seed {
    /// The stream called `name`, numbered `index`; the same three always give the same numbers.
    pub fn stream(self, name: &str, index: u64) -> Stream {
        let mut hasher = blake3::Hasher::new_derive_key("swarm-sim stream v1");
        hasher.update(&self.0.to_le_bytes()).update(&index.to_le_bytes()).update(name.as_bytes());
        Stream(ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()))
    }
}

/// One stream of random numbers.
#[derive(Debug, Clone)]
pub struct Stream(ChaCha8Rng);

impl Stream {
    /// Sixty-four random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number in `0..n`; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        // The high half of the product is uniform up to 2^-64 per value, which no simulation can tell.
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// A number in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_by_name_and_differ_between_names() {
        let draw = |seed, name, index| {
            let mut stream = Seed(seed).stream(name, index);
            (0..8).map(|_| stream.next_u64()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, "loss", 0), draw(1, "loss", 0));
        for other in [draw(2, "loss", 0), draw(1, "jitter", 0), draw(1, "loss", 1)] {
            assert_ne!(draw(1, "loss", 0), other);
        }
    }

    #[test]
    fn draws_stay_in_their_range_and_reach_all_of_it() {
        let mut stream = Seed(3).stream("range", 0);
        let mut seen = [0; 5];
        (0..1000).for_each(|_| seen[stream.below(5) as usize] += 1);
        assert!(seen.iter().all(|n| (120..280).contains(n)), "{seen:?}");
        assert_eq!(stream.below(0), 0);
        let hits = (0..10_000).filter(|_| stream.chance(0.25)).count();
        assert!((2200..2800).contains(&hits), "{hits}");
        assert!(!stream.chance(0.0) && stream.chance(1.0));
    }
}
