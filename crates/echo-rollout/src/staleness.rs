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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StalenessStats {
    /// Largest, in versions.
    pub max: u64,
    /// Sum over the trajectories.
    pub sum: u64,
    /// How many trajectories.
    pub n: u64,
}

impl StalenessStats {
    /// Takes in one trajectory.
    pub fn add(&mut self, staleness: u64) {
        self.max = self.max.max(staleness);
        self.sum += staleness;
        self.n += 1;
    }

    /// Mean over the trajectories; 0 when there were none.
    pub fn mean(&self) -> f64 {
        if self.n == 0 { 0.0 } else { self.sum as f64 / self.n as f64 }
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
        assert_eq!(stats.mean(), 0.0);
        [0, 1, 5].into_iter().for_each(|s| stats.add(s));
        assert_eq!((stats.max, stats.mean()), (5, 2.0));
    }
}
