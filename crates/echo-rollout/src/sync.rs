//! The sequential mode as a state machine: READY, PUBLISH, WAIT_ACK, LEASE, COLLECT, TRAIN, COMMIT, and again.
//!
//! Everything trained on was sampled with the newest weights, so staleness is 0. A worker that is late with a new version
//! is left out of the round, not waited for: it gets leases as soon as it has caught up. Use: `poll` until it says
//! nothing, do what it says, report with a `handle_*`. An action is given out until it is reported, so a driver that was
//! interrupted asks again; every action can be repeated.

use swarm_wire::PolicyVersion;

use crate::dispatcher::Dispatcher;

/// How a round goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequentialConfig {
    /// Groups trained on per step.
    pub groups_per_step: u32,
    /// Workers without which no round starts.
    pub min_workers: usize,
    /// How long the other workers are waited for.
    pub ack_timeout_ms: u64,
}

/// Where a round stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Weights of the version exist and nothing was done with them.
    Ready,
    /// They are being published.
    Publish,
    /// Workers fetch and install them.
    WaitAck {
        /// Until when all of them are waited for.
        until_ms: u64,
    },
    /// Groups are to be opened.
    Lease,
    /// Workers sample.
    Collect,
    /// The learner has the groups.
    Train,
    /// The step's results go to disk.
    Commit,
}

/// What the driver of either mode is to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Publish this version, tell the dispatcher, then report it with `handle_published`; the asynchronous mode also wants to
    /// hear that it has begun ([`crate::asynchronous::AsyncCoordinator::handle_publishing`]).
    Publish(PolicyVersion),
    /// Open groups. In the sequential mode: wait no longer for workers that are late, and report with `handle_opened`.
    OpenGroups {
        /// How many are to be open, those with the learner included.
        up_to: u32,
    },
    /// Take groups for this step; when there are any, train on them, then report with `handle_trained`. The asynchronous
    /// mode also wants to hear that it has begun ([`crate::asynchronous::AsyncCoordinator::handle_training`]).
    Train {
        /// The step.
        step: u64,
        /// How many groups.
        groups: u32,
    },
    /// Commit the step, then report with `handle_committed`.
    Commit {
        /// The step.
        step: u64,
    },
}

/// What a dispatcher looks like to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct View {
    /// Workers that may have leases.
    pub workers: usize,
    /// Of these, the ones that have installed the version.
    pub up_to_date: usize,
    /// Groups that are neither consumed nor given up.
    pub open_groups: usize,
    /// Of these, the ones that the learner can have.
    pub ready_groups: usize,
    /// Samples that nobody works on.
    pub pending: usize,
}

impl View {
    /// The view of `dispatcher`.
    pub fn of(dispatcher: &Dispatcher) -> Self {
        let active = dispatcher.active_versions();
        Self {
            workers: active.len(),
            up_to_date: active.iter().filter(|(_, v)| *v == Some(dispatcher.version())).count(),
            open_groups: dispatcher.n_open_groups(),
            ready_groups: dispatcher.ready_groups().len(),
            pending: dispatcher.n_pending(),
        }
    }
}

/// A report that does not fit the phase: a bug of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{input} does not fit phase {phase:?}")]
pub struct OutOfOrder {
    /// What was reported.
    pub input: &'static str,
    /// The phase.
    pub phase: Phase,
}

/// The state machine of the sequential mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequentialSync {
    config: SequentialConfig,
    version: PolicyVersion,
    step: u64,
    phase: Phase,
}

impl SequentialSync {
    /// Starts at READY with `version`, before `step`.
    pub fn new(config: SequentialConfig, version: PolicyVersion, step: u64) -> Self {
        Self { config, version, step, phase: Phase::Ready }
    }

    /// Where the round stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What to do now; `None` while others have to act.
    pub fn poll(&mut self, now_ms: u64, view: &View) -> Option<Action> {
        match self.phase {
            Phase::Ready => self.enter(Phase::Publish),
            Phase::WaitAck { until_ms } => {
                let everybody = view.up_to_date == view.workers || now_ms >= until_ms;
                if everybody && view.up_to_date >= self.config.min_workers.max(1) {
                    self.enter(Phase::Lease);
                }
            }
            // Groups that were given up are replaced.
            Phase::Collect | Phase::Train if view.open_groups < self.config.groups_per_step as usize => {
                self.enter(Phase::Lease);
            }
            Phase::Collect if view.ready_groups == view.open_groups => self.enter(Phase::Train),
            _ => {}
        }
        match self.phase {
            Phase::Publish => Some(Action::Publish(self.version)),
            Phase::Lease => Some(Action::OpenGroups { up_to: self.config.groups_per_step }),
            Phase::Train => Some(Action::Train { step: self.step, groups: self.config.groups_per_step }),
            Phase::Commit => Some(Action::Commit { step: self.step }),
            Phase::Ready | Phase::WaitAck { .. } | Phase::Collect => None,
        }
    }

