//! A run that is killed before any of its writes, and again soon after, against one that is left alone: the same weights,
//! moments, books and published versions, bit for bit, in both modes, with dynamic sampling and without.
//!
//! The schedule depends only on what was written down, so that both runs see the same events. Workers are other machines:
//! they keep what they have in hand, and the versions that they were given.

use std::collections::BTreeMap;

use echo_rollout::asynchronous::AsyncCoordinator;
use echo_rollout::dispatcher::{Command, Outcome};
use echo_rollout::environment::Reward;
use echo_rollout::rollout::{Finish, Sample, Step};
use echo_rollout::staleness::StalenessBound;
use echo_rollout::sync::{Action, SequentialConfig, SequentialSync, View};
use echo_rollout::wire::{Entry, decode_entry, encode_entry};
use echo_rollout::{DispatchConfig, Dispatcher, DropReason, GroupId, Lease, Trajectory};
use swarm_wire::PeerId;

use super::*;
use crate::data::LineDraws;
use crate::policy::{read_parameters, values};
use crate::run::{Mode, RunConfig};
use crate::step::tests::Bigram;
use crate::trainer::Group;
use crate::trainer::tests::config;

const WORKERS: u64 = 3;
/// Samples that are leased while a step of the asynchronous mode trains, beyond those that it needs.
const MEANWHILE: u64 = 3;

/// How rollouts and training alternate, and whether groups of equal rewards are replaced.
type Kind = (Mode, bool);

/// The learner's process has ended.
#[derive(Debug)]
struct Killed;

/// What survives it. Every write is made in one piece or not at all.
#[derive(Debug, Default)]
struct Disk {
    journal: Vec<Vec<u8>>,
    checkpoint: Option<(Vec<u8>, Vec<u8>)>,
    writes: usize,
    /// The process ends instead of this write.
    kill_at: Option<usize>,
}

impl Disk {
    fn write(&mut self, change: impl FnOnce(&mut Self)) -> Result<(), Killed> {
        if self.kill_at.take_if(|at| *at == self.writes).is_some() {
            return Err(Killed);
        }
        self.writes += 1;
        change(self);
        Ok(())
    }
}

/// The other machines.
#[derive(Debug, Default)]
struct Swarm {
    published: BTreeMap<PolicyVersion, Bigram>,
    in_hand: Vec<Trajectory>,
}

fn worker(i: u64) -> PeerId {
    PeerId::from_ed25519(&[i as u8 + 1; 32])
}

impl Swarm {
    /// One token after a prompt of one token, under the lease's own seed; token 2 is right.
    fn make(&self, lease: Lease, worker: PeerId) -> Trajectory {
        let policy = &self.published[&lease.version];
        let prompt = (lease.task_seed % 2) as u32;
        let logprob = |t: u32| values(policy.token_logprobs(&[prompt, t], &[0, 2]).unwrap().into_data())[0];
        let mut left = LineDraws::new(lease.sampling.seed, 0, 0).uniform() as f32;
        let drawn = (0..3).find(|t| {
            left -= logprob(*t).exp();
            left < 0.0
        });
        let token = drawn.unwrap_or(3);
        let step = Step { token, logprob: logprob(token), version: lease.version, trainable: true };
        Trajectory::new(Sample {
            lease,
            worker,
            environment: "toy".to_owned(),
            prompt: vec![prompt],
            steps: vec![step],
            finish: Finish::Length,
            reward: Reward::new(f32::from(u8::from(token == 2)), Vec::new(), &(0.0..=1.0)).unwrap(),
            commitment: Default::default(),
        })
        .unwrap()
    }
}

struct Learner {
    run: RunConfig,
    disk: Disk,
    dispatcher: Dispatcher,
    trainer: Trainer<Bigram>,
}

