//! One run in virtual time: what happens when, and what each worker does about it.

use std::collections::BTreeMap;

use bytes::Bytes;
use swarm_sim::{Digest, Seed, Stream, Timers};
use swarm_wire::{PeerId, PolicyVersion, RunId};

use super::{FleetChange, Scenario, SimulationError, selected};
use crate::asynchronous::{AsyncConfig, AsyncCoordinator};
use crate::config::DispatchConfig;
use crate::dispatcher::{Command, Counts, Dispatcher, Outcome};
use crate::environment::Reward;
use crate::fleet::capacity::price_per_hour;
use crate::fleet::{Keeper, Kind};
use crate::lease::{Lease, LeaseId, SamplingSpec};
use crate::rollout::{Finish, Sample, Step, Trajectory};
use crate::staleness::{StalenessBound, StalenessStats};
use crate::sync::{Action, SequentialConfig, SequentialSync, View};

/// Leases live so many times as long as a mean trajectory of the slowest kind: tails are heavy.
const PATIENCE: f64 = 50.0;
/// Longest virtual run, in steps' worth of the time in which everything happens one after the other.
const MOST_ROUNDS: f64 = 200.0;

/// What came of a run.
pub(super) struct Played {
    pub(super) step_s: f64,
    pub(super) utilisation: f64,
    pub(super) cost_per_step: f64,
    pub(super) max_staleness: u64,
    pub(super) mean_staleness: f64,
    pub(super) counts: Counts,
    pub(super) changes: Vec<FleetChange>,
    pub(super) digest: String,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    /// A worker comes, for the first time or again.
    Up(usize),
    /// It goes.
    Down { worker: usize, life: u64 },
    /// Prices or workers change as the scenario says.
    Change(usize),
    /// Its question for one more lease is at the learner.
    Asks { worker: usize, life: u64 },
    /// It has a version.
    Has { worker: usize, life: u64, version: PolicyVersion },
    /// The learner knows that it has.
    Tells { worker: usize, life: u64, version: PolicyVersion },
    /// A trajectory is made, unless the worker was held up meanwhile.
    Made { worker: usize, life: u64, lease: LeaseId },
    /// It is at the learner.
    Arrives { worker: usize, lease: Lease },
    /// The learner is done with its batch.
    Trained,
    /// Time passes: the sequential mode waits no longer for late workers.
    Tick,
}

struct Worker {
    peer: PeerId,
    /// Number of its kind.
    kind: usize,
    random: Stream,
    /// Whether it belongs to the fleet.
    hired: bool,
    up: bool,
    /// Whether it is on its way back.
    returns: bool,
    /// Counts its comings.
    life: u64,
    /// Until when it is paid, while it is up.
    paid_us: u64,
    /// Slots whose questions are at the learner.
    asking: u32,
    making: BTreeMap<LeaseId, Making>,
    /// Time for which installing versions has held it up.
    held_up_us: u64,
    /// Until when its link carries earlier things: down, up.
    link_us: [u64; 2],
}

struct Making {
    lease: Lease,
    held_up_us: u64,
}

enum Coordinator {
    Sequential(SequentialSync),
    Async(Box<AsyncCoordinator>),
}

/// A swarm in virtual time.
pub(super) struct Swarm<'a> {
    scenario: &'a Scenario,
    time: Timers<Event>,
    digest: Digest,
    dispatcher: Dispatcher,
    coordinator: Coordinator,
    /// As they are now.
    kinds: Vec<Kind>,
    workers: Vec<Worker>,
    keeper: Option<Keeper>,
    /// Time and training at the beginning of the keeper's window.
    window: (u64, u64),
    changes: Vec<FleetChange>,
    /// What workers have been paid.
    paid: f64,
    ack_timeout_ms: u64,
    /// The step that is trained.
    training: Option<u64>,
    committed: u64,
    trained_us: u64,
    /// Time, training and payments at the end of the warm-up.
    began: Option<(u64, u64, f64)>,
    staleness: StalenessStats,
}

