//! The event loop: time jumps from one message, timer or fault to the next.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use crate::clock::Timers;
use crate::digest::Digest;
use crate::fault::Fault;
use crate::link::{Link, LinkConfig};
use crate::seed::{Seed, Stream};

/// Which node, in the order of [`World::add`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub usize);

/// A state machine in a [`World`].
pub trait Node {
    /// What nodes send each other. Its `Debug` text goes into the event log.
    type Message: Clone + Debug;

    /// The node starts, for the first time or after a crash.
    fn on_start(&mut self, _context: &mut Context<'_, Self::Message>) {}

    /// A message has arrived.
    fn on_message(&mut self, context: &mut Context<'_, Self::Message>, from: NodeId, message: Self::Message);

    /// A timer has fired; `token` is what it was set with.
    fn on_timer(&mut self, _context: &mut Context<'_, Self::Message>, _token: u64) {}

    /// The node crashes: drop here what would not survive.
    fn on_crash(&mut self) {}
}

/// What a node can see and do while it handles an event.
#[derive(Debug)]
pub struct Context<'a, M> {
    id: NodeId,
    now_us: u64,
    random: &'a mut Stream,
    sends: Vec<(NodeId, M, u64)>,
    timers: Vec<(u64, u64)>,
    notes: Vec<String>,
}

impl<M> Context<'_, M> {
    /// Who is handling.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Virtual microseconds since the start.
    pub fn now_us(&self) -> u64 {
        self.now_us
    }

    /// The node's own randomness.
    pub fn random(&mut self) -> &mut Stream {
        self.random
    }

    /// Sends a message that counts as `bytes` on the link.
    pub fn send(&mut self, to: NodeId, message: M, bytes: u64) {
        self.sends.push((to, message, bytes));
    }

    /// Has [`Node::on_timer`] called with `token` in `delay_us`.
    pub fn timer(&mut self, delay_us: u64, token: u64) {
        self.timers.push((delay_us, token));
    }

    /// Writes a line into the event log, so that the digest depends on it.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }
}

#[derive(Debug)]
enum Event<M> {
    Message { from: NodeId, to: NodeId, message: M },
    Timer { node: NodeId, life: u64, token: u64 },
    Fault(Fault),
}

#[derive(Debug)]
struct Place<N> {
    node: N,
    random: Stream,
    up: bool,
    /// Counts starts, so that timers from before a crash do not fire.
    life: u64,
    island: bool,
}

/// A swarm in virtual time.
#[derive(Debug)]
pub struct World<N: Node> {
    seed: Seed,
    link: LinkConfig,
    places: Vec<Place<N>>,
    links: BTreeMap<(NodeId, NodeId), Link>,
    events: Timers<Event<N::Message>>,
    digest: Digest,
    delivered: u64,
}

impl<N: Node> World<N> {
    /// An empty world whose links behave like `link` unless told otherwise.
    pub fn new(seed: u64, link: LinkConfig) -> Self {
        Self {
            seed: Seed(seed),
            link,
            places: Vec::new(),
            links: BTreeMap::new(),
            events: Timers::default(),
            digest: Digest::default(),
            delivered: 0,
        }
    }

    /// Adds a node and starts it.
    pub fn add(&mut self, node: N) -> NodeId {
        let id = NodeId(self.places.len());
        let random = self.seed.stream("node", id.0 as u64);
        self.places.push(Place { node, random, up: true, life: 0, island: false });
        self.with(id, |node, context| node.on_start(context));
        id
    }

    /// A node, to look at.
    pub fn node(&self, id: NodeId) -> &N {
        &self.places[id.0].node
    }

    /// Whether a node is up.
    pub fn is_up(&self, id: NodeId) -> bool {
        self.places[id.0].up
    }

    /// Virtual microseconds since the start.
    pub fn now_us(&self) -> u64 {
        self.events.now_us()
    }

    /// Messages that have arrived at a node.
    pub fn delivered(&self) -> u64 {
        self.delivered
    }

