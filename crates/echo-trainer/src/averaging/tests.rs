//! Trainers that average in virtual time: lost, repeated and late messages, trainers that die in the middle of a step, and some
//! that say something else than they should. Whatever happens, the steps are those that one trainer alone would have made.
//!
//! Gradients are small whole numbers, so that sums are exact however a batch is shared.

use std::collections::BTreeMap;
use std::sync::Arc;

use swarm_sim::{Context, Fault, LinkConfig, Node, NodeId, Seed, World};
use swarm_wire::PeerId;

use super::*;

const LEADER: NodeId = NodeId(0);
const TRAINERS: usize = 4;
const STEPS: u64 = 6;
const PARTS: usize = 10;
const WIDTH: usize = 5;
const CONFIG: LeaderConfig = LeaderConfig { patience_ms: 400, repeat_ms: 60 };

fn peer(i: usize) -> PeerId {
    PeerId::from_ed25519(&[i as u8 + 1; 32])
}

/// What trainer `i` does wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Flaw {
    /// Sends other shares to the leader than to everybody else.
    Shares,
    /// Reports another sum.
    Sum,
    /// Reports another share of somebody else.
    Report,
    /// Its weights are not everybody's.
    State,
    /// Sends what is no gradient.
    Nan,
    /// Never answers.
    Silence,
}

fn state(weights: &[f32], step: u64) -> Hash {
    let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).chain(step.to_le_bytes()).collect();
    *blake3::hash(&bytes).as_bytes()
}

/// The gradients of these parts of a step's batch.
fn gradients(step: u64, parts: std::ops::Range<usize>) -> Gradients {
    let mut sum = vec![0.0; WIDTH];
    for part in parts {
        sum.iter_mut().enumerate().for_each(|(i, s)| *s += ((step as usize * 7 + part * 3 + i) % 5) as f32);
    }
    Gradients { values: vec![sum] }
}

/// What one trainer alone makes of it.
fn alone(steps: u64) -> Vec<f32> {
    let mut weights = vec![0.0; WIDTH];
    for step in 0..steps {
        apply(&mut weights, &gradients(step, 0..PARTS));
    }
    weights
}

fn apply(weights: &mut [f32], sum: &Gradients) {
    weights.iter_mut().zip(&sum.values[0]).for_each(|(w, g)| *w -= g);
}

struct Trainer {
    member: Member,
    leader: Option<Leader>,
    weights: Vec<f32>,
    flaw: Option<Flaw>,
    excluded: BTreeMap<PeerId, Exclusion>,
    /// The share in the making, ready after a while.
    computing: Option<(Attempt, Gradients)>,
}

impl Trainer {
    fn new(i: usize, flaw: Option<Flaw>) -> Self {
        let weights = vec![if flaw == Some(Flaw::State) { 1.0 } else { 0.0 }; WIDTH];
        let member = Member::new(peer(i), peer(0), vec![WIDTH], 0, state(&weights, 0));
        let leader = (i == 0).then(|| {
            let mut leader = Leader::new(peer(0), CONFIG);
            (1..TRAINERS).for_each(|i| assert!(leader.admit(peer(i))));
            leader
        });
        Self { member, leader, weights, flaw, excluded: BTreeMap::new(), computing: None }
    }

    fn tell(&mut self, context: &mut Context<'_, Message>, to: &PeerId, mut message: Message) {
        let to = (0..TRAINERS).find(|i| peer(*i) == *to).expect("a trainer");
        match (&mut message, self.flaw) {
            (_, Some(Flaw::Silence)) => return,
            (Message::Share { gradients, .. }, Some(Flaw::Shares)) if to == 0 => {
                Arc::make_mut(gradients).values[0][0] += 1.0;
            }
            (Message::Share { gradients, .. }, Some(Flaw::Nan)) => {
                Arc::make_mut(gradients).values[0][0] = f32::NAN;
            }
            (Message::Sum { sum, .. }, Some(Flaw::Sum)) => sum[0] ^= 1,
            // Of the leader.
            (Message::Sum { shares, .. }, Some(Flaw::Report)) => shares[0][0] ^= 1,
            _ => {}
        }
        if NodeId(to) == context.id() {
            // To itself without a network.
            self.hear(context, &peer(to), message);
        } else {
            context.send(NodeId(to), message, 200);
        }
    }