fn us(seconds: f64) -> u64 {
    (seconds * 1e6).round() as u64
}

impl<'a> Swarm<'a> {
    pub(super) fn new(scenario: &'a Scenario, counts: &[u32]) -> Result<Self, SimulationError> {
        let s = scenario;
        let used =
            || s.workers.iter().zip(counts).filter(|(_, n)| **n > 0 || s.keep.is_some()).map(|(k, _)| k);
        let slowest = used().map(|k| k.rollout_s).fold(0.0, f64::max);
        let demand = s.demand();
        let update_s = used().map(|k| k.update_s(&demand)).fold(0.0, f64::max);
        let milliseconds = |s: f64| (s * 1000.0).min(f64::from(u32::MAX)) as u32;
        let dispatcher = Dispatcher::new(DispatchConfig {
            group_size: s.group_size,
            groups_per_step: s.groups_per_step,
            sampling: SamplingSpec { max_tokens: 1, ..SamplingSpec::default() },
            lease_ttl_ms: milliseconds(PATIENCE * slowest).max(1),
            max_leases_per_worker: used().map(|k| k.slots).max().unwrap_or(1),
            max_attempts: 65_536,
            max_workers: most_workers(s, counts),
            staleness: StalenessBound(s.staleness_budget),
            ..DispatchConfig::new(RunId(s.seed))
        })?;
        let ack_timeout_ms = u64::from(milliseconds(2.0 * update_s));
        let coordinator = match s.staleness_budget {
            0 => Coordinator::Sequential(SequentialSync::new(
                SequentialConfig { groups_per_step: s.groups_per_step, min_workers: 1, ack_timeout_ms },
                PolicyVersion(0),
                0,
            )),
            _ => {
                let config = AsyncConfig {
                    groups_per_step: s.groups_per_step,
                    budget: StalenessBound(s.staleness_budget),
                    publish_every: s.publish_every,
                    steps: u64::MAX,
                };
                Coordinator::Async(Box::new(AsyncCoordinator::new(config, 0, 0)?))
            }
        };
        let mut swarm = Self {
            scenario,
            time: Timers::default(),
            digest: Digest::default(),
            dispatcher,
            coordinator,
            kinds: s.workers.clone(),
            workers: Vec::new(),
            keeper: s.keep.map(|config| Keeper::new(config, s.headroom)),
            window: (0, 0),
            changes: Vec::new(),
            paid: 0.0,
            ack_timeout_ms,
            training: None,
            committed: 0,
            trained_us: 0,
            began: None,
            staleness: StalenessStats::default(),
        };
        s.changes.iter().enumerate().for_each(|(i, c)| swarm.time.set_at(us(c.at_s), Event::Change(i)));
        counts.iter().enumerate().for_each(|(kind, n)| swarm.resize(kind, *n));
        Ok(swarm)
    }

    /// Plays until all steps are made.
    pub(super) fn play(mut self) -> Result<Played, SimulationError> {
        let s = self.scenario;
        let last = s.warmup_steps + s.steps;
        let demand = s.demand();
        let round = s
            .workers
            .iter()
            .map(|k| k.update_s(&demand) + f64::from(demand.batch) * k.trajectory_s(&demand) + k.mean_down_s);
        let round = s.train_s + round.fold(0.0, f64::max);
        let limit_us = us((round * MOST_ROUNDS * last as f64).min(1e12));
        while self.committed < last {
            let Some(event) = self.time.pop_until(limit_us) else {
                let seconds = self.time.now_us() as f64 / 1e6;
                return Err(SimulationError::Stuck { step: self.committed, seconds });
            };
            self.digest.event(self.time.now_us(), "event", &[format!("{event:?}").as_bytes()]);
            self.happens(event);
            self.coordinate();
            self.lease();
        }
        self.dispatcher.check_invariants().expect("the books of a simulated run add up");
        let (began_us, trained_us, paid) = self.began.unwrap_or_default();
        let (now, steps) = (self.time.now_us(), s.steps as f64);
        let seconds = (now - began_us) as f64 / 1e6;
        Ok(Played {
            step_s: seconds / steps,
            utilisation: (self.trained_us - trained_us) as f64 / 1e6 / seconds,
            cost_per_step: (self.paid() - paid + s.learner_price_per_hour * seconds / 3600.0) / steps,
            max_staleness: self.staleness.max(),
            mean_staleness: self.staleness.mean(),
            counts: self.dispatcher.counts(),
            changes: self.changes,
            digest: self.digest.hex(),
        })
    }