impl Learner {
    /// What is on `disk`, as a process finds it that starts.
    fn open((mode, dynamic_sampling): Kind, disk: Disk) -> Self {
        let (max_staleness, publish_every) = if mode == Mode::Async { (3, 2) } else { (0, 1) };
        // Few enough that some step is made with what there is.
        let max_flat_groups = 2;
        let trainer = TrainerConfig {
            steps: 5,
            group_size: 2,
            max_staleness,
            dynamic_sampling,
            max_flat_groups,
            ..config()
        };
        let run = RunConfig { mode, publish_every, trainer, ..RunConfig::default() };
        let dispatch = DispatchConfig { lease_ttl_ms: u32::MAX, ..run.dispatch(0) };
        assert_eq!(dispatch.staleness, StalenessBound(max_staleness));
        let mut dispatcher = Dispatcher::new(dispatch).unwrap();
        for entry in &disk.journal {
            let Entry::Command(now_ms, command) = decode_entry(entry).unwrap() else { panic!("a command") };
            dispatcher.handle(now_ms, command);
        }
        let trainer = match &disk.checkpoint {
            None => Trainer::new(Bigram::new(4), run.trainer.clone()).unwrap(),
            Some((manifest, payload)) => {
                let manifest = serde_json::from_slice(manifest).unwrap();
                let checkpoint = TrainerCheckpoint::decode(manifest, payload.clone()).unwrap();
                Trainer::resume(Bigram::new(4), &checkpoint, run.run(), "base").unwrap()
            }
        };
        let ahead = trainer.version().0 - dispatcher.steps();
        assert!(ahead <= 1, "the checkpoint is written before the commit");
        Self { run, disk, dispatcher, trainer }
    }

    fn leased(&self) -> u64 {
        self.dispatcher.counts().leased
    }

    fn handle(&mut self, command: Command) -> Result<Outcome, Killed> {
        let now_ms = self.leased();
        self.disk.write(|disk| disk.journal.push(encode_entry(now_ms, &command)))?;
        let outcome = self.dispatcher.handle(now_ms, command);
        self.dispatcher.check_invariants().unwrap();
        Ok(outcome)
    }

    fn take(&mut self, step: u64, groups: u32) -> Result<Vec<echo_rollout::Group>, Killed> {
        let Outcome::Groups(groups) = self.handle(Command::Take { step, groups })? else { panic!("groups") };
        Ok(groups)
    }

    /// Whether dynamic sampling wants others for `step` than these.
    fn gave_back(&mut self, step: u64, groups: &[echo_rollout::Group]) -> Result<bool, Killed> {
        let batch: Vec<Group> = groups.iter().map(Group::from).collect();
        let flat = self.trainer.flat(&batch, self.dispatcher.flat_groups());
        if flat.is_empty() {
            return Ok(false);
        }
        let flat = flat.into_iter().map(GroupId).collect();
        self.handle(Command::GiveBack { step, flat }).map(|_| true)
    }

    fn learn(&mut self, groups: &[echo_rollout::Group]) -> Result<(), Killed> {
        for group in groups {
            self.trainer.add_group(Group::from(group)).unwrap();
        }
        self.trainer.train_step().unwrap();
        let checkpoint = self.trainer.checkpoint(self.run.run(), "base").unwrap();
        let manifest = checkpoint.manifest_json().unwrap();
        self.disk.write(|disk| disk.checkpoint = Some((manifest, checkpoint.payload)))
    }

    fn publish(&mut self, swarm: &mut Swarm, version: PolicyVersion) -> Result<(), Killed> {
        let weights = self.trainer.policy().clone();
        if version == self.trainer.version() {
            let before = swarm.published.insert(version, weights);
            let same = before.is_none_or(|b| read_parameters(&b) == read_parameters(self.trainer.policy()));
            assert!(same, "{version} was published with other weights");
        }
        self.handle(Command::SetVersion(version)).map(|_| ())
    }

