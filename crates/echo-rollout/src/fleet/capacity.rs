//! Seconds and prices of a step, from what workers and links can do.

use serde::{Deserialize, Serialize};

/// The 90th percentile of a standard normal distribution.
const P90: f64 = 1.281_551_6;

/// What the learner asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Demand {
    /// Trajectories of a step (B).
    pub batch: u32,
    /// Seconds of training a step (T).
    pub train_s: f64,
    /// Steps between published versions (kappa).
    pub publish_every: u64,
    /// Versions that a trajectory may lag behind (S).
    pub staleness_budget: u64,
    /// Megabytes of a policy update.
    pub update_mb: f64,
    /// Kilobytes of a trajectory.
    pub trajectory_kb: f64,
    /// Of the machine that trains.
    pub learner_price_per_hour: f64,
}

/// Workers of one kind.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kind {
    /// For people.
    pub name: String,
    /// How many can be had.
    pub available: u32,
    /// Of one, while it is up.
    pub price_per_hour: f64,
    /// Trajectories in the making at once.
    pub slots: u32,
    /// Mean seconds to make a trajectory.
    pub rollout_s: f64,
    /// How heavy the tail is: the standard deviation of its logarithm, in a log-normal distribution.
    #[serde(default)]
    pub rollout_sigma: f64,
    /// Megabits a second of its link, in either direction.
    pub link_mbit: f64,
    /// One way, to the learner.
    pub latency_ms: f64,
    /// Seconds in which it samples nothing while it installs a version.
    #[serde(default)]
    pub install_s: f64,
    /// Mean seconds until it goes away; 0: it stays.
    #[serde(default)]
    pub mean_up_s: f64,
    /// Mean seconds until it is back.
    #[serde(default)]
    pub mean_down_s: f64,
}

impl Kind {
    /// One way, in seconds.
    pub fn latency_s(&self) -> f64 {
        self.latency_ms / 1000.0
    }

    /// Seconds to move so many megabytes.
    pub fn transfer_s(&self, megabytes: f64) -> f64 {
        8.0 * megabytes / self.link_mbit
    }

    /// Seconds from publication until it samples with the version, and the learner knows (Tb).
    pub fn update_s(&self, demand: &Demand) -> f64 {
        2.0 * self.latency_s() + self.transfer_s(demand.update_mb) + self.install_s
    }

    /// Seconds that a trajectory takes from the lease to the learner, nine times of ten (L).
    pub fn trajectory_s(&self, demand: &Demand) -> f64 {
        let s = self.rollout_sigma;
        let slow = self.rollout_s * (P90 * s - 0.5 * s * s).exp();
        slow.max(self.rollout_s) + 2.0 * self.latency_s() + self.transfer_s(demand.trajectory_kb / 1000.0)
    }

    /// Share of the time in which it is there.
    pub fn availability(&self) -> f64 {
        if self.mean_up_s > 0.0 { self.mean_up_s / (self.mean_up_s + self.mean_down_s) } else { 1.0 }
    }

    /// Trajectories a second of one worker over a long time: slots over the time that each is taken (a lease is asked for
    /// and answered in between) or what the link carries, less the time away and the time for installing.
    pub fn rate(&self, demand: &Demand) -> f64 {
        let slots = f64::from(self.slots) / (self.rollout_s + 2.0 * self.latency_s());
        let link = 1.0 / self.transfer_s(demand.trajectory_kb / 1000.0);
        let installing = self.install_s / (demand.publish_every as f64 * demand.train_s);
        slots.min(link) * self.availability() * (1.0 - installing).max(0.0)
    }

    /// Whether its part of a batch that takes `sampling_s` to make (B / mu) is there before the learner would wait:
    /// Tb + L + B / mu <= (S + 1 - kappa) T.
    pub fn is_in_time(&self, demand: &Demand, sampling_s: f64) -> bool {
        let versions = demand.staleness_budget.saturating_add(1).saturating_sub(demand.publish_every);
        let round = self.update_s(demand) + self.trajectory_s(demand) + sampling_s;
        round <= versions as f64 * demand.train_s
    }
}

/// What to expect of a fleet.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forecast {
    /// Seconds of a step.
    pub step_s: f64,
    /// Share of the time in which the learner trains.
    pub utilisation: f64,
    /// Trajectories a second that the fleet can make.
    pub rate_per_s: f64,
    /// The least staleness budget with which the learner would not wait.
    pub min_staleness: u64,
    /// Learner and workers.
    pub cost_per_step: f64,
}

