//! What can happen to a dispatcher, and what it answers.

use swarm_wire::{PeerId, PolicyVersion};

use crate::group::Group;
use crate::lease::{GroupId, Lease, LeaseId};
use crate::rollout::Trajectory;

/// One thing that happened. The journal keeps these.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "commands are handled one by one; most of them are submissions"
)]
pub enum Command {
    /// New groups, as many as are missing to so many open ones, those with the learner included.
    OpenGroups {
        /// How many are to be open.
        up_to: u32,
    },
    /// A version was published.
    SetVersion(PolicyVersion),
    /// A worker is there, for the first time or again.
    Register {
        /// The worker.
        worker: PeerId,
        /// Grows with each of its starts.
        incarnation: u64,
    },
    /// A worker has checked and installed a version.
    Acknowledge {
        /// The worker.
        worker: PeerId,
        /// The version.
        version: PolicyVersion,
    },
    /// A worker asks for samples to make.
    Lease {
        /// The worker.
        worker: PeerId,
        /// The most that it wants.
        max: u32,
    },
    /// A worker's trajectory has come and was admitted.
    Submit {
        /// What came.
        trajectory: Trajectory,
    },
    /// A worker's trajectory has come and admission refused it.
    Refuse {
        /// The worker.
        worker: PeerId,
        /// Its lease.
        lease: LeaseId,
    },
    /// A worker does not serve a lease.
    Fail {
        /// The worker.
        worker: PeerId,
        /// The lease.
        lease: LeaseId,
        /// Whether it was broken off for a newer policy, which is nobody's fault.
        aborted: bool,
    },
    /// The connection to a worker is gone.
    Disconnect {
        /// The worker.
        worker: PeerId,
    },
    /// Only time has passed.
    Tick,
    /// An audit has a result.
    Verdict {
        /// The audited lease.
        lease: LeaseId,
        /// The result.
        verdict: AuditOutcome,
    },
    /// The learner takes complete groups for a step: so many, or none. Taking them again gives the same ones.
    Take {
        /// Its step.
        step: u64,
        /// How many groups.
        groups: u32,
    },
    /// The learner cannot learn from some of the groups that it took for a step: they are given up, and the others wait for the
    /// same step until there are enough.
    GiveBack {
        /// Its step.
        step: u64,
        /// The groups whose rewards are all equal.
        flat: Vec<GroupId>,
    },
    /// The step's weights, optimiser and random state are on disk.
    Commit {
        /// The step.
        step: u64,
    },
    /// The trainer has restarted.
    Recover {
        /// How many steps its checkpoint contains.
        steps: u64,
    },
}

/// What an audit says about a trajectory, as far as book-keeping goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuditOutcome {
    /// It is what it claims to be.
    Pass,
    /// It is not: the worker is convicted.
    Fail,
    /// Not known: this trajectory is not trained on.
    Unproven,
    /// The worker did not open its commitment: not trained on, and counted against the worker.
    Withheld,
}

/// What became of a submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Submission {
    /// It counts.
    Accepted,
    /// It was here before.
    Duplicate,
    /// Its lease is no longer this worker's.
    Late,
    /// Too many versions behind.
    Stale,
    /// Admission refused it, or it is not what was leased.
    Rejected,
}

/// Why a command was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The worker must register first.
    #[error("not registered with this run; register again")]
    NotRegistered,
    /// A later start of the same worker has registered.
    #[error("a later start of this worker has registered")]
    OldIncarnation,
    /// The worker failed an audit.
    #[error("this worker failed an audit; it gets no leases in this run")]
    Convicted,
    /// No room for another worker.
    #[error("this run has as many workers as it allows; raise max_workers")]
    TooManyWorkers,
    /// A version that was never published.
    #[error("that version was never published")]
    UnknownVersion,
    /// Versions only grow.
    #[error("versions never go back")]
    VersionRollback,
    /// No audit of that lease is open.
    #[error("no audit of that lease is open")]
    NoSuchAudit,
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Nothing to say.
    Done,
    /// Groups that were opened; fewer than asked for when there is no room.
    Opened(Vec<GroupId>),
    /// Leases that were granted.
    Leased(Vec<Lease>),
    /// What became of a submission.
    Submitted(Submission),
    /// Groups for the learner; none when too few are ready.
    Groups(Vec<Group>),
    /// How many groups were consumed.
    Committed(usize),
    /// Not carried out; nothing changed.
    Refused(Refusal),
}
