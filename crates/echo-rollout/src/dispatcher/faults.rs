//! The dispatcher, alone and under the asynchronous coordinator, against crashes, lost and repeated messages, late and corrupt answers and cheaters, in virtual time.
//!
//! The learner keeps its own set of what it trained on, as a checkpoint would; exactly once is judged from that set and
//! not from the dispatcher's counters.

use std::collections::{BTreeMap, BTreeSet};

use swarm_sim::{Context, Fault, LinkConfig, Node, NodeId, Seed, World};
use swarm_wire::{PeerId, PolicyVersion};

use super::tests::config;
use super::*;
use crate::asynchronous::{AsyncConfig, AsyncCoordinator, Learner};
use crate::lease::Lease;
use crate::rollout::tests::sample;
use crate::staleness::StalenessBound;
use crate::sync::{Action, View};
use crate::wire::{Entry, decode_entry, encode_entry};

const TRAINER: NodeId = NodeId(0);
const GROUPS: u64 = 12;
/// How long a step of the asynchronous learner takes.
const TRAIN_MS: u64 = 40;

#[derive(Debug, Clone)]
enum Message {
    Register { incarnation: u64 },
    Registered,
    Ask { active: PolicyVersion },
    Leases { leases: Vec<Lease>, version: PolicyVersion },
    Submit { trajectory: Box<Trajectory> },
    GiveBack { lease: LeaseId },
    Answer { lease: LeaseId },
}

/// What survives a crash of the trainer: the journal and the checkpoint.
#[derive(Default)]
struct Disk {
    journal: Vec<Vec<u8>>,
    steps: u64,
    trained: BTreeMap<LeaseId, (GroupId, u32)>,
    lies_trained: u64,
}

struct Trainer {
    config: DispatchConfig,
    disk: Disk,
    dispatcher: Dispatcher,
    peers: BTreeMap<NodeId, PeerId>,
    batch: Vec<Group>,
    /// `None` in the sequential mode.
    coordinator: Option<AsyncCoordinator>,
    /// The version that is being published.
    sending: Option<PolicyVersion>,
}

/// Six steps of two groups.
fn async_config(budget: StalenessBound) -> AsyncConfig {
    AsyncConfig { groups_per_step: 2, budget, publish_every: 1, steps: 6 }
}

impl Trainer {
    fn handle(&mut self, now_us: u64, command: Command) -> Outcome {
        let now_ms = now_us / 1000;
        self.disk.journal.push(encode_entry(now_ms, &command));
        let outcome = self.dispatcher.handle(now_ms, command);
        self.dispatcher.check_invariants().unwrap();
        outcome
    }

    fn replay(&self, journal: &[Vec<u8>]) -> Dispatcher {
        let mut dispatcher = Dispatcher::new(self.config.clone()).unwrap();
        for entry in journal {
            let Entry::Command(now_ms, command) = decode_entry(entry).unwrap() else { continue };
            dispatcher.handle(now_ms, command);
        }
        dispatcher
    }

    /// Three groups at a time, until there were enough.
    fn open(&mut self, now_us: u64) {
        if self.dispatcher.next_group < GROUPS {
            self.handle(now_us, Command::OpenGroups { up_to: 3 });
        }
    }

    /// Trains on the batch: the checkpoint is written in one piece.
    fn checkpoint(&mut self) {
        let step = self.disk.steps;
        for group in self.batch.drain(..) {
            assert_eq!(group.trajectories.len(), 3);
            for t in &group.trajectories {
                let place = (group.id, t.lease().sample_index);
                assert!(self.disk.trained.insert(t.id(), place).is_none(), "{} trained twice", t.id());
                self.disk.lies_trained += u64::from(&t.commitment()[..] == b"lie");
                let fresh = |v: PolicyVersion| v.0 <= step && step - v.0 <= self.config.staleness.0;
                assert!(t.steps().iter().all(|s| fresh(s.version)), "{} is too old for step {step}", t.id());
            }
        }
        self.disk.steps = step + 1;
    }

