//! Every interleaving of a small run: two workers, two steps of one group of two samples, and up to so many faults anywhere. Where
//! `faults` draws schedules, this leaves none out.
//!
//! Faults are a crash of the trainer (which loses any part of what was not yet on disk), a lost answer to a question for work or
//! to a submission, a restart of a worker, a lease that runs out in its hands, a lease that it gives back, a group of equal
//! rewards. What was trained on is judged by the checkpoint, not by the dispatcher's counters.

use std::collections::{BTreeMap, HashSet};

use swarm_wire::{PeerId, PolicyVersion, RunId};

use super::*;
use crate::lease::Lease;
use crate::rollout::tests::sample;
use crate::staleness::StalenessBound;

const STEPS: u64 = 2;
const SAMPLES: u32 = 2;
const WORKERS: u8 = 2;

/// The run, its trainer's disk, and what is in the hands of its workers.
#[derive(Debug, Clone)]
struct Model {
    dispatcher: Dispatcher,
    /// The dispatcher as the disk has it for certain, and the commands since, of which a crash leaves any number.
    on_disk: Dispatcher,
    written: Vec<(u64, Command)>,
    now_ms: u64,
    /// Steps in the checkpoint, and the samples that they trained on.
    steps: u64,
    trained: BTreeMap<(GroupId, u32), LeaseId>,
    /// What the learner has, and whether the checkpoint has it too.
    batch: Option<Vec<Group>>,
    saved: bool,
    workers: Vec<Hands>,
    faults: u32,
}

/// A worker: what it was told and not yet answered for.
#[derive(Debug, Clone, Default)]
struct Hands {
    incarnation: u64,
    held: Vec<Lease>,
}

fn worker(i: usize) -> PeerId {
    PeerId::from_ed25519(&[i as u8 + 1; 32])
}

impl Model {
    fn new(budget: u64, faults: u32) -> Self {
        let config = DispatchConfig {
            group_size: SAMPLES,
            groups_per_step: 1,
            lease_ttl_ms: 100,
            max_attempts: 1000,
            staleness: StalenessBound(budget),
            ..DispatchConfig::new(RunId(1))
        };
        let dispatcher = Dispatcher::new(config).unwrap();
        Self {
            on_disk: dispatcher.clone(),
            dispatcher,
            written: Vec::new(),
            now_ms: 0,
            steps: 0,
            trained: BTreeMap::new(),
            batch: None,
            saved: false,
            workers: vec![Hands { incarnation: 1, held: Vec::new() }; usize::from(WORKERS)],
            faults,
        }
    }

    /// Two models of the same key have the same future.
    fn key(&self) -> [u8; 32] {
        let Self { on_disk, written, now_ms, steps, trained, batch, saved, workers, faults, .. } = self;
        let batch = batch.is_some();
        let all = (on_disk, written, now_ms, steps, trained, batch, saved, workers, faults);
        *blake3::hash(format!("{all:?}").as_bytes()).as_bytes()
    }

    fn handle(&mut self, command: Command, durable: bool) -> Outcome {
        let outcome = self.dispatcher.handle(self.now_ms, command.clone());
        self.dispatcher.check_invariants().unwrap();
        if durable {
            self.on_disk = self.dispatcher.clone();
            self.written.clear();
        } else {
            self.written.push((self.now_ms, command));
        }
        outcome
    }

    /// What the trainer may do next.
    fn trainer(&self, next: &mut Vec<Self>) {
        let ahead = self.dispatcher.config().staleness.0 + 1;
        let learning = u64::from(self.saved);
        let up_to = ahead.min(STEPS - (self.steps - learning)) as u32;
        let mut then = |change: &dyn Fn(&mut Self)| {
            let mut model = self.clone();
            change(&mut model);
            next.push(model);
        };
        if self.dispatcher.version().0 < self.steps {
            then(&|m| _ = m.handle(Command::SetVersion(PolicyVersion(m.steps)), true));
        }
        if self.dispatcher.n_open_groups() < up_to as usize {
            then(&|m| _ = m.handle(Command::OpenGroups { up_to }, true));
        }
        if self.batch.is_none() && self.steps < STEPS && !self.dispatcher.ready_groups().is_empty() {
            then(&|m| {
                if let Outcome::Groups(groups) = m.handle(Command::Take { step: m.steps, groups: 1 }, true) {
                    m.batch = Some(groups).filter(|groups| !groups.is_empty());
                }
            });
        }
        let Some(batch) = &self.batch else { return };
        if self.saved {
            then(&|m| {
                m.handle(Command::Commit { step: m.steps - 1 }, true);
                (m.batch, m.saved) = (None, false);
            });
            return;
        }
        then(&|m| {
            for t in batch.iter().flat_map(|g| &g.trajectories) {
                let place = (t.lease().group, t.lease().sample_index);
                assert!(m.trained.insert(place, t.id()).is_none(), "{place:?} is trained on twice");
                let age = m.steps.checked_sub(t.oldest_version().0).expect("nothing is from the future");
                assert!(age <= m.dispatcher.config().staleness.0, "{} is {age} versions old", t.id());
            }
            assert_eq!(batch.iter().map(|g| g.trajectories.len()).sum::<usize>(), SAMPLES as usize);
            m.steps += 1;
            m.saved = true;
        });
        if self.faults > 0 {
            then(&|m| {
                m.faults -= 1;
                m.handle(Command::GiveBack { step: m.steps, flat: vec![batch[0].id] }, true);
                m.batch = None;
            });
        }
    }

