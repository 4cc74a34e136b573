//! Every lease ever issued with its state: two words each, so that a duplicate is known however late it comes.

use std::collections::BTreeMap;

use swarm_wire::PeerId;

use crate::lease::{DropReason, GroupId, Lease, LeaseId, LeaseState};

/// States by lease number, and who holds those that are with workers.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct LeaseTable {
    entries: Vec<(GroupId, u32, LeaseState)>,
    given: BTreeMap<LeaseId, Given>,
    consumed: u64,
    dropped: [u64; DropReason::ALL.len()],
}

/// A lease that a worker has.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Given {
    pub(super) worker: PeerId,
    pub(super) lease: Lease,
    pub(super) deadline_ms: u64,
}

impl LeaseTable {
    pub(super) fn issue(&mut self, group: GroupId, index: u32) -> LeaseId {
        let id = LeaseId(self.entries.len() as u64);
        self.entries.push((group, index, LeaseState::Leased));
        id
    }

    pub(super) fn held_by(&mut self, id: LeaseId, worker: &PeerId, lease: Lease, deadline_ms: u64) {
        self.given.insert(id, Given { worker: worker.clone(), lease, deadline_ms });
    }

    pub(super) fn given(&self, id: LeaseId) -> Option<&Given> {
        self.given.get(&id)
    }

    pub(super) fn take_given(&mut self, id: LeaseId) -> Option<Given> {
        self.given.remove(&id)
    }

    pub(super) fn n_given(&self) -> usize {
        self.given.len()
    }

    pub(super) fn state(&self, id: LeaseId) -> Option<LeaseState> {
        self.entry(id).map(|e| e.2)
    }

    pub(super) fn slot(&self, id: LeaseId) -> Option<(GroupId, u32)> {
        self.entry(id).map(|e| (e.0, e.1))
    }

    fn entry(&self, id: LeaseId) -> Option<&(GroupId, u32, LeaseState)> {
        self.entries.get(usize::try_from(id.0).ok()?)
    }

    /// Moves a lease that is still open; what has ended stays as it is.
    pub(super) fn set(&mut self, id: LeaseId, state: LeaseState) {
        let entry = usize::try_from(id.0).ok().and_then(|i| self.entries.get_mut(i));
        let Some(entry) = entry.filter(|e| e.2.is_open()) else { return };
        entry.2 = state;
        match state {
            LeaseState::Consumed => self.consumed += 1,
            LeaseState::Dropped(reason) => self.dropped[reason.index()] += 1,
            _ => {}
        }
    }

    pub(super) fn issued(&self) -> u64 {
        self.entries.len() as u64
    }

    pub(super) fn consumed(&self) -> u64 {
        self.consumed
    }

    pub(super) fn dropped(&self) -> [u64; DropReason::ALL.len()] {
        self.dropped
    }

    pub(super) fn states(&self) -> impl Iterator<Item = (LeaseId, LeaseState)> {
        self.entries.iter().enumerate().map(|(i, e)| (LeaseId(i as u64), e.2))
    }
}
