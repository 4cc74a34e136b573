//! The whole loop in virtual time: the dispatcher and the coordinators of a real run, with workers, links and training that
//! only take their time.
//!
//! Lengths of trajectories are drawn from heavy-tailed distributions, links have latency and bandwidth, workers come and
//! go, everything has a price, and prices change: the fleet may be chosen anew while the run goes on. Workers go on with a newer policy while they sample (`--in-flight switch`); a trajectory is
//! as old as its first token. The same scenario gives the same events: [`Outcome::digest`].

mod swarm;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::asynchronous::Impossible;
use crate::config::InvalidConfig;
use crate::fleet::{Demand, KeepConfig, Kind, KindCount, Plan, plan};
use swarm::Swarm;

/// What is simulated.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Of all draws.
    #[serde(default = "one")]
    pub seed: u64,
    /// Steps that count.
    pub steps: u64,
    /// Steps before them that do not: nothing runs ahead yet.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Groups of a step.
    pub groups_per_step: u32,
    /// Trajectories of a group.
    pub group_size: u32,
    /// Seconds of training a step.
    pub train_s: f64,
    /// Versions that a trajectory may lag behind; 0 is the sequential mode.
    pub staleness_budget: u64,
    /// Steps between published versions.
    #[serde(default = "one")]
    pub publish_every: u64,
    /// Megabytes of a policy update.
    pub update_mb: f64,
    /// Kilobytes of a trajectory.
    pub trajectory_kb: f64,
    /// Of the machine that trains.
    pub learner_price_per_hour: f64,
    /// Throughput to spare when workers are chosen: 0.05 is 5 %.
    #[serde(default = "spare")]
    pub headroom: f64,
    /// Use all workers that there are instead of the cheapest set.
    #[serde(default)]
    pub use_all: bool,
    /// The workers that can be had.
    pub workers: Vec<Kind>,
    /// The machine that trains, as it samples by itself: what the swarm is compared with. Its price is the learner's.
    #[serde(default)]
    pub central: Option<Central>,
    /// Choose the fleet anew when that is worth it; without, the first choice stays.
    #[serde(default)]
    pub keep: Option<KeepConfig>,
    /// What changes while the run goes on.
    #[serde(default)]
    pub changes: Vec<Change>,
}

/// What a kind of workers is from a moment on.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Seconds from the beginning, the warm-up included.
    pub at_s: f64,
    /// The kind's name.
    pub kind: String,
    /// Its new price; none: as it was.
    pub price_per_hour: Option<f64>,
    /// How many can be had now; workers beyond that go at once. None: as before.
    pub available: Option<u32>,
}

/// A machine that trains and samples in turn, with no link in between.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Central {
    /// Trajectories in the making at once.
    pub slots: u32,
    /// Mean seconds to make one.
    pub rollout_s: f64,
    /// As [`Kind::rollout_sigma`].
    #[serde(default)]
    pub rollout_sigma: f64,
}

fn one() -> u64 {
    1
}

fn spare() -> f64 {
    0.05
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Versions that a trajectory may lag behind.
    pub staleness_budget: u64,
    /// Share of the time in which the learner trained.
    pub learner_utilisation: f64,
    /// The same, as forecast.
    pub predicted_utilisation: f64,
    /// Mean seconds of a step.
    pub step_s: f64,
    /// The same, as forecast.
    pub predicted_step_s: f64,
    /// Learner and workers, for the time that they were there.
    pub cost_per_step: f64,
    /// The same, as forecast.
    pub predicted_cost_per_step: f64,
    /// How many of which kind, at first.
    pub workers_selected: Vec<KindCount>,
    /// Fleets that took over later.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fleet_changes: Vec<FleetChange>,
    /// The plan: what to expect, and what would help.
    pub plan: Plan,
    /// Oldest trajectory that was trained on, in versions.
    pub max_staleness: u64,
    /// Mean age.
    pub mean_staleness: f64,
    /// Leases given out.
    pub leased: u64,
    /// Of these, trained on.
    pub consumed: u64,
    /// Of these, dropped as too old.
    pub dropped_stale: u64,
    /// Of these, lost with a worker that went away.
    pub dropped_with_worker: u64,
    /// Seconds of a step when the learner's machine samples by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub central_step_s: Option<f64>,
    /// What that costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub central_cost_per_step: Option<f64>,
    /// What the swarm saves: a share of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saving: Option<f64>,
    /// Of all events.
    pub digest: String,
}

