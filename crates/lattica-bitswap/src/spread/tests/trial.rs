//! One spread in virtual time: its members, their links, who dies and who lies.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use swarm_sim::{Context, Fault, LinkConfig, Node, NodeId, Seed, World};

use crate::spread::{Action, Bitmap, Spread, SpreadConfig, SpreadMessage};

#[derive(Debug, Clone)]
enum Packet {
    Spread(SpreadMessage),
    Chunk { chunk: u32, right: bool },
    Gone(usize),
    Meet(usize),
}

/// A member whose links carry one chunk after the other.
struct Member {
    spread: Spread<usize>,
    trial: Trial,
    liar: bool,
    /// What waits for the uplink, and for the local network where that is another one.
    queues: [VecDeque<(usize, u32)>; 2],
    /// Chunks that came from other networks.
    from_afar: u64,
    /// Chunks that came over a relay.
    over_relays: u64,
    /// Who sent what is wrong is no neighbour again.
    shunned: BTreeSet<usize>,
    timer_at: Option<u64>,
    done_at_us: Option<u64>,
}

/// Tokens of timers: smaller ones are for the queue of that number.
const DEADLINE: u64 = 2;

impl Member {
    fn new(spread: Spread<usize>, liar: bool, trial: &Trial) -> Self {
        let (queues, trial) = (Default::default(), trial.clone());
        Self {
            spread,
            trial,
            liar,
            queues,
            from_afar: 0,
            over_relays: 0,
            shunned: BTreeSet::new(),
            timer_at: None,
            done_at_us: None,
        }
    }

    /// How long the front of a queue takes.
    fn takes_us(&self, queue: usize) -> u64 {
        let rate = if queue == 0 { self.trial.uplink } else { self.trial.lan_rate };
        self.trial.chunk_bytes * 1_000_000 / rate
    }

    fn act(&mut self, context: &mut Context<'_, Packet>) {
        let now = Duration::from_micros(context.now_us());
        while let Some(action) = self.spread.poll(now) {
            match action {
                Action::Send { to, message } => context.send(NodeId(to), Packet::Spread(message), 0),
                Action::Upload { to, chunk } => {
                    let local = self.trial.lan_rate > 0 && self.trial.is_near(context.id().0, to);
                    let queue = usize::from(local);
                    self.queues[queue].push_back((to, chunk));
                    if self.queues[queue].len() == 1 {
                        context.timer(self.takes_us(queue), queue as u64);
                    }
                }
                // A dropped neighbour sees the connection close.
                Action::Drop { peer, wrong, .. } => {
                    if wrong {
                        self.shunned.insert(peer);
                    }
                    context.send(NodeId(peer), Packet::Gone(context.id().0), 0);
                }
            }
        }
        if self.spread.is_done() && self.done_at_us.is_none() {
            self.done_at_us = Some(context.now_us());
        }
        if let Some(at) = self.spread.next_deadline() {
            let at_us = (at.as_micros() as u64).max(context.now_us() + 1);
            if self.timer_at.is_none_or(|t| t > at_us || t <= context.now_us()) {
                self.timer_at = Some(at_us);
                context.timer(at_us - context.now_us(), DEADLINE);
            }
        }
    }
}

impl Node for Member {
    type Message = Packet;

    fn on_message(&mut self, context: &mut Context<'_, Packet>, from: NodeId, message: Packet) {
        let now = Duration::from_micros(context.now_us());
        if self.liar && self.trial.only_promises {
            if matches!(message, Packet::Spread(SpreadMessage::Coming { .. })) {
                return;
            }
            let chunk = context.random().below(self.trial.n_chunks.into()) as u32;
            return context.send(from, Packet::Spread(SpreadMessage::Coming { chunk, lot: 0 }), 0);
        }
        match message {
            Packet::Spread(message) => self.spread.handle(&from.0, message, now),
            Packet::Chunk { chunk, right: true } => {
                self.over_relays += u64::from(self.trial.is_relayed(context.id().0, from.0));
                self.from_afar += u64::from(!self.trial.is_near(context.id().0, from.0));
                self.spread.handle_chunk(&from.0, chunk, now);
            }
            Packet::Chunk { .. } => self.spread.handle_wrong(&from.0, now),
            Packet::Gone(peer) => self.spread.remove_neighbour(&peer, now),
            Packet::Meet(peer) if self.shunned.contains(&peer) => {
                context.send(NodeId(peer), Packet::Gone(context.id().0), 0)
            }
            Packet::Meet(peer) => {
                let id = context.id().0;
                if self.trial.heeds && self.trial.is_relayed(id, peer) {
                    self.spread.add_relayed_neighbour(&peer, now);
                } else {
                    self.spread.add_neighbour(&peer, now);
                }
                self.spread.set_near(&peer, self.trial.heeds && self.trial.is_near(id, peer), now);
            }
        }
        self.act(context);
    }

