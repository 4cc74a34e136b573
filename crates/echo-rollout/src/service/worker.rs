//! A rollout worker: register, keep the policy current, sample what is leased, submit until it is acknowledged.
//!
//! Asking, fetching, sampling and submitting go on at the same time (`worker/shift.rs`): a finished sample is submitted at once
//! and its place is taken by another. [`Stopper::stop`] lets a worker finish what it has begun and say goodbye; dropping the
//! future of [`Worker::run`] stops it at once, and its leases expire and go to others.

mod openings;
mod sample;
mod shift;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use lattica_net::{CallError, Node, Status, StatusCode};
use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::{PeerId, RunId};
use tokio::sync::watch;

use super::payload_source::PayloadSource;
use super::policy_engine::PolicyEngine;
use super::referee::Referees;
use super::snapshot_watcher::SnapshotWatcher;
use super::{AskError, LEASE, LONG_POLL, OPEN, REGISTER, ask};
use crate::environment::Environment;
use crate::lease::Lease;
use crate::rollout::Step;
use crate::text::Text;
use openings::Openings;
use shift::{End, Shift};

/// What becomes of samples in the making when a newer policy is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InFlight {
    /// They are finished with the old one, and nothing is begun meanwhile.
    #[default]
    Finish,
    /// They go on with the new one: each token carries the version that sampled it. The engine must be set to
    /// [`parallax_engine::OnSwap::Recompute`], which is its default. Not together with commitments, which are about one
    /// policy: such samples are given back.
    Switch,
    /// They are broken off and their leases given back, which counts against nobody.
    Abort,
}

/// How a worker behaves.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// The trainer, which must be connected or known by address.
    pub trainer: PeerId,
    /// Names the base checkpoint that the engine has loaded.
    pub base_model_id: String,
    /// Leases asked for at once. Default: 16.
    pub max_leases: u32,
    /// How long one call may take. Default: 10 s.
    pub call_timeout: Duration,
    /// Pause between tries when the trainer does not answer. Default: 250 ms.
    pub retry_pause: Duration,
    /// After this long without an answer of the trainer the worker ends. Default: 60 s.
    pub give_up: Duration,
    /// Commitments kept for auditors; the oldest go first. Default: 1024.
    pub openings: usize,
    /// Memory for them. Default: 256 MiB.
    pub openings_bytes: usize,
    /// What becomes of samples in the making when a newer policy is here. Default: they are finished.
    pub in_flight: InFlight,
    /// How long the environment may take to answer; a lease whose episode takes longer is given back. Default: 30 s.
    pub episode_timeout: Duration,
}

impl WorkerConfig {
    /// The defaults for `trainer` and a base model.
    pub fn new(trainer: PeerId, base_model_id: String) -> Self {
        Self {
            trainer,
            base_model_id,
            max_leases: 16,
            call_timeout: Duration::from_secs(10),
            retry_pause: Duration::from_millis(250),
            give_up: Duration::from_secs(60),
            openings: 1024,
            openings_bytes: 256 << 20,
            in_flight: InFlight::default(),
            episode_timeout: Duration::from_secs(30),
        }
    }
}

/// One finished sample, for a [`Committer`].
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// What was asked.
    pub lease: &'a Lease,
    /// The rendered prompt.
    pub prompt: &'a [u32],
    /// The completion as it is submitted: sampled tokens, and what the environment said between turns.
    pub steps: &'a [Step],
    /// The final-norm row `[H]` that produced each sampled token.
    pub rows: &'a [Vec<f32>],
    /// Hash of the installed adapter or of all weights; `None` for the base model.
    pub adapter_hash: Option<[u8; 32]>,
}

/// Binds a worker to what it computed. [`super::VeriCommitter`] is the usual one.
pub trait Committer: Send + Sync {
    /// The commitment that travels with the trajectory, and what can open it later.
    ///
    /// # Errors
    /// When no commitment can be made; the lease is given back then.
    fn commit(&self, work: &Work<'_>) -> Result<(Bytes, Box<dyn Opener>), CommitError>;
}

/// Opens one commitment.
pub trait Opener: Send {
    /// Answers an encoded challenge with an encoded opening.
    ///
    /// # Errors
    /// When the challenge is not one for this commitment.
    fn open(&self, challenge: &[u8]) -> Result<Bytes, CommitError>;

    /// Memory that it keeps.
    fn bytes(&self) -> usize;
}

/// A commitment that could not be made or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("commitment: {reason}")]
pub struct CommitError {
    /// Why.
    pub reason: String,
}

/// What a worker has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct WorkerStats {
    /// The installed version.
    pub version: Option<u64>,
    /// Trajectories sampled.
    pub sampled: u64,
    /// Of these, accepted by the trainer.
    pub accepted: u64,
    /// Of these, refused as late, stale or wrong.
    pub refused: u64,
    /// Leases given back.
    pub failed: u64,
    /// Tokens sampled.
    pub tokens: u64,
    /// Sum of the rewards.
    pub reward_sum: f64,
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The trainer does not want this worker.
    #[error("trainer {trainer} refuses this worker: {reason}")]
    Refused {
        /// The trainer.
        trainer: PeerId,
        /// Its reason.
        reason: String,
    },
    /// The trainer has not answered for a long time.
    #[error("trainer {trainer} has not answered for {silent_s} s: {reason}")]
    TrainerLost {
        /// The trainer.
        trainer: PeerId,
        /// Seconds without an answer.
        silent_s: u64,
        /// The last error.
        reason: String,
    },
}

