//! One sample as the learner needs it: tokens, log-probabilities and versions that cannot be misaligned.
//!
//! A [`Trajectory`] keeps one [`Step`] per sampled token instead of parallel arrays; text is never tokenised again.

use std::ops::RangeInclusive;

use bytes::Bytes;
use swarm_wire::{PeerId, PolicyVersion};

use crate::environment::Reward;
use crate::lease::{Lease, LeaseId};

/// Most prompt tokens and most sampled tokens of one trajectory, each.
pub const MAX_TOKENS: usize = 32 * 1024;
/// Most bytes of an attached commitment: a signed root of fixed size, with room to grow.
pub const MAX_COMMITMENT_BYTES: usize = 4096;
/// Probabilities below e^-100 do not come from a sampler.
pub const LOGPROB_RANGE: RangeInclusive<f32> = -100.0..=0.0;

/// One sampled token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability under the distribution that it was sampled from; 0 where it was not sampled.
    pub logprob: f32,
    /// The policy that sampled it.
    pub version: PolicyVersion,
    /// Whether the learner may train on it; false for text that a tool or another player wrote.
    pub trainable: bool,
}

/// Why sampling ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-sequence token, which is the last step.
    Stop,
    /// The lease's token limit.
    Length,
}

/// One finished sample, tied to its lease.
#[derive(Debug, Clone, PartialEq)]
pub struct Trajectory {
    lease: Lease,
    worker: PeerId,
    environment: String,
    prompt: Vec<u32>,
    steps: Vec<Step>,
    finish: Finish,
    reward: Reward,
    commitment: Bytes,
}

/// What a worker hands in to become a [`Trajectory`].
#[derive(Debug, Clone)]
pub struct Sample {
    /// The lease that it serves.
    pub lease: Lease,
    /// Who made it.
    pub worker: PeerId,
    /// The environment's name.
    pub environment: String,
    /// The rendered prompt.
    pub prompt: Vec<u32>,
    /// What was sampled.
    pub steps: Vec<Step>,
    /// Why sampling ended.
    pub finish: Finish,
    /// What the verifier said.
    pub reward: Reward,
    /// The worker's commitment; empty when it makes none.
    pub commitment: Bytes,
}

/// Why a sample is no trajectory.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MalformedTrajectory {
    /// No prompt or nothing sampled, or more tokens than allowed.
    #[error("{what} has {got} tokens; 1 to {limit} are allowed")]
    Length {
        /// Prompt or completion.
        what: &'static str,
        /// How many tokens it has.
        got: usize,
        /// The limit.
        limit: usize,
    },
    /// A log-probability that no sampler reports.
    #[error("log-probability {value} at token {position} is outside of -100 to 0")]
    Logprob {
        /// Which sampled token.
        position: usize,
        /// What was reported.
        value: f32,
    },
    /// The policy neither begins nor ends a completion with its own words.
    #[error("the first and the last token of a completion must be the policy's own")]
    NotOwn,
    /// A commitment that is too large.
    #[error("a commitment of {got} bytes is over the limit of {limit}")]
    Commitment {
        /// Its size.
        got: usize,
        /// The limit.
        limit: usize,
    },
}

impl Trajectory {
    /// Checks shapes and ranges.
    ///
    /// # Errors
    /// When a part is empty or too long, or a log-probability is not one.
    pub fn new(sample: Sample) -> Result<Self, MalformedTrajectory> {
        let Sample { lease, worker, environment, prompt, steps, finish, reward, commitment } = sample;
        let completion_limit = MAX_TOKENS.min(lease.sampling.max_tokens as usize);
        for (what, got, limit) in
            [("prompt", prompt.len(), MAX_TOKENS), ("completion", steps.len(), completion_limit)]
        {
            if got == 0 || got > limit {
                return Err(MalformedTrajectory::Length { what, got, limit });
            }
        }
        if let Some(position) = steps.iter().position(|s| !LOGPROB_RANGE.contains(&s.logprob)) {
            return Err(MalformedTrajectory::Logprob { position, value: steps[position].logprob });
        }
        if ![steps.first(), steps.last()].into_iter().flatten().all(|s| s.trainable) {
            return Err(MalformedTrajectory::NotOwn);
        }
        if commitment.len() > MAX_COMMITMENT_BYTES {
            return Err(MalformedTrajectory::Commitment {
                got: commitment.len(),
                limit: MAX_COMMITMENT_BYTES,
            });
        }
        Ok(Self { lease, worker, environment, prompt, steps, finish, reward, commitment })
    }

