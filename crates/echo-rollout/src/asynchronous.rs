//! The asynchronous mode as a state machine: rollouts are leased and taken in while the learner learns and a version is
//! published.
//!
//! Four loops go on side by side: *lease* keeps enough groups open, *ingest* takes trajectories in (the dispatcher does), *learn*
//! trains whenever a batch is ready, *publish* sends versions out. Use: `poll` until it says nothing, do what it says, report
//! with a `handle_*`. An action is given out until it is reported; every action can be repeated.
//!
//! How old a trained token may be is promised by [`crate::dispatcher`], whatever happens here. This machine chooses how far
//! rollouts run ahead of the learner within that budget: the least at which the learner need not wait. If it waited though
//! everything that was open was already in the making, one more batch is opened; if a whole spare batch was waiting at the
//! start of several steps in a row, one fewer. A batch that always waits makes its rollouts older and nothing faster.

use swarm_wire::PolicyVersion;

use crate::staleness::StalenessBound;
use crate::sync::{Action, View};

/// Share of a step's time that the learner may wait before more rollouts are opened.
const IDLE_SHARE: u64 = 20;
/// Steps in a row with a spare batch before fewer are opened; doubled each time that this was wrong, up to a limit.
const SPARE_STEPS: u32 = 3;
const MAX_SPARE_STEPS: u32 = 48;

/// How an asynchronous run goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AsyncConfig {
    /// Groups trained on per step.
    pub groups_per_step: u32,
    /// The staleness budget.
    pub budget: StalenessBound,
    /// A version is published after so many steps.
    pub publish_every: u64,
    /// Steps of the run.
    pub steps: u64,
}

/// Settings with which a run could not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Impossible {
    /// No batch.
    #[error("groups_per_step is 0: a step trains on at least one group")]
    NoGroups,
    /// Nobody can sample while the learner learns.
    #[error(
        "a staleness budget of 0 lets nobody sample while the learner learns; allow at least 1, or use the sequential mode"
    )]
    NoOverlap,
    /// Workers would wait for a version that is only published after steps that wait for workers.
    #[error(
        "publish_every is {publish_every} but must be 1 to {most} with a staleness budget of {budget}: rollouts of the version before would be too old and the run would stand still"
    )]
    Deadlock {
        /// Steps per published version.
        publish_every: u64,
        /// The budget.
        budget: u64,
        /// One more than the budget.
        most: u64,
    },
}

impl AsyncConfig {
    /// Checks that the run can go on.
    ///
    /// # Errors
    /// Why it could not.
    pub fn validate(&self) -> Result<(), Impossible> {
        let (publish_every, budget) = (self.publish_every, self.budget.0);
        let most = budget.saturating_add(1);
        if self.groups_per_step == 0 {
            return Err(Impossible::NoGroups);
        }
        if budget == 0 {
            return Err(Impossible::NoOverlap);
        }
        if publish_every == 0 || publish_every > most {
            return Err(Impossible::Deadlock { publish_every, budget, most });
        }
        Ok(())
    }
}

/// A report that does not fit: a bug of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{input} was reported but the learner is at {learner:?}, the publisher at {publishing:?}")]
pub struct NotAsked {
    /// What was reported.
    pub input: &'static str,
    /// Where the learner is.
    pub learner: Learner,
    /// What is being published.
    pub publishing: Option<PolicyVersion>,
}

/// What the learner is doing, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learner {
    /// It waits for a batch.
    Waits {
        /// Since.
        since_ms: u64,
    },
    /// It has a batch.
    Trains {
        /// Since.
        since_ms: u64,
    },
    /// The batch is in the checkpoint.
    Trained,
}

/// The state machine of the asynchronous mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AsyncCoordinator {
    config: AsyncConfig,
    /// The step that comes next, or that is being made.
    step: u64,
    learner: Learner,
    /// The newest version that is out; `None` before the first.
    published: Option<PolicyVersion>,
    publishing: Option<PolicyVersion>,
    /// Batches that are open beyond the one in training.
    ahead: u64,
    /// Whether everything open was in the making while the learner waited for the present batch.
    starved: bool,
    /// Steps in a row that began with a spare batch.
    spare: u32,
    /// How many of these it takes to open one fewer.
    patience: u32,
    waited_ms: u64,
    trained_ms: u64,
    /// Steps that took `trained_ms`.
    trained_steps: u64,
}