    fn on_timer(&mut self, context: &mut Context<'_, Packet>, token: u64) {
        let now = Duration::from_micros(context.now_us());
        if token < DEADLINE {
            let (to, chunk) = self.queues[token as usize].pop_front().expect("the timer was set for it");
            context.send(NodeId(to), Packet::Chunk { chunk, right: !self.liar }, 0);
            self.spread.handle_uploaded(&to, chunk, true, now);
            if !self.queues[token as usize].is_empty() {
                context.timer(self.takes_us(token as usize), token);
            }
        } else {
            self.timer_at = None;
            self.spread.handle_timeout(now);
        }
        self.act(context);
    }
}

#[derive(Clone)]
pub(in crate::spread) struct Trial {
    pub(in crate::spread) n: usize,
    pub(in crate::spread) n_chunks: u32,
    pub(in crate::spread) chunk_bytes: u64,
    /// Bytes per second that every member sends.
    pub(in crate::spread) uplink: u64,
    /// One way between members that are not near.
    pub(in crate::spread) latency_us: u64,
    /// Members meet the source at once, and each other after this time.
    pub(in crate::spread) meet_us: u64,
    pub(in crate::spread) dead: f64,
    pub(in crate::spread) liars: f64,
    /// Liars say that everything is coming, instead of sending what is wrong.
    pub(in crate::spread) only_promises: bool,
    /// Members of one local network; 0 for no local networks.
    pub(in crate::spread) lan: usize,
    /// Bytes per second of a member's link to its local network; 0 when that is its uplink.
    pub(in crate::spread) lan_rate: u64,
    /// The last so many members are behind relays, to the source and to each other.
    pub(in crate::spread) relayed: usize,
    /// Whether members heed who is near and who is behind a relay.
    pub(in crate::spread) heeds: bool,
    pub(in crate::spread) seed: u64,
}

pub(in crate::spread) const PLAIN: Trial = Trial {
    n: 0,
    n_chunks: 128,
    chunk_bytes: 1 << 20,
    uplink: 2_500_000,
    latency_us: 25_000,
    meet_us: 0,
    dead: 0.0,
    liars: 0.0,
    only_promises: false,
    lan: 0,
    lan_rate: 0,
    relayed: 0,
    heeds: true,
    seed: 0,
};

impl Trial {
    /// Whether a relay is between two members.
    fn is_relayed(&self, a: usize, b: usize) -> bool {
        a.max(b) > self.n - self.relayed
    }

    /// Whether two members share a local network; the source has one for itself.
    fn is_near(&self, a: usize, b: usize) -> bool {
        let network = |i: usize| i.checked_sub(1)?.checked_div(self.lan);
        network(a).is_some() && network(a) == network(b)
    }
}

/// Neighbours of a member at the beginning.
const MESH_DEGREE: usize = 12;

#[derive(Debug)]
pub(in crate::spread) struct Outcome {
    /// Completion over the fluid bound.
    pub(in crate::spread) ratio: f64,
    pub(in crate::spread) source_copies: f64,
    pub(in crate::spread) unfinished: usize,
    pub(in crate::spread) duplicates: u64,
    /// Chunks that crossed a network's border, over those that have to.
    pub(in crate::spread) copies_of_a_lan: f64,
    /// Chunks that relays carried, over those that they have to.
    pub(in crate::spread) copies_over_relays: f64,
}

