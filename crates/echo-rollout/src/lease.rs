//! The right and the duty to make one sample before a deadline, and what became of it.
//!
//! A lease is never given twice: when it expires, its slot gets a new lease with a new number, and an answer to the old
//! one is refused. So the number alone decides what counts.

use std::fmt;

use serde::{Deserialize, Serialize};
use swarm_wire::{PolicyVersion, RunId};

/// Number of a lease, unique in its run, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lease-{}", self.0)
    }
}

/// Number of a group, unique in its run, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupId(pub u64);

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "group-{}", self.0)
    }
}

/// How to sample. The end of a sequence is the model's own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SamplingSpec {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep this many likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens up to this probability; 1 keeps all.
    pub top_p: f32,
    /// Most tokens to sample.
    pub max_tokens: u32,
    /// Key of the random numbers. A repeated attempt has the same seed and so makes the same tokens.
    pub seed: u64,
}

impl Default for SamplingSpec {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, max_tokens: 32, seed: 0 }
    }
}

/// One sample to make.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lease {
    /// Its number.
    pub id: LeaseId,
    /// The run that it belongs to.
    pub run: RunId,
    /// The group of samples of one prompt.
    pub group: GroupId,
    /// Which sample of the group.
    pub sample_index: u32,
    /// How many samples the group has.
    pub group_size: u32,
    /// How many leases of this sample came before.
    pub attempt: u32,
    /// Names the task.
    pub task_seed: u64,
    /// The policy to sample with.
    pub version: PolicyVersion,
    /// How to sample.
    pub sampling: SamplingSpec,
    /// Milliseconds from the grant to its end.
    pub ttl_ms: u32,
}

/// Where a lease stands. Every lease ends as consumed or dropped, exactly once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// A worker has it.
    Leased,
    /// Its trajectory is here and waits for its group.
    Received,
    /// Its group was handed to the learner.
    Batched,
    /// The learner's step with it was committed.
    Consumed,
    /// It counts no more.
    Dropped(DropReason),
}

impl LeaseState {
    /// Whether the lease can still become consumed.
    pub fn is_open(self) -> bool {
        !matches!(self, Self::Consumed | Self::Dropped(_))
    }
}

/// Why a lease was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// No answer before the deadline.
    Expired,
    /// Its worker left, or came back without it.
    Disconnected,
    /// The worker said that it could not serve it.
    Failed,
    /// Too many versions behind.
    Stale,
    /// Its worker broke it off for a newer policy.
    Aborted,
    /// Admission refused the trajectory.
    Rejected,
    /// Its worker failed an audit.
    Convicted,
    /// Its audit came to no result, or the worker did not open its commitment.
    Unproven,
    /// Its group was given up after too many attempts.
    Abandoned,
    /// Its group's rewards are all equal, and dynamic sampling has another group made instead.
    Flat,
}

impl DropReason {
    /// All of them, in the order of [`crate::dispatcher::Counts::dropped`].
    pub const ALL: [Self; 10] = [
        Self::Expired,
        Self::Disconnected,
        Self::Failed,
        Self::Stale,
        Self::Aborted,
        Self::Rejected,
        Self::Convicted,
        Self::Unproven,
        Self::Abandoned,
        Self::Flat,
    ];

    /// Its place in [`Self::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn lease(id: u64) -> Lease {
        Lease {
            id: LeaseId(id),
            run: RunId(1),
            group: GroupId(0),
            sample_index: 0,
            group_size: 2,
            attempt: 0,
            task_seed: 5,
            version: PolicyVersion(3),
            sampling: SamplingSpec::default(),
            ttl_ms: 1000,
        }
    }

    #[test]
    fn every_reason_knows_its_place() {
        for (i, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), i);
        }
        assert!(LeaseState::Batched.is_open() && !LeaseState::Dropped(DropReason::Stale).is_open());
    }
}