    /// The command that says so may be lost in a crash.
    fn train(&mut self, context: &mut Context<'_, Message>) {
        let now = context.now_us();
        let step = self.disk.steps;
        self.checkpoint();
        self.handle(now, Command::Commit { step });
        self.handle(now, Command::SetVersion(PolicyVersion(step + 1)));
        self.open(now);
    }

    /// The four loops, as far as they get now.
    fn drive(&mut self, context: &mut Context<'_, Message>) {
        let Some(mut coordinator) = self.coordinator.take() else { return };
        let now = context.now_us();
        if let Learner::Trains { since_ms } = coordinator.learner()
            && now / 1000 >= since_ms + TRAIN_MS
        {
            self.checkpoint();
            coordinator.handle_trained(now / 1000).unwrap();
        } else if let Some(version) = self.sending.filter(|_| context.random().chance(0.5)) {
            self.handle(now, Command::SetVersion(version));
            coordinator.handle_published().unwrap();
            self.sending = None;
        }
        while let Some(action) = coordinator.poll(&View::of(&self.dispatcher)) {
            match action {
                Action::OpenGroups { up_to } => _ = self.handle(now, Command::OpenGroups { up_to }),
                Action::Train { step, groups } => {
                    assert_eq!(step, self.disk.steps);
                    if let Outcome::Groups(taken) = self.handle(now, Command::Take { step, groups }) {
                        if taken.is_empty() {
                            break;
                        }
                        // Dynamic sampling finds one that it cannot learn from.
                        if context.random().chance(0.1) {
                            let flat = vec![taken[0].id];
                            self.handle(now, Command::GiveBack { step, flat });
                            continue;
                        }
                        self.batch = taken;
                    }
                    let ready = self.dispatcher.ready_groups().len();
                    coordinator.handle_training(now / 1000, ready).unwrap();
                }
                // A crash may come between the checkpoint and this.
                Action::Commit { .. } if context.random().chance(0.5) => break,
                Action::Commit { step } => {
                    self.handle(now, Command::Commit { step });
                    coordinator.handle_committed(now / 1000).unwrap();
                }
                Action::Publish(version) => {
                    coordinator.handle_publishing(version).unwrap();
                    self.sending = Some(version);
                }
            }
        }
        self.coordinator = Some(coordinator);
    }
}

impl Trainer {
    fn on_start(&mut self, context: &mut Context<'_, Message>) {
        let steps = self.disk.steps;
        if !self.disk.journal.is_empty() {
            self.dispatcher = self.replay(&self.disk.journal);
            self.handle(context.now_us(), Command::Recover { steps });
        }
        if self.coordinator.is_some() {
            let config = async_config(self.config.staleness);
            self.coordinator = Some(AsyncCoordinator::new(config, steps, context.now_us() / 1000).unwrap());
        } else {
            self.handle(context.now_us(), Command::SetVersion(PolicyVersion(steps)));
            self.open(context.now_us());
        }
        context.timer(7000, 0);
    }

    fn on_timer(&mut self, context: &mut Context<'_, Message>) {
        let now = context.now_us();
        let due: Vec<_> =
            self.dispatcher.audits_due().iter().map(|t| (t.id(), t.commitment().clone())).collect();
        for (lease, commitment) in due {
            let verdict = match &commitment[..] {
                b"lie" => AuditOutcome::Fail,
                _ if context.random().chance(0.1) => AuditOutcome::Unproven,
                _ => AuditOutcome::Pass,
            };
            self.handle(now, Command::Verdict { lease, verdict });
        }
        if self.coordinator.is_some() {
            self.drive(context);
        } else if !self.batch.is_empty() {
            self.train(context);
        } else if self.dispatcher.ready_groups().len() == 3 {
            let step = self.disk.steps;
            if let Outcome::Groups(groups) = self.handle(now, Command::Take { step, groups: 3 }) {
                self.batch = groups;
            }
        }
        context.timer(7000, 0);
    }