    /// One thing that a worker does; false when there is nothing to do. Workers take up a version at different times.
    fn work(&mut self, swarm: &mut Swarm) -> Result<bool, Killed> {
        let (leased, newest) = (self.leased(), self.dispatcher.version());
        // Every fifth takes longer, so that a group may be complete after later ones.
        let made = |t: &Trajectory| !t.id().0.is_multiple_of(5) || leased > t.id().0 + 5;
        if let Some(at) = swarm.in_hand.iter().position(made) {
            return self.submit(swarm, at).map(|()| true);
        }
        for late in [false, true] {
            for i in (0..WORKERS).map(|i| (leased + i) % WORKERS) {
                let id = worker(i);
                if !self.dispatcher.is_registered(&id) {
                    self.handle(Command::Register { worker: id.clone(), incarnation: 1 })?;
                }
                let active = self.dispatcher.active_version(&id);
                let takes_up =
                    active.is_none() || late || leased % 4 == i || self.run.mode == Mode::Sequential;
                if takes_up && active != Some(newest) {
                    self.handle(Command::Acknowledge { worker: id.clone(), version: newest })?;
                }
                if self.dispatcher.can_lease(leased, &id) {
                    let got = self.handle(Command::Lease { worker: id.clone(), max: 1 })?;
                    let Outcome::Leased(leases) = got else { panic!("{got:?}") };
                    swarm.in_hand.push(swarm.make(leases[0], id));
                    return Ok(true);
                }
            }
        }
        if swarm.in_hand.is_empty() {
            return Ok(false);
        }
        self.submit(swarm, 0).map(|()| true)
    }

    fn submit(&mut self, swarm: &mut Swarm, at: usize) -> Result<(), Killed> {
        let answer = self.handle(Command::Submit { trajectory: swarm.in_hand[at].clone() })?;
        assert!(matches!(answer, Outcome::Submitted(_)));
        swarm.in_hand.remove(at);
        Ok(())
    }

    /// Until all steps are made.
    fn run(&mut self, swarm: &mut Swarm) -> Result<(), Killed> {
        if !self.disk.journal.is_empty() {
            let steps = self.trainer.version().0;
            self.handle(Command::Recover { steps })?;
        }
        match self.run.mode {
            Mode::Sequential => self.alternate(swarm),
            Mode::Async => self.overlap(swarm),
        }
    }

    fn alternate(&mut self, swarm: &mut Swarm) -> Result<(), Killed> {
        let round = SequentialConfig { groups_per_step: 2, min_workers: 1, ack_timeout_ms: 0 };
        let version = self.trainer.version();
        let mut sync = SequentialSync::new(round, version, version.0);
        while self.dispatcher.steps() < self.run.trainer.steps {
            match sync.poll(self.leased(), &View::of(&self.dispatcher)) {
                Some(Action::Publish(version)) => {
                    self.publish(swarm, version)?;
                    sync.handle_published(self.leased()).unwrap();
                    for i in 0..WORKERS {
                        self.handle(Command::Register { worker: worker(i), incarnation: 1 })?;
                        self.handle(Command::Acknowledge { worker: worker(i), version })?;
                    }
                }
                Some(Action::OpenGroups { up_to }) => {
                    self.handle(Command::OpenGroups { up_to })?;
                    sync.handle_opened().unwrap();
                }
                Some(Action::Train { step, groups }) => {
                    let batch = self.take(step, groups)?;
                    if !self.gave_back(step, &batch)? {
                        self.learn(&batch)?;
                        sync.handle_trained().unwrap();
                    }
                }
                Some(Action::Commit { step }) => {
                    self.handle(Command::Commit { step })?;
                    sync.handle_committed().unwrap();
                }
                None => assert!(self.work(swarm)?, "it stands still"),
            }
        }
        Ok(())
    }