    /// The lease that it serves.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// The lease's number, which is also the trajectory's.
    pub fn id(&self) -> LeaseId {
        self.lease.id
    }

    /// Who made it.
    pub fn worker(&self) -> &PeerId {
        &self.worker
    }

    /// The environment's name.
    pub fn environment(&self) -> &str {
        &self.environment
    }

    /// The rendered prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// The sampled tokens with all that belongs to each.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Prompt and completion, one after the other: `[T]`.
    pub fn tokens(&self) -> Vec<u32> {
        self.prompt.iter().copied().chain(self.steps.iter().map(|s| s.token)).collect()
    }

    /// The sampled tokens: [T - prompt].
    pub fn completion(&self) -> Vec<u32> {
        self.steps.iter().map(|s| s.token).collect()
    }

    /// Log-probabilities of the sampled tokens: [T - prompt].
    pub fn logprobs(&self) -> Vec<f32> {
        self.steps.iter().map(|s| s.logprob).collect()
    }

    /// Which of all tokens the learner trains on: `[T]`; false for the prompt.
    pub fn mask(&self) -> Vec<bool> {
        let prompt = std::iter::repeat_n(false, self.prompt.len());
        prompt.chain(self.steps.iter().map(|s| s.trainable)).collect()
    }

    /// The oldest policy among the trainable tokens; staleness counts from it.
    pub fn oldest_version(&self) -> PolicyVersion {
        let trainable = self.steps.iter().filter(|s| s.trainable).map(|s| s.version).min();
        trainable.unwrap_or(self.lease.version)
    }

    /// Why sampling ended.
    pub fn finish(&self) -> Finish {
        self.finish
    }

    /// What the verifier said.
    pub fn reward(&self) -> &Reward {
        &self.reward
    }

    /// The worker's commitment, opaque here; empty when it makes none.
    pub fn commitment(&self) -> &Bytes {
        &self.commitment
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::lease::tests::lease;

    pub(crate) fn sample(lease: Lease, worker: &PeerId) -> Sample {
        let version = lease.version;
        let step = |token| Step { token, logprob: -0.5, version, trainable: true };
        Sample {
            lease,
            worker: worker.clone(),
            environment: "arithmetic".to_owned(),
            prompt: vec![1, 2, 3],
            steps: vec![step(7), step(8)],
            finish: Finish::Stop,
            reward: Reward::new(1.0, vec![("correct".to_owned(), 1.0)], &(0.0..=1.0)).unwrap(),
            commitment: Bytes::from_static(b"root"),
        }
    }

    fn worker() -> PeerId {
        PeerId::from_ed25519(&[1; 32])
    }

    #[test]
    fn views_of_one_trajectory_are_aligned() {
        let t = Trajectory::new(sample(lease(0), &worker())).unwrap();
        assert_eq!(t.tokens(), [1, 2, 3, 7, 8]);
        assert_eq!(t.mask(), [false, false, false, true, true]);
        assert_eq!(t.tokens().len(), t.prompt().len() + t.logprobs().len());
        assert_eq!(t.oldest_version(), t.lease().version);
    }

    #[test]
    fn what_no_sampler_makes_is_refused() {
        let good = || sample(lease(0), &worker());
        let mut empty = good();
        empty.steps.clear();
        assert!(matches!(
            Trajectory::new(empty),
            Err(MalformedTrajectory::Length { what: "completion", .. })
        ));
        let mut long = good();
        long.steps = vec![long.steps[0]; long.lease.sampling.max_tokens as usize + 1];
        assert!(matches!(Trajectory::new(long), Err(MalformedTrajectory::Length { .. })));
        for bad in [f32::NAN, 0.1, f32::NEG_INFINITY] {
            let mut odd = good();
            odd.steps[1].logprob = bad;
            assert!(matches!(Trajectory::new(odd), Err(MalformedTrajectory::Logprob { position: 1, .. })));
        }
        let mut foreign = good();
        foreign.steps[1].trainable = false;
        assert_eq!(Trajectory::new(foreign), Err(MalformedTrajectory::NotOwn));
        let mut huge = good();
        huge.commitment = vec![0; MAX_COMMITMENT_BYTES + 1].into();
        assert!(matches!(Trajectory::new(huge), Err(MalformedTrajectory::Commitment { .. })));
    }
}