    fn on_message(&mut self, context: &mut Context<'_, Message>, from: NodeId, message: Message) {
        let now = context.now_us();
        let worker = self.peers[&from].clone();
        match message {
            Message::Register { incarnation } => {
                self.handle(now, Command::Register { worker, incarnation });
                context.send(from, Message::Registered, 10);
            }
            Message::Ask { active } => {
                self.handle(now, Command::Acknowledge { worker: worker.clone(), version: active });
                let outcome = self.handle(now, Command::Lease { worker, max: 2 });
                let leases = if let Outcome::Leased(leases) = outcome { leases } else { Vec::new() };
                let version = self.dispatcher.version();
                context.send(from, Message::Leases { leases, version }, 100);
            }
            Message::Submit { trajectory } => {
                let lease = trajectory.id();
                // The connection says who it is, whatever the message claims.
                assert_eq!(*trajectory.worker(), worker);
                self.handle(now, Command::Submit { trajectory: *trajectory });
                context.send(from, Message::Answer { lease }, 10);
            }
            Message::GiveBack { lease } => {
                _ = self.handle(now, Command::Fail { worker, lease, aborted: true })
            }
            other => panic!("{other:?} at the trainer"),
        }
    }
}

#[derive(Default)]
struct Rollouts {
    peer: Option<PeerId>,
    incarnation: u64,
    active: PolicyVersion,
    unanswered: BTreeMap<LeaseId, Trajectory>,
    lies: bool,
    corrupts: f64,
    /// How often a newer policy breaks a sample off, or goes on with it.
    aborts: f64,
    switches: f64,
}

impl Rollouts {
    fn on_message(&mut self, context: &mut Context<'_, Message>, message: Message) {
        match message {
            Message::Leases { leases, version } => {
                self.active = self.active.max(version);
                for lease in leases {
                    if context.random().chance(self.aborts) {
                        context.send(TRAINER, Message::GiveBack { lease: lease.id }, 10);
                        continue;
                    }
                    let mut made = sample(lease, self.peer.as_ref().unwrap());
                    made.steps.iter_mut().for_each(|s| s.version = lease.version);
                    if context.random().chance(self.switches) {
                        made.steps[1..].iter_mut().for_each(|s| s.version = self.active);
                    }
                    if self.lies {
                        made.commitment = b"lie"[..].into();
                    }
                    if context.random().chance(self.corrupts) {
                        made.lease.task_seed ^= 1;
                    }
                    self.unanswered.insert(lease.id, Trajectory::new(made).unwrap());
                }
            }
            Message::Answer { lease } => {
                self.unanswered.remove(&lease);
            }
            _ => {}
        }
    }

    fn on_timer(&mut self, context: &mut Context<'_, Message>) {
        for trajectory in self.unanswered.values() {
            context.send(TRAINER, Message::Submit { trajectory: Box::new(trajectory.clone()) }, 500);
        }
        context.send(TRAINER, Message::Register { incarnation: self.incarnation }, 10);
        context.send(TRAINER, Message::Ask { active: self.active }, 10);
        // Now and then slower than the lease lives.
        let pause = if context.random().chance(0.1) { 200_000 } else { 15_000 };
        context.timer(pause, 0);
    }
}

enum Role {
    Trainer(Box<Trainer>),
    Worker(Rollouts),
}

impl Node for Role {
    type Message = Message;

    fn on_start(&mut self, context: &mut Context<'_, Message>) {
        match self {
            Self::Trainer(trainer) => trainer.on_start(context),
            Self::Worker(worker) => {
                worker.incarnation += 1;
                context.timer(1000, 0);
            }
        }
    }

    fn on_message(&mut self, context: &mut Context<'_, Message>, from: NodeId, message: Message) {
        match self {
            Self::Trainer(trainer) => trainer.on_message(context, from, message),
            Self::Worker(worker) => worker.on_message(context, message),
        }
    }