    /// The hash of all that has happened.
    pub fn digest(&self) -> String {
        self.digest.hex()
    }

    /// Sets a fault to happen at `at_us`.
    pub fn fault_at(&mut self, at_us: u64, fault: Fault) {
        self.events.set_at(at_us, Event::Fault(fault));
    }

    /// Sends a message as if `from` had.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "a sent message is given away, however many copies arrive"
    )]
    pub fn send(&mut self, from: NodeId, to: NodeId, message: N::Message, bytes: u64) {
        let (seed, config) = (self.seed, &self.link);
        let link = self.links.entry((from, to)).or_insert_with(|| new_link(seed, from, to, config.clone()));
        for at_us in link.arrivals(self.events.now_us(), bytes) {
            self.events.set_at(at_us, Event::Message { from, to, message: message.clone() });
        }
    }

    /// Handles the next event, if it is not after `limit_us`; false when there is none.
    pub fn step(&mut self, limit_us: u64) -> bool {
        let Some(event) = self.events.pop_until(limit_us) else { return false };
        let now = self.events.now_us();
        match event {
            Event::Message { from, to, message } => {
                let text = format!("{message:?}");
                let (source, target) = (from.0.to_le_bytes(), to.0.to_le_bytes());
                let parts: [&[u8]; 3] = [&source, &target, text.as_bytes()];
                let cut = self.places[from.0].island != self.places[to.0].island;
                if cut || !self.places[to.0].up {
                    self.digest.event(now, "lost", &parts);
                } else {
                    self.digest.event(now, "message", &parts);
                    self.delivered += 1;
                    self.with(to, |node, context| node.on_message(context, from, message));
                }
            }
            Event::Timer { node, life, token } => {
                if self.places[node.0].up && self.places[node.0].life == life {
                    self.digest.event(now, "timer", &[&node.0.to_le_bytes(), &token.to_le_bytes()]);
                    self.with(node, |node, context| node.on_timer(context, token));
                }
            }
            Event::Fault(fault) => self.apply(fault),
        }
        true
    }

    /// Handles all events up to `limit_us` and moves time there.
    pub fn run_until(&mut self, limit_us: u64) {
        while self.step(limit_us) {}
        self.events.advance_to(limit_us);
    }

    fn apply(&mut self, fault: Fault) {
        self.digest.event(self.events.now_us(), "fault", &[format!("{fault:?}").as_bytes()]);
        match fault {
            Fault::Crash(id) => {
                let place = &mut self.places[id.0];
                if std::mem::replace(&mut place.up, false) {
                    place.node.on_crash();
                }
            }
            Fault::Restart(id) => {
                let place = &mut self.places[id.0];
                if !std::mem::replace(&mut place.up, true) {
                    place.life += 1;
                    self.with(id, |node, context| node.on_start(context));
                }
            }
            Fault::Partition(nodes) => {
                let nodes: BTreeSet<NodeId> = nodes.into_iter().collect();
                for (i, place) in self.places.iter_mut().enumerate() {
                    place.island = nodes.contains(&NodeId(i));
                }
            }
            Fault::Heal => self.places.iter_mut().for_each(|place| place.island = false),
            Fault::Link(from, to, config) => match self.links.get_mut(&(from, to)) {
                Some(link) => link.config = config,
                None => {
                    self.links.insert((from, to), new_link(self.seed, from, to, config));
                }
            },
        }
    }

    fn with(&mut self, id: NodeId, act: impl FnOnce(&mut N, &mut Context<'_, N::Message>)) {
        let now_us = self.events.now_us();
        let place = &mut self.places[id.0];
        let (sends, timers, notes) = (Vec::new(), Vec::new(), Vec::new());
        let mut context = Context { id, now_us, random: &mut place.random, sends, timers, notes };
        act(&mut place.node, &mut context);
        let Context { sends, timers, notes, .. } = context;
        let life = place.life;
        notes.iter().for_each(|n| self.digest.event(now_us, "note", &[&id.0.to_le_bytes(), n.as_bytes()]));
        for (delay_us, token) in timers {
            self.events.set_at(now_us + delay_us, Event::Timer { node: id, life, token });
        }
        sends.into_iter().for_each(|(to, message, bytes)| self.send(id, to, message, bytes));
    }
}

