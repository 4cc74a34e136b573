//! Why training stopped. Each family of operations has its own error beside it; these join them.

use swarm_wire::PolicyVersion;

use crate::advantage::AdvantageError;
use crate::loss::LossError;
use crate::optim::OptimError;
use crate::packing::PackError;

/// Why a training step failed. The parameters are those from before the step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// Rewards.
    #[error(transparent)]
    Advantage(#[from] AdvantageError),
    /// Packing.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The loss.
    #[error(transparent)]
    Loss(#[from] LossError),
    /// The optimiser.
    #[error(transparent)]
    Optim(#[from] OptimError),
    /// The model.
    #[error("the model refused: {reason}")]
    Model {
        /// The model's own words.
        reason: String,
    },
    /// A parameter without a gradient after the backward pass.
    #[error("no gradient reached {name}; it takes no part in the forward pass")]
    NoGradient {
        /// Which parameter.
        name: String,
    },
    /// Not enough groups for a step.
    #[error("a step needs {needed} groups and {got} are here")]
    TooFewGroups {
        /// Groups of a step.
        needed: usize,
        /// Groups that wait.
        got: usize,
    },
}

impl StepError {
    /// Wraps the model's error.
    pub fn model(error: impl std::fmt::Display) -> Self {
        Self::Model { reason: error.to_string() }
    }
}

/// Why a group of rollouts was not taken. None of its rollouts is trained on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// Sampled under other weights than the current ones; sequential mode takes no others.
    #[error("group {group} was sampled under {got} but the trainer is at {wanted}")]
    Stale {
        /// Which group.
        group: u64,
        /// Version of its rollouts.
        got: PolicyVersion,
        /// The trainer's version.
        wanted: PolicyVersion,
    },
    /// A lease that was trained on before or waits already.
    #[error("lease {lease} of group {group} was delivered before")]
    Duplicate {
        /// Which group.
        group: u64,
        /// The lease.
        lease: u64,
    },
    /// A broken rollout.
    #[error("group {group} is malformed: {reason}")]
    Malformed {
        /// Which group.
        group: u64,
        /// What is wrong.
        reason: String,
    },
    /// The bounded queue is full.
    #[error("the trainer already holds {limit} groups; train a step first")]
    Full {
        /// The bound.
        limit: usize,
    },
}