    fn on_timer(&mut self, context: &mut Context<'_, Message>, _token: u64) {
        match self {
            Self::Trainer(trainer) => trainer.on_timer(context),
            Self::Worker(worker) => worker.on_timer(context),
        }
    }

    fn on_crash(&mut self) {
        match self {
            // The dispatcher is rebuilt from the journal; a batch in training is lost.
            Self::Trainer(trainer) => {
                trainer.batch.clear();
                trainer.sending = None;
            }
            Self::Worker(worker) => worker.unanswered.clear(),
        }
    }
}

/// Four workers, the last of which lies when `cheater` is set; a random schedule of faults; then peace until the end. With a
/// staleness budget, the coordinator of the asynchronous mode drives the same dispatcher.
fn run(seed: u64, cheater: bool, budget: Option<u64>) -> World<Role> {
    let mut config = config();
    if let Some(budget) = budget {
        (config.staleness, config.groups_per_step) = (StalenessBound(budget), 2);
    }
    let link = LinkConfig {
        latency_us: 2000,
        jitter_us: 3000,
        loss: 0.1,
        duplicate: 0.1,
        reorder: 0.2,
        ..LinkConfig::default()
    };
    let mut world = World::new(seed, link);
    let peer = |i: usize| PeerId::from_ed25519(&[i as u8; 32]);
    let coordinator = budget.map(|b| AsyncCoordinator::new(async_config(StalenessBound(b)), 0, 0).unwrap());
    let trainer = Trainer {
        dispatcher: Dispatcher::new(config.clone()).unwrap(),
        config,
        coordinator,
        sending: None,
        disk: Disk::default(),
        peers: (1..=4).map(|i| (NodeId(i), peer(i))).collect(),
        batch: Vec::new(),
    };
    world.add(Role::Trainer(Box::new(trainer)));
    for i in 1..=4 {
        let lies = cheater && i == 4;
        let corrupts = if i == 3 { 0.3 } else { 0.0 };
        let (aborts, switches) = if budget.is_some() { (0.05, 0.3) } else { (0.0, 0.0) };
        let worker =
            Rollouts { peer: Some(peer(i)), lies, corrupts, aborts, switches, ..Rollouts::default() };
        world.add(Role::Worker(worker));
    }
    let mut faults = Seed(seed).stream("faults", 0);
    for _ in 0..8 {
        let at = faults.below(600_000);
        let victim = NodeId(faults.below(5) as usize);
        if faults.chance(0.7) {
            world.fault_at(at, Fault::Crash(victim));
            world.fault_at(at + 1000 + faults.below(80_000), Fault::Restart(victim));
        } else {
            world.fault_at(at, Fault::Partition(vec![victim]));
            world.fault_at(at + faults.below(150_000), Fault::Heal);
        }
    }
    world.run_until(700_000);
    (0..5).for_each(|i| world.fault_at(700_000, Fault::Restart(NodeId(i))));
    world.fault_at(700_000, Fault::Heal);
    // A little longer than until all is trained on, so that what comes late is met as well.
    let done = |world: &World<Role>| self::trainer(world).disk.trained.len() as u64 == GROUPS * 3;
    while !done(&world) && world.now_us() < 6_000_000 {
        world.run_until(world.now_us() + 100_000);
    }
    world.run_until(world.now_us() + 300_000);
    world
}

fn trainer(world: &World<Role>) -> &Trainer {
    match world.node(TRAINER) {
        Role::Trainer(trainer) => trainer,
        Role::Worker(_) => panic!("node 0 is the trainer"),
    }
}

/// What many schedules came to.
#[derive(Default)]
struct Sums {
    reasons: [u64; DropReason::ALL.len()],
    duplicates: u64,
    late: u64,
    staleness_max: u64,
}