    /// The version is published.
    ///
    /// # Errors
    /// When it was not asked for.
    pub fn handle_published(&mut self, now_ms: u64) -> Result<(), OutOfOrder> {
        self.expect("published", Phase::Publish)?;
        self.enter(Phase::WaitAck { until_ms: now_ms + self.config.ack_timeout_ms });
        Ok(())
    }

    /// Groups are open.
    ///
    /// # Errors
    /// When they were not asked for.
    pub fn handle_opened(&mut self) -> Result<(), OutOfOrder> {
        self.expect("opened", Phase::Lease)?;
        self.enter(Phase::Collect);
        Ok(())
    }

    /// The learner is done with the groups.
    ///
    /// # Errors
    /// When it had none.
    pub fn handle_trained(&mut self) -> Result<(), OutOfOrder> {
        self.expect("trained", Phase::Train)?;
        self.enter(Phase::Commit);
        Ok(())
    }

    /// The step is on disk: the next version is ready.
    ///
    /// # Errors
    /// When nothing was to be committed.
    pub fn handle_committed(&mut self) -> Result<(), OutOfOrder> {
        self.expect("committed", Phase::Commit)?;
        self.version.0 += 1;
        self.step += 1;
        self.enter(Phase::Ready);
        Ok(())
    }

    fn expect(&self, input: &'static str, phase: Phase) -> Result<(), OutOfOrder> {
        if self.phase == phase { Ok(()) } else { Err(OutOfOrder { input, phase: self.phase }) }
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sync() -> SequentialSync {
        let config = SequentialConfig { groups_per_step: 4, min_workers: 2, ack_timeout_ms: 100 };
        SequentialSync::new(config, PolicyVersion(3), 3)
    }

    fn waiting() -> SequentialSync {
        let mut sync = sync();
        assert_eq!(sync.poll(0, &View::default()), Some(Action::Publish(PolicyVersion(3))));
        let again = sync.poll(0, &View::default());
        assert_eq!(again, Some(Action::Publish(PolicyVersion(3))), "until it is reported");
        sync.handle_published(10).unwrap();
        sync
    }

    #[test]
    fn one_round_goes_through_every_phase_in_order() {
        let mut sync = waiting();
        let view = View { workers: 3, up_to_date: 3, ..View::default() };
        assert_eq!(sync.poll(11, &view), Some(Action::OpenGroups { up_to: 4 }));
        sync.handle_opened().unwrap();
        assert_eq!(sync.poll(12, &View { open_groups: 4, ready_groups: 3, ..view }), None);
        let done = View { open_groups: 4, ready_groups: 4, ..view };
        assert_eq!(sync.poll(13, &done), Some(Action::Train { step: 3, groups: 4 }));
        sync.handle_trained().unwrap();
        assert_eq!(sync.poll(14, &done), Some(Action::Commit { step: 3 }));
        sync.handle_committed().unwrap();
        assert_eq!(sync.poll(15, &view), Some(Action::Publish(PolicyVersion(4))));
    }

    #[test]
    fn a_late_worker_is_left_out_but_too_few_are_waited_for() {
        let mut sync = waiting();
        let late = View { workers: 3, up_to_date: 2, ..View::default() };
        assert_eq!(sync.poll(109, &late), None);
        let few = View { up_to_date: 1, ..late };
        assert_eq!(sync.poll(1000, &few), None);
        assert_eq!(sync.poll(1001, &late), Some(Action::OpenGroups { up_to: 4 }));
    }

    #[test]
    fn groups_that_were_given_up_are_replaced() {
        let mut sync = waiting();
        let view = View { workers: 2, up_to_date: 2, ..View::default() };
        sync.poll(11, &view);
        sync.handle_opened().unwrap();
        let three = View { open_groups: 3, ready_groups: 3, ..view };
        assert_eq!(sync.poll(12, &three), Some(Action::OpenGroups { up_to: 4 }));
        sync.handle_opened().unwrap();
        assert_eq!(sync.poll(13, &View { open_groups: 4, ..three }), None);
    }

    #[test]
    fn reports_out_of_order_are_refused_and_change_nothing() {
        let mut sync = waiting();
        let before = sync.clone();
        assert!(sync.handle_opened().is_err() && sync.handle_trained().is_err());
        assert!(sync.handle_committed().is_err() && sync.handle_published(0).is_err());
        assert_eq!(sync, before);
    }
}
