//! What workers do: register, acknowledge, lease, submit, give back, leave, and be convicted.

use std::collections::{BTreeMap, BTreeSet};

use swarm_wire::{PeerId, PolicyVersion};

use super::{AuditOutcome, Dispatcher, Filled, Outcome, Refusal, Submission};
use crate::lease::{DropReason, GroupId, Lease, LeaseId, LeaseState, SamplingSpec};
use crate::rollout::Trajectory;

/// Whether a worker is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Presence {
    /// It was heard from and has not left.
    #[default]
    Here,
    /// It was here before the trainer's restart and has said nothing since: it may be dead.
    Unheard,
    /// Left, or silent for too long: nobody waits for it.
    Gone,
}

/// What is known of a worker.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Worker {
    pub(super) incarnation: u64,
    pub(super) active: Option<PolicyVersion>,
    pub(super) presence: Presence,
    pub(super) held: BTreeSet<LeaseId>,
    pub(super) accepted: u64,
    pub(super) consumed: u64,
    /// Ordinals of trajectories whose audit has no result yet, with their leases.
    pub(super) audits: BTreeMap<u64, LeaseId>,
    pub(super) audits_done: u64,
    /// Commitments that it did not open, in a row.
    pub(super) withheld: u32,
    /// How many audits it took to convict it.
    pub(super) convicted: Option<u64>,
}

impl Dispatcher {
    /// Whether `worker` is registered.
    pub fn is_registered(&self, worker: &PeerId) -> bool {
        self.workers.contains_key(worker)
    }

    /// The start of `worker` that registered last.
    pub fn incarnation(&self, worker: &PeerId) -> Option<u64> {
        Some(self.workers.get(worker)?.incarnation)
    }

    /// The version that `worker` has installed.
    pub fn active_version(&self, worker: &PeerId) -> Option<PolicyVersion> {
        self.workers.get(worker)?.active
    }

    /// Whether `worker` is registered and not convicted.
    pub fn is_admitted(&self, worker: &PeerId) -> bool {
        self.workers.get(worker).is_some_and(|w| w.convicted.is_none())
    }

    /// Whether `worker` has left or is counted out.
    pub fn is_gone(&self, worker: &PeerId) -> bool {
        self.workers.get(worker).is_none_or(|w| w.presence == Presence::Gone)
    }

    /// Whether `worker` was here before a restart and has said nothing since.
    pub fn is_unheard(&self, worker: &PeerId) -> bool {
        self.workers.get(worker).is_some_and(|w| w.presence == Presence::Unheard)
    }

    /// Admitted workers that are there and were heard from since the last restart, with the version that each of them has installed.
    pub fn active_versions(&self) -> Vec<(PeerId, Option<PolicyVersion>)> {
        let there =
            self.workers.iter().filter(|(_, w)| w.convicted.is_none() && w.presence == Presence::Here);
        there.map(|(id, w)| (id.clone(), w.active)).collect()
    }

    /// Convicted workers, with the number of audits after which each was convicted.
    pub fn convicted(&self) -> Vec<(PeerId, u64)> {
        self.workers.iter().filter_map(|(id, w)| Some((id.clone(), w.convicted?))).collect()
    }

    /// Whether a question for work at `now_ms` would be answered with some.
    pub fn can_lease(&self, now_ms: u64, worker: &PeerId) -> bool {
        self.leasable(now_ms, worker, 1).is_ok_and(|samples| !samples.is_empty())
    }

    /// What a submission that changes nothing is answered; `None` while `worker` holds the lease.
    pub fn answer(&self, worker: &PeerId, id: LeaseId) -> Option<Submission> {
        match self.leases.state(id) {
            Some(LeaseState::Leased) => {
                let theirs = self.leases.given(id).is_some_and(|given| given.worker == *worker);
                (!theirs).then_some(Submission::Late)
            }
            Some(LeaseState::Received | LeaseState::Batched | LeaseState::Consumed) => {
                Some(Submission::Duplicate)
            }
            Some(LeaseState::Dropped(DropReason::Stale)) => Some(Submission::Stale),
            Some(LeaseState::Dropped(
                DropReason::Rejected | DropReason::Convicted | DropReason::Unproven,
            )) => Some(Submission::Rejected),
            Some(LeaseState::Dropped(_)) | None => Some(Submission::Late),
        }
    }

    pub(super) fn register(&mut self, id: &PeerId, incarnation: u64) -> Outcome {
        if !self.workers.contains_key(id) && self.workers.len() >= self.config.max_workers as usize {
            // Whoever never delivered anything makes room; it can register again.
            let idle = |w: &Worker| w.held.is_empty() && w.accepted == 0 && w.convicted.is_none();
            let Some(idle) = self.workers.iter().find(|(_, w)| idle(w)).map(|(id, _)| id.clone()) else {
                return Outcome::Refused(Refusal::TooManyWorkers);
            };
            self.workers.remove(&idle);
        }
        let worker = self.workers.entry(id.clone()).or_default();
        if worker.convicted.is_some() {
            return Outcome::Refused(Refusal::Convicted);
        }
        if incarnation < worker.incarnation {
            return Outcome::Refused(Refusal::OldIncarnation);
        }
        worker.presence = Presence::Here;
        if incarnation > worker.incarnation {
            worker.incarnation = incarnation;
            worker.active = None;
            self.release_held(id, DropReason::Disconnected);
        }
        Outcome::Done
    }

