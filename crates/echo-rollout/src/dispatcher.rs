//! Which sample, which worker, what became of it: the book-keeping of a run, exactly once.
//!
//! Every change is a [`Command`] with its time, applied by [`Dispatcher::handle`]; nothing else is read. So a journal of
//! commands is the whole state: replayed, it gives the same dispatcher, and a restart forgets nothing that was answered.
//! Order of use: `handle` each command, then ask [`Dispatcher::audits_due`] and [`Dispatcher::ready_groups`].

mod command;
mod count;
mod table;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use swarm_wire::{PeerId, PolicyVersion};

use crate::config::{DispatchConfig, InvalidConfig};
use crate::group::Group;
use crate::lease::{DropReason, GroupId, Lease, LeaseId, LeaseState, SamplingSpec};
use crate::rollout::Trajectory;
use crate::staleness::{StalenessBound, StalenessStats};

pub use command::{AuditOutcome, Command, Outcome, Refusal, Submission};
pub use count::{Broken, Counts};
use table::LeaseTable;

/// The book-keeping of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Dispatcher {
    config: DispatchConfig,
    version: PolicyVersion,
    leases: LeaseTable,
    groups: BTreeMap<GroupId, OpenGroup>,
    next_group: u64,
    /// Samples that nobody works on.
    pending: BTreeSet<(GroupId, u32)>,
    workers: BTreeMap<PeerId, Worker>,
    /// Deadlines of the leases that workers hold.
    deadlines: BTreeSet<(u64, LeaseId)>,
    groups_consumed: u64,
    groups_abandoned: u64,
    duplicates_refused: u64,
    late_refused: u64,
    twice_consumed: u64,
    consumed_of_convicted: u64,
    staleness: StalenessStats,
}

#[derive(Debug, Clone, PartialEq)]
struct OpenGroup {
    task_seed: u64,
    version: PolicyVersion,
    slots: Vec<Slot>,
    /// The learner's step that has it.
    step: Option<u64>,
    /// How many versions behind it was when the learner took it.
    staleness: u64,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Slot {
    /// Leases given so far.
    attempts: u32,
    /// The lease that is with a worker.
    live: Option<LeaseId>,
    filled: Option<Filled>,
}

#[derive(Debug, Clone, PartialEq)]
struct Filled {
    trajectory: Trajectory,
    /// Its worker had this many trajectories accepted before.
    ordinal: u64,
}

/// What is known of a worker.
#[derive(Debug, Clone, PartialEq, Default)]
struct Worker {
    incarnation: u64,
    active: Option<PolicyVersion>,
    held: BTreeSet<LeaseId>,
    accepted: u64,
    consumed: u64,
    /// Ordinals of trajectories whose audit has no result yet, with their leases.
    audits: BTreeMap<u64, LeaseId>,
    audits_done: u64,
    /// How many audits it took to convict it.
    convicted: Option<u64>,
}

impl Dispatcher {
    /// An empty run.
    ///
    /// # Errors
    /// When the configuration is out of range.
    pub fn new(config: DispatchConfig) -> Result<Self, InvalidConfig> {
        config.validate()?;
        Ok(Self {
            config,
            version: PolicyVersion(0),
            leases: LeaseTable::default(),
            groups: BTreeMap::new(),
            next_group: 0,
            pending: BTreeSet::new(),
            workers: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            groups_consumed: 0,
            groups_abandoned: 0,
            duplicates_refused: 0,
            late_refused: 0,
            twice_consumed: 0,
            consumed_of_convicted: 0,
            staleness: StalenessStats::default(),
        })
    }

    /// How the run is set up.
    pub fn config(&self) -> &DispatchConfig {
        &self.config
    }

    /// The newest published version.
    pub fn version(&self) -> PolicyVersion {
        self.version
    }

