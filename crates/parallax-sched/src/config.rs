//! Knobs of the planner and the coordinator.

use std::str::FromStr;
use std::time::Duration;

use crate::PlanError;

/// How a plan is searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Algorithm {
    /// Exact up to [`EXACT_MAX_NODES`] nodes, the heuristic beyond.
    #[default]
    Auto,
    /// The best throughput among all plans whose pipelines share no node; at most [`EXACT_MAX_NODES`] nodes.
    Exact,
    /// Greedy pipelines improved by local search; any number of nodes.
    Cover,
}

/// Above this many nodes the exact search (2^n states) would be felt at every join.
pub const EXACT_MAX_NODES: usize = 8;

impl FromStr for Algorithm {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        match text {
            "auto" => Ok(Self::Auto),
            "exact" => Ok(Self::Exact),
            "cover" => Ok(Self::Cover),
            _ => Err(PlanError::UnknownAlgorithm { name: text.to_owned() }),
        }
    }
}

/// What the planner may do.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanOptions {
    /// How to search.
    pub algorithm: Algorithm,
    /// At most this many pipelines; at least 1.
    pub max_pipelines: usize,
    /// Cached positions that every stage must have room for, beside its weights.
    pub context_tokens: u64,
    /// The node that must hold the first layers when it is in a plan (the head, which has the tokens).
    pub first_stage: Option<crate::NodeId>,
    /// With one pipeline: prefer plans with more nodes as long as their slowest stage takes at most this many times as
    /// long as the best plan's. 1 means the fastest plan, whoever stands by; at least 1.
    pub more_nodes_slack: f64,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Auto,
            max_pipelines: usize::MAX,
            context_tokens: 2048,
            first_stage: None,
            more_nodes_slack: 1.0,
        }
    }
}

/// When members count as lost, and how plans are made.
#[derive(Debug, Clone, PartialEq)]
pub struct CoordinatorConfig {
    /// Members are asked to send a heartbeat this often.
    pub heartbeat: Duration,
    /// A member is lost after this long without one.
    pub timeout: Duration,
    /// At most this many members; more are refused.
    pub max_members: usize,
    /// Membership must have been quiet this long before a new plan is made, so that several members that start
    /// together cause one plan; a lost member's stage is planned again at once.
    pub settle: Duration,
    /// A plan that works is replaced only by one with at least this many times its throughput.
    pub min_gain: f64,
    /// Epochs count up from here. A head that restarts begins above what its members have seen (it takes the time of
    /// day), so that an assignment of its former life is never taken for a current one.
    pub first_epoch: u64,
    /// Passed to the planner.
    pub plan: PlanOptions,
}

impl Default for CoordinatorConfig {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(250),
            timeout: Duration::from_millis(1500),
            max_members: 1024,
            settle: Duration::from_millis(300),
            min_gain: 1.1,
            first_epoch: 0,
            plan: PlanOptions { max_pipelines: 1, more_nodes_slack: 4.0, ..PlanOptions::default() },
        }
    }
}

impl CoordinatorConfig {
    /// Checks that the values make sense together.
    ///
    /// # Errors
    /// When the timeout is not at least three heartbeats, or a bound is zero.
    pub fn validate(&self) -> Result<(), PlanError> {
        if self.timeout < self.heartbeat * 3 {
            return Err(PlanError::BadConfig { what: "the timeout must be at least three heartbeats" });
        }
        if self.max_members == 0 || self.plan.max_pipelines == 0 {
            return Err(PlanError::BadConfig { what: "max_members and max_pipelines must be at least 1" });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_shorter_than_three_heartbeats_is_refused() {
        assert!(CoordinatorConfig::default().validate().is_ok());
        let hasty = CoordinatorConfig { timeout: Duration::from_millis(500), ..CoordinatorConfig::default() };
        assert!(hasty.validate().is_err());
    }

    #[test]
    fn only_algorithms_that_exist_are_accepted() {
        assert_eq!("cover".parse::<Algorithm>().unwrap(), Algorithm::Cover);
        assert!("paper".parse::<Algorithm>().unwrap_err().to_string().contains("exact"));
    }
}
