//! When a fleet is exchanged for another one while a run goes on: prices and workers change, and so may the choice. Workers
//! that come and go cost rollouts in the making and fresh copies of the policy, so a fleet is kept until a change is worth it.

use serde::Deserialize;

use super::capacity::{Demand, Kind, forecast, price_per_hour};
use super::{Plan, plan};

/// Most throughput to spare that a fleet is ever chosen with.
const MOST_HEADROOM: f64 = 3.0;

/// What makes a change worth it.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeepConfig {
    /// Steps of a window; the fleet is looked at once in each.
    pub window_steps: u64,
    /// A cheaper fleet must save more than this share of the price.
    pub min_saving: f64,
    /// The learner is to be busy for this share of what is forecast for the best fleet that can be had.
    pub target_utilisation: f64,
    /// Windows in a row below it before the fleet is changed.
    pub patience: u32,
}

impl Default for KeepConfig {
    fn default() -> Self {
        Self { window_steps: 5, min_saving: 0.03, target_utilisation: 0.95, patience: 3 }
    }
}

/// Decides from window to window whether a fleet is kept.
#[derive(Debug, Clone)]
pub struct Keeper {
    config: KeepConfig,
    /// Throughput to spare when a fleet is chosen; grows when fleets deliver less than forecast.
    headroom: f64,
    /// Windows in a row that were below the target.
    below: u32,
}

impl Keeper {
    /// Of a fleet that was chosen with `headroom`.
    pub fn new(config: KeepConfig, headroom: f64) -> Self {
        Self { config, headroom, below: 0 }
    }

    /// The fleet to change to after a window in which `counts` of `kinds`, as they are now, kept the learner busy for
    /// `utilisation` of the time; none to keep what there is.
    pub fn after_window(
        &mut self,
        demand: &Demand,
        kinds: &[Kind],
        counts: &[u32],
        utilisation: f64,
    ) -> Option<Plan> {
        let best = self.best(demand, kinds, counts);
        let target = self.config.target_utilisation * best.forecast.utilisation;
        self.below = if utilisation < target { self.below + 1 } else { 0 };
        let price = |counts: &[u32]| price_per_hour(kinds, counts);
        let saves = price(&best.counts) < price(counts) * (1.0 - self.config.min_saving);
        if !saves && self.below < self.config.patience {
            return None;
        }
        self.below = 0;
        if best.counts != counts {
            return Some(best);
        }
        // What should be enough is there and is not enough.
        let short = target / utilisation.max(1e-3);
        self.headroom = ((1.0 + self.headroom) * short - 1.0).min(MOST_HEADROOM.max(self.headroom));
        Some(self.best(demand, kinds, counts)).filter(|more| more.counts != counts)
    }

    /// The cheapest fleet, when workers that are there already are worth as much more as a change must save.
    fn best(&self, demand: &Demand, kinds: &[Kind], counts: &[u32]) -> Plan {
        let there = kinds.iter().zip(counts).map(|(kind, n)| Kind {
            available: kind.available.min(*n),
            price_per_hour: kind.price_per_hour * (1.0 - self.config.min_saving),
            ..kind.clone()
        });
        let more = kinds
            .iter()
            .zip(counts)
            .map(|(kind, n)| Kind { available: kind.available.saturating_sub(*n), ..kind.clone() });
        let offered: Vec<Kind> = there.chain(more).collect();
        let mut plan = plan(demand, &offered, self.headroom);
        let (there, more) = plan.counts.split_at(kinds.len());
        plan.counts = there.iter().zip(more).map(|(there, more)| there + more).collect();
        plan.forecast = forecast(demand, kinds, &plan.counts);
        // Said of each kind twice.
        plan.more.truncate(plan.more.len() / 2);
        plan
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{demand, kind};
    use super::*;

    fn keeper() -> Keeper {
        Keeper::new(KeepConfig::default(), 0.05)
    }

    proptest! {
        #[test]
        fn a_fleet_is_changed_when_that_saves_enough_and_not_back(cents in 1_u32..200) {
            let mut kinds = [kind("here", 1.0, 60.0, 1000.0), kind("there", 1.0, 60.0, 1000.0)];
            let mut keeper = keeper();
            let counts = plan(&demand(3), &kinds, 0.05).counts;
            prop_assert!(counts[0] > 0 && counts[1] == 0);
            kinds[1].price_per_hour = f64::from(cents) / 100.0;
            let changed = keeper.after_window(&demand(3), &kinds, &counts, 1.0);
            prop_assert_eq!(changed.is_some(), cents < 97, "{:?}", changed);
            let now = changed.map_or(counts, |plan| plan.counts);
            prop_assert_eq!(keeper.after_window(&demand(3), &kinds, &now, 1.0), None);
        }
    }

    #[test]
    fn a_learner_that_waits_gets_another_fleet_after_some_patience() {
        let kinds = [kind("here", 1.0, 60.0, 1000.0)];
        let enough = plan(&demand(3), &kinds, 0.05).counts;
        let (mut gone, mut keeper) = (enough.clone(), keeper());
        gone[0] -= 3;
        let mut changes = |counts: &[u32], utilisation| {
            keeper.after_window(&demand(3), &kinds, counts, utilisation).map(|plan| plan.counts)
        };
        for utilisation in [0.5, 0.5, 1.0, 0.5, 0.5] {
            assert_eq!(changes(&gone, utilisation), None);
        }
        assert_eq!(changes(&gone, 0.5), Some(enough.clone()));
        // The same with a fleet that should do: more of it is taken, as much more as it was too slow, and that is kept.
        for _ in 0..2 {
            assert_eq!(changes(&enough, 0.7), None);
        }
        let more = changes(&enough, 0.7).unwrap();
        let ratio = f64::from(more[0]) / f64::from(enough[0]);
        assert!((1.3..1.5).contains(&ratio), "{enough:?} {more:?}");
        assert_eq!(changes(&more, 1.0), None);
    }

    #[test]
    fn who_is_there_already_is_kept_where_others_are_hardly_cheaper() {
        let kinds = [kind("here", 1.0, 60.0, 1000.0), kind("there", 0.99, 60.0, 1000.0)];
        let mut keeper = keeper();
        let counts = [4, 0];
        let changes: Vec<_> =
            (0..3).filter_map(|_| keeper.after_window(&demand(3), &kinds, &counts, 0.4)).collect();
        let [plan] = &changes[..] else { panic!("{changes:?}") };
        assert!(plan.counts[0] == 4 && plan.counts[1] > 4 && plan.more.is_empty(), "{plan:?}");
    }

    #[test]
    fn all_that_there_is_cannot_be_changed() {
        let mut few = kind("few", 1.0, 60.0, 1000.0);
        few.available = 2;
        let mut keeper = keeper();
        for utilisation in [0.2, 0.1, 0.0, 0.0, 0.0, 0.0] {
            assert_eq!(keeper.after_window(&demand(3), std::slice::from_ref(&few), &[2], utilisation), None);
        }
    }
}