    /// Applies one command at `now_ms` of the run's clock. Deadlines that have passed are settled first, so that an
    /// answer after its deadline is late no matter how often [`Command::Tick`] came.
    pub fn handle(&mut self, now_ms: u64, command: Command) -> Outcome {
        self.expire(now_ms);
        match command {
            Command::OpenGroups { task_seeds } => self.open_groups(&task_seeds),
            Command::SetVersion(version) => self.set_version(version),
            Command::Register { worker, incarnation } => self.register(&worker, incarnation),
            Command::Acknowledge { worker, version } => self.acknowledge(&worker, version),
            Command::Lease { worker, max } => self.lease(now_ms, &worker, max),
            Command::Submit { trajectory, refused } => Outcome::Submitted(self.submit(trajectory, refused)),
            Command::Fail { worker, lease } => self.fail(&worker, lease),
            Command::Disconnect { worker } => self.disconnect(&worker),
            Command::Tick => Outcome::Done,
            Command::Verdict { lease, verdict } => self.verdict(lease, verdict),
            Command::Take { step, max_groups } => Outcome::Groups(self.take(step, max_groups)),
            Command::Commit { step } => self.commit(step),
            Command::Recover { steps } => self.recover(steps),
        }
    }

    /// When the next lease expires, on the run's clock.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Trajectories that wait for an audit, oldest lease first.
    pub fn audits_due(&self) -> Vec<&Trajectory> {
        let mut due: Vec<LeaseId> = self.workers.values().flat_map(|w| w.audits.values().copied()).collect();
        due.sort_unstable();
        due.into_iter().filter_map(|id| self.trajectory(id)).collect()
    }

    /// A trajectory that is here and not yet consumed.
    pub fn trajectory(&self, id: LeaseId) -> Option<&Trajectory> {
        let slot = self.leases.slot(id)?;
        let filled = self.groups.get(&slot.0)?.slots.get(slot.1 as usize)?.filled.as_ref()?;
        (filled.trajectory.id() == id).then_some(&filled.trajectory)
    }

    /// Groups that are complete, audited as the policy asks, and not yet with the learner; oldest first.
    pub fn ready_groups(&self) -> Vec<GroupId> {
        let ready = |g: &OpenGroup| g.step.is_none() && g.slots.iter().all(|s| self.slot_released(s));
        self.groups.iter().filter(|(_, g)| ready(g)).map(|(id, _)| *id).collect()
    }

    /// Groups that are open: not consumed, not given up.
    pub fn n_open_groups(&self) -> usize {
        self.groups.len()
    }

    /// Whether `worker` is registered.
    pub fn is_registered(&self, worker: &PeerId) -> bool {
        self.workers.contains_key(worker)
    }

    /// The version that `worker` has installed.
    pub fn active_version(&self, worker: &PeerId) -> Option<PolicyVersion> {
        self.workers.get(worker)?.active
    }

    /// Whether a sample of `version` waits for a worker.
    pub fn has_pending(&self, version: PolicyVersion) -> bool {
        self.pending.iter().any(|(id, _)| self.groups.get(id).is_some_and(|g| g.version == version))
    }

    /// Whether `worker` is registered and not convicted.
    pub fn is_admitted(&self, worker: &PeerId) -> bool {
        self.workers.get(worker).is_some_and(|w| w.convicted.is_none())
    }

    /// Admitted workers, with the version that each of them has installed.
    pub fn active_versions(&self) -> Vec<(PeerId, Option<PolicyVersion>)> {
        let admitted = self.workers.iter().filter(|(_, w)| w.convicted.is_none());
        admitted.map(|(id, w)| (id.clone(), w.active)).collect()
    }

    /// Convicted workers, with the number of audits after which each was convicted.
    pub fn convicted(&self) -> Vec<(PeerId, u64)> {
        self.workers.iter().filter_map(|(id, w)| Some((id.clone(), w.convicted?))).collect()
    }

    /// A trajectory may be trained on once every audit drawn on it or on an earlier one of its worker has passed.
    fn slot_released(&self, slot: &Slot) -> bool {
        let Some(filled) = &slot.filled else { return false };
        let Some(worker) = self.workers.get(filled.trajectory.worker()) else { return false };
        worker.convicted.is_none() && worker.audits.range(..=filled.ordinal).next().is_none()
    }

