//! A worker's time between two registrations: questions, snapshots, samples and submissions side by side.

use std::collections::HashMap;
use std::future::pending;
use std::time::Duration;

use swarm_wire::PolicyVersion;
use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::generated::swarm::v1::Signed;
use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};

use lattica_net::StatusCode;

use super::openings;
use super::sample::{GivenBack, Made, sample};
use super::{InFlight, Worker, WorkerError, status};
use crate::lease::{Lease, LeaseId};
use crate::service::snapshot_watcher::{SnapshotError, SnapshotWatcher, Staged};
use crate::service::{AskError, BoxFuture, LEASE, LONG_POLL, SUBMIT, ask};

/// How a shift ends.
pub(super) enum End {
    /// The trainer does not know this worker any more. The watcher is here unless a snapshot was on its way.
    Register(Option<SnapshotWatcher>),
    /// The run is over, or the worker was asked to stop and has delivered everything.
    Finished,
}

type Reply<T> = BoxFuture<'static, Result<T, AskError>>;

/// A snapshot on its way.
enum Staging {
    /// None.
    Nothing,
    /// Being fetched and hashed.
    Fetching(BoxFuture<'static, Result<Staged, SnapshotError>>, PolicyVersion),
    /// Here; samples in the making are finished first.
    Draining(Staged),
}

/// The state of one shift.
pub(super) struct Shift<'a> {
    worker: &'a mut Worker,
    watcher: SnapshotWatcher,
    staging: Staging,
    samples: JoinSet<Result<Made, GivenBack>>,
    leases: HashMap<Id, LeaseId>,
    /// Made and not yet on its way.
    made: proto::SubmitRequest,
    /// On its way, until it is answered.
    sent: Option<proto::SubmitRequest>,
    /// The open question and for how many leases there was room.
    asking: Option<(Reply<proto::LeaseReply>, u32)>,
    /// Questions with room that say an older version. The trainer answers them when it hears of the newer one.
    outdated: JoinSet<Result<proto::LeaseReply, AskError>>,
    submitting: Option<Reply<proto::SubmitReply>>,
    /// Pause before the next question.
    pause: Duration,
    stop: watch::Receiver<bool>,
    /// Nothing is begun any more.
    stopping: bool,
}

/// What happened.
enum Event {
    Sampled(Result<(Id, Result<Made, GivenBack>), JoinError>),
    Leased(Result<proto::LeaseReply, AskError>),
    LeasedBefore(Result<proto::LeaseReply, AskError>),
    Submitted(Result<proto::SubmitReply, AskError>),
    Fetched(Result<Staged, SnapshotError>),
    Stop,
}

