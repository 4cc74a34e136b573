//! Which sample, which worker, what became of it: the book-keeping of a run, exactly once.
//!
//! Every change is a [`Command`] with its time, applied by [`Dispatcher::handle`]; nothing else is read. So a journal of
//! commands is the whole state: replayed, it gives the same dispatcher, and a restart forgets nothing that was answered.
//! Order of use: `handle` each command, then ask [`Dispatcher::audits_due`] and [`Dispatcher::ready_groups`].
//!
//! Age is a promise about every trained token, kept three times: a worker gets a sample only when the step that will
//! probably train on it is within the budget of the worker's policy; what is too old when a step is over is dropped; and
//! a step takes nothing that is too old for it.

mod command;
mod count;
mod table;
mod workers;

#[cfg(test)]
mod exhaustive;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use swarm_wire::{PeerId, PolicyVersion};

use crate::config::{DispatchConfig, InvalidConfig};
use crate::group::Group;
use crate::lease::{DropReason, GroupId, LeaseId, LeaseState};
use crate::rollout::Trajectory;
use crate::staleness::StalenessStats;

pub use command::{AuditOutcome, Command, Outcome, Refusal, Submission};
pub use count::{Broken, Counts};
use table::LeaseTable;
use workers::{Presence, Worker};

/// The book-keeping of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Dispatcher {
    config: DispatchConfig,
    /// Time of the newest command.
    now_ms: u64,
    version: PolicyVersion,
    /// Steps that are committed.
    steps: u64,
    leases: LeaseTable,
    groups: BTreeMap<GroupId, OpenGroup>,
    next_group: u64,
    /// How many groups were last asked to be open.
    asked_open: u32,
    /// Samples that nobody works on.
    pending: BTreeSet<(GroupId, u32)>,
    workers: BTreeMap<PeerId, Worker>,
    /// Deadlines of the leases that workers hold.
    deadlines: BTreeSet<(u64, LeaseId)>,
    groups_consumed: u64,
    groups_abandoned: u64,
    /// Groups that were given up for equal rewards since the last commit.
    flat_groups: u64,
    duplicates_refused: u64,
    late_refused: u64,
    twice_consumed: u64,
    consumed_of_convicted: u64,
    staleness: StalenessStats,
}