    fn hear(&mut self, context: &mut Context<'_, Message>, from: &PeerId, message: Message) {
        let now_ms = context.now_us() / 1000;
        if let Some(leader) = &mut self.leader {
            let actions = leader.handle(now_ms, from, message.clone());
            self.lead(context, actions);
        }
        let actions = self.member.handle(from, message);
        self.act(context, actions);
    }

    fn lead(&mut self, context: &mut Context<'_, Message>, actions: Vec<LeaderAction>) {
        for action in actions {
            match action {
                LeaderAction::Send { to, message } => self.tell(context, &to, message),
                LeaderAction::Excluded { peer, why } => _ = self.excluded.insert(peer, why),
            }
        }
    }

    fn act(&mut self, context: &mut Context<'_, Message>, actions: Vec<MemberAction>) {
        for action in actions {
            match action {
                MemberAction::Send { to, message } => self.tell(context, &to, message),
                MemberAction::Compute { attempt, place, of } => {
                    self.computing = Some((attempt, gradients(attempt.step, share(PARTS, place, of))));
                    let takes_us = 5_000 + context.random().below(40_000);
                    context.timer(takes_us, 1);
                }
                MemberAction::Apply { attempt, sum } => {
                    apply(&mut self.weights, &sum);
                    assert_eq!(self.weights, alone(attempt.step + 1), "not what one trainer makes of it");
                    let state = state(&self.weights, attempt.step + 1);
                    let next = self.member.handle_applied(attempt, state);
                    self.act(context, next);
                    if let Some(leader) = &mut self.leader {
                        let commits = leader.handle_applied();
                        self.lead(context, commits);
                    }
                }
            }
        }
    }
}

impl Node for Trainer {
    type Message = Message;

    fn on_start(&mut self, context: &mut Context<'_, Message>) {
        context.timer(1_000, 0);
    }

    fn on_message(&mut self, context: &mut Context<'_, Message>, from: NodeId, message: Message) {
        self.hear(context, &peer(from.0), message);
    }

    fn on_timer(&mut self, context: &mut Context<'_, Message>, token: u64) {
        if token == 1 {
            if let Some((attempt, gradients)) = self.computing.take() {
                let actions = self.member.handle_computed(attempt, gradients);
                self.act(context, actions);
            }
            return;
        }
        context.timer(10_000, 0);
        let (now_ms, missing) = (context.now_us() / 1000, self.member.missing());
        let Some(leader) = &mut self.leader else { return };
        let actions = if leader.is_busy() {
            leader.handle_time(now_ms, &missing)
        } else if self.member.step() < STEPS {
            leader.begin(now_ms, self.member.step(), self.member.state())
        } else {
            Vec::new()
        };
        self.lead(context, actions);
    }

    /// What it had in memory is gone; it says nothing any more, because it is not started again.
    fn on_crash(&mut self) {
        self.computing = None;
    }
}

fn world(seed: u64, flaws: &[(usize, Flaw)], loss: f64) -> World<Trainer> {
    let link = LinkConfig {
        latency_us: 2000,
        jitter_us: 6000,
        loss,
        duplicate: 0.1,
        reorder: 0.3,
        ..LinkConfig::default()
    };
    let mut world = World::new(seed, link);
    for i in 0..TRAINERS {
        let flaw = flaws.iter().find(|(at, _)| *at == i).map(|(_, flaw)| *flaw);
        world.add(Trainer::new(i, flaw));
    }
    world
}

fn finished(world: &mut World<Trainer>, seed: u64) {
    let done = |world: &World<Trainer>| world.node(LEADER).member.step() == STEPS;
    while !done(world) {
        assert!(world.now_us() < 60_000_000, "seed {seed}: it stands still");
        world.run_until(world.now_us() + 10_000);
    }
    // Commits arrive.
    world.run_until(world.now_us() + 100_000);
    assert_eq!(world.node(LEADER).weights, alone(STEPS), "seed {seed}");
}

#[test]
fn several_trainers_make_the_steps_of_one() {
    for seed in 0..50 {
        let mut world = world(seed, &[], 0.0);
        finished(&mut world, seed);
        assert!(world.node(LEADER).excluded.is_empty(), "seed {seed}: {:?}", world.node(LEADER).excluded);
        for i in 0..TRAINERS {
            let trainer = world.node(NodeId(i));
            assert_eq!((trainer.member.step(), &trainer.weights), (STEPS, &alone(STEPS)), "seed {seed}, {i}");
        }
    }
}