    fn open_groups(&mut self, task_seeds: &[u64]) -> Outcome {
        let room = (self.config.max_open_groups as usize).saturating_sub(self.groups.len());
        let mut opened = Vec::new();
        for &task_seed in task_seeds.iter().take(room) {
            let id = GroupId(self.next_group);
            self.next_group += 1;
            let slots = vec![Slot::default(); self.config.group_size as usize];
            self.groups
                .insert(id, OpenGroup { task_seed, version: self.version, slots, step: None, staleness: 0 });
            self.pending.extend((0..self.config.group_size).map(|i| (id, i)));
            opened.push(id);
        }
        Outcome::Opened(opened)
    }

    /// Groups of versions beyond the bound are given up: nobody may train on them any more. Versions never go back.
    fn set_version(&mut self, version: PolicyVersion) -> Outcome {
        if version < self.version {
            return Outcome::Refused(Refusal::VersionRollback);
        }
        self.version = version;
        let bound = self.config.staleness;
        let stale = self.groups.iter().filter(|(_, g)| g.step.is_none() && !bound.allows(version, g.version));
        let stale: Vec<GroupId> = stale.map(|(id, _)| *id).collect();
        stale.into_iter().for_each(|id| self.abandon(id, DropReason::Stale));
        Outcome::Done
    }

    fn register(&mut self, id: &PeerId, incarnation: u64) -> Outcome {
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
        if incarnation > worker.incarnation {
            worker.incarnation = incarnation;
            worker.active = None;
            self.release_held(id, DropReason::Disconnected);
        }
        Outcome::Done
    }

    fn acknowledge(&mut self, id: &PeerId, version: PolicyVersion) -> Outcome {
        match self.workers.get_mut(id) {
            None => Outcome::Refused(Refusal::NotRegistered),
            Some(_) if version > self.version => Outcome::Refused(Refusal::UnknownVersion),
            Some(worker) => {
                worker.active = Some(version);
                Outcome::Done
            }
        }
    }

    fn lease(&mut self, now_ms: u64, id: &PeerId, max: u32) -> Outcome {
        let Some(worker) = self.workers.get(id) else { return Outcome::Refused(Refusal::NotRegistered) };
        if worker.convicted.is_some() {
            return Outcome::Refused(Refusal::Convicted);
        }
        let room = (self.config.max_leases_per_worker as usize).saturating_sub(worker.held.len());
        let Some(active) = worker.active else { return Outcome::Leased(Vec::new()) };
        let fits = |(group, _): &&(GroupId, u32)| self.groups.get(group).is_some_and(|g| g.version == active);
        let want = room.min(max as usize).min(self.share(active).saturating_sub(worker.held.len()));
        let chosen: Vec<_> = self.pending.iter().filter(fits).take(want).copied().collect();
        let leases = chosen.into_iter().map(|(group, index)| self.grant(now_ms, id, group, index)).collect();
        Outcome::Leased(leases)
    }

    /// How many samples one worker may hold, so that the first to ask does not get everything: an equal part of what is
    /// to be made, rounded up.
    fn share(&self, version: PolicyVersion) -> usize {
        let ready =
            self.workers.values().filter(|w| w.convicted.is_none() && w.active == Some(version)).count();
        (self.pending.len() + self.leases.n_given()).div_ceil(ready.max(1))
    }

    fn grant(&mut self, now_ms: u64, worker: &PeerId, group: GroupId, index: u32) -> Lease {
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
            task_seed: open.task_seed,
            version: open.version,
            sampling: SamplingSpec { seed: self.config.sample_seed(group, index), ..self.config.sampling },
            ttl_ms: self.config.lease_ttl_ms,
        };
        slot.attempts += 1;
        slot.live = Some(id);
        self.deadlines.insert((now_ms + u64::from(lease.ttl_ms), id));
        self.leases.held_by(id, worker, lease, now_ms + u64::from(lease.ttl_ms));
        self.workers.get_mut(worker).expect("checked by the caller").held.insert(id);
        lease
    }

