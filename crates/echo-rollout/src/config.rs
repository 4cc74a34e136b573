//! How a run leases, expires and audits: every limit with its unit, default and range.

use serde::{Deserialize, Serialize};
use swarm_wire::RunId;

use crate::lease::{GroupId, LeaseId, SamplingSpec};
use crate::rollout::MAX_TOKENS;
use crate::staleness::StalenessBound;

/// How a run leases, expires and audits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DispatchConfig {
    /// The run.
    pub run: RunId,
    /// Seed of group 0's task; every group has the next one, so that no task is given out twice. Default: 0.
    pub first_task: u64,
    /// Samples of one prompt. Default: 8; 1 to 1024.
    pub group_size: u32,
    /// Groups of one step. Default: 32.
    pub groups_per_step: u32,
    /// How to sample; the seed is the run's, each sample gets its own from it.
    pub sampling: SamplingSpec,
    /// Milliseconds that a worker has for a lease. Default: 30 000.
    pub lease_ttl_ms: u32,
    /// Leases that one worker may hold. Default: 64.
    pub max_leases_per_worker: u32,
    /// Workers that may be registered. Default: 4096.
    pub max_workers: u32,
    /// Groups that are not yet consumed. Default: 4096.
    pub max_open_groups: u32,
    /// Leases of one sample before its group is given up; those that ended because the policy moved on do not count.
    /// Default: 16.
    pub max_attempts: u32,
    /// Commitments that a worker may fail to open in a row before that convicts it. Default: 3.
    pub max_withheld: u32,
    /// How old a sample may be. Default: 0, the sequential mode.
    pub staleness: StalenessBound,
    /// Whether trajectories are audited before they are trained on.
    pub audit: AuditPolicy,
}

impl DispatchConfig {
    /// The defaults for `run`.
    pub fn new(run: RunId) -> Self {
        Self {
            run,
            first_task: 0,
            group_size: 8,
            groups_per_step: 32,
            sampling: SamplingSpec::default(),
            lease_ttl_ms: 30_000,
            max_leases_per_worker: 64,
            max_workers: 4096,
            max_open_groups: 4096,
            max_attempts: 16,
            max_withheld: 3,
            staleness: StalenessBound(0),
            audit: AuditPolicy::default(),
        }
    }

    /// How many versions before the newest somebody may still ask for: those within the staleness bound, and a few more for
    /// audits that come late.
    pub fn snapshots_kept(&self) -> u64 {
        const SPARE: u64 = 4;
        self.staleness.0.saturating_add(SPARE)
    }

    /// Checks every value.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let counts = [
            ("group_size", self.group_size, 1024),
            ("groups_per_step", self.groups_per_step, 1 << 20),
            ("lease_ttl_ms", self.lease_ttl_ms, u32::MAX),
            ("max_leases_per_worker", self.max_leases_per_worker, 65_536),
            ("max_workers", self.max_workers, 1 << 20),
            ("max_open_groups", self.max_open_groups, 1 << 20),
            ("max_attempts", self.max_attempts, 65_536),
            ("max_withheld", self.max_withheld, 65_536),
            ("sampling.max_tokens", self.sampling.max_tokens, MAX_TOKENS as u32),
        ];
        for (field, value, most) in counts {
            if value == 0 || value > most {
                return Err(InvalidConfig {
                    field,
                    value: value.to_string(),
                    allowed: format!("1 to {most}"),
                });
            }
        }
        // Otherwise a step's groups would never all be open.
        let open_at_once = self.staleness.0.saturating_add(1).saturating_mul(u64::from(self.groups_per_step));
        if open_at_once > u64::from(self.max_open_groups) {
            let value = self.max_open_groups.to_string();
            let allowed = format!(
                "at least {open_at_once}: groups_per_step {} times one more than the staleness budget {}",
                self.groups_per_step, self.staleness.0
            );
            return Err(InvalidConfig { field: "max_open_groups", value, allowed });
        }
        // Auditors recompute log-probabilities at temperature 1 with nothing cut off; reports must be of the same kind.
        let s = self.sampling;
        let audited = self.audit.fraction > 0.0 || self.audit.first > 0;
        if audited && (s.temperature, s.top_k, s.top_p) != (1.0, 0, 1.0) {
            let value = format!("temperature {}, top_k {}, top_p {}", s.temperature, s.top_k, s.top_p);
            let allowed = "temperature 1, top_k 0, top_p 1 when trajectories are audited".to_owned();
            return Err(InvalidConfig { field: "sampling", value, allowed });
        }
        let fractions = [
            ("audit.fraction", self.audit.fraction, 0.0..=1.0),
            ("sampling.temperature", f64::from(self.sampling.temperature), 0.0..=100.0),
            ("sampling.top_p", f64::from(self.sampling.top_p), f64::MIN_POSITIVE..=1.0),
        ];
        for (field, value, allowed) in fractions {
            if !allowed.contains(&value) {
                let allowed = format!("{} to {}", allowed.start(), allowed.end());
                return Err(InvalidConfig { field, value: value.to_string(), allowed });
            }
        }
        Ok(())
    }
}

/// Which trajectories are audited. The draw is made after the submission, from a seed that workers do not know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct AuditPolicy {
    /// The fraction of trajectories that is drawn. Default: 0.
    pub fraction: f64,
    /// The first trajectories of each worker are always audited: this many. Default: 0.
    pub first: u32,
    /// The secret of the draw; never written down.
    #[serde(skip)]
    pub seed: u64,
}

/// A configuration that no run can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value} but must be {allowed}")]
pub struct InvalidConfig {
    /// The field.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What is allowed.
    pub allowed: String,
}

impl DispatchConfig {
    /// Each sample has its own seed; a later attempt has the same, so it makes the same tokens under the same policy.
    pub fn sample_seed(&self, group: GroupId, index: u32) -> u64 {
        let mut hasher = blake3::Hasher::new_derive_key("echo-rollout sample seed v1");
        hasher.update(&self.run.0.to_le_bytes()).update(&self.sampling.seed.to_le_bytes());
        hasher.update(&group.0.to_le_bytes()).update(&index.to_le_bytes());
        u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes"))
    }
}

impl AuditPolicy {
    pub(crate) fn draws(&self, id: LeaseId) -> bool {
        let mut hasher = blake3::Hasher::new_derive_key("echo-rollout audit draw v1");
        hasher.update(&self.seed.to_le_bytes()).update(&id.0.to_le_bytes());
        let word = u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes"));
        // 53 bits make every fraction exact; the draw is below the fraction with just that probability.
        ((word >> 11) as f64) < self.fraction * (1u64 << 53) as f64
    }
}
