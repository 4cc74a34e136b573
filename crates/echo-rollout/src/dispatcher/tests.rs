//! The dispatcher against crashes, lost and repeated messages, late and corrupt answers and cheaters, in virtual time.
//!
//! The learner keeps its own set of what it trained on, as a checkpoint would; exactly once is judged from that set and
//! not from the dispatcher's counters.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use swarm_sim::{Context, Fault, LinkConfig, Node, NodeId, Seed, World};
use swarm_wire::{PeerId, PolicyVersion, RunId};

use super::*;
use crate::config::AuditPolicy;
use crate::rollout::tests::sample;
use crate::wire::{decode_entry, encode_entry};

const TRAINER: NodeId = NodeId(0);
const GROUPS: u64 = 12;

#[derive(Debug, Clone)]
enum Message {
    Register { incarnation: u64 },
    Registered,
    Ask { active: PolicyVersion },
    Leases { leases: Vec<Lease>, version: PolicyVersion },
    Submit { trajectory: Box<Trajectory> },
    Answer { lease: LeaseId },
}

fn config() -> DispatchConfig {
    DispatchConfig {
        group_size: 3,
        lease_ttl_ms: 120,
        max_leases_per_worker: 4,
        max_attempts: 1000,
        audit: AuditPolicy { fraction: 0.3, first: 2, seed: 5 },
        ..DispatchConfig::new(RunId(1))
    }
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
    disk: Disk,
    dispatcher: Dispatcher,
    peers: BTreeMap<NodeId, PeerId>,
    batch: Vec<Group>,
}

impl Trainer {
    fn handle(&mut self, now_us: u64, command: Command) -> Outcome {
        let now_ms = now_us / 1000;
        self.disk.journal.push(encode_entry(now_ms, &command));
        let outcome = self.dispatcher.handle(now_ms, command);
        self.dispatcher.check_invariants().unwrap();
        outcome
    }

    fn replay(journal: &[Vec<u8>]) -> Dispatcher {
        let mut dispatcher = Dispatcher::new(config()).unwrap();
        for entry in journal {
            let (now_ms, command) = decode_entry(entry).unwrap();
            dispatcher.handle(now_ms, command);
        }
        dispatcher
    }

    /// Trains on the batch: the checkpoint is written in one piece, the command that says so may be lost in a crash.
    fn train(&mut self, context: &mut Context<'_, Message>) {
        let now = context.now_us();
        let step = self.disk.steps;
        for group in self.batch.drain(..) {
            assert_eq!(group.trajectories.len(), 3);
            for t in &group.trajectories {
                let place = (group.id, t.lease().sample_index);
                assert!(self.disk.trained.insert(t.id(), place).is_none(), "{} trained twice", t.id());
                self.disk.lies_trained += u64::from(&t.commitment()[..] == b"lie");
            }
        }
        self.disk.steps = step + 1;
        self.handle(now, Command::Commit { step });
        self.handle(now, Command::SetVersion(PolicyVersion(step + 1)));
        let opened = self.dispatcher.next_group;
        let more: Vec<u64> = (opened..(opened + 3).min(GROUPS)).collect();
        self.handle(now, Command::OpenGroups { task_seeds: more });
    }
}

