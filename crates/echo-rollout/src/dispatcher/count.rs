//! The sums, and the law that they obey: leased = consumed + dropped + open, at every moment.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Dispatcher;
use crate::lease::{DropReason, LeaseId, LeaseState};
use crate::staleness::StalenessStats;

/// How many leases went where.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Leases granted.
    pub leased: u64,
    /// Of these: trained on.
    pub consumed: u64,
    /// Of these: dropped, by [`DropReason::ALL`].
    pub dropped: [u64; DropReason::ALL.len()],
    /// Of these: not yet ended.
    pub open: u64,
    /// Leases that no state accounts for; anything but 0 is our bug.
    pub lost: u64,
    /// Leases trained on twice; anything but 0 is our bug.
    pub duplicated: u64,
    /// Repeated submissions that were refused.
    pub duplicates_refused: u64,
    /// Submissions after the end of their lease that were refused.
    pub late_refused: u64,
    /// Trajectories of workers that turned out to cheat, trained on before that was known.
    pub consumed_of_convicted: u64,
    /// Groups trained on.
    pub groups_consumed: u64,
    /// Groups given up.
    pub groups_abandoned: u64,
    /// Largest staleness of what was trained on, in versions.
    pub staleness_max: u64,
    /// Mean of it.
    pub staleness_mean: f64,
}

impl Counts {
    /// Leases dropped for one reason.
    pub fn dropped_for(&self, reason: DropReason) -> u64 {
        self.dropped[reason.index()]
    }

    /// Leases dropped because of their age.
    pub fn dropped_stale(&self) -> u64 {
        self.dropped_for(DropReason::Stale)
    }

    /// Trajectories refused by admission or by audits.
    pub fn rejected(&self) -> u64 {
        let reasons = [DropReason::Rejected, DropReason::Convicted, DropReason::Unproven];
        reasons.into_iter().map(|r| self.dropped_for(r)).sum()
    }
}

/// Book-keeping that contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("dispatcher invariant broken: {0}")]
pub struct Broken(pub String);

impl Dispatcher {
    /// The sums at this moment. `open` is counted from groups and workers, not from the lease states, so that `lost` can
    /// differ from 0.
    pub fn counts(&self) -> Counts {
        let filled = |g: &super::OpenGroup| g.slots.iter().filter(|s| s.filled.is_some()).count();
        let open = self.leases.n_given() + self.groups.values().map(filled).sum::<usize>();
        let dropped = self.leases.dropped();
        let ended = self.leases.consumed() + dropped.iter().sum::<u64>();
        Counts {
            leased: self.leases.issued(),
            consumed: self.leases.consumed(),
            dropped,
            open: open as u64,
            lost: self.leases.issued().saturating_sub(ended + open as u64),
            duplicated: self.twice_consumed,
            duplicates_refused: self.duplicates_refused,
            late_refused: self.late_refused,
            consumed_of_convicted: self.consumed_of_convicted,
            groups_consumed: self.groups_consumed,
            groups_abandoned: self.groups_abandoned,
            staleness_max: self.staleness.max(),
            staleness_mean: self.staleness.mean(),
        }
    }

    /// How old what was trained on was.
    pub fn staleness(&self) -> &StalenessStats {
        &self.staleness
    }

    /// Checks that all tables say the same. Linear in the leases of the run: for tests and once at the end of a run.
    ///
    /// # Errors
    /// Names the first contradiction.
    pub fn check_invariants(&self) -> Result<(), Broken> {
        let broken = |text: String| Err(Broken(text));
        let counts = self.counts();
        let ended = counts.consumed + counts.dropped.iter().sum::<u64>();
        if counts.leased != ended + counts.open || counts.lost != 0 || counts.duplicated != 0 {
            return broken(format!("leases do not add up: {counts:?}"));
        }
        let mut expected: BTreeMap<LeaseId, LeaseState> = BTreeMap::new();
        for (id, group) in &self.groups {
            for (index, slot) in group.slots.iter().enumerate() {
                let waits = self.pending.contains(&(*id, index as u32));
                let places = usize::from(waits)
                    + usize::from(slot.live.is_some())
                    + usize::from(slot.filled.is_some());
                if places != 1 {
                    return broken(format!("sample {index} of {id} is in {places} places"));
                }
                let state = if group.step.is_some() { LeaseState::Batched } else { LeaseState::Received };
                let of_slot = slot.live.map(|l| (l, LeaseState::Leased));
                let of_slot = of_slot.or_else(|| slot.filled.as_ref().map(|f| (f.trajectory.id(), state)));
                if let Some((lease, state)) = of_slot
                    && expected.insert(lease, state).is_some()
                {
                    return broken(format!("{lease} fills two samples"));
                }
            }
        }
        if let Some((group, index)) = self.pending.iter().find(|(g, _)| !self.groups.contains_key(g)) {
            return broken(format!("sample {index} of {group} waits but its group is gone"));
        }
        for (id, state) in self.leases.states() {
            let expected = expected.remove(&id);
            if state.is_open() && expected != Some(state) || !state.is_open() && expected.is_some() {
                return broken(format!("{id} is {state:?} but its group says {expected:?}"));
            }
            if self.leases.given(id).is_some() != (state == LeaseState::Leased) {
                return broken(format!("{id} is {state:?} but its holder says otherwise"));
            }
        }
        let held: usize = self.workers.values().map(|w| w.held.len()).sum();
        if held != self.leases.n_given() || held != self.deadlines.len() {
            return broken(format!(
                "{held} leases held, {} given, {} due",
                self.leases.n_given(),
                self.deadlines.len()
            ));
        }
        let audits = self.workers.values().flat_map(|w| w.audits.values());
        if let Some(id) = audits.into_iter().find(|id| self.trajectory(**id).is_none()) {
            return broken(format!("an audit waits for {id}, which is gone"));
        }
        Ok(())
    }
}