    fn command(&mut self, command: Command) -> Outcome {
        self.dispatcher.handle(self.time.now_us() / 1000, command)
    }

    /// What all workers have cost.
    fn paid(&mut self) -> f64 {
        (0..self.workers.len()).for_each(|i| self.pay(i));
        self.paid
    }

    /// Pays a worker until now, at its present price.
    fn pay(&mut self, i: usize) {
        let (now, w) = (self.time.now_us(), &mut self.workers[i]);
        if w.up {
            self.paid += (now - w.paid_us) as f64 / 3.6e9 * self.kinds[w.kind].price_per_hour;
        }
        w.paid_us = now;
    }

    fn happens(&mut self, event: Event) {
        let now = self.time.now_us();
        let lives = |swarm: &Self, i: usize, life: u64| swarm.workers[i].up && swarm.workers[i].life == life;
        match event {
            Event::Up(i) => self.comes(i),
            Event::Down { worker, life } if lives(self, worker, life) => self.goes(worker),
            Event::Change(i) => self.change(i),
            Event::Asks { worker, life } if lives(self, worker, life) => self.workers[worker].asking += 1,
            Event::Has { worker, life, version } if lives(self, worker, life) => {
                let w = &mut self.workers[worker];
                let kind = &self.kinds[w.kind];
                let install_us = us(kind.install_s);
                w.held_up_us += install_us;
                let at = now + install_us + us(kind.latency_s());
                self.time.set_at(at, Event::Tells { worker, life, version });
            }
            Event::Tells { worker, life, version } if lives(self, worker, life) => {
                let worker = self.workers[worker].peer.clone();
                self.command(Command::Acknowledge { worker, version });
            }
            Event::Made { worker, life, lease } if lives(self, worker, life) => {
                self.made(worker, life, lease)
            }
            // What was sent arrives, though its sender may be gone.
            Event::Arrives { worker, lease } => {
                let trajectory = trajectory(lease, &self.workers[worker].peer);
                self.command(Command::Submit { trajectory });
            }
            Event::Trained => self.trained(),
            Event::Tick => _ = self.command(Command::Tick),
            _ => {}
        }
    }

    fn comes(&mut self, i: usize) {
        let now = self.time.now_us();
        let w = &mut self.workers[i];
        w.returns = false;
        if !w.hired {
            return;
        }
        (w.up, w.paid_us, w.life, w.asking) = (true, now, w.life + 1, 0);
        w.link_us = [now; 2];
        let kind = &self.kinds[w.kind];
        let (peer, life, slots, at) = (w.peer.clone(), w.life, kind.slots, now + us(kind.latency_s()));
        if kind.mean_up_s > 0.0 {
            let until = now + us(kind.mean_up_s * exponential(&mut w.random));
            self.time.set_at(until, Event::Down { worker: i, life });
        }
        self.command(Command::Register { worker: peer, incarnation: life });
        self.send_version(i);
        (0..slots).for_each(|_| self.time.set_at(at, Event::Asks { worker: i, life }));
    }