impl AsyncCoordinator {
    /// Starts before `step`, whose weights are still to be published.
    ///
    /// # Errors
    /// Settings with which the run could not go on.
    pub fn new(config: AsyncConfig, step: u64, now_ms: u64) -> Result<Self, Impossible> {
        config.validate()?;
        Ok(Self {
            config,
            step,
            learner: Learner::Waits { since_ms: now_ms },
            published: None,
            publishing: None,
            ahead: config.publish_every - 1,
            starved: false,
            spare: 0,
            patience: SPARE_STEPS,
            waited_ms: 0,
            trained_ms: 0,
            trained_steps: 0,
        })
    }

    /// Goes on where a run was stopped that had published `published` and had last asked for `open` groups.
    #[must_use]
    pub fn resumed(mut self, published: Option<PolicyVersion>, open: u32) -> Self {
        let batches = u64::from(open / self.config.groups_per_step);
        self.ahead = batches.saturating_sub(1).clamp(self.config.publish_every - 1, self.config.budget.0);
        self.published = published;
        self
    }

    /// What the learner is doing.
    pub fn learner(&self) -> Learner {
        self.learner
    }

    /// The step that comes next, or that is being made.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Batches that are open beyond the one in training: the budget that is in use.
    pub fn ahead(&self) -> u64 {
        self.ahead
    }

    /// Share of the time until now in which the learner trained, from the first batch on.
    pub fn utilisation(&self) -> f64 {
        self.trained_ms as f64 / ((self.trained_ms + self.waited_ms) as f64).max(1.0)
    }

    /// Begins no further step.
    pub fn stop(&mut self) {
        let begun = u64::from(!matches!(self.learner, Learner::Waits { .. }));
        self.config.steps = self.config.steps.min(self.step + begun);
    }

    /// Whether all steps are made.
    pub fn is_done(&self) -> bool {
        self.step >= self.config.steps
    }

    /// What to do now; `None` while others have to act.
    pub fn poll(&mut self, view: &View) -> Option<Action> {
        let batch = self.config.groups_per_step;
        if let Learner::Trained = self.learner {
            return Some(Action::Commit { step: self.step });
        }
        // Step n trains version n and makes version n + 1, so `step` counts the versions that exist.
        let due = self.published.map_or(0, |v| v.0 + self.config.publish_every);
        if self.publishing.is_none() && !self.is_done() && self.step >= due {
            return Some(Action::Publish(PolicyVersion(self.step)));
        }
        let left = self.config.steps.saturating_sub(self.step);
        let batches = u32::try_from((self.ahead + 1).min(left)).unwrap_or(u32::MAX);
        let up_to = batches.saturating_mul(batch);
        if view.open_groups < up_to as usize {
            return Some(Action::OpenGroups { up_to });
        }
        if let Learner::Waits { .. } = self.learner
            && !self.is_done()
        {
            if view.ready_groups >= batch as usize {
                return Some(Action::Train { step: self.step, groups: batch });
            }
            self.starved |= view.pending == 0;
        }
        None
    }

    /// The learner has its batch; `ready` groups are left.
    ///
    /// # Errors
    /// When it was not waiting for one.
    pub fn handle_training(&mut self, now_ms: u64, ready: usize) -> Result<(), NotAsked> {
        let Learner::Waits { since_ms } = self.learner else { return Err(self.not_asked("a batch")) };
        let waited_ms = now_ms.saturating_sub(since_ms);
        // The first batch is waited for whatever is open.
        if self.trained_ms > 0 {
            self.waited_ms += waited_ms;
            self.adapt(waited_ms, ready);
        }
        self.starved = false;
        self.learner = Learner::Trains { since_ms: now_ms };
        Ok(())
    }

    /// The batch is in the checkpoint.
    ///
    /// # Errors
    /// When there was none.
    pub fn handle_trained(&mut self, now_ms: u64) -> Result<(), NotAsked> {
        let Learner::Trains { since_ms } = self.learner else { return Err(self.not_asked("a step")) };
        self.trained_ms += now_ms.saturating_sub(since_ms);
        self.trained_steps += 1;
        self.learner = Learner::Trained;
        Ok(())
    }

    /// The step is committed.
    ///
    /// # Errors
    /// When nothing was to be committed.
    pub fn handle_committed(&mut self, now_ms: u64) -> Result<(), NotAsked> {
        let Learner::Trained = self.learner else { return Err(self.not_asked("a commit")) };
        self.step += 1;
        self.learner = Learner::Waits { since_ms: now_ms };
        Ok(())
    }