/// Another fleet from here on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FleetChange {
    /// Steps that were made before.
    pub after_steps: u64,
    /// Seconds from the beginning.
    pub at_s: f64,
    /// How many of which kind there are now.
    pub workers: Vec<KindCount>,
    /// What they cost.
    pub price_per_hour: f64,
}

/// The kinds of which there are any.
fn selected(kinds: &[Kind], counts: &[u32]) -> Vec<KindCount> {
    let some = kinds.iter().zip(counts).filter(|(_, count)| **count > 0);
    some.map(|(kind, count)| KindCount { kind: kind.name.clone(), count: *count }).collect()
}

/// Why a scenario cannot be played.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SimulationError {
    /// A number out of range.
    #[error("{setting} = {value} must be {allowed}")]
    Setting {
        /// Its name.
        setting: String,
        /// Its value.
        value: f64,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A change of workers that are not there.
    #[error("changes[{index}] is about {kind:?}, and no workers are called so")]
    Change {
        /// Its number.
        index: usize,
        /// The name.
        kind: String,
    },
    /// Settings with which an asynchronous run could not go on.
    #[error(transparent)]
    Impossible(#[from] Impossible),
    /// The dispatcher's settings.
    #[error(transparent)]
    Dispatch(#[from] InvalidConfig),
    /// Nothing more happens.
    #[error(
        "after step {step} nothing happens any more at {seconds:.0} s: no worker that is there can make what is missing"
    )]
    Stuck {
        /// The last step.
        step: u64,
        /// Virtual time.
        seconds: f64,
    },
}

impl Scenario {
    /// What the learner asks for.
    pub fn demand(&self) -> Demand {
        Demand {
            batch: self.groups_per_step.saturating_mul(self.group_size),
            train_s: self.train_s,
            publish_every: self.publish_every,
            staleness_budget: self.staleness_budget,
            update_mb: self.update_mb,
            trajectory_kb: self.trajectory_kb,
            learner_price_per_hour: self.learner_price_per_hour,
        }
    }

    /// The workers to take and what to expect of them, without playing anything.
    ///
    /// # Errors
    /// A number out of range.
    pub fn plan(&self) -> Result<Plan, SimulationError> {
        self.validate()?;
        let demand = self.demand();
        if !self.use_all {
            return Ok(plan(&demand, &self.workers, self.headroom));
        }
        let counts: Vec<u32> = self.workers.iter().map(|k| k.available).collect();
        let forecast = crate::fleet::capacity::forecast(&demand, &self.workers, &counts);
        let meets_budget = forecast.rate_per_s > 0.0 && forecast.min_staleness <= self.staleness_budget;
        Ok(Plan { counts, exact: true, meets_budget, forecast, more: Vec::new() })
    }

    /// Plays it.
    ///
    /// # Errors
    /// A number out of range, settings with which a run could not go on, a swarm that gets stuck.
    pub fn run(&self) -> Result<Outcome, SimulationError> {
        let plan = self.plan()?;
        let played = Swarm::new(self, &plan.counts)?.play()?;
        let central = self.central.map(|central| self.alone(central)).transpose()?;
        let central_cost = central.as_ref().map(|c| c.cost_per_step);
        Ok(Outcome {
            staleness_budget: self.staleness_budget,
            learner_utilisation: played.utilisation,
            predicted_utilisation: plan.forecast.utilisation,
            step_s: played.step_s,
            predicted_step_s: plan.forecast.step_s,
            cost_per_step: played.cost_per_step,
            predicted_cost_per_step: plan.forecast.cost_per_step,
            workers_selected: selected(&self.workers, &plan.counts),
            fleet_changes: played.changes,
            max_staleness: played.max_staleness,
            mean_staleness: played.mean_staleness,
            leased: played.counts.leased,
            consumed: played.counts.consumed,
            dropped_stale: played.counts.dropped_stale(),
            dropped_with_worker: played.counts.dropped_for(crate::lease::DropReason::Disconnected),
            central_step_s: central.as_ref().map(|c| c.step_s),
            central_cost_per_step: central_cost,
            saving: central_cost.map(|cost| 1.0 - played.cost_per_step / cost),
            digest: played.digest,
            plan,
        })
    }