    fn overlap(&mut self, swarm: &mut Swarm) -> Result<(), Killed> {
        let (config, step) = (self.run.asynchronous(), self.trainer.version().0);
        let asked_open = self.dispatcher.asked_open();
        let published = (asked_open > 0).then(|| self.dispatcher.version());
        let mut c = AsyncCoordinator::new(config, step, 0).unwrap().resumed(published, asked_open);
        let mut batch = Vec::new();
        loop {
            while let Some(action) = c.poll(&View::of(&self.dispatcher)) {
                match action {
                    Action::OpenGroups { up_to } => _ = self.handle(Command::OpenGroups { up_to })?,
                    Action::Train { step, groups } => {
                        let taken = self.take(step, groups)?;
                        if !self.gave_back(step, &taken)? {
                            batch = taken;
                            c.handle_training(0, 0).unwrap();
                        }
                    }
                    Action::Commit { step } => {
                        self.handle(Command::Commit { step })?;
                        c.handle_committed(0).unwrap();
                    }
                    Action::Publish(version) => {
                        c.handle_publishing(version).unwrap();
                        self.publish(swarm, version)?;
                        c.handle_published().unwrap();
                    }
                }
            }
            if c.is_done() {
                return Ok(());
            }
            let trained_at = (c.step() + 1) * 4 + MEANWHILE;
            if !batch.is_empty() && (self.leased() >= trained_at || !self.work(swarm)?) {
                self.learn(&std::mem::take(&mut batch))?;
                c.handle_trained(0).unwrap();
            } else if batch.is_empty() {
                assert!(self.work(swarm)?, "it stands still");
            }
        }
    }
}

/// The run to its end, through a process that is killed before each of these writes, counted from its start.
fn finished(kind: Kind, kills: &[usize]) -> (Learner, Swarm) {
    let (mut disk, mut swarm, mut kills) = (Disk::default(), Swarm::default(), kills.iter());
    loop {
        disk.kill_at = kills.next().map(|after| disk.writes + after);
        let mut learner = Learner::open(kind, disk);
        if learner.run(&mut swarm).is_ok() {
            // One that was killed near the end has not heard all workers since; they ask once more, and hear that it is over.
            for i in 0..WORKERS {
                let asks = Command::Register { worker: worker(i), incarnation: 1 };
                learner.dispatcher.handle(learner.leased(), asks);
            }
            return (learner, swarm);
        }
        disk = learner.disk;
    }
}

#[test]
fn a_run_killed_before_any_write_ends_as_the_one_that_was_left_alone() {
    let kinds = [Mode::Sequential, Mode::Async].map(|mode| [(mode, false), (mode, true)]);
    for kind @ (mode, dynamic_sampling) in kinds.into_iter().flatten() {
        let (whole, given) = finished(kind, &[]);
        let counts = whole.dispatcher.counts();
        assert_eq!((counts.consumed, counts.open), (5 * 4, 0), "{kind:?}: {counts:?}");
        assert_eq!(counts.dropped_for(DropReason::Flat) > 0, dynamic_sampling, "{kind:?}: {counts:?}");
        assert_eq!(counts.staleness_max > 0, mode == Mode::Async, "{counts:?}");
        assert!(whole.disk.writes > 50, "{}", whole.disk.writes);
        for at in 0..whole.disk.writes {
            let (killed, taken) = finished(kind, &[at, at * 7 % 11]);
            let again = killed.disk.journal.iter().map(|entry| decode_entry(entry).unwrap());
            let again = again.filter(|e| matches!(e, Entry::Command(_, Command::Recover { .. }))).count();
            assert!((1..=2).contains(&again) || at == 0, "{kind:?}, {at}: it was not killed");
            assert_eq!(killed.disk.checkpoint, whole.disk.checkpoint, "{kind:?}, killed before write {at}");
            assert_eq!(killed.dispatcher, whole.dispatcher, "{kind:?}, killed before write {at}");
            let versions = |swarm: &Swarm| swarm.published.keys().copied().collect::<Vec<_>>();
            assert_eq!(versions(&taken), versions(&given), "{kind:?}, killed before write {at}");
        }
    }
}