    fn goes(&mut self, i: usize) {
        self.pay(i);
        let now = self.time.now_us();
        let w = &mut self.workers[i];
        w.up = false;
        w.making.clear();
        if w.hired {
            w.returns = true;
            let back = now + us(self.kinds[w.kind].mean_down_s * exponential(&mut w.random));
            self.time.set_at(back, Event::Up(i));
        }
        let worker = w.peer.clone();
        self.command(Command::Disconnect { worker });
    }

    /// Prices and workers are other ones now.
    fn change(&mut self, index: usize) {
        let change = &self.scenario.changes[index];
        let kind = self.kinds.iter().position(|k| k.name == change.kind).expect("scenarios are validated");
        (0..self.workers.len()).for_each(|i| self.pay(i));
        let k = &mut self.kinds[kind];
        k.price_per_hour = change.price_per_hour.unwrap_or(k.price_per_hour);
        k.available = change.available.unwrap_or(k.available);
        let most = k.available;
        self.resize(kind, self.hired(kind).min(most));
    }

    /// Workers of a kind in the fleet.
    fn hired(&self, kind: usize) -> u32 {
        self.workers.iter().filter(|w| w.hired && w.kind == kind).count() as u32
    }

    /// Takes workers of a kind into the fleet or lets them go, the last ones first, until there are `n`.
    fn resize(&mut self, kind: usize, n: u32) {
        let now = self.time.now_us();
        for _ in n..self.hired(kind) {
            let last = self.workers.iter().rposition(|w| w.hired && w.kind == kind);
            let i = last.expect("they were counted");
            self.workers[i].hired = false;
            if self.workers[i].up {
                self.goes(i);
            }
        }
        for _ in self.hired(kind)..n {
            let free = self.workers.iter().position(|w| !w.hired && w.kind == kind);
            let i = free.unwrap_or_else(|| self.enrol(kind));
            self.workers[i].hired = true;
            if !self.workers[i].returns {
                self.workers[i].returns = true;
                self.time.set_at(now, Event::Up(i));
            }
        }
    }

    /// A worker that has never been in the fleet.
    fn enrol(&mut self, kind: usize) -> usize {
        let index = self.workers.len();
        let key = (index as u64).to_le_bytes();
        let key = blake3::derive_key("echo-rollout simulated worker v1", &key);
        self.workers.push(Worker {
            peer: PeerId::from_ed25519(&key),
            kind,
            random: Seed(self.scenario.seed).stream("worker", index as u64),
            hired: false,
            up: false,
            returns: false,
            life: 0,
            paid_us: 0,
            asking: 0,
            making: BTreeMap::new(),
            held_up_us: 0,
            link_us: [0; 2],
        });
        index
    }

    /// Once a window: is another fleet worth it?
    fn look_at_fleet(&mut self) {
        let due = self.scenario.keep.is_some_and(|k| self.committed.is_multiple_of(k.window_steps));
        let Some(mut keeper) = self.keeper.take_if(|_| due) else { return };
        let (now, (began_us, trained_us)) = (self.time.now_us(), self.window);
        let utilisation = (self.trained_us - trained_us) as f64 / (now - began_us).max(1) as f64;
        let counts: Vec<u32> = (0..self.kinds.len()).map(|kind| self.hired(kind)).collect();
        let demand = self.scenario.demand();
        if let Some(plan) = keeper.after_window(&demand, &self.kinds, &counts, utilisation) {
            plan.counts.iter().enumerate().for_each(|(kind, n)| self.resize(kind, *n));
            self.changes.push(FleetChange {
                after_steps: self.committed,
                at_s: now as f64 / 1e6,
                workers: selected(&self.kinds, &plan.counts),
                price_per_hour: price_per_hour(&self.kinds, &plan.counts),
            });
        }
        self.keeper = Some(keeper);
        self.window = (now, self.trained_us);
    }