#[derive(Debug, Clone, PartialEq)]
struct OpenGroup {
    slots: Vec<Slot>,
    /// The learner's step that has it.
    step: Option<u64>,
    /// The step that had it when the learner was stopped, and that gets it again: it is then trained on what it would
    /// have been without the stop.
    again: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Slot {
    /// Leases given so far.
    attempts: u32,
    /// Of these, the ones that ended only because the policy moved on.
    excused: u32,
    /// The lease that is with a worker.
    live: Option<LeaseId>,
    /// Who dropped it last, and when: others go first.
    dropped_by: Option<(PeerId, u64)>,
    filled: Option<Filled>,
}

impl Slot {
    /// Its open lease.
    fn lease(&self) -> Option<LeaseId> {
        self.live.or_else(|| self.filled.as_ref().map(|f| f.trajectory.id()))
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Filled {
    trajectory: Trajectory,
    /// Its worker had this many trajectories accepted before.
    ordinal: u64,
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
            now_ms: 0,
            version: PolicyVersion(0),
            steps: 0,
            leases: LeaseTable::default(),
            groups: BTreeMap::new(),
            next_group: 0,
            asked_open: 0,
            pending: BTreeSet::new(),
            workers: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            groups_consumed: 0,
            groups_abandoned: 0,
            flat_groups: 0,
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

    /// How many steps are committed.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Applies one command at `now_ms` of the run's clock. Deadlines that have passed are settled first, so that an
    /// answer after its deadline is late no matter how often [`Command::Tick`] came.
    pub fn handle(&mut self, now_ms: u64, command: Command) -> Outcome {
        self.now_ms = now_ms;
        self.expire(now_ms);
        match command {
            Command::OpenGroups { up_to } => self.open_groups(up_to),
            Command::SetVersion(version) => self.set_version(version),
            Command::Register { worker, incarnation } => self.register(&worker, incarnation),
            Command::Acknowledge { worker, version } => self.acknowledge(&worker, version),
            Command::Lease { worker, max } => self.lease(&worker, max),
            Command::Submit { trajectory } => Outcome::Submitted(self.submit(trajectory)),
            Command::Refuse { worker, lease } => Outcome::Submitted(self.refuse(&worker, lease)),
            Command::Fail { worker, lease, aborted } => self.fail(&worker, lease, aborted),
            Command::Disconnect { worker } => self.disconnect(&worker),
            Command::Tick => Outcome::Done,
            Command::Verdict { lease, verdict } => self.verdict(lease, verdict),
            Command::Take { step, groups } => Outcome::Groups(self.take(step, groups as usize)),
            Command::GiveBack { step, flat } => self.give_back(step, &flat),
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

    /// How many groups were last asked to be open; 0 before the first were.
    pub fn asked_open(&self) -> u32 {
        self.asked_open
    }

    /// Groups that were given up for equal rewards since the last commit: for the step that comes next.
    pub fn flat_groups(&self) -> u64 {
        self.flat_groups
    }

    /// Samples that nobody works on.
    pub fn n_pending(&self) -> usize {
        self.pending.len()
    }

    /// A trajectory may be trained on once every audit drawn on it or on an earlier one of its worker has passed.
    fn slot_released(&self, slot: &Slot) -> bool {
        let Some(filled) = &slot.filled else { return false };
        let Some(worker) = self.workers.get(filled.trajectory.worker()) else { return false };
        worker.convicted.is_none() && worker.audits.range(..=filled.ordinal).next().is_none()
    }

    fn open_groups(&mut self, up_to: u32) -> Outcome {
        self.asked_open = up_to;
        let limit = up_to.min(self.config.max_open_groups) as usize;
        let mut opened = Vec::new();
        while self.groups.len() < limit {
            let id = GroupId(self.next_group);
            self.next_group += 1;
            let slots = vec![Slot::default(); self.config.group_size as usize];
            self.groups.insert(id, OpenGroup { slots, step: None, again: None });
            self.pending.extend((0..self.config.group_size).map(|i| (id, i)));
            opened.push(id);
        }
        Outcome::Opened(opened)
    }

    /// Versions never go back.
    fn set_version(&mut self, version: PolicyVersion) -> Outcome {
        if version < self.version {
            return Outcome::Refused(Refusal::VersionRollback);
        }
        self.version = version;
        self.drop_stale();
        Outcome::Done
    }

    /// The step that the oldest open groups are for. Step n trains version n.
    fn next_step(&self) -> u64 {
        self.steps.max(self.version.0)
    }

    /// Ends what nobody may train on any more: it is too old for the next step.
    fn drop_stale(&mut self) {
        let (bound, step) = (self.config.staleness, PolicyVersion(self.next_step()));
        let mut stale = Vec::new();
        for slot in self.groups.values().filter(|g| g.step.is_none()).flat_map(|g| &g.slots) {
            let live = slot.live.and_then(|id| Some((id, self.leases.given(id)?.lease.version)));
            let filled = slot.filled.as_ref().map(|f| (f.trajectory.id(), f.trajectory.oldest_version()));
            stale.extend(live.or(filled).filter(|(_, v)| !bound.allows(step, *v)).map(|(id, _)| id));
        }
        stale.into_iter().for_each(|id| self.drop_lease(id, DropReason::Stale));
    }

    fn take(&mut self, step: u64, n: usize) -> Vec<Group> {
        let bound = self.config.staleness;
        let mut chosen: Vec<GroupId> =
            self.groups.iter().filter(|(_, g)| g.step == Some(step)).map(|(id, _)| *id).collect();
        if chosen.is_empty() {
            let mut too_old = Vec::new();
            let mut ready = self.ready_groups();
            ready.sort_by_key(|id| self.groups[id].again != Some(step));
            for id in ready {
                let filled = self.groups[&id].slots.iter().filter_map(|s| s.filled.as_ref());
                let old = filled
                    .map(|f| &f.trajectory)
                    .filter(|t| !bound.allows(PolicyVersion(step), t.oldest_version()));
                let old: Vec<LeaseId> = old.map(Trajectory::id).collect();
                if old.is_empty() && chosen.len() < n {
                    chosen.push(id);
                }
                too_old.extend(old);
            }
            too_old.into_iter().for_each(|id| self.drop_lease(id, DropReason::Stale));
            if chosen.len() < n {
                return Vec::new();
            }
        }
        let mut groups = Vec::with_capacity(chosen.len());
        for id in chosen {
            let open = self.groups.get_mut(&id).expect("chosen among the open ones");
            open.step = Some(step);
            let filled = open.slots.iter().filter_map(|s| s.filled.as_ref());
            let trajectories: Vec<Trajectory> = filled.map(|f| f.trajectory.clone()).collect();
            trajectories.iter().for_each(|t| self.leases.set(t.id(), LeaseState::Batched));
            groups.push(Group { id, task_seed: self.config.first_task + id.0, trajectories });
        }
        groups
    }

    fn give_back(&mut self, step: u64, flat: &[GroupId]) -> Outcome {
        for id in flat {
            if self.groups.get(id).is_some_and(|g| g.step == Some(step)) {
                self.abandon(*id, DropReason::Flat);
                self.flat_groups += 1;
            }
        }
        self.take_back(|of| of == step);
        Outcome::Done
    }

    /// Groups that the learner has for these steps wait again, for the same ones. What is not to be trained on any more goes.
    fn take_back(&mut self, these: impl Fn(u64) -> bool) {
        let mut back = Vec::new();
        for group in self.groups.values_mut() {
            if let Some(step) = group.step.take_if(|step| these(*step)) {
                group.again = Some(step);
                back.extend(group.slots.iter().filter_map(|s| s.filled.as_ref()).map(|f| f.trajectory.id()));
            }
        }
        for id in &back {
            self.leases.set(*id, LeaseState::Received);
        }
        let convicted = |id: &LeaseId| self.trajectory(*id).is_some_and(|t| !self.is_admitted(t.worker()));
        let convicted: Vec<LeaseId> = back.iter().filter(|id| convicted(id)).copied().collect();
        convicted.into_iter().for_each(|id| self.drop_lease(id, DropReason::Convicted));
        self.drop_stale();
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
                self.staleness.add(step.saturating_sub(t.oldest_version().0));
                let worker = self.workers.get_mut(t.worker()).expect("a trajectory's worker is registered");
                worker.consumed += 1;
                self.consumed_of_convicted += u64::from(worker.convicted.is_some());
            }
        }
        if !done.is_empty() {
            self.steps = self.steps.max(step + 1);
            self.flat_groups = 0;
            self.drop_stale();
        }
        Outcome::Committed(done.len())
    }

    /// After a restart: steps below `steps` are in the trainer's checkpoint and so consumed; the groups of the next one
    /// go back to the queue, for the same step. Connections are gone: leases run until their deadlines, and a worker is not
    /// there before it is heard again.
    fn recover(&mut self, steps: u64) -> Outcome {
        for worker in self.workers.values_mut().filter(|w| w.presence == Presence::Here) {
            worker.presence = Presence::Unheard;
        }
        let taken: BTreeSet<u64> = self.groups.values().filter_map(|g| g.step).collect();
        taken.range(..steps).for_each(|step| {
            self.commit(*step);
        });
        self.steps = self.steps.max(steps);
        self.take_back(|_| true);
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

    /// Ends an open lease; its sample waits for another worker, unless it had its share of attempts.
    fn drop_lease(&mut self, id: LeaseId, reason: DropReason) {
        let by = self.leases.given(id).map(|g| g.worker.clone());
        let by = by.or_else(|| self.trajectory(id).map(|t| t.worker().clone()));
        self.end_lease(id, reason);
        let Some((group, index)) = self.leases.slot(id) else { return };
        let Some(open) = self.groups.get_mut(&group) else { return };
        let slot = &mut open.slots[index as usize];
        slot.live = None;
        slot.filled = None;
        if matches!(reason, DropReason::Stale | DropReason::Aborted) {
            slot.excused += 1;
        } else {
            slot.dropped_by = by.map(|peer| (peer, self.now_ms));
        }
        if slot.attempts - slot.excused >= self.config.max_attempts {
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
        let open: Vec<LeaseId> = group.slots.iter().filter_map(Slot::lease).collect();
        open.into_iter().for_each(|lease| self.end_lease(lease, reason));
        self.groups.remove(&id);
        self.groups_abandoned += 1;
        (0..self.config.group_size).for_each(|index| {
            self.pending.remove(&(id, index));
        });
    }
}