    fn submit(&mut self, trajectory: Trajectory, refused: bool) -> Submission {
        let id = trajectory.id();
        let answer = match self.leases.state(id) {
            Some(LeaseState::Leased) => None,
            Some(LeaseState::Received | LeaseState::Batched | LeaseState::Consumed) => {
                Some(Submission::Duplicate)
            }
            Some(LeaseState::Dropped(DropReason::Stale)) => Some(Submission::Stale),
            Some(LeaseState::Dropped(
                DropReason::Rejected | DropReason::Convicted | DropReason::Unproven,
            )) => Some(Submission::Rejected),
            Some(LeaseState::Dropped(_)) | None => Some(Submission::Late),
        };
        if let Some(answer) = answer {
            self.duplicates_refused += u64::from(answer == Submission::Duplicate);
            self.late_refused += u64::from(answer != Submission::Duplicate);
            return answer;
        }
        let given = self.leases.given(id).expect("a lease at a worker is on record");
        if given.worker != *trajectory.worker() {
            self.late_refused += 1;
            return Submission::Late;
        }
        // The worker may not change what it was asked for, nor sample with another policy than the one leased.
        let published = |v: PolicyVersion| v >= given.lease.version && v <= self.version;
        let honest =
            given.lease == *trajectory.lease() && trajectory.steps().iter().all(|s| published(s.version));
        if refused || !honest {
            self.drop_lease(id, DropReason::Rejected);
            return Submission::Rejected;
        }
        self.accept(id, trajectory);
        Submission::Accepted
    }

    fn accept(&mut self, id: LeaseId, trajectory: Trajectory) {
        let (group, index) = self.leases.slot(id).expect("an issued lease has a slot");
        self.unhold(id);
        self.leases.set(id, LeaseState::Received);
        let audited = self.config.audit.draws(id);
        let worker = self.workers.get_mut(trajectory.worker()).expect("a lease holder is registered");
        let ordinal = worker.accepted;
        worker.accepted += 1;
        if audited || ordinal < u64::from(self.config.audit.first) {
            worker.audits.insert(ordinal, id);
        }
        let slot =
            &mut self.groups.get_mut(&group).expect("a held lease's group is open").slots[index as usize];
        slot.live = None;
        slot.filled = Some(Filled { trajectory, ordinal });
    }

    fn fail(&mut self, worker: &PeerId, id: LeaseId) -> Outcome {
        if self.leases.given(id).is_some_and(|g| g.worker == *worker) {
            self.drop_lease(id, DropReason::Failed);
        }
        Outcome::Done
    }

    fn disconnect(&mut self, worker: &PeerId) -> Outcome {
        self.release_held(worker, DropReason::Disconnected);
        if let Some(worker) = self.workers.get_mut(worker) {
            worker.active = None;
        }
        Outcome::Done
    }