    /// The newest version sets out for a worker.
    fn send_version(&mut self, i: usize) {
        let (now, version) = (self.time.now_us(), self.dispatcher.version());
        let w = &mut self.workers[i];
        if !w.up {
            return;
        }
        // Peers that have it pass it on, so every worker gets it at the speed of its own link.
        let kind = &self.kinds[w.kind];
        w.link_us[0] = w.link_us[0].max(now) + us(kind.transfer_s(self.scenario.update_mb));
        let at = w.link_us[0] + us(kind.latency_s());
        let life = w.life;
        self.time.set_at(at, Event::Has { worker: i, life, version });
    }

    /// Everything that is asked for and may be made.
    fn lease(&mut self) {
        let now = self.time.now_us();
        for i in 0..self.workers.len() {
            let (max, worker) = (self.workers[i].asking, self.workers[i].peer.clone());
            if max == 0 || self.dispatcher.n_pending() == 0 {
                continue;
            }
            let Outcome::Leased(leases) = self.command(Command::Lease { worker, max }) else { continue };
            let w = &mut self.workers[i];
            let kind = &self.kinds[w.kind];
            for lease in leases {
                w.asking -= 1;
                let seconds = kind.latency_s() + kind.rollout_s * length(kind.rollout_sigma, &mut w.random);
                let making = Making { lease, held_up_us: w.held_up_us };
                w.making.insert(lease.id, making);
                let event = Event::Made { worker: i, life: w.life, lease: lease.id };
                self.time.set_at(now + us(seconds), event);
            }
        }
    }

    fn made(&mut self, worker: usize, life: u64, lease: LeaseId) {
        let now = self.time.now_us();
        let w = &mut self.workers[worker];
        let Some(making) = w.making.get_mut(&lease) else { return };
        let held_up = w.held_up_us - making.held_up_us;
        if held_up > 0 {
            making.held_up_us = w.held_up_us;
            return self.time.set_at(now + held_up, Event::Made { worker, life, lease });
        }
        let lease = making.lease;
        w.making.remove(&lease.id);
        let kind = &self.kinds[w.kind];
        let latency_us = us(kind.latency_s());
        w.link_us[1] = w.link_us[1].max(now) + us(kind.transfer_s(self.scenario.trajectory_kb / 1000.0));
        self.time.set_at(w.link_us[1] + latency_us, Event::Arrives { worker, lease });
        self.time.set_at(now + latency_us, Event::Asks { worker, life });
    }

    fn trained(&mut self) {
        self.trained_us += us(self.scenario.train_s);
        let now_ms = self.time.now_us() / 1000;
        match &mut self.coordinator {
            Coordinator::Sequential(sync) => sync.handle_trained().expect("a batch was in training"),
            Coordinator::Async(c) => c.handle_trained(now_ms).expect("a batch was in training"),
        }
        self.training = None;
    }

    /// What the coordinator wants done, as far as it can be done now.
    fn coordinate(&mut self) {
        loop {
            let (now_ms, view) = (self.time.now_us() / 1000, View::of(&self.dispatcher));
            let action = match &mut self.coordinator {
                Coordinator::Sequential(_) if self.training.is_some() => None,
                Coordinator::Sequential(sync) => sync.poll(now_ms, &view),
                Coordinator::Async(c) => c.poll(&view),
            };
            match action {
                None => return,
                Some(Action::Publish(version)) => self.publish(version),
                Some(Action::OpenGroups { up_to }) => self.open(up_to),
                Some(Action::Train { step, groups }) if !self.train(step, groups) => return,
                Some(Action::Train { .. }) => {}
                Some(Action::Commit { step }) => self.commit(step),
            }
        }
    }

    fn publish(&mut self, version: PolicyVersion) {
        self.command(Command::SetVersion(version));
        let now_ms = self.time.now_us() / 1000;
        match &mut self.coordinator {
            Coordinator::Sequential(sync) => {
                sync.handle_published(now_ms).expect("asked for");
                let at = self.time.now_us() + 1000 * self.ack_timeout_ms;
                self.time.set_at(at, Event::Tick);
            }
            Coordinator::Async(c) => {
                c.handle_publishing(version).expect("asked for");
                c.handle_published().expect("just begun");
            }
        }
        (0..self.workers.len()).for_each(|i| self.send_version(i));
    }