pub(in crate::spread) fn spread(trial: &Trial) -> Outcome {
    let Trial { n, n_chunks, dead, liars, lan, seed, .. } = *trial;
    let link = LinkConfig {
        latency_us: trial.latency_us,
        jitter_us: trial.latency_us * 2 / 25,
        ..LinkConfig::default()
    };
    let mut world = World::new(seed, link);
    let mut random = Seed(seed).stream("trial", 0);
    let config = |i: usize| SpreadConfig {
        upload_slots: 2,
        max_queue: 2,
        seed: seed ^ (i as u64) << 32,
        ..SpreadConfig::default()
    };
    let is_liar: Vec<bool> = (0..=n).map(|i| i > 0 && random.chance(liars)).collect();
    let dies: Vec<bool> = (0..=n).map(|i| i > 0 && random.chance(dead)).collect();
    for (i, &liar) in is_liar.iter().enumerate() {
        let have = if i == 0 { Bitmap::full(n_chunks) } else { Bitmap::empty(n_chunks) };
        world.add(Member::new(Spread::new(config(i), have, i == 0), liar, trial));
    }
    // A ring keeps it in one piece; the rest is drawn.
    let mut pairs: BTreeSet<(usize, usize)> = (1..=n).map(|i| (i - 1, i)).collect();
    for i in 0..=n {
        for _ in 0..MESH_DEGREE / 2 {
            let other = random.below(n as u64 + 1) as usize;
            if other != i {
                pairs.insert((i.min(other), i.max(other)));
            }
        }
    }
    // On a local network everybody finds everybody.
    let local = (1..=n).flat_map(|a| (a + 1..=n).map(move |b| (a, b))).filter(|(a, b)| trial.is_near(*a, *b));
    for (a, b) in local.collect::<Vec<_>>() {
        let near = || LinkConfig { latency_us: 500, jitter_us: 200, ..LinkConfig::default() };
        world.fault_at(0, Fault::Link(NodeId(a), NodeId(b), near()));
        world.fault_at(0, Fault::Link(NodeId(b), NodeId(a), near()));
        pairs.insert((a, b));
    }
    for &(a, b) in pairs.iter().filter(|(a, b)| trial.is_relayed(*a, *b)) {
        let slow = LinkConfig { latency_us: 3 * trial.latency_us, ..LinkConfig::default() };
        world.fault_at(0, Fault::Link(NodeId(a), NodeId(b), slow.clone()));
        world.fault_at(0, Fault::Link(NodeId(b), NodeId(a), slow));
    }
    world.run_until(0);
    let meet = |world: &mut World<Member>, a, b| {
        world.send(NodeId(b), NodeId(a), Packet::Meet(b), 0);
        world.send(NodeId(a), NodeId(b), Packet::Meet(a), 0);
    };
    let (first, later): (Vec<_>, Vec<_>) =
        pairs.into_iter().partition(|(a, _)| *a == 0 || trial.meet_us == 0);
    first.into_iter().for_each(|(a, b)| meet(&mut world, a, b));
    world.run_until(trial.meet_us);
    later.into_iter().for_each(|(a, b)| meet(&mut world, a, b));
    let bound_s = (u64::from(n_chunks) * trial.chunk_bytes) as f64 / trial.uplink as f64;
    let mut at_us = trial.meet_us + (bound_s * 0.3e6) as u64;
    world.run_until(at_us);
    for i in (0..=n).filter(|&i| dies[i]) {
        world.fault_at(at_us, Fault::Crash(NodeId(i)));
    }
    // A closed connection tells the others after a second and a half.
    at_us += 1_500_000;
    world.run_until(at_us);
    for i in (0..=n).filter(|&i| dies[i]) {
        for j in (0..=n).filter(|&j| !dies[j]) {
            world.send(NodeId(j), NodeId(j), Packet::Gone(i), 0);
        }
    }
    let limit_us = at_us + (bound_s * 6e6) as u64;
    while at_us < limit_us {
        at_us += 500_000;
        world.run_until(at_us);
        for j in (1..=n).filter(|&j| !dies[j]) {
            if world.node(NodeId(j)).spread.wants_neighbours(Duration::from_micros(at_us)) {
                let other = if random.chance(0.25) { 0 } else { random.below(n as u64 + 1) as usize };
                if other != j && !dies[other] {
                    world.send(NodeId(other), NodeId(j), Packet::Meet(other), 0);
                    world.send(NodeId(j), NodeId(other), Packet::Meet(j), 0);
                }
            }
        }
        if (0..=n).all(|j| dies[j] || is_liar[j] || world.node(NodeId(j)).done_at_us.is_some()) {
            break;
        }
    }
    let members = || (0..=n).filter(|&j| !dies[j] && !is_liar[j]).map(|j| world.node(NodeId(j)));
    let last_us = members().filter_map(|m| m.done_at_us).max().unwrap_or_default();
    Outcome {
        ratio: last_us as f64 / 1e6 / bound_s,
        source_copies: world.node(NodeId(0)).spread.uploaded() as f64 / f64::from(n_chunks),
        unfinished: members().filter(|m| m.done_at_us.is_none()).count(),
        duplicates: members().map(|m| m.spread.duplicates()).sum(),
        copies_of_a_lan: (1..=n).map(|j| world.node(NodeId(j)).from_afar).sum::<u64>() as f64
            / f64::from(n_chunks)
            / n.checked_div(lan).unwrap_or(n) as f64,
        copies_over_relays: (0..=n).map(|j| world.node(NodeId(j)).over_relays).sum::<u64>() as f64
            / f64::from(n_chunks)
            / trial.relayed as f64,
    }
}