/// A worker, ready to run.
pub struct Worker {
    node: Node,
    engine: PolicyEngine,
    referees: Arc<Referees>,
    text: Arc<dyn Text>,
    source: Arc<dyn PayloadSource>,
    committer: Option<Arc<dyn Committer>>,
    config: WorkerConfig,
    incarnation: u64,
    openings: Arc<Mutex<Openings>>,
    stats: watch::Sender<WorkerStats>,
    stop: watch::Sender<bool>,
    last_answer: Instant,
}

/// Ends a worker from outside.
#[derive(Debug, Clone)]
pub struct Stopper(watch::Sender<bool>);

impl Stopper {
    /// The worker begins no further sample, delivers those in the making, says goodbye and ends.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Worker({} for {})", self.node.peer_id(), self.config.trainer)
    }
}

impl Worker {
    /// A worker on `node` that samples with `engine`; without a committer its trajectories carry no commitments.
    pub fn new(
        node: Node,
        engine: impl Into<PolicyEngine>,
        environment: Arc<dyn Environment>,
        text: Arc<dyn Text>,
        source: Arc<dyn PayloadSource>,
        committer: Option<Arc<dyn Committer>>,
        config: WorkerConfig,
    ) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let incarnation = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let openings = Arc::new(Mutex::new(Openings::new(config.openings, config.openings_bytes)));
        let stats = watch::Sender::new(WorkerStats::default());
        let last_answer = Instant::now();
        let referees = Arc::new(Referees::new(environment, config.episode_timeout));
        Self {
            node,
            engine: engine.into(),
            referees,
            text,
            source,
            committer,
            config,
            incarnation,
            openings,
            stats,
            stop: watch::Sender::new(false),
            last_answer,
        }
    }

    /// What the worker has done, live.
    pub fn stats(&self) -> watch::Receiver<WorkerStats> {
        self.stats.subscribe()
    }

    /// Ends the worker from outside, gently.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Works until the run is finished or the worker's [`Stopper`] is used.
    ///
    /// # Errors
    /// The trainer refuses the worker or stays silent: see [`WorkerError`].
    pub async fn run(mut self) -> Result<(), WorkerError> {
        self.answer_challenges();
        let mut last: Option<SnapshotWatcher> = None;
        let mut stop = self.stop.subscribe();
        loop {
            let run = tokio::select! {
                run = self.register() => run?,
                _ = stop.wait_for(|stop| *stop) => return Ok(()),
            };
            let watcher = last.take().filter(|watcher| watcher.run() == run).unwrap_or_else(|| {
                // Numbers of leases begin anew.
                openings::lock(&self.openings).clear();
                SnapshotWatcher::new(
                    self.config.trainer.clone(),
                    run,
                    self.config.base_model_id.clone(),
                    self.engine.clone(),
                    Arc::clone(&self.source),
                )
            });
            match Shift::new(&mut self, watcher).work().await? {
                End::Register(watcher) => last = watcher,
                End::Finished => {
                    self.leave().await;
                    return Ok(());
                }
            }
        }
    }

    /// Says goodbye, so that nobody waits for this worker.
    async fn leave(&self) {
        let question =
            proto::LeaseRequest { incarnation: self.incarnation, leaving: true, ..Default::default() };
        let reply: Result<proto::LeaseReply, _> = self.ask(LEASE, &question).await;
        if let Err(error) = reply {
            tracing::debug!(%error, "goodbye not heard");
        }
    }

    /// Commitments are opened to the trainer, which passes on auditors' challenges, and to nobody else.
    fn answer_challenges(&self) {
        let (openings, trainer) = (Arc::clone(&self.openings), self.config.trainer.clone());
        self.node.handle(OPEN, move |peer, body| {
            let answer = openings::open(&openings, &trainer, &peer, &body);
            async move { answer }
        });
    }

    async fn register(&mut self) -> Result<RunId, WorkerError> {
        loop {
            let request = proto::RegisterRequest {
                incarnation: self.incarnation,
                base_model_id: self.config.base_model_id.clone(),
                environment: self.referees.environment().name().to_owned(),
                environment_version: self.referees.environment().version(),
            };
            let reply: Result<proto::RegisterReply, _> = self.ask(REGISTER, &request).await;
            match self.judge(reply)? {
                Some(reply) => return Ok(RunId(reply.run)),
                None => tokio::time::sleep(self.config.retry_pause).await,
            }
        }
    }

    async fn ask<A: prost::Message + Default>(
        &self,
        method: &'static str,
        question: &impl prost::Message,
    ) -> Result<A, AskError> {
        let timeout = self.config.call_timeout.max(LONG_POLL * 2);
        ask(&self.node, &self.config.trainer, method, question, timeout).await
    }

    /// An answer, or `None` when it is worth trying again.
    fn judge<A>(&mut self, reply: Result<A, AskError>) -> Result<Option<A>, WorkerError> {
        let trainer = self.config.trainer.clone();
        let error = match reply {
            Ok(answer) => {
                self.last_answer = Instant::now();
                return Ok(Some(answer));
            }
            Err(error) => error,
        };
        if let AskError::Call(call) = &error
            && let Some(status) = status(call)
        {
            self.last_answer = Instant::now();
            if matches!(status.code, StatusCode::PermissionDenied | StatusCode::InvalidArgument) {
                return Err(WorkerError::Refused { trainer, reason: status.message.clone() });
            }
        }
        let silent = self.last_answer.elapsed();
        if silent > self.config.give_up {
            let reason = error.to_string();
            return Err(WorkerError::TrainerLost { trainer, silent_s: silent.as_secs(), reason });
        }
        tracing::debug!(%error, "trainer does not answer");
        Ok(None)
    }
}

/// What the trainer said, if it said something.
fn status(error: &CallError) -> Option<&Status> {
    if let CallError::Remote { status, .. } = error { Some(status) } else { None }
}