    fn verdict(&mut self, id: LeaseId, verdict: AuditOutcome) -> Outcome {
        let found = self.workers.iter().find_map(|(peer, w)| {
            w.audits.iter().find(|(_, l)| **l == id).map(|(ordinal, _)| (peer.clone(), *ordinal))
        });
        let Some((peer, ordinal)) = found else { return Outcome::Refused(Refusal::NoSuchAudit) };
        let worker = self.workers.get_mut(&peer).expect("just found");
        worker.audits.remove(&ordinal);
        worker.audits_done += 1;
        match verdict {
            AuditOutcome::Pass => {}
            AuditOutcome::Unproven => self.drop_lease(id, DropReason::Unproven),
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

    fn take(&mut self, step: u64, max_groups: u32) -> Vec<Group> {
        let ready: Vec<GroupId> = self.ready_groups().into_iter().take(max_groups as usize).collect();
        let mut groups = Vec::with_capacity(ready.len());
        for id in ready {
            let open = self.groups.get_mut(&id).expect("ready groups are open");
            open.step = Some(step);
            open.staleness = StalenessBound::staleness(self.version, open.version);
            let filled = open.slots.iter().filter_map(|s| s.filled.as_ref());
            let trajectories: Vec<Trajectory> = filled.map(|f| f.trajectory.clone()).collect();
            trajectories.iter().for_each(|t| self.leases.set(t.id(), LeaseState::Batched));
            groups.push(Group { id, task_seed: open.task_seed, version: open.version, trajectories });
        }
        groups
    }

    fn commit(&mut self, step: u64) -> Outcome {
        let done: Vec<GroupId> =
            self.groups.iter().filter(|(_, g)| g.step == Some(step)).map(|(id, _)| *id).collect();
        for id in &done {
            let group = self.groups.remove(id).expect("just listed");
            self.groups_consumed += 1;
            for filled in group.slots.into_iter().filter_map(|s| s.filled) {
                let t = filled.trajectory;
                if self.leases.state(t.id()) != Some(LeaseState::Batched) {
                    self.twice_consumed += 1;
                    continue;
                }
                self.leases.set(t.id(), LeaseState::Consumed);
                self.staleness.add(group.staleness);
                let worker = self.workers.get_mut(t.worker()).expect("a trajectory's worker is registered");
                worker.consumed += 1;
                self.consumed_of_convicted += u64::from(worker.convicted.is_some());
            }
        }
        Outcome::Committed(done.len())
    }

    /// After a restart: steps below `steps` are in the trainer's checkpoint and so consumed; the groups of later ones go
    /// back to the queue. Connections are gone, so leases run until their deadlines.
    fn recover(&mut self, steps: u64) -> Outcome {
        let taken: BTreeSet<u64> = self.groups.values().filter_map(|g| g.step).collect();
        taken.range(..steps).for_each(|step| {
            self.commit(*step);
        });
        let mut back = Vec::new();
        for group in self.groups.values_mut() {
            if group.step.take().is_some() {
                back.extend(group.slots.iter().filter_map(|s| s.filled.as_ref()).map(|f| f.trajectory.id()));
            }
        }
        for id in &back {
            self.leases.set(*id, LeaseState::Received);
        }
        let convicted = |id: &LeaseId| self.trajectory(*id).is_some_and(|t| !self.is_admitted(t.worker()));
        let convicted: Vec<LeaseId> = back.iter().filter(|id| convicted(id)).copied().collect();
        convicted.into_iter().for_each(|id| self.drop_lease(id, DropReason::Convicted));
        Outcome::Done
    }

    fn expire(&mut self, now_ms: u64) {
        while let Some(&(at, id)) = self.deadlines.first() {
            if at > now_ms {
                break;
            }
            self.drop_lease(id, DropReason::Expired);
        }
    }

    fn release_held(&mut self, worker: &PeerId, reason: DropReason) {
        let held = self.workers.get(worker).map(|w| w.held.clone()).unwrap_or_default();
        held.into_iter().for_each(|id| self.drop_lease(id, reason));
    }

    fn unhold(&mut self, id: LeaseId) {
        if let Some(given) = self.leases.take_given(id) {
            self.deadlines.remove(&(given.deadline_ms, id));
            if let Some(worker) = self.workers.get_mut(&given.worker) {
                worker.held.remove(&id);
            }
        }
    }

    /// Ends an open lease; its sample waits for another worker, unless it had its share of attempts.
    fn drop_lease(&mut self, id: LeaseId, reason: DropReason) {
        self.end_lease(id, reason);
        let Some((group, index)) = self.leases.slot(id) else { return };
        let Some(open) = self.groups.get_mut(&group) else { return };
        let slot = &mut open.slots[index as usize];
        slot.live = None;
        slot.filled = None;
        if slot.attempts >= self.config.max_attempts {
            self.abandon(group, DropReason::Abandoned);
        } else {
            self.pending.insert((group, index));
        }
    }

    fn end_lease(&mut self, id: LeaseId, reason: DropReason) {
        self.unhold(id);
        if let Some(t) = self.trajectory(id) {
            let worker = t.worker().clone();
            if let Some(worker) = self.workers.get_mut(&worker) {
                worker.audits.retain(|_, l| *l != id);
            }
        }
        self.leases.set(id, LeaseState::Dropped(reason));
    }

    fn abandon(&mut self, id: GroupId, reason: DropReason) {
        let Some(group) = self.groups.get(&id) else { return };
        let of_slot = |s: &Slot| s.live.or_else(|| s.filled.as_ref().map(|f| f.trajectory.id()));
        let open: Vec<LeaseId> = group.slots.iter().filter_map(of_slot).collect();
        open.into_iter().for_each(|lease| self.end_lease(lease, reason));
        self.groups.remove(&id);
        self.groups_abandoned += 1;
        (0..self.config.group_size).for_each(|index| {
            self.pending.remove(&(id, index));
        });
    }
}