    /// A version is on its way out.
    ///
    /// # Errors
    /// When another one is.
    pub fn handle_publishing(&mut self, version: PolicyVersion) -> Result<(), NotAsked> {
        if self.publishing.is_some() || version.0 > self.step {
            return Err(self.not_asked("publishing"));
        }
        self.publishing = Some(version);
        Ok(())
    }

    /// The version is out.
    ///
    /// # Errors
    /// When none was on its way.
    pub fn handle_published(&mut self) -> Result<(), NotAsked> {
        let Some(version) = self.publishing.take() else { return Err(self.not_asked("a version")) };
        self.published = Some(version);
        Ok(())
    }

    /// One batch more or fewer, by what was seen before this step.
    fn adapt(&mut self, waited_ms: u64, ready: usize) {
        let step_ms = self.trained_ms / self.trained_steps.max(1);
        let waited = waited_ms.saturating_mul(IDLE_SHARE) > step_ms.max(1);
        let spare = !waited && ready >= self.config.groups_per_step as usize;
        self.spare = if spare { self.spare + 1 } else { 0 };
        if waited && self.starved && self.ahead < self.config.budget.0 {
            self.ahead += 1;
        } else if self.spare >= self.patience && self.ahead >= self.config.publish_every {
            self.ahead -= 1;
            self.spare = 0;
            self.patience = (self.patience * 2).min(MAX_SPARE_STEPS);
        }
    }