impl Sums {
    /// Plays the schedules of `seeds` and judges each: every sample is trained on exactly once, no lie is, and no token
    /// older than the budget.
    fn of(seeds: impl Iterator<Item = u64>, budget: impl Fn(u64) -> Option<u64>) -> Self {
        let mut sums = Self::default();
        for seed in seeds {
            let budget = budget(seed);
            let world = run(seed, seed % 2 == 0, budget);
            let trainer = trainer(&world);
            let counts = trainer.dispatcher.counts();
            let samples: BTreeSet<_> = trainer.disk.trained.values().collect();
            assert_eq!(
                trainer.disk.trained.len(),
                samples.len(),
                "seed {seed}: a sample was trained on twice"
            );
            assert_eq!(samples.len() as u64, GROUPS * 3, "seed {seed}: {counts:?}");
            assert_eq!(counts.consumed, GROUPS * 3, "seed {seed}: {counts:?}");
            assert_eq!((counts.lost, counts.duplicated, counts.open), (0, 0, 0), "seed {seed}: {counts:?}");
            assert_eq!(trainer.disk.lies_trained, 0, "seed {seed}: a lie reached the learner");
            assert_eq!(counts.consumed_of_convicted, 0);
            assert!(counts.staleness_max <= budget.unwrap_or(0), "seed {seed}: {counts:?}");
            sums.reasons.iter_mut().zip(counts.dropped).for_each(|(sum, n)| *sum += n);
            sums.duplicates += counts.duplicates_refused;
            sums.late += counts.late_refused;
            sums.staleness_max = sums.staleness_max.max(counts.staleness_max);
        }
        sums
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.reasons[reason.index()]
    }
}

#[test]
fn a_thousand_fault_schedules_train_every_sample_exactly_once() {
    let sums = Sums::of(0..1000, |_| None);
    // The schedules did exercise what they are about.
    for reason in [DropReason::Expired, DropReason::Disconnected, DropReason::Rejected, DropReason::Convicted]
    {
        assert!(sums.dropped(reason) > 100, "{reason:?}: {:?}", sums.reasons);
    }
    assert!(sums.dropped(DropReason::Unproven) > 100 && sums.duplicates > 1000 && sums.late > 100);
    assert_eq!(sums.staleness_max, 0);
}

#[test]
fn ten_thousand_fault_schedules_of_the_asynchronous_mode_train_nothing_twice_or_too_old() {
    let half = |odd: u64| Sums::of((0..5000_u64).map(move |i| 2 * i + odd), |seed| Some(1 + seed / 2 % 3));
    let (even, odd) = std::thread::scope(|scope| {
        let odd = scope.spawn(move || half(1));
        (half(0), odd.join().unwrap())
    });
    for reason in
        DropReason::ALL.into_iter().filter(|r| *r != DropReason::Failed && *r != DropReason::Abandoned)
    {
        let dropped = even.dropped(reason) + odd.dropped(reason);
        assert!(dropped > 100, "{reason:?}: {:?} {:?}", even.reasons, odd.reasons);
    }
    assert!(even.duplicates > 1000 && even.late > 100);
    assert!(odd.staleness_max > 1, "rollouts do run ahead");
}

#[test]
fn the_same_seed_gives_the_same_digest() {
    assert_eq!(run(42, true, Some(2)).digest(), run(42, true, Some(2)).digest());
    assert_ne!(run(42, true, None).digest(), run(43, true, None).digest());
}

#[test]
fn a_replayed_journal_is_the_same_dispatcher_at_every_prefix() {
    for budget in [None, Some(2)] {
        let world = run(11, true, budget);
        let trainer = trainer(&world);
        let journal = &trainer.disk.journal;
        assert!(journal.len() > 300, "{}", journal.len());
        let mut live = Dispatcher::new(trainer.config.clone()).unwrap();
        for (i, entry) in journal.iter().enumerate() {
            let Entry::Command(now_ms, command) = decode_entry(entry).unwrap() else { continue };
            live.handle(now_ms, command);
            live.check_invariants().unwrap();
            if i % 97 == 0 {
                assert_eq!(trainer.replay(&journal[..=i]), live, "prefix {i}");
            }
        }
        assert_eq!(live, trainer.dispatcher);
    }
}
