//! What a learner tells of its run while it goes on, and at its end.

use std::path::PathBuf;

use serde::Serialize;
use swarm_wire::{PeerId, PolicyVersion};

use crate::service::evaluation::Evaluation;

/// What a learner tells of its run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum LearnerEvent {
    /// The policy was measured.
    Eval(Evaluation),
    /// A step was made, written down and published.
    Step(StepEvent),
    /// A worker was found to compute something else than it says.
    Convicted {
        /// The worker.
        peer: PeerId,
        /// Audits of it, the one that found it included.
        audits: u64,
    },
    /// An assistant did not do its part; its share was computed by somebody else.
    LeftOut {
        /// The assistant.
        peer: PeerId,
        /// Why.
        reason: String,
        /// Until the learner is started again; otherwise it may come again at once.
        dismissed: bool,
    },
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepEvent {
    /// The version that it made.
    pub version: PolicyVersion,
    /// Mean reward of its rollouts.
    pub reward: f64,
    /// The loss.
    pub loss: f64,
    /// Largest `|ratio - 1|` between learner and sampler.
    pub ratio_deviation_max: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Age of its oldest rollout, in versions.
    pub staleness_max: u64,
    /// Mean age of its rollouts.
    pub staleness_mean: f64,
    /// Workers that were there when it was made.
    pub workers: usize,
    /// Batches that were open beyond the one in training: the part of the budget that is in use.
    pub ahead: u64,
    /// Bytes of the published update.
    pub update_bytes: u64,
    /// Groups whose rewards were all equal and that dynamic sampling had replaced.
    pub flat_groups: u64,
    /// Shares of its batch that assistants computed.
    pub assisted: usize,
    /// Sampled tokens that it trained on.
    pub completion_tokens: usize,
    /// Seconds that the learner waited for its rollouts.
    pub rollouts_s: f64,
    /// Seconds of training, writing and publishing.
    pub train_s: f64,
    /// Seconds of the whole step.
    pub step_s: f64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunSummary {
    /// Versions after the base model.
    pub versions: u64,
    /// Share of the loop in which the learner trained.
    pub learner_utilisation: f64,
    /// Where the leases went.
    pub trajectories: TrajectoryCounts,
    /// Ages of what was trained on.
    pub staleness: StalenessCounts,
    /// Trajectories of convicted workers that had been trained on before.
    pub poisoned_trained: u64,
    /// Bytes of the newest update.
    pub update_bytes: u64,
    /// Bytes of all weights.
    pub full_bytes: u64,
    /// The newest adapter, or all weights in a model directory; none when no step was made.
    pub adapter: Option<PathBuf>,
}

/// Where the leases went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TrajectoryCounts {
    /// Given out.
    pub leased: u64,
    /// Trained on.
    pub consumed: u64,
    /// Too old.
    pub dropped_stale: u64,
    /// Of groups whose rewards were all equal, where dynamic sampling had others made.
    pub dropped_flat: u64,
    /// Refused by admission or audit.
    pub rejected: u64,
    /// Of these, drawn for an audit that came to no result: nobody took it up in time, or the worker did not open its commitment.
    pub unproven: u64,
    /// In no state: always 0.
    pub lost: u64,
    /// Trained on twice: always 0.
    pub duplicated: u64,
    /// Not ended yet.
    pub open: u64,
}

/// Ages of what was trained on, in versions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StalenessCounts {
    /// Most that is allowed.
    pub budget: u64,
    /// Most that was.
    pub max: u64,
    /// Mean.
    pub mean: f64,
    /// How many trajectories were 0 versions old, 1, and so on up to the oldest.
    pub by_age: Vec<u64>,
}