    /// The sequential mode on the learner's machine: one worker without a price, and nothing to send.
    fn alone(&self, central: Central) -> Result<swarm::Played, SimulationError> {
        let worker = Kind {
            name: "central".to_owned(),
            available: 1,
            price_per_hour: 0.0,
            slots: central.slots,
            rollout_s: central.rollout_s,
            rollout_sigma: central.rollout_sigma,
            link_mbit: f64::INFINITY,
            latency_ms: 0.0,
            install_s: 0.0,
            mean_up_s: 0.0,
            mean_down_s: 0.0,
        };
        let scenario = Self {
            staleness_budget: 0,
            publish_every: 1,
            workers: vec![worker],
            central: None,
            keep: None,
            changes: Vec::new(),
            ..self.clone()
        };
        Swarm::new(&scenario, &[1])?.play()
    }

    fn validate(&self) -> Result<(), SimulationError> {
        let mut checks = vec![
            ("steps".to_owned(), self.steps as f64, 1.0),
            ("groups_per_step".to_owned(), f64::from(self.groups_per_step), 1.0),
            ("group_size".to_owned(), f64::from(self.group_size), 1.0),
            ("train_s".to_owned(), self.train_s, 1e-3),
            ("publish_every".to_owned(), self.publish_every as f64, 1.0),
            ("update_mb".to_owned(), self.update_mb, 0.0),
            ("trajectory_kb".to_owned(), self.trajectory_kb, 0.0),
            ("learner_price_per_hour".to_owned(), self.learner_price_per_hour, 0.0),
            ("headroom".to_owned(), self.headroom, 0.0),
            ("workers".to_owned(), self.workers.len() as f64, 1.0),
        ];
        for (i, k) in self.workers.iter().enumerate() {
            let mut check =
                |name: &str, value, least| checks.push((format!("workers[{i}].{name}"), value, least));
            check("price_per_hour", k.price_per_hour, 0.0);
            check("slots", f64::from(k.slots), 1.0);
            check("rollout_s", k.rollout_s, 1e-3);
            check("rollout_sigma", k.rollout_sigma, 0.0);
            check("link_mbit", k.link_mbit, 1e-6);
            check("latency_ms", k.latency_ms, 0.0);
            check("install_s", k.install_s, 0.0);
            check("mean_up_s", k.mean_up_s, 0.0);
            check("mean_down_s", k.mean_down_s, 0.0);
        }
        for (i, change) in self.changes.iter().enumerate() {
            if !self.workers.iter().any(|kind| kind.name == change.kind) {
                return Err(SimulationError::Change { index: i, kind: change.kind.clone() });
            }
            checks.push((format!("changes[{i}].at_s"), change.at_s, 0.0));
            checks.extend(change.price_per_hour.map(|p| (format!("changes[{i}].price_per_hour"), p, 0.0)));
        }
        if let Some(k) = &self.keep {
            checks.push(("keep.window_steps".to_owned(), k.window_steps as f64, 1.0));
            checks.push(("keep.min_saving".to_owned(), k.min_saving, 0.0));
            checks.push(("keep.target_utilisation".to_owned(), k.target_utilisation, 0.0));
            checks.push(("keep.patience".to_owned(), f64::from(k.patience), 1.0));
        }
        if let Some(c) = &self.central {
            checks.push(("central.slots".to_owned(), f64::from(c.slots), 1.0));
            checks.push(("central.rollout_s".to_owned(), c.rollout_s, 1e-3));
            checks.push(("central.rollout_sigma".to_owned(), c.rollout_sigma, 0.0));
        }
        for (setting, value, least) in checks {
            if !value.is_finite() || value < least {
                let allowed = match least {
                    1.0 => "at least 1",
                    0.0 => "at least 0",
                    _ => "greater than 0",
                };
                return Err(SimulationError::Setting { setting, value, allowed });
            }
        }
        if self.staleness_budget == 0 && self.publish_every != 1 {
            let (setting, value) = ("publish_every".to_owned(), self.publish_every as f64);
            return Err(SimulationError::Setting {
                setting,
                value,
                allowed: "1 with a staleness budget of 0",
            });
        }
        Ok(())
    }
}