/// Of `counts` of each of `kinds`, for the time that they are there.
pub fn price_per_hour(kinds: &[Kind], counts: &[u32]) -> f64 {
    // A float sum of nothing may be -0.
    let price = |(k, n): (&Kind, &u32)| f64::from(*n) * k.availability() * k.price_per_hour;
    kinds.iter().zip(counts).map(price).fold(0.0, |a, b| a + b)
}

/// What to expect of `counts` of each of `kinds`.
///
/// A step takes max(T, B / mu, (T + Tb + Leff) / (S + 2 - kappa)) with Leff = L + B / mu for the slowest kind in use: the
/// learner trains, or waits for throughput, or for the first trajectories of a version that is not too old. It does not
/// wait from S = kappa - 1 + ceil((Tb + Leff) / T) on.
pub fn forecast(demand: &Demand, kinds: &[Kind], counts: &[u32]) -> Forecast {
    let used = || kinds.iter().zip(counts).filter(|(_, n)| **n > 0);
    let rate = used().map(|(k, n)| f64::from(*n) * k.rate(demand)).fold(0.0, |a, b| a + b);
    let sampling = f64::from(demand.batch) / rate;
    let round = used().map(|(k, _)| k.update_s(demand) + k.trajectory_s(demand)).fold(0.0, f64::max);
    let round = round + sampling;
    let overlap = demand.staleness_budget.saturating_add(2).saturating_sub(demand.publish_every).max(1);
    let step_s = demand.train_s.max(sampling).max((demand.train_s + round) / overlap as f64);
    Forecast {
        step_s,
        utilisation: demand.train_s / step_s,
        rate_per_s: rate,
        min_staleness: (demand.publish_every - 1).saturating_add((round / demand.train_s).ceil() as u64),
        cost_per_step: (demand.learner_price_per_hour + price_per_hour(kinds, counts)) * step_s / 3600.0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{demand, kind};
    use super::*;

    #[test]
    fn the_step_is_as_long_as_what_it_waits_for() {
        // A discrete-event simulation of T 60, B 64, 96 slots, L 60, and Tb 60 or 180 gave these (seconds by S).
        let fleet = |tb: f64| {
            Kind {
                available: 12,
                latency_ms: 0.0,
                link_mbit: 1e9,
                install_s: 0.0,
                ..kind("gpu", 0.45, 60.0, 1e9)
            }
            .delayed(tb)
        };
        for (tb, simulated) in [(60.0, [179.0, 90.0, 60.0]), (180.0, [299.0, 149.0, 100.0])] {
            for (s, seconds) in simulated.into_iter().enumerate() {
                let got = forecast(&demand(s as u64), &[fleet(tb)], &[12]).step_s;
                // Here a batch waits for its last trajectory as well, half a batch's time on average there.
                assert!(got >= seconds * 0.99 && got <= seconds * 1.35, "Tb {tb} S {s}: {got} {seconds}");
            }
        }
    }

    impl Kind {
        /// The same with versions that take so long.
        fn delayed(self, seconds: f64) -> Self {
            Self { link_mbit: 8.0 * 5.0 / seconds, ..self }
        }
    }

    #[test]
    fn absences_installing_and_thin_links_take_their_share() {
        let d = demand(3);
        let whole = kind("gpu", 0.45, 60.0, 100.0);
        let rate = whole.rate(&d);
        assert!((rate - 8.0 / 60.1).abs() < 1e-9);
        let away = Kind { mean_up_s: 900.0, mean_down_s: 300.0, ..whole.clone() };
        assert!((away.rate(&d) - 0.75 * rate).abs() < 1e-9);
        let busy = Kind { install_s: 6.0, ..whole.clone() };
        assert!((busy.rate(&d) - 0.9 * rate).abs() < 1e-9);
        let thin = Kind { link_mbit: 0.001, ..whole.clone() };
        assert!((thin.rate(&d) - 1.0 / 160.0).abs() < 1e-9, "20 kB take 160 s");
        let in_time = [0, 1, 2, 3].map(|budget| whole.is_in_time(&demand(budget), 57.0));
        assert_eq!(in_time, [false, false, true, true]);
    }
}