fn new_link(seed: Seed, from: NodeId, to: NodeId, config: LinkConfig) -> Link {
    Link::new(config, seed.stream("link", (from.0 as u64) << 32 | to.0 as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends its number to the next node every millisecond, and counts what comes.
    #[derive(Debug)]
    struct Beacon {
        to: NodeId,
        heard: u64,
        starts: u64,
    }

    impl Node for Beacon {
        type Message = u64;

        fn on_start(&mut self, context: &mut Context<'_, u64>) {
            self.starts += 1;
            context.timer(1000, 1);
        }

        fn on_message(&mut self, context: &mut Context<'_, u64>, _from: NodeId, message: u64) {
            self.heard += 1;
            context.note(format!("heard {message}"));
        }

        fn on_timer(&mut self, context: &mut Context<'_, u64>, _token: u64) {
            let draw = context.random().next_u64();
            context.send(self.to, draw, 100);
            context.timer(1000, 1);
        }

        fn on_crash(&mut self) {
            self.heard = 0;
        }
    }

    fn pair(seed: u64, link: LinkConfig) -> (World<Beacon>, NodeId, NodeId) {
        let mut world = World::new(seed, link);
        let beacon = |to| Beacon { to: NodeId(to), heard: 0, starts: 0 };
        let (a, b) = (world.add(beacon(1)), world.add(beacon(0)));
        (world, a, b)
    }

    #[test]
    fn the_same_seed_gives_the_same_digest_and_another_one_does_not() {
        let lossy = LinkConfig { loss: 0.1, reorder: 0.1, duplicate: 0.1, ..LinkConfig::default() };
        let run = |seed| {
            let (mut world, a, b) = pair(seed, lossy.clone());
            world.fault_at(20_000, Fault::Crash(b));
            world.fault_at(30_000, Fault::Restart(b));
            world.fault_at(50_000, Fault::Partition(vec![a]));
            world.fault_at(60_000, Fault::Heal);
            world.run_until(100_000);
            world.digest()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn a_crashed_node_hears_nothing_and_starts_afresh() {
        let (mut world, a, b) = pair(1, LinkConfig::default());
        world.run_until(50_000);
        let before = (world.node(a).heard, world.node(b).heard);
        assert!(before.0 > 30 && before.1 > 30);
        world.fault_at(50_001, Fault::Crash(b));
        world.run_until(100_000);
        assert_eq!(world.node(b).heard, 0);
        assert!(!world.is_up(b));
        // What was on its way still arrived; then the other side fell silent.
        assert!(world.node(a).heard - before.0 <= 12, "{} {}", world.node(a).heard, before.0);
        world.fault_at(100_001, Fault::Restart(b));
        world.run_until(150_000);
        assert_eq!(world.node(b).starts, 2);
        assert!(world.node(b).heard > 30);
    }

    #[test]
    fn a_partition_cuts_until_it_heals() {
        let (mut world, a, b) = pair(1, LinkConfig { jitter_us: 0, ..LinkConfig::default() });
        world.fault_at(0, Fault::Partition(vec![a]));
        world.run_until(100_000);
        assert_eq!((world.node(a).heard, world.node(b).heard), (0, 0));
        world.fault_at(100_000, Fault::Heal);
        world.run_until(200_500);
        assert!(world.node(a).heard >= 100 && world.node(b).heard >= 100);
    }

    #[test]
    fn one_direction_can_be_worse_than_the_other() {
        let (mut world, a, b) = pair(1, LinkConfig::default());
        world.fault_at(0, Fault::Link(a, b, LinkConfig { loss: 1.0, ..LinkConfig::default() }));
        world.run_until(50_000);
        assert_eq!(world.node(b).heard, 0);
        assert!(world.node(a).heard > 30);
    }
}
