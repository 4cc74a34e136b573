//! How many versions behind is too many.

use serde::{Deserialize, Serialize};
use swarm_wire::PolicyVersion;

/// The staleness budget in versions: a step that trains version n takes samples of version n - S or newer. 0 is the
/// sequential mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StalenessBound(pub u64);

impl StalenessBound {
    /// How far `sampled` is behind `current`; a version from the future counts as 0 and is refused elsewhere.
    pub fn staleness(current: PolicyVersion, sampled: PolicyVersion) -> u64 {
        current.0.saturating_sub(sampled.0)
    }

    /// Whether a sample of version `sampled` may still be trained on when the policy is at `current`.
    pub fn allows(self, current: PolicyVersion, sampled: PolicyVersion) -> bool {
        sampled <= current && Self::staleness(current, sampled) <= self.0
    }
}

/// Staleness of what was consumed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StalenessStats {
    /// How many trajectories were 0 versions old, 1, and so on up to the oldest.
    by_age: Vec<u64>,
}

impl StalenessStats {
    /// Takes in one trajectory. The budget bounds its age, and with it what is kept.
    pub fn add(&mut self, staleness: u64) {
        let age = usize::try_from(staleness).expect("ages are within a budget");
        self.by_age.resize(self.by_age.len().max(age + 1), 0);
        self.by_age[age] += 1;
    }

    /// How many trajectories were 0 versions old, 1, and so on up to the oldest.
    pub fn by_age(&self) -> &[u64] {
        &self.by_age
    }

    /// Largest, in versions; 0 when there were none.
    pub fn max(&self) -> u64 {
        self.by_age.len().saturating_sub(1) as u64
    }

    /// Mean over the trajectories; 0 when there were none.
    pub fn mean(&self) -> f64 {
        let sum: u64 = self.by_age.iter().zip(0..).map(|(n, age)| n * age).sum();
        sum as f64 / self.by_age.iter().sum::<u64>().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_inclusive_and_the_future_is_refused() {
        let v = PolicyVersion;
        assert!(StalenessBound(0).allows(v(4), v(4)));
        assert!(!StalenessBound(0).allows(v(4), v(3)));
        assert!(StalenessBound(2).allows(v(4), v(2)));
        assert!(!StalenessBound(2).allows(v(4), v(1)));
        assert!(!StalenessBound(2).allows(v(4), v(5)));
    }

    #[test]
    fn the_mean_is_over_trajectories() {
        let mut stats = StalenessStats::default();
        assert_eq!((stats.max(), stats.mean()), (0, 0.0));
        [0, 1, 5].into_iter().for_each(|s| stats.add(s));
        assert_eq!((stats.max(), stats.mean()), (5, 2.0));
        assert_eq!(stats.by_age(), [1, 1, 0, 0, 0, 1]);
    }
}
