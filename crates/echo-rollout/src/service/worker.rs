//! A rollout worker: register, keep the policy current, sample what is leased, submit until it is acknowledged.
//!
//! Dropping the future of [`Worker::run`] stops the worker at once; its leases expire and go to others.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use lattica_net::{CallError, Node, Status, StatusCode};
use parallax_engine::{EngineHandle, FinishReason, Request, SamplingParams};
use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::{PeerId, PolicyVersion, RunId};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::referee::Referee;
use super::snapshot_watcher::{PayloadSource, SnapshotWatcher};
use super::{AskError, LEASE, LONG_POLL, OPEN, REGISTER, SUBMIT, ask, encode};
use crate::environment::{Environment, Task, Turn};
use crate::lease::{Lease, LeaseId};
use crate::rollout::{Finish, Sample, Step, Trajectory};
use crate::text::Text;
use crate::wire;

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
    /// Sampled tokens: `[T]`.
    pub tokens: &'a [u32],
    /// Their log-probabilities as submitted: `[T]`.
    pub logprobs: &'a [f32],
    /// The final-norm row `[H]` that produced each token: `[T]`.
    pub rows: &'a [Vec<f32>],
    /// Hash of the installed adapter; `None` for the base model.
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
    engine: EngineHandle,
    environment: Arc<dyn Environment>,
    text: Arc<dyn Text>,
    source: Arc<dyn PayloadSource>,
    committer: Option<Arc<dyn Committer>>,
    config: WorkerConfig,
    incarnation: u64,
    openings: Arc<Mutex<BTreeMap<LeaseId, Box<dyn Opener>>>>,
    stats: watch::Sender<WorkerStats>,
    last_answer: Instant,
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
        engine: EngineHandle,
        environment: Arc<dyn Environment>,
        text: Arc<dyn Text>,
        source: Arc<dyn PayloadSource>,
        committer: Option<Arc<dyn Committer>>,
        config: WorkerConfig,
    ) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let incarnation = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let (openings, stats) = (Arc::default(), watch::Sender::new(WorkerStats::default()));
        let last_answer = Instant::now();
        Self {
            node,
            engine,
            environment,
            text,
            source,
            committer,
            config,
            incarnation,
            openings,
            stats,
            last_answer,
        }
    }

    /// What the worker has done, live.
    pub fn stats(&self) -> watch::Receiver<WorkerStats> {
        self.stats.subscribe()
    }

    /// Works until the trainer refuses the worker or stays silent.
    ///
    /// # Errors
    /// See [`WorkerError`].
    pub async fn run(mut self) -> Result<(), WorkerError> {
        self.answer_challenges();
        loop {
            let run = self.register().await?;
            let mut watcher = SnapshotWatcher::new(
                self.config.trainer.clone(),
                run,
                self.config.base_model_id.clone(),
                self.engine.clone(),
                Arc::clone(&self.source),
            );
            while self.round(&mut watcher).await? {}
        }
    }

    /// Commitments are opened to the trainer, which passes on auditors' challenges, and to nobody else.
    fn answer_challenges(&self) {
        let (openings, trainer) = (Arc::clone(&self.openings), self.config.trainer.clone());
        self.node.handle(OPEN, move |peer, body| {
            let answer = open(&openings, &trainer, &peer, &body);
            async move { answer }
        });
    }

    async fn register(&mut self) -> Result<RunId, WorkerError> {
        loop {
            let request = proto::RegisterRequest {
                incarnation: self.incarnation,
                base_model_id: self.config.base_model_id.clone(),
                environment: self.environment.name().to_owned(),
                environment_version: self.environment.version(),
            };
            let reply: Result<proto::RegisterReply, _> = self.ask(REGISTER, &request).await;
            match self.judge(reply)? {
                Some(reply) => return Ok(RunId(reply.run)),
                None => tokio::time::sleep(self.config.retry_pause).await,
            }
        }
    }

    /// One question for work and what follows from it; false when the worker must register again.
    async fn round(&mut self, watcher: &mut SnapshotWatcher) -> Result<bool, WorkerError> {
        let request = proto::LeaseRequest {
            incarnation: self.incarnation,
            active_version: watcher.active().map(|v| v.0),
            max_leases: self.config.max_leases,
        };
        let reply: Result<proto::LeaseReply, _> = self.ask(LEASE, &request).await;
        let Some(reply) = self.judge(reply)? else {
            tokio::time::sleep(self.config.retry_pause).await;
            return Ok(false);
        };
        if let Some(signed) = reply.snapshot {
            match watcher.follow(signed).await {
                Ok(version) => self.stats.send_modify(|s| s.version = Some(version.0)),
                Err(error) => {
                    tracing::warn!(%error, "snapshot not installed");
                    tokio::time::sleep(self.config.retry_pause).await;
                }
            }
        }
        let leases: Vec<Lease> = reply.leases.into_iter().filter_map(|l| Lease::try_from(l).ok()).collect();
        if leases.is_empty() {
            tokio::time::sleep(Duration::from_millis(reply.wait_ms.min(10_000).into())).await;
            return Ok(true);
        }
        let request = self.serve(leases, watcher).await;
        let nothing_made = request.trajectories.is_empty();
        let registered = self.submit(request).await?;
        if nothing_made {
            // Whatever is wrong here is still wrong at once; others may take the samples meanwhile.
            tokio::time::sleep(self.config.retry_pause).await;
        }
        Ok(registered)
    }

    /// Samples all leases at once, so that the engine batches them.
    async fn serve(&self, leases: Vec<Lease>, watcher: &SnapshotWatcher) -> proto::SubmitRequest {
        let mut samples = JoinSet::new();
        let mut request = proto::SubmitRequest { incarnation: self.incarnation, ..Default::default() };
        let active = watcher.active();
        for lease in leases {
            if active != Some(lease.version) {
                let reason = format!("leased for {} but {active:?} is installed", lease.version);
                request.failed.push(proto::FailedLease { lease: lease.id.0, reason });
                continue;
            }
            samples.spawn(sample(
                self.engine.clone(),
                Arc::clone(&self.environment),
                Arc::clone(&self.text),
                self.committer.clone(),
                (lease, watcher.adapter_hash(), self.node.peer_id()),
                self.config.episode_timeout,
            ));
        }
        while let Some(done) = samples.join_next().await {
            let Ok(done) = done else { continue };
            match done {
                Ok((trajectory, opener)) => {
                    self.stats.send_modify(|s| {
                        s.sampled += 1;
                        s.tokens += trajectory.steps().len() as u64;
                        s.reward_sum += f64::from(trajectory.reward().value());
                    });
                    if let Some(opener) = opener {
                        let mut openings = self.openings.lock().unwrap_or_else(PoisonError::into_inner);
                        openings.insert(trajectory.id(), opener);
                        while openings.len() > self.config.openings {
                            openings.pop_first();
                        }
                    }
                    request.trajectories.push((&trajectory).into());
                }
                Err((lease, reason)) => {
                    tracing::warn!(%lease, reason, "lease given back");
                    self.stats.send_modify(|s| s.failed += 1);
                    request.failed.push(proto::FailedLease { lease: lease.0, reason });
                }
            }
        }
        request
    }

    /// Submits until it is acknowledged. Repeats are harmless: the trainer knows each lease.
    async fn submit(&mut self, request: proto::SubmitRequest) -> Result<bool, WorkerError> {
        loop {
            let reply: Result<proto::SubmitReply, _> = self.ask(SUBMIT, &request).await;
            let lost = matches!(&reply, Err(AskError::Call(error)) if status(error).is_none());
            let Some(reply) = self.judge(reply)? else {
                if lost {
                    tokio::time::sleep(self.config.retry_pause).await;
                    continue;
                }
                return Ok(false);
            };
            let taken = [proto::SubmitStatus::Accepted, proto::SubmitStatus::Duplicate];
            let accepted = reply.outcomes.iter().filter(|o| taken.contains(&o.status())).count() as u64;
            self.stats.send_modify(|s| {
                s.accepted += accepted;
                s.refused += reply.outcomes.len() as u64 - accepted;
            });
            return Ok(true);
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

fn status(error: &CallError) -> Option<&Status> {
    if let CallError::Remote { status, .. } = error { Some(status) } else { None }
}

fn open(
    openings: &Mutex<BTreeMap<LeaseId, Box<dyn Opener>>>,
    trainer: &PeerId,
    peer: &PeerId,
    body: &[u8],
) -> Result<Bytes, Status> {
    if peer != trainer {
        return Err(Status::permission_denied("only the trainer passes challenges on"));
    }
    let request: proto::OpenRequest =
        wire::message("open request", body).map_err(Status::invalid_argument)?;
    let openings = openings.lock().unwrap_or_else(PoisonError::into_inner);
    let opener = openings.get(&LeaseId(request.lease));
    let opener = opener
        .ok_or_else(|| Status::not_found(format!("no commitment to lease {} is kept", request.lease)))?;
    let opening = opener.open(&request.challenge).map_err(Status::invalid_argument)?;
    Ok(encode(&proto::OpenReply { opening }))
}

type Made = (Trajectory, Option<Box<dyn Opener>>);

/// Makes one trajectory, or says why the lease is given back.
async fn sample(
    engine: EngineHandle,
    environment: Arc<dyn Environment>,
    text: Arc<dyn Text>,
    committer: Option<Arc<dyn Committer>>,
    (lease, adapter_hash, worker): (Lease, Option<[u8; 32]>, PeerId),
    timeout: Duration,
) -> Result<Made, (LeaseId, String)> {
    let back = |e: &dyn fmt::Display| (lease.id, e.to_string());
    if committer.is_some() && environment.turns() > 1 {
        return Err(back(&"commitments cover a single turn; take a run without audits for this environment"));
    }
    let name = environment.name().to_owned();
    let task = environment.task(lease.task_seed);
    let prompt = text.prompt(&task).map_err(|e| back(&e))?;
    let mut referee = Referee::start(environment, task.clone(), timeout).map_err(|e| back(&e))?;
    let mut play = Play { engine, text, task, lease, steps: Vec::new(), rows: Vec::new() };
    let (reward, finish) = loop {
        let turn = play.turn(&prompt, committer.is_some()).await.map_err(|e| back(&e))?;
        let answer = referee.step(turn.said).await.map_err(|e| back(&e))?;
        match (answer, turn.stopped) {
            (Turn::Done(reward), true) => break (reward, Finish::Stop),
            (Turn::Done(reward), false) => break (reward, Finish::Length),
            (Turn::Continue { observation }, true) if play.hear(&observation).map_err(|e| back(&e))? => {}
            (Turn::Continue { .. }, _) => {
                break (referee.cut().await.map_err(|e| back(&e))?, Finish::Length);
            }
        }
    };
    let Play { steps, rows, .. } = play;
    let (commitment, opener) = match committer {
        None => (Bytes::new(), None),
        Some(committer) => {
            let tokens: Vec<u32> = steps.iter().map(|s| s.token).collect();
            let logprobs: Vec<f32> = steps.iter().map(|s| s.logprob).collect();
            let (lease, prompt) = (&lease, &prompt[..]);
            let work =
                Work { lease, prompt, tokens: &tokens, logprobs: &logprobs, rows: &rows, adapter_hash };
            let (commitment, opener) = committer.commit(&work).map_err(|e| back(&e))?;
            (commitment, Some(opener))
        }
    };
    let sample = Sample { lease, worker, environment: name, prompt, steps, finish, reward, commitment };
    Ok((Trajectory::new(sample).map_err(|e| back(&e))?, opener))
}

/// A transcript in the making.
struct Play {
    engine: EngineHandle,
    text: Arc<dyn Text>,
    task: Task,
    lease: Lease,
    steps: Vec<Step>,
    /// Final-norm rows of the sampled tokens, where a committer asked for them.
    rows: Vec<Vec<f32>>,
}

/// What the policy said in one turn.
struct Said {
    said: String,
    /// By an end-of-sequence token, not for want of room.
    stopped: bool,
}

impl Play {
    /// Samples one turn after `prompt` and all that was said.
    async fn turn(&mut self, prompt: &[u32], capture_hidden: bool) -> Result<Said, String> {
        let s = self.lease.sampling;
        let before = self.steps.len();
        let sampling = SamplingParams {
            temperature: s.temperature,
            top_k: s.top_k as usize,
            top_p: s.top_p,
            seed: s.seed,
            max_tokens: (s.max_tokens as usize).saturating_sub(before),
            stop_ids: self.text.stop_ids().to_vec(),
            ..SamplingParams::default()
        };
        let context = prompt.iter().copied().chain(self.steps.iter().map(|s| s.token)).collect();
        let request = Request { prompt: context, sampling, capture_hidden, ..Request::default() };
        let completion = self.engine.generate(request).await.map_err(|e| e.to_string())?;
        let stopped = match completion.reason {
            FinishReason::Stop => true,
            FinishReason::Length => false,
            FinishReason::Aborted | FinishReason::Error => {
                return Err(completion
                    .error
                    .map_or_else(|| "sampling was aborted".to_owned(), |e| e.to_string()));
            }
        };
        let version = self.lease.version;
        if let Some(odd) = completion.tokens.iter().find(|t| t.version != version) {
            return Err(format!("sampled with {} instead of {version}", odd.version));
        }
        self.steps.extend(completion.tokens.iter().map(|t| step(t, version)));
        if capture_hidden {
            let rows: Option<Vec<Vec<f32>>> = completion.tokens.into_iter().map(|t| t.hidden).collect();
            self.rows.extend(rows.ok_or("the engine captured no hidden rows")?);
        }
        let tokens: Vec<u32> = self.steps[before..].iter().map(|s| s.token).collect();
        Ok(Said { said: self.text.completion(&tokens), stopped })
    }

    /// Writes down what the environment says; false when there is no room for a word of the policy after it.
    fn hear(&mut self, observation: &str) -> Result<bool, String> {
        let tokens = self.text.observation(&self.task, observation).map_err(|e| e.to_string())?;
        let room = self.steps.len() + tokens.len() < self.lease.sampling.max_tokens as usize;
        if room {
            let version = self.lease.version;
            let foreign = |token| Step { token, logprob: 0.0, version, trainable: false };
            self.steps.extend(tokens.into_iter().map(foreign));
        }
        Ok(room)
    }
}

/// The log-probability is the one under the distribution that was sampled from.
fn step(token: &parallax_engine::Token, version: PolicyVersion) -> Step {
    Step { token: token.id, logprob: token.sampled_logprob, version, trainable: true }
}