/// The value of a future that may not be there.
async fn of<T>(future: Option<&mut BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

impl<'a> Shift<'a> {
    pub(super) fn new(worker: &'a mut Worker, watcher: SnapshotWatcher) -> Self {
        let stop = worker.stop.subscribe();
        Self {
            worker,
            watcher,
            staging: Staging::Nothing,
            samples: JoinSet::new(),
            leases: HashMap::new(),
            made: proto::SubmitRequest::default(),
            sent: None,
            asking: None,
            outdated: JoinSet::new(),
            submitting: None,
            pause: Duration::ZERO,
            stop,
            stopping: false,
        }
    }

    /// Works until the trainer sends the worker to register again, or home.
    pub(super) async fn work(mut self) -> Result<End, WorkerError> {
        loop {
            self.install().await;
            self.ask_for_more();
            self.submit();
            if self.stopping && self.has_delivered() {
                return Ok(End::Finished);
            }
            let fetching = match &mut self.staging {
                Staging::Fetching(fetch, _) => Some(fetch),
                Staging::Nothing | Staging::Draining(_) => None,
            };
            let event = tokio::select! {
                // What is finished is taken in before anything is asked or sent.
                biased;
                Some(done) = self.samples.join_next_with_id() => Event::Sampled(done),
                fetched = of(fetching) => Event::Fetched(fetched),
                reply = of(self.submitting.as_mut()) => Event::Submitted(reply),
                Some(Ok(reply)) = self.outdated.join_next() => Event::LeasedBefore(reply),
                reply = of(self.asking.as_mut().map(|(reply, _)| reply)) => Event::Leased(reply),
                _ = self.stop.wait_for(|stop| *stop), if !self.stopping => Event::Stop,
            };
            let end = match event {
                Event::Sampled(done) => {
                    self.sampled(done);
                    while let Some(done) = self.samples.try_join_next_with_id() {
                        self.sampled(done);
                    }
                    None
                }
                Event::Fetched(fetched) => {
                    self.fetched(fetched);
                    None
                }
                Event::Submitted(reply) => self.submitted(reply)?,
                Event::Leased(reply) => {
                    self.asking = None;
                    self.leased(reply)?
                }
                Event::LeasedBefore(reply) => self.leased(reply)?,
                Event::Stop => {
                    self.stopping = true;
                    None
                }
            };
            match end {
                None => {}
                Some(End::Register(_)) => {
                    let watcher = matches!(self.staging, Staging::Nothing).then_some(self.watcher);
                    return Ok(End::Register(watcher));
                }
                Some(End::Finished) => return Ok(End::Finished),
            }
        }
    }

    /// Whether nothing is in the making, on its way or perhaps just being leased.
    fn has_delivered(&self) -> bool {
        let may_lease = self.asking.as_ref().is_some_and(|(_, room)| *room > 0) || !self.outdated.is_empty();
        self.samples.is_empty() && self.sent.is_none() && !may_lease
    }

    /// The newest version that this worker has or is about to have.
    fn known(&self) -> Option<PolicyVersion> {
        match &self.staging {
            Staging::Nothing => self.watcher.active(),
            Staging::Fetching(_, version) => Some(*version),
            Staging::Draining(staged) => Some(staged.version()),
        }
    }

    /// Keeps one question open, so that news come at once. A question without room for leases is asked again as soon as
    /// there is room; one with room is never taken back, because its answer may hold leases.
    fn ask_for_more(&mut self) {
        if self.stopping {
            return;
        }
        let draining = matches!(self.staging, Staging::Draining(_));
        let busy = u32::try_from(self.samples.len()).unwrap_or(u32::MAX);
        let room = if draining { 0 } else { self.worker.config.max_leases.saturating_sub(busy) };
        if self.asking.as_ref().is_some_and(|(_, max)| *max > 0 || room == 0) {
            return;
        }
        let question = proto::LeaseRequest {
            incarnation: self.worker.incarnation,
            active_version: self.watcher.active().map(|v| v.0),
            max_leases: room,
            known_version: self.known().map(|v| v.0),
            leaving: false,
        };
        let pause = std::mem::take(&mut self.pause);
        self.asking = Some((self.call(LEASE, question, pause), room));
    }

    /// Sends what was made, one submission at a time; what is made meanwhile goes with the next.
    fn submit(&mut self) {
        if self.sent.is_some() || (self.made.trajectories.is_empty() && self.made.failed.is_empty()) {
            return;
        }
        let mut request = std::mem::take(&mut self.made);
        request.incarnation = self.worker.incarnation;
        let only_given_back = request.trajectories.is_empty() && request.failed.iter().any(|f| !f.aborted);
        if only_given_back {
            // Whatever is wrong here is still wrong at once; others may take the samples meanwhile.
            self.pause = self.worker.config.retry_pause;
        }
        self.submitting = Some(self.call(SUBMIT, request.clone(), Duration::ZERO));
        self.sent = Some(request);
    }

    fn call<Q: prost::Message + 'static, A: prost::Message + Default + 'static>(
        &self,
        method: &'static str,
        question: Q,
        pause: Duration,
    ) -> Reply<A> {
        let (node, trainer) = (self.worker.node.clone(), self.worker.config.trainer.clone());
        let timeout = self.worker.config.call_timeout.max(LONG_POLL * 2);
        Box::pin(async move {
            tokio::time::sleep(pause).await;
            ask(&node, &trainer, method, &question, timeout).await
        })
    }

    fn leased(&mut self, reply: Result<proto::LeaseReply, AskError>) -> Result<Option<End>, WorkerError> {
        let unknown = is_unknown(&reply);
        let Some(reply) = self.worker.judge(reply)? else {
            self.pause = self.worker.config.retry_pause;
            return Ok(unknown.then_some(End::Register(None)));
        };
        if reply.finished {
            return Ok(Some(End::Finished));
        }
        if let Some(signed) = reply.snapshot {
            self.stage(signed);
        }
        for lease in reply.leases.into_iter().take(self.worker.config.max_leases as usize) {
            let id = LeaseId(lease.id);
            match Lease::try_from(lease) {
                Ok(lease) if self.stopping => {
                    let reason = "this worker was asked to stop".to_owned();
                    self.give_back(lease.id, GivenBack { reason, aborted: true });
                }
                Ok(lease) => self.begin(lease),
                Err(error) => self.give_back(id, GivenBack::failed(error)),
            }
        }
        Ok(None)
    }

    fn begin(&mut self, lease: Lease) {
        let active = self.watcher.active();
        if active != Some(lease.version) {
            let reason = format!("leased for {} but {active:?} is installed", lease.version);
            // The question was asked before another version was installed.
            let aborted = active.is_some_and(|active| active > lease.version);
            return self.give_back(lease.id, GivenBack { reason, aborted });
        }
        let w = &*self.worker;
        let task = self.samples.spawn(sample(
            w.engine.engine().clone(),
            std::sync::Arc::clone(&w.referees),
            w.text.clone(),
            w.committer.clone(),
            (lease, self.watcher.adapter_hash(), w.node.peer_id()),
        ));
        self.leases.insert(task.id(), lease.id);
    }

    fn sampled(&mut self, done: Result<(Id, Result<Made, GivenBack>), JoinError>) {
        let (id, made) = match done {
            Ok((id, made)) => (id, made),
            Err(error) => {
                (error.id(), Err(GivenBack::failed("making the sample crashed; the worker's log says where")))
            }
        };
        let Some(lease) = self.leases.remove(&id) else { return };
        match made {
            Ok((trajectory, opener)) => {
                self.worker.stats.send_modify(|s| {
                    s.sampled += 1;
                    s.tokens += trajectory.steps().len() as u64;
                    s.reward_sum += f64::from(trajectory.reward().value());
                });
                if let Some(opener) = opener {
                    openings::lock(&self.worker.openings).keep(lease, opener);
                }
                self.made.trajectories.push((&trajectory).into());
            }
            Err(back) => self.give_back(lease, back),
        }
    }

    fn give_back(&mut self, lease: LeaseId, back: GivenBack) {
        let GivenBack { reason, aborted } = back;
        tracing::info!(%lease, reason, "lease given back");
        self.worker.stats.send_modify(|s| s.failed += 1);
        self.made.failed.push(proto::FailedLease { lease: lease.0, reason, aborted });
    }

    /// An answer to what was sent. Repeats are harmless: the trainer knows each lease.
    fn submitted(&mut self, reply: Result<proto::SubmitReply, AskError>) -> Result<Option<End>, WorkerError> {
        self.submitting = None;
        let unknown = is_unknown(&reply);
        let Some(reply) = self.worker.judge(reply)? else {
            if unknown {
                return Ok(Some(End::Register(None)));
            }
            // Not delivered, or the trainer could not write it down.
            let again = self.sent.clone().unwrap_or_default();
            self.submitting = Some(self.call(SUBMIT, again, self.worker.config.retry_pause));
            return Ok(None);
        };
        self.sent = None;
        let taken = [proto::SubmitStatus::Accepted, proto::SubmitStatus::Duplicate];
        let accepted = reply.outcomes.iter().filter(|o| taken.contains(&o.status())).count() as u64;
        self.worker.stats.send_modify(|s| {
            s.accepted += accepted;
            s.refused += reply.outcomes.len() as u64 - accepted;
        });
        Ok(None)
    }

    /// Begins to fetch a newer snapshot; sampling goes on meanwhile.
    fn stage(&mut self, signed: Signed) {
        match self.watcher.check(signed) {
            Ok(Some(manifest)) => {
                let version = manifest.version;
                self.staging = Staging::Fetching(self.watcher.fetch(manifest), version);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "snapshot refused");
                self.pause = self.worker.config.retry_pause;
            }
        }
    }

    fn fetched(&mut self, fetched: Result<Staged, SnapshotError>) {
        self.staging = match fetched {
            Ok(staged) => Staging::Draining(staged),
            Err(error) => {
                tracing::warn!(%error, "snapshot not fetched");
                self.pause = self.worker.config.retry_pause;
                // An open question would not be answered with it again before its time is over.
                self.asking = self.asking.take().filter(|(_, max)| *max > 0);
                Staging::Nothing
            }
        };
    }

    /// Installs a snapshot that is here, as soon as the samples in the making allow.
    async fn install(&mut self) {
        if !matches!(self.staging, Staging::Draining(_)) {
            return;
        }
        match self.worker.config.in_flight {
            InFlight::Finish if !self.samples.is_empty() => return,
            InFlight::Finish | InFlight::Switch => {}
            InFlight::Abort => {
                self.samples.abort_all();
                // Those that were finished in this moment count.
                while let Some(done) = self.samples.join_next_with_id().await {
                    match done {
                        Err(error) if error.is_cancelled() => {
                            if let Some(lease) = self.leases.remove(&error.id()) {
                                let reason = "broken off for a newer policy".to_owned();
                                self.give_back(lease, GivenBack { reason, aborted: true });
                            }
                        }
                        done => self.sampled(done),
                    }
                }
            }
        }
        let Staging::Draining(staged) = std::mem::replace(&mut self.staging, Staging::Nothing) else {
            return;
        };
        match self.watcher.install(staged).await {
            Ok(version) => self.worker.stats.send_modify(|s| s.version = Some(version.0)),
            Err(error) => {
                tracing::warn!(%error, "snapshot not installed");
                self.pause = self.worker.config.retry_pause;
            }
        }
        // The open question says the old version.
        if let Some((reply, _)) = self.asking.take().filter(|(_, max)| *max > 0) {
            self.outdated.spawn(reply);
        }
    }
}

/// Whether the trainer says that it does not know this worker.
fn is_unknown<T>(reply: &Result<T, AskError>) -> bool {
    let Err(AskError::Call(call)) = reply else { return false };
    status(call).is_some_and(|s| matches!(s.code, StatusCode::FailedPrecondition | StatusCode::NotFound))
}