    pub(super) fn acknowledge(&mut self, id: &PeerId, version: PolicyVersion) -> Outcome {
        match self.workers.get_mut(id) {
            None => Outcome::Refused(Refusal::NotRegistered),
            Some(_) if version > self.version => Outcome::Refused(Refusal::UnknownVersion),
            Some(worker) => {
                worker.active = Some(version);
                worker.presence = Presence::Here;
                Outcome::Done
            }
        }
    }

    pub(super) fn lease(&mut self, id: &PeerId, max: u32) -> Outcome {
        let active = self.active_version(id);
        match (self.leasable(self.now_ms, id, max), active) {
            (Err(refusal), _) => Outcome::Refused(refusal),
            (Ok(samples), Some(version)) => {
                let leases = samples.into_iter().map(|(group, index)| self.grant(id, version, group, index));
                Outcome::Leased(leases.collect())
            }
            (Ok(_), None) => Outcome::Leased(Vec::new()),
        }
    }

    /// The samples that `id` may have: an equal part of what is to be made (rounded up), so that the first to ask does not
    /// get everything, and nothing that it has just dropped while somebody else could take it.
    fn leasable(&self, now_ms: u64, id: &PeerId, max: u32) -> Result<Vec<(GroupId, u32)>, Refusal> {
        let worker = self.workers.get(id).ok_or(Refusal::NotRegistered)?;
        if worker.convicted.is_some() {
            return Err(Refusal::Convicted);
        }
        let Some(active) = worker.active else { return Ok(Vec::new()) };
        let ready = self.workers.values().filter(|w| {
            w.convicted.is_none()
                && w.active.is_some_and(|v| v == active || self.first_too_late(v) != Some(0))
        });
        let ready = ready.count().max(1);
        let share = (self.pending.len() + self.leases.n_given()).div_ceil(ready);
        let room = (self.config.max_leases_per_worker as usize).min(share).saturating_sub(worker.held.len());
        let end = self.first_too_late(active).and_then(|rank| self.groups.keys().nth(rank));
        let within = self.pending.iter().take_while(|(group, _)| end.is_none_or(|end| group < end));
        let others_first = |(group, index): &&(GroupId, u32)| {
            let dropped_by =
                self.groups.get(group).and_then(|g| g.slots[*index as usize].dropped_by.as_ref());
            let patience = u64::from(self.config.lease_ttl_ms);
            ready == 1 || dropped_by.is_none_or(|(peer, at)| peer != id || now_ms >= at + patience)
        };
        Ok(within.filter(others_first).take(room.min(max as usize)).copied().collect())
    }

    /// The place, among all open groups, of the first that a worker at `version` may not sample for: it would probably be
    /// trained on too late. `None` when there is no such place in reach.
    ///
    /// With B groups a step, the group at place p is for step `next + p / B`, so p < (version + S + 1 - next) * B. That is
    /// the rule `started - refunded < (version + S + 1) * B`, with everything consumed taken off both sides.
    fn first_too_late(&self, version: PolicyVersion) -> Option<usize> {
        let steps = (version.0.saturating_add(self.config.staleness.0).saturating_add(1))
            .saturating_sub(self.next_step());
        usize::try_from(steps.checked_mul(u64::from(self.config.groups_per_step))?).ok()
    }

    fn grant(&mut self, worker: &PeerId, version: PolicyVersion, group: GroupId, index: u32) -> Lease {
        self.pending.remove(&(group, index));
        let id = self.leases.issue(group, index);
        let open = self.groups.get_mut(&group).expect("a pending sample belongs to an open group");
        let slot = &mut open.slots[index as usize];
        let lease = Lease {
            id,
            run: self.config.run,
            group,
            sample_index: index,
            group_size: self.config.group_size,
            attempt: slot.attempts,
            task_seed: self.config.first_task + group.0,
            version,
            sampling: SamplingSpec { seed: self.config.sample_seed(group, index), ..self.config.sampling },
            ttl_ms: self.config.lease_ttl_ms,
        };
        slot.attempts += 1;
        slot.live = Some(id);
        let deadline_ms = self.now_ms + u64::from(lease.ttl_ms);
        self.deadlines.insert((deadline_ms, id));
        self.leases.held_by(id, worker, lease, deadline_ms);
        self.workers.get_mut(worker).expect("checked by the caller").held.insert(id);
        lease
    }