    fn open(&mut self, up_to: u32) {
        if let Coordinator::Sequential(sync) = &mut self.coordinator {
            sync.handle_opened().expect("asked for");
            let newest = Some(self.dispatcher.version());
            for (worker, version) in self.dispatcher.active_versions() {
                if version != newest {
                    self.command(Command::Disconnect { worker });
                }
            }
        }
        self.command(Command::OpenGroups { up_to });
    }

    /// Whether there was a batch.
    fn train(&mut self, step: u64, groups: u32) -> bool {
        let Outcome::Groups(batch) = self.command(Command::Take { step, groups }) else { return false };
        if batch.is_empty() {
            return false;
        }
        if self.committed >= self.scenario.warmup_steps {
            let ages = batch.iter().flat_map(|g| &g.trajectories).map(|t| step - t.oldest_version().0);
            ages.for_each(|age| self.staleness.add(age));
        }
        self.training = Some(step);
        let now_ms = self.time.now_us() / 1000;
        if let Coordinator::Async(c) = &mut self.coordinator {
            let ready = self.dispatcher.ready_groups().len();
            c.handle_training(now_ms, ready).expect("it was waiting");
        }
        self.time.set_at(self.time.now_us() + us(self.scenario.train_s), Event::Trained);
        true
    }

    fn commit(&mut self, step: u64) {
        self.command(Command::Commit { step });
        let now_ms = self.time.now_us() / 1000;
        match &mut self.coordinator {
            Coordinator::Sequential(sync) => sync.handle_committed().expect("asked for"),
            Coordinator::Async(c) => c.handle_committed(now_ms).expect("asked for"),
        }
        self.committed += 1;
        if self.committed == self.scenario.warmup_steps {
            self.began = Some((self.time.now_us(), self.trained_us, self.paid()));
        }
        self.look_at_fleet();
    }
}

/// Workers that a run may know: those of the first fleet, or where fleets change all that there will ever be.
fn most_workers(s: &Scenario, counts: &[u32]) -> u32 {
    let ever = |kind: &Kind| {
        let later = s.changes.iter().filter(|c| c.kind == kind.name).filter_map(|c| c.available).max();
        kind.available.max(later.unwrap_or(0))
    };
    let each = s.workers.iter().zip(counts).map(|(kind, n)| if s.keep.is_some() { ever(kind) } else { *n });
    each.fold(0_u32, u32::saturating_add).max(1)
}

/// Log-normal with mean 1.
fn length(sigma: f64, random: &mut Stream) -> f64 {
    if sigma == 0.0 {
        return 1.0;
    }
    // Box and Muller.
    let (radius, angle) = ((-2.0 * (1.0 - random.unit()).ln()).sqrt(), std::f64::consts::TAU * random.unit());
    (sigma * radius * angle.cos() - 0.5 * sigma * sigma).exp()
}

/// Exponential with mean 1.
fn exponential(random: &mut Stream) -> f64 {
    -(1.0 - random.unit()).ln()
}

fn trajectory(lease: Lease, worker: &PeerId) -> Trajectory {
    let step = Step { token: 1, logprob: 0.0, version: lease.version, trainable: true };
    let reward = Reward::new(0.0, Vec::new(), &(0.0..=1.0)).expect("within its range");
    let sample = Sample {
        lease,
        worker: worker.clone(),
        environment: "simulated".to_owned(),
        prompt: vec![0],
        steps: vec![step],
        finish: Finish::Length,
        reward,
        commitment: Bytes::new(),
    };
    Trajectory::new(sample).expect("one token each")
}
