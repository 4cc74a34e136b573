//! What a fleet of rollout workers yields and costs, before money is spent on it.
//!
//! [`capacity`] forecasts the time and the price of a step; [`select`] finds the cheapest workers that keep the learner busy;
//! [`plan`] puts both together and says what is missing where nothing will do; [`keep`] decides whether a running fleet is
//! changed. Everything here is arithmetic; the simulator (feature `sim`) plays the same fleet in virtual time.
//!
//! Symbols, after the capacity model for Echo-2's overlap of learning and sampling (arXiv 2602.02192): B trajectories of a
//! step, T seconds of training, kappa steps between published versions, S versions of staleness allowed, Tb seconds from
//! publication until a worker samples with a version, L seconds to make and deliver a trajectory, mu trajectories a second.

pub mod capacity;
pub mod keep;
pub mod select;

use serde::Serialize;

pub use capacity::{Demand, Forecast, Kind};
pub use keep::{KeepConfig, Keeper};
use select::{Choice, Offer};

/// A fleet, what to expect of it, and what would help where it is not enough.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// How many of each kind, in the order of the kinds.
    pub counts: Vec<u32>,
    /// Whether no cheaper fleet meets the throughput; false when the search gave up early.
    pub exact: bool,
    /// Whether the fleet keeps the learner busy within the staleness budget.
    pub meets_budget: bool,
    /// What to expect.
    pub forecast: Forecast,
    /// Where the throughput is not met: how many more of each kind would do, alone.
    pub more: Vec<KindCount>,
}

/// So many workers of a kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KindCount {
    /// The kind's name.
    pub kind: String,
    /// How many.
    pub count: u32,
}

/// The cheapest fleet of `kinds` that keeps the learner of `demand` busy with `headroom` (0.05: 5 %) to spare.
///
/// Kinds whose versions or trajectories take too long for the budget are left out; where that leaves too little, all kinds
/// are taken into account and [`Plan::meets_budget`] is false. Where all of them together are too slow, all are used and
/// [`Plan::more`] says what is missing.
pub fn plan(demand: &Demand, kinds: &[Kind], headroom: f64) -> Plan {
    let needed = (1.0 + headroom) * f64::from(demand.batch) / demand.train_s;
    let sampling_s = f64::from(demand.batch) / needed;
    let offers = |only_in_time: bool| -> Vec<Offer> {
        let offer = |kind: &Kind| Offer {
            price: kind.price_per_hour,
            rate: kind.rate(demand),
            available: if only_in_time && !kind.is_in_time(demand, sampling_s) { 0 } else { kind.available },
        };
        kinds.iter().map(offer).collect()
    };
    let chosen = select::cheapest(&offers(true), needed).or_else(|| select::cheapest(&offers(false), needed));
    let (counts, exact, more) = match chosen {
        Some(Choice { counts, exact }) => (counts, exact, Vec::new()),
        None => {
            let counts: Vec<u32> = kinds.iter().map(|k| k.available).collect();
            let have: f64 = kinds.iter().map(|k| f64::from(k.available) * k.rate(demand)).sum();
            let more = |kind: &Kind| KindCount {
                kind: kind.name.clone(),
                count: select::more(needed - have, kind.rate(demand)),
            };
            (counts, true, kinds.iter().filter(|k| k.rate(demand) > 0.0).map(more).collect())
        }
    };
    let forecast = capacity::forecast(demand, kinds, &counts);
    let meets_budget =
        more.is_empty() && forecast.rate_per_s > 0.0 && forecast.min_staleness <= demand.staleness_budget;
    Plan { counts, exact, meets_budget, forecast, more }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn demand(staleness_budget: u64) -> Demand {
        Demand {
            batch: 64,
            train_s: 60.0,
            publish_every: 1,
            staleness_budget,
            update_mb: 5.0,
            trajectory_kb: 20.0,
            learner_price_per_hour: 12.8,
        }
    }

    pub(crate) fn kind(name: &str, price_per_hour: f64, rollout_s: f64, link_mbit: f64) -> Kind {
        Kind {
            name: name.to_owned(),
            available: 20,
            price_per_hour,
            slots: 8,
            rollout_s,
            rollout_sigma: 0.0,
            link_mbit,
            latency_ms: 50.0,
            install_s: 0.0,
            mean_up_s: 0.0,
            mean_down_s: 0.0,
        }
    }

    #[test]
    fn a_tight_budget_buys_workers_on_fast_links_and_a_loose_one_cheap_ones() {
        let kinds = [kind("near", 0.9, 60.0, 1000.0), kind("far", 0.4, 60.0, 0.4)];
        // 5 MB at 0.4 Mbit/s take 100 s: too long for one version of 60 s, not for four.
        let loose = plan(&demand(4), &kinds, 0.05);
        assert_eq!((loose.counts[0], loose.meets_budget), (0, true));
        assert!(loose.counts[1] >= 9 && loose.more.is_empty());
        let tight = plan(&demand(3), &kinds, 0.05);
        assert_eq!(tight.counts[1], 0, "{tight:?}");
        assert!(tight.forecast.cost_per_step > loose.forecast.cost_per_step);
    }

    #[test]
    fn a_fleet_that_makes_nothing_meets_nothing() {
        // Installing takes as long as a version lasts.
        let busy = Kind { install_s: 120.0, ..kind("busy", 0.4, 60.0, 1000.0) };
        let demand = Demand { publish_every: 2, ..demand(8) };
        let nothing = plan(&demand, &[busy], 0.05);
        assert!(!nothing.meets_budget && nothing.more.is_empty(), "{nothing:?}");
        assert_eq!((nothing.forecast.rate_per_s, nothing.forecast.min_staleness), (0.0, u64::MAX));
    }

    #[test]
    fn what_is_missing_is_said_and_enough_once_it_is_there() {
        let mut kinds = [kind("near", 0.9, 60.0, 1000.0), kind("slow", 0.2, 240.0, 1000.0)];
        kinds.iter_mut().for_each(|k| k.available = 2);
        let short = plan(&demand(8), &kinds, 0.05);
        assert!(!short.meets_budget && short.forecast.utilisation < 0.5);
        for (i, more) in short.more.iter().enumerate() {
            let mut enough = kinds.clone();
            enough[i].available += more.count;
            assert!(plan(&demand(8), &enough, 0.05).more.is_empty(), "{more:?}");
            enough[i].available -= 1;
            assert!(!plan(&demand(8), &enough, 0.05).more.is_empty(), "{more:?}");
        }
    }
}