impl Trainer {
    fn on_start(&mut self, context: &mut Context<'_, Message>) {
        if self.disk.journal.is_empty() {
            self.handle(0, Command::OpenGroups { task_seeds: vec![0, 1, 2] });
        } else {
            self.dispatcher = Self::replay(&self.disk.journal);
            let steps = self.disk.steps;
            self.handle(context.now_us(), Command::Recover { steps });
            self.handle(context.now_us(), Command::SetVersion(PolicyVersion(steps)));
            if self.dispatcher.n_open_groups() == 0 {
                let opened = self.dispatcher.next_group;
                let more: Vec<u64> = (opened..(opened + 3).min(GROUPS)).collect();
                self.handle(context.now_us(), Command::OpenGroups { task_seeds: more });
            }
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
        if !self.batch.is_empty() {
            self.train(context);
        } else if self.dispatcher.ready_groups().len() == self.dispatcher.n_open_groups() {
            let step = self.disk.steps;
            if let Outcome::Groups(groups) = self.handle(now, Command::Take { step, max_groups: 100 }) {
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
                self.handle(now, Command::Submit { trajectory: *trajectory, refused: false });
                context.send(from, Message::Answer { lease }, 10);
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
}

impl Rollouts {
    fn on_message(&mut self, context: &mut Context<'_, Message>, message: Message) {
        match message {
            Message::Leases { leases, version } => {
                self.active = self.active.max(version);
                for lease in leases {
                    let mut made = sample(lease, self.peer.as_ref().unwrap());
                    made.steps.iter_mut().for_each(|s| s.version = lease.version);
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
            Self::Trainer(trainer) => trainer.batch.clear(),
            Self::Worker(worker) => worker.unanswered.clear(),
        }
    }
}

/// Four workers, the last of which lies when `cheater` is set; a random schedule of faults; then peace until the end.
fn run(seed: u64, cheater: bool) -> World<Role> {
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
    let trainer = Trainer {
        disk: Disk::default(),
        dispatcher: Dispatcher::new(config()).unwrap(),
        peers: (1..=4).map(|i| (NodeId(i), peer(i))).collect(),
        batch: Vec::new(),
    };
    world.add(Role::Trainer(Box::new(trainer)));
    for i in 1..=4 {
        let lies = cheater && i == 4;
        let corrupts = if i == 3 { 0.3 } else { 0.0 };
        world.add(Role::Worker(Rollouts { peer: Some(peer(i)), lies, corrupts, ..Rollouts::default() }));
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
    world.run_until(6_000_000);
    world
}

fn trainer(world: &World<Role>) -> &Trainer {
    match world.node(TRAINER) {
        Role::Trainer(trainer) => trainer,
        Role::Worker(_) => panic!("node 0 is the trainer"),
    }
}

#[test]
fn a_thousand_fault_schedules_train_every_sample_exactly_once() {
    let (mut reasons, mut duplicates, mut late) = ([0; DropReason::ALL.len()], 0, 0);
    for seed in 0..1000 {
        let world = run(seed, seed % 2 == 0);
        let trainer = trainer(&world);
        let counts = trainer.dispatcher.counts();
        let samples: BTreeSet<_> = trainer.disk.trained.values().collect();
        assert_eq!(trainer.disk.trained.len(), samples.len(), "seed {seed}: a sample was trained on twice");
        assert_eq!(samples.len() as u64, GROUPS * 3, "seed {seed}: {counts:?}");
        assert_eq!(counts.consumed, GROUPS * 3, "seed {seed}: {counts:?}");
        assert_eq!((counts.lost, counts.duplicated, counts.open), (0, 0, 0), "seed {seed}: {counts:?}");
        assert_eq!(trainer.disk.lies_trained, 0, "seed {seed}: a lie reached the learner");
        assert_eq!(counts.consumed_of_convicted, 0);
        assert_eq!(counts.staleness_max, 0);
        reasons.iter_mut().zip(counts.dropped).for_each(|(sum, n)| *sum += n);
        duplicates += counts.duplicates_refused;
        late += counts.late_refused;
    }
    // The schedules did exercise what they are about.
    for reason in [DropReason::Expired, DropReason::Disconnected, DropReason::Rejected, DropReason::Convicted]
    {
        assert!(reasons[reason.index()] > 100, "{reason:?}: {reasons:?}");
    }
    assert!(
        reasons[DropReason::Unproven.index()] > 100 && duplicates > 1000 && late > 100,
        "{duplicates} {late}"
    );
}

#[test]
fn the_same_seed_gives_the_same_digest() {
    assert_eq!(run(42, true).digest(), run(42, true).digest());
    assert_ne!(run(42, true).digest(), run(43, true).digest());
}

#[test]
fn a_replayed_journal_is_the_same_dispatcher_at_every_prefix() {
    let world = run(11, true);
    let journal = &trainer(&world).disk.journal;
    assert!(journal.len() > 500, "{}", journal.len());
    let mut live = Dispatcher::new(config()).unwrap();
    for (i, entry) in journal.iter().enumerate() {
        let (now_ms, command) = decode_entry(entry).unwrap();
        live.handle(now_ms, command);
        live.check_invariants().unwrap();
        if i % 97 == 0 {
            assert_eq!(Trainer::replay(&journal[..=i]), live, "prefix {i}");
        }
    }
    assert_eq!(live, trainer(&world).dispatcher);
}

fn worker(i: u8) -> PeerId {
    PeerId::from_ed25519(&[i; 32])
}

fn leased(d: &mut Dispatcher, now_ms: u64, i: u8, max: u32) -> Vec<Lease> {
    let version = d.version();
    d.handle(now_ms, Command::Register { worker: worker(i), incarnation: 1 });
    d.handle(now_ms, Command::Acknowledge { worker: worker(i), version });
    match d.handle(now_ms, Command::Lease { worker: worker(i), max }) {
        Outcome::Leased(leases) => leases,
        other => panic!("{other:?}"),
    }
}

fn submit(d: &mut Dispatcher, now_ms: u64, i: u8, lease: Lease) -> Submission {
    let trajectory = Trajectory::new(sample(lease, &worker(i))).unwrap();
    match d.handle(now_ms, Command::Submit { trajectory, refused: false }) {
        Outcome::Submitted(submission) => submission,
        other => panic!("{other:?}"),
    }
}

fn open(config: DispatchConfig) -> Dispatcher {
    let mut d = Dispatcher::new(config).unwrap();
    d.handle(0, Command::OpenGroups { task_seeds: vec![5, 6] });
    d
}

#[test]
fn a_worker_behind_the_version_gets_nothing() {
    let mut d = open(config());
    d.handle(0, Command::SetVersion(PolicyVersion(1)));
    d.handle(0, Command::OpenGroups { task_seeds: vec![7] });
    d.handle(0, Command::Register { worker: worker(1), incarnation: 1 });
    d.handle(0, Command::Acknowledge { worker: worker(1), version: PolicyVersion(0) });
    assert_eq!(d.handle(0, Command::Lease { worker: worker(1), max: 9 }), Outcome::Leased(vec![]));
    let ahead = Command::Acknowledge { worker: worker(1), version: PolicyVersion(2) };
    assert_eq!(d.handle(0, ahead), Outcome::Refused(Refusal::UnknownVersion));
    assert_eq!(leased(&mut d, 0, 1, 9).len(), 3);
}

#[test]
fn an_answer_at_the_deadline_is_late_and_the_sample_goes_to_another() {
    let mut d = open(config());
    let first = leased(&mut d, 0, 1, 1)[0];
    assert_eq!(submit(&mut d, 120, 1, first), Submission::Late);
    let again = leased(&mut d, 121, 2, 1)[0];
    assert_eq!((again.group, again.sample_index, again.attempt), (first.group, first.sample_index, 1));
    assert_eq!(again.sampling.seed, first.sampling.seed);
    assert_ne!(again.id, first.id);
    assert_eq!(submit(&mut d, 122, 1, again), Submission::Late, "another worker's lease");
    assert_eq!(submit(&mut d, 122, 2, again), Submission::Accepted);
    assert_eq!(submit(&mut d, 122, 2, again), Submission::Duplicate);
    d.check_invariants().unwrap();
}

#[test]
fn a_new_version_gives_up_groups_beyond_the_bound() {
    for (bound, left) in [(0, 0), (1, 2)] {
        let mut d = open(DispatchConfig { staleness: StalenessBound(bound), ..config() });
        let lease = leased(&mut d, 0, 1, 1)[0];
        d.handle(1, Command::SetVersion(PolicyVersion(1)));
        assert_eq!(d.n_open_groups(), left);
        let expected = if left == 0 { Submission::Stale } else { Submission::Rejected };
        let mut made = sample(lease, &worker(1));
        // A version that was never published is refused whatever the bound.
        made.steps[0].version = PolicyVersion(9);
        let trajectory = Trajectory::new(made).unwrap();
        let outcome = d.handle(2, Command::Submit { trajectory, refused: false });
        assert_eq!(outcome, Outcome::Submitted(expected));
        d.check_invariants().unwrap();
    }
}

#[test]
fn samples_are_shared_among_the_workers_that_are_ready() {
    let mut d = open(DispatchConfig { max_leases_per_worker: 64, group_size: 8, ..config() });
    for i in 1..=3 {
        d.handle(0, Command::Register { worker: worker(i), incarnation: 1 });
        d.handle(0, Command::Acknowledge { worker: worker(i), version: PolicyVersion(0) });
    }
    let counts: Vec<usize> = (1..=3).map(|i| leased(&mut d, 0, i, 64).len()).collect();
    assert_eq!(counts, [6, 6, 4]);
    assert!(leased(&mut d, 0, 1, 64).is_empty());
    d.handle(1, Command::Disconnect { worker: worker(3) });
    assert_eq!(leased(&mut d, 1, 1, 64).len(), 2, "the share grows when a worker leaves");
    d.check_invariants().unwrap();
}

#[test]
fn a_conviction_takes_back_everything_not_yet_trained_on() {
    let mut d =
        open(DispatchConfig { audit: AuditPolicy { first: 1, ..AuditPolicy::default() }, ..config() });
    let leases = leased(&mut d, 0, 1, 3);
    leases.iter().for_each(|l| assert_eq!(submit(&mut d, 1, 1, *l), Submission::Accepted));
    assert!(d.ready_groups().is_empty(), "the first audit covers the later ones too");
    assert_eq!(d.audits_due().len(), 1);
    let held = leased(&mut d, 2, 1, 1);
    d.handle(3, Command::Verdict { lease: leases[0].id, verdict: AuditOutcome::Fail });
    assert_eq!(d.convicted(), [(worker(1), 1)]);
    assert_eq!(d.counts().dropped_for(DropReason::Convicted), 4);
    assert_eq!(submit(&mut d, 4, 1, held[0]), Submission::Rejected);
    let refused = d.handle(5, Command::Register { worker: worker(1), incarnation: 2 });
    assert_eq!(refused, Outcome::Refused(Refusal::Convicted));
    d.check_invariants().unwrap();
}

#[test]
fn a_sample_that_nobody_delivers_ends_its_group() {
    let mut d = open(DispatchConfig { max_attempts: 2, ..config() });
    for attempt in 0..2u64 {
        for lease in leased(&mut d, attempt, 1, 1) {
            d.handle(attempt, Command::Fail { worker: worker(1), lease: lease.id });
        }
    }
    assert_eq!((d.n_open_groups(), d.counts().groups_abandoned), (1, 1));
    d.check_invariants().unwrap();
}

#[derive(Debug, Clone)]
enum Op {
    Lease(u8, u32),
    Submit(u8, usize),
    Fail(u8, usize),
    Disconnect(u8),
    Register(u8, u64),
    Wait(u64),
    Verdict(usize, u8),
    Take,
    Commit,
    Version,
    Open,
    Recover,
}

fn op() -> impl Strategy<Value = Op> {
    let worker = 1u8..4;
    prop_oneof![
        4 => (worker.clone(), 1u32..5).prop_map(|(w, n)| Op::Lease(w, n)),
        8 => (worker.clone(), 0usize..40).prop_map(|(w, l)| Op::Submit(w, l)),
        1 => (worker.clone(), 0usize..40).prop_map(|(w, l)| Op::Fail(w, l)),
        1 => worker.clone().prop_map(Op::Disconnect),
        1 => (worker, 0u64..4).prop_map(|(w, i)| Op::Register(w, i)),
        2 => (0u64..200).prop_map(Op::Wait),
        4 => (0usize..40, 0u8..8).prop_map(|(l, v)| Op::Verdict(l, v)),
        2 => Just(Op::Take),
        2 => Just(Op::Commit),
        1 => Just(Op::Version),
        1 => Just(Op::Open),
        1 => Just(Op::Recover),
    ]
}

proptest! {
    #[test]
    fn leases_add_up_after_any_commands(ops in prop::collection::vec(op(), 1..120), bound in 0u64..3) {
        let mut d = open(DispatchConfig { max_attempts: 3, staleness: StalenessBound(bound), ..config() });
        let (mut now, mut step, mut leases) = (0, 0, Vec::new());
        for op in ops {
            match op {
                Op::Lease(w, n) => {
                    d.handle(now, Command::Register { worker: worker(w), incarnation: 1 });
                    let version = d.version();
                    d.handle(now, Command::Acknowledge { worker: worker(w), version });
                    if let Outcome::Leased(more) = d.handle(now, Command::Lease { worker: worker(w), max: n }) {
                        leases.extend(more);
                    }
                }
                Op::Submit(w, l) if !leases.is_empty() => {
                    let lease: Lease = leases[l % leases.len()];
                    submit(&mut d, now, w, lease);
                }
                Op::Fail(w, l) => {
                    d.handle(now, Command::Fail { worker: worker(w), lease: LeaseId(l as u64) });
                }
                Op::Disconnect(w) => {
                    d.handle(now, Command::Disconnect { worker: worker(w) });
                }
                Op::Register(w, incarnation) => {
                    d.handle(now, Command::Register { worker: worker(w), incarnation });
                }
                Op::Wait(ms) => now += ms,
                Op::Verdict(l, v) => {
                    let verdict = match v {
                        0 => AuditOutcome::Fail,
                        1 => AuditOutcome::Unproven,
                        _ => AuditOutcome::Pass,
                    };
                    d.handle(now, Command::Verdict { lease: LeaseId(l as u64), verdict });
                }
                Op::Take => {
                    d.handle(now, Command::Take { step, max_groups: 1 });
                }
                Op::Commit => {
                    d.handle(now, Command::Commit { step });
                    step += 1;
                }
                Op::Version => {
                    let next = PolicyVersion(d.version().0 + 1);
                    d.handle(now, Command::SetVersion(next));
                }
                Op::Open => {
                    d.handle(now, Command::OpenGroups { task_seeds: vec![now] });
                }
                Op::Recover => {
                    d.handle(now, Command::Recover { steps: step });
                }
                Op::Submit(..) => {}
            }
            d.check_invariants().map_err(|e| TestCaseError::fail(e.to_string()))?;
        }
    }
}