    /// What worker `i` may do next.
    fn worker(&self, i: usize, next: &mut Vec<Self>) {
        let id = worker(i);
        let answers = if self.faults > 0 { &[false, true][..] } else { &[false][..] };
        for lost in answers.iter().copied() {
            let mut model = self.clone();
            let (incarnation, version) = (model.workers[i].incarnation, model.dispatcher.version());
            let here = model.dispatcher.incarnation(&id) == Some(incarnation)
                && !model.dispatcher.is_gone(&id)
                && !model.dispatcher.is_unheard(&id);
            if !here {
                model.handle(Command::Register { worker: id.clone(), incarnation }, false);
            }
            if model.dispatcher.active_version(&id) != Some(version) {
                model.handle(Command::Acknowledge { worker: id.clone(), version }, false);
            }
            // As the collector does: a question that finds nothing to make is not written down.
            let may = model.dispatcher.can_lease(model.now_ms, &id);
            if may
                && let Outcome::Leased(leases) =
                    model.handle(Command::Lease { worker: id.clone(), max: 1 }, false)
                && !lost
            {
                model.workers[i].held.extend(leases);
            }
            if may || !lost {
                model.faults -= u32::from(lost);
                next.push(model);
            }
            for at in 0..self.workers[i].held.len() {
                let mut model = self.clone();
                model.faults -= u32::from(lost);
                let lease = model.workers[i].held[at];
                let trajectory = Trajectory::new(sample(lease, &id)).unwrap();
                // As the collector does: what changes nothing is answered from the books.
                if model.dispatcher.answer(&id, lease.id).is_none() {
                    model.handle(Command::Submit { trajectory }, true);
                }
                if !lost {
                    model.workers[i].held.remove(at);
                }
                next.push(model);
            }
        }
        if self.faults > 0 {
            let mut restarted = self.clone();
            restarted.faults -= 1;
            restarted.workers[i] = Hands { incarnation: self.workers[i].incarnation + 1, held: Vec::new() };
            next.push(restarted);
            if let Some(lease) = self.workers[i].held.first().map(|lease| lease.id) {
                let mut failed = self.clone();
                failed.faults -= 1;
                failed.workers[i].held.remove(0);
                failed.handle(Command::Fail { worker: id, lease, aborted: false }, true);
                next.push(failed);
            }
        }
    }

    /// The trainer's process ends and starts again with any part of what it wrote last.
    fn crash(&self, next: &mut Vec<Self>) {
        for kept in 0..=self.written.len() {
            let mut model = self.clone();
            model.faults -= 1;
            (model.batch, model.saved) = (None, false);
            model.dispatcher = self.on_disk.clone();
            for (at, command) in &self.written[..kept] {
                model.dispatcher.handle(*at, command.clone());
            }
            // The run's clock goes on where the journal ends.
            model.now_ms = model.dispatcher.now_ms;
            model.handle(Command::Recover { steps: model.steps }, true);
            for (place, lease) in &model.trained {
                let state = model.dispatcher.leases.state(*lease);
                assert_eq!(state, Some(LeaseState::Consumed), "{place:?} is in the checkpoint");
            }
            next.push(model);
        }
    }

    /// All that can come next.
    fn next(&self) -> Vec<Self> {
        let mut next = Vec::new();
        self.trainer(&mut next);
        for i in 0..usize::from(WORKERS) {
            self.worker(i, &mut next);
        }
        // A lease that is in nobody's hands runs out; another one may.
        let held = |id: LeaseId| self.workers.iter().any(|w| w.held.iter().any(|l| l.id == id));
        if let Some((at, id)) = self.dispatcher.deadlines.first().copied()
            && (!held(id) || self.faults > 0)
        {
            let mut model = self.clone();
            model.faults -= u32::from(held(id));
            model.now_ms = at;
            model.handle(Command::Tick, false);
            next.push(model);
        }
        if self.faults > 0 {
            self.crash(&mut next);
        }
        next
    }

    /// Nothing is left to do.
    fn assert_finished(&self) {
        let counts = self.dispatcher.counts();
        let samples = STEPS * u64::from(SAMPLES);
        assert_eq!((self.steps, self.trained.len() as u64), (STEPS, samples), "it stands still: {self:?}");
        assert_eq!((counts.consumed, counts.open), (samples, 0), "{counts:?}");
        assert_eq!(counts.leased, counts.consumed + counts.dropped.iter().sum::<u64>());
    }
}

/// Every state that can be reached; how many there are, and in how many of them nothing is left to do.
fn explore(start: Model) -> (usize, usize) {
    let mut seen = HashSet::from([start.key()]);
    let (mut open, mut ends) = (vec![start], 0);
    while let Some(model) = open.pop() {
        let here = model.key();
        let next = model.next();
        let others = next.iter().filter(|n| n.key() != here && n.faults == model.faults).count();
        if others == 0 {
            model.assert_finished();
            ends += 1;
        }
        open.extend(next.into_iter().filter(|n| seen.insert(n.key())));
    }
    (seen.len(), ends)
}

#[test]
fn no_interleaving_of_a_small_run_loses_or_doubles_anything() {
    for (budget, faults, least) in [(0, 1, 1000), (1, 0, 100)] {
        let (states, ends) = explore(Model::new(budget, faults));
        println!("budget {budget}, {faults} faults: {states} states, {ends} ends");
        assert!(states > least && ends > 1, "budget {budget}: {states} states, {ends} ends");
    }
}