    fn not_asked(&self, input: &'static str) -> NotAsked {
        NotAsked { input, learner: self.learner, publishing: self.publishing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AsyncConfig {
        AsyncConfig { groups_per_step: 4, budget: StalenessBound(3), publish_every: 1, steps: 100 }
    }

    fn coordinator() -> AsyncCoordinator {
        let mut c = AsyncCoordinator::new(config(), 0, 0).unwrap();
        assert_eq!(c.poll(&View::default()), Some(Action::Publish(PolicyVersion(0))));
        c.handle_publishing(PolicyVersion(0)).unwrap();
        c.handle_published().unwrap();
        c
    }

    /// One step that was waited for, with what was pending meanwhile and what was ready after its batch was taken.
    fn step(c: &mut AsyncCoordinator, now_ms: &mut u64, waited_ms: u64, pending: usize, ready: usize) {
        let open = View { open_groups: 400, pending, ..View::default() };
        while let Some(Action::Publish(version)) = c.poll(&open) {
            c.handle_publishing(version).unwrap();
            c.handle_published().unwrap();
        }
        *now_ms += waited_ms;
        let full = View { ready_groups: 4, ..open };
        assert_eq!(c.poll(&full), Some(Action::Train { step: c.step(), groups: 4 }));
        c.handle_training(*now_ms, ready).unwrap();
        *now_ms += 100;
        c.handle_trained(*now_ms).unwrap();
        assert_eq!(c.poll(&full), Some(Action::Commit { step: c.step() }));
        c.handle_committed(*now_ms).unwrap();
    }

    #[test]
    fn impossible_settings_are_refused_with_the_reason() {
        let refused = |c: AsyncConfig| AsyncCoordinator::new(c, 0, 0).unwrap_err();
        assert_eq!(refused(AsyncConfig { budget: StalenessBound(0), ..config() }), Impossible::NoOverlap);
        let dead = refused(AsyncConfig { publish_every: 5, ..config() });
        assert_eq!(dead, Impossible::Deadlock { publish_every: 5, budget: 3, most: 4 });
        assert!(dead.to_string().contains("stand still"));
        assert_eq!(refused(AsyncConfig { groups_per_step: 0, ..config() }), Impossible::NoGroups);
        AsyncCoordinator::new(AsyncConfig { publish_every: 4, ..config() }, 0, 0).unwrap();
    }

    #[test]
    fn loops_go_on_side_by_side() {
        let mut c = coordinator();
        assert_eq!(c.poll(&View::default()), Some(Action::OpenGroups { up_to: 4 }));
        let ready = View { open_groups: 4, ready_groups: 4, ..View::default() };
        assert_eq!(c.poll(&ready), Some(Action::Train { step: 0, groups: 4 }));
        c.handle_training(10, 0).unwrap();
        c.ahead = 1;
        // While it trains, more is opened.
        assert_eq!(c.poll(&ready), Some(Action::OpenGroups { up_to: 8 }));
        let open = View { open_groups: 8, ready_groups: 4, ..View::default() };
        assert_eq!(c.poll(&open), None, "one batch at a time");
        c.handle_trained(20).unwrap();
        c.handle_committed(20).unwrap();
        assert_eq!(c.poll(&open), Some(Action::Publish(PolicyVersion(1))));
        c.handle_publishing(PolicyVersion(1)).unwrap();
        assert_eq!(c.poll(&open), Some(Action::Train { step: 1, groups: 4 }), "while a version goes out");
    }

    #[test]
    fn the_least_that_keeps_the_learner_busy_is_open() {
        let (mut c, mut now) = (coordinator(), 0);
        step(&mut c, &mut now, 500, 0, 0);
        assert_eq!(c.ahead(), 0, "the first batch is always waited for");
        step(&mut c, &mut now, 50, 3, 0);
        assert_eq!(c.ahead(), 0, "workers could not keep up: more would not help");
        (0..5).for_each(|_| step(&mut c, &mut now, 50, 0, 0));
        assert_eq!(c.ahead(), 3, "the budget is the limit");
        (0..2).for_each(|_| step(&mut c, &mut now, 0, 0, 4));
        assert_eq!(c.ahead(), 3);
        step(&mut c, &mut now, 0, 0, 4);
        assert_eq!(c.ahead(), 2, "a spare batch waited at the start of three steps");
        step(&mut c, &mut now, 50, 0, 0);
        assert_eq!(c.ahead(), 3, "that was one too few");
        (0..5).for_each(|_| step(&mut c, &mut now, 0, 0, 4));
        assert_eq!(c.ahead(), 3, "more patient than before");
        step(&mut c, &mut now, 0, 0, 4);
        assert_eq!(c.ahead(), 2);
        assert!((c.utilisation() - 1400.0 / 1750.0).abs() < 0.1, "{}", c.utilisation());
    }

    #[test]
    fn a_resumed_run_is_as_far_ahead_and_judges_waits_by_its_own_steps() {
        let (published, mut now) = (Some(PolicyVersion(1000)), 0);
        let start = AsyncCoordinator::new(AsyncConfig { steps: 2000, ..config() }, 1000, 0).unwrap();
        let mut c = start.resumed(published, 12);
        let view = View { open_groups: 12, pending: 4, ..View::default() };
        assert_eq!((c.ahead(), c.poll(&view)), (2, None), "what is out is not published again");
        step(&mut c, &mut now, 500, 0, 0);
        (0..9).for_each(|_| step(&mut c, &mut now, 2, 0, 0));
        assert_eq!(c.ahead(), 2, "2 ms are nothing beside steps of 100 ms, however many were made before");
        step(&mut c, &mut now, 50, 0, 0);
        assert_eq!(c.ahead(), 3);
        let config = AsyncConfig { publish_every: 2, ..config() };
        let ahead = |open| AsyncCoordinator::new(config, 0, 0).unwrap().resumed(None, open).ahead();
        assert_eq!([0, 8, 400].map(ahead), [1, 1, 3], "within what the settings allow");
    }

    #[test]
    fn nothing_is_opened_that_no_step_will_train_on() {
        let mut c = AsyncCoordinator::new(AsyncConfig { steps: 2, ..config() }, 0, 0).unwrap();
        c.handle_publishing(PolicyVersion(0)).unwrap();
        c.handle_published().unwrap();
        c.ahead = 3;
        assert_eq!(c.poll(&View::default()), Some(Action::OpenGroups { up_to: 8 }));
        c.handle_training(0, 0).unwrap();
        c.stop();
        assert!(!c.is_done(), "what was begun is made");
        c.handle_trained(1).unwrap();
        c.handle_committed(1).unwrap();
        assert!(c.is_done());
        assert_eq!(c.poll(&View { ready_groups: 8, ..View::default() }), None);
    }

    #[test]
    fn reports_that_nobody_asked_for_change_nothing() {
        let mut c = coordinator();
        let before = c.clone();
        assert!(
            c.handle_trained(1).is_err() && c.handle_committed(1).is_err() && c.handle_published().is_err()
        );
        assert!(c.handle_publishing(PolicyVersion(7)).is_err());
        assert_eq!(c, before);
    }
}