#[test]
fn whoever_says_something_else_is_named_and_the_step_is_made_without_it() {
    for (flaw, why) in [
        (Flaw::Shares, Exclusion::Share),
        (Flaw::Sum, Exclusion::Sum),
        (Flaw::Report, Exclusion::Report),
        (Flaw::State, Exclusion::Behind),
        (Flaw::Nan, Exclusion::Late),
        (Flaw::Silence, Exclusion::Late),
    ] {
        for seed in 0..20 {
            let at = 1 + seed as usize % (TRAINERS - 1);
            let mut world = world(seed, &[(at, flaw)], 0.0);
            finished(&mut world, seed);
            let excluded = &world.node(LEADER).excluded;
            assert_eq!(*excluded, BTreeMap::from([(peer(at), why)]), "{flaw:?}, seed {seed}");
            for i in (1..TRAINERS).filter(|i| *i != at) {
                assert_eq!(world.node(NodeId(i)).weights, alone(STEPS), "{flaw:?}, seed {seed}, {i}");
            }
        }
    }
}

#[test]
fn trainers_that_die_in_the_middle_and_lost_messages_change_no_step() {
    let mut late = 0;
    for seed in 0..300 {
        let mut world = world(seed, &[], 0.1);
        let mut faults = Seed(seed).stream("deaths", 0);
        for victim in 1..TRAINERS {
            if faults.chance(0.5) {
                world.fault_at(faults.below(900_000), Fault::Crash(NodeId(victim)));
            }
        }
        finished(&mut world, seed);
        let leader = world.node(LEADER);
        late += leader.excluded.values().filter(|why| **why == Exclusion::Late).count();
        // Nobody is blamed for more than silence, or for what silence led to.
        for why in leader.excluded.values() {
            assert!(matches!(why, Exclusion::Late | Exclusion::Behind), "seed {seed}: {why}");
        }
        for i in (1..TRAINERS).filter(|i| world.is_up(NodeId(*i)) && !leader.excluded.contains_key(&peer(*i)))
        {
            let trainer = world.node(NodeId(i));
            let behind = STEPS - trainer.member.step();
            assert!(behind <= 1, "seed {seed}: {i} misses more than the last commit");
            assert_eq!(trainer.weights, alone(STEPS - behind), "seed {seed}, {i}");
        }
    }
    assert!(late > 100, "{late}");
}

#[test]
fn shares_cover_a_batch_once_and_in_order() {
    for n in 0..40 {
        for of in 1..9 {
            let all: Vec<usize> = (0..of).flat_map(|place| share(n, place, of)).collect();
            assert_eq!(all, (0..n).collect::<Vec<_>>(), "{n} of {of}");
        }
    }
}

#[test]
fn sums_do_not_depend_on_who_was_first() {
    // Numbers whose sum depends on the order.
    let shares = [1e8_f32, 1.0, -1e8];
    let members: Vec<PeerId> = (0..3).map(peer).collect();
    let attempt = Attempt { step: 0, number: 0 };
    let begin = Message::Begin { attempt, members, state: [0; 32], committed: None };
    let sum = |order: [usize; 2]| {
        let mut member = Member::new(peer(0), peer(0), vec![1], 0, [0; 32]);
        let compute = member.handle(&peer(0), begin.clone());
        assert!(matches!(compute[..], [MemberAction::Compute { place: 0, of: 3, .. }]));
        let one = |i: usize| Gradients { values: vec![vec![shares[i]]] };
        member.handle_computed(attempt, one(0));
        let mut last = Vec::new();
        for i in order {
            last = member.handle(&peer(i), Message::Share { attempt, gradients: Arc::new(one(i)) });
        }
        let [MemberAction::Send { message: Message::Sum { sum, .. }, .. }] = &last[..] else {
            panic!("{last:?}")
        };
        *sum
    };
    assert_eq!(sum([1, 2]), sum([2, 1]));
    // A second share of one member is not taken, strangers' and misshapen ones neither.
    let mut member = Member::new(peer(0), peer(0), vec![1], 0, [0; 32]);
    member.handle(&peer(0), begin);
    let of = |values: Vec<f32>| Message::Share {
        attempt,
        gradients: Arc::new(Gradients { values: vec![values] }),
    };
    for (from, message) in [(7, of(vec![1.0])), (1, of(vec![1.0, 2.0])), (1, of(vec![f32::NAN]))] {
        assert!(member.handle(&peer(from), message).is_empty());
    }
    assert_eq!(member.missing().len(), 3);
}