    pub(super) fn submit(&mut self, trajectory: Trajectory) -> Submission {
        let id = trajectory.id();
        if let Some(answer) = self.answer(trajectory.worker(), id) {
            self.count_refused(answer);
            return answer;
        }
        let given = self.leases.given(id).expect("a lease at a worker is on record");
        // The worker may not change what it was asked for, nor sample with another policy than the one leased or a newer.
        let published = |v: PolicyVersion| v >= given.lease.version && v <= self.version;
        let honest =
            given.lease == *trajectory.lease() && trajectory.steps().iter().all(|s| published(s.version));
        if !honest {
            self.drop_lease(id, DropReason::Rejected);
            return Submission::Rejected;
        }
        self.accept(id, trajectory);
        Submission::Accepted
    }

    pub(super) fn refuse(&mut self, worker: &PeerId, id: LeaseId) -> Submission {
        if let Some(answer) = self.answer(worker, id) {
            self.count_refused(answer);
            return answer;
        }
        self.drop_lease(id, DropReason::Rejected);
        Submission::Rejected
    }

    fn count_refused(&mut self, answer: Submission) {
        self.duplicates_refused += u64::from(answer == Submission::Duplicate);
        self.late_refused += u64::from(answer != Submission::Duplicate);
    }

    fn accept(&mut self, id: LeaseId, trajectory: Trajectory) {
        let (group, index) = self.leases.slot(id).expect("an issued lease has a slot");
        self.unhold(id);
        self.leases.set(id, LeaseState::Received);
        let audited = self.config.audit.draws(id);
        let worker = self.workers.get_mut(trajectory.worker()).expect("a lease holder is registered");
        let ordinal = worker.accepted;
        worker.accepted += 1;
        worker.presence = Presence::Here;
        if audited || ordinal < u64::from(self.config.audit.first) {
            worker.audits.insert(ordinal, id);
        }
        let slot =
            &mut self.groups.get_mut(&group).expect("a held lease's group is open").slots[index as usize];
        slot.live = None;
        slot.filled = Some(Filled { trajectory, ordinal });
    }

    pub(super) fn fail(&mut self, worker: &PeerId, id: LeaseId, aborted: bool) -> Outcome {
        if self.leases.given(id).is_some_and(|g| g.worker == *worker) {
            self.drop_lease(id, if aborted { DropReason::Aborted } else { DropReason::Failed });
        }
        Outcome::Done
    }

    pub(super) fn disconnect(&mut self, worker: &PeerId) -> Outcome {
        self.release_held(worker, DropReason::Disconnected);
        if let Some(worker) = self.workers.get_mut(worker) {
            worker.active = None;
            worker.presence = Presence::Gone;
        }
        Outcome::Done
    }

    pub(super) fn verdict(&mut self, id: LeaseId, verdict: AuditOutcome) -> Outcome {
        let Some(peer) = self.trajectory(id).map(|t| t.worker().clone()) else {
            return Outcome::Refused(Refusal::NoSuchAudit);
        };
        let worker = self.workers.get_mut(&peer).expect("a trajectory's worker is registered");
        let Some(ordinal) = worker.audits.iter().find(|(_, l)| **l == id).map(|(ordinal, _)| *ordinal) else {
            return Outcome::Refused(Refusal::NoSuchAudit);
        };
        worker.audits.remove(&ordinal);
        worker.audits_done += 1;
        match verdict {
            AuditOutcome::Pass => worker.withheld = 0,
            AuditOutcome::Unproven => self.drop_lease(id, DropReason::Unproven),
            AuditOutcome::Withheld => {
                worker.withheld += 1;
                if worker.withheld >= self.config.max_withheld {
                    self.convict(&peer);
                } else {
                    self.drop_lease(id, DropReason::Unproven);
                }
            }
            AuditOutcome::Fail => self.convict(&peer),
        }
        Outcome::Done
    }

    /// Nothing of a convicted worker that is not yet with the learner is ever trained on, and it gets no more leases.
    fn convict(&mut self, peer: &PeerId) {
        let worker = self.workers.get_mut(peer).expect("a convicted worker is registered");
        worker.convicted = Some(worker.audits_done);
        worker.audits.clear();
        self.consumed_of_convicted += worker.consumed;
        self.release_held(peer, DropReason::Convicted);
        let mut theirs = Vec::new();
        for group in self.groups.values().filter(|g| g.step.is_none()) {
            let filled = group.slots.iter().filter_map(|s| s.filled.as_ref());
            theirs.extend(filled.filter(|f| f.trajectory.worker() == peer).map(|f| f.trajectory.id()));
        }
        theirs.into_iter().for_each(|id| self.drop_lease(id, DropReason::Convicted));
    }

    fn release_held(&mut self, worker: &PeerId, reason: DropReason) {
        let held = self.workers.get(worker).map(|w| w.held.clone()).unwrap_or_default();
        held.into_iter().for_each(|id| self.drop_lease(id, reason));
    }

    pub(super) fn unhold(&mut self, id: LeaseId) {
        if let Some(given) = self.leases.take_given(id) {
            self.deadlines.remove(&(given.deadline_ms, id));
            if let Some(worker) = self.workers.get_mut(&given.worker) {
                worker.held.remove(&id);
            }
        }
    }
}
