//! What a training step reports.

use serde::Serialize;
use swarm_wire::PolicyVersion;

use crate::loss::plan::CorrectionFigures;

/// Figures of the loss over one batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct LossMetrics {
    /// The loss.
    pub loss: f64,
    /// Trainable tokens.
    pub tokens: usize,
    /// All tokens, prompts included.
    pub batch_tokens: usize,
    /// Share of trainable tokens whose ratio was clipped.
    pub clip_fraction: f64,
    /// Mean k3 divergence between the sampling and the current policy.
    pub sampled_kl: f64,
    /// Largest `|ratio - 1|`; 0 when sampler and trainer agree bit for bit.
    pub ratio_deviation_max: f64,
    /// What importance weights and filters did.
    pub correction: CorrectionFigures,
}

impl LossMetrics {
    /// Adds those of the next part of the same batch.
    pub(crate) fn add(&mut self, next: &Self) {
        self.loss += next.loss;
        self.tokens += next.tokens;
        self.batch_tokens += next.batch_tokens;
        self.clip_fraction += next.clip_fraction;
        self.sampled_kl += next.sampled_kl;
        self.ratio_deviation_max = self.ratio_deviation_max.max(next.ratio_deviation_max);
        self.correction = next.correction;
    }
}

/// Figures of one round: groups in, next version out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepReport {
    /// The version that the step produced.
    pub version: PolicyVersion,
    /// Groups that were consumed.
    pub groups: usize,
    /// Rollouts that were consumed.
    pub rollouts: usize,
    /// Groups whose rewards were all equal.
    pub degenerate_groups: usize,
    /// Mean reward of all rollouts.
    pub reward_mean: f64,
    /// Largest age of a rollout in versions.
    pub staleness_max: u64,
    /// Mean age of the rollouts in versions.
    pub staleness_mean: f64,
    /// The loss.
    pub loss: LossMetrics,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
}
