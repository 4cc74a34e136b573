//! The learner of a swarm: leases rollouts to workers, trains on what passed the audits, publishes every update as a signed
//! adapter, measures itself on held-out tasks, and goes on after a crash where its checkpoint is.
//!
//! ```no_run
//! # async fn example(
//! #     node: lattica_net::Node, blocks: lattica_bitswap::Blocks, policy: parallax_model::train::TrainModel,
//! #     sampler: std::sync::Arc<dyn echo_trainer::service::Sampler>, text: std::sync::Arc<dyn echo_rollout::text::Text>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! use echo_trainer::RunConfig;
//! use echo_trainer::service::{Learner, Parts};
//!
//! let environment = std::sync::Arc::from(echo_rollout::environment::by_name("arithmetic")?);
//! let parts = Parts { node, blocks, policy, sampler, text, environment, base_model_id: "…".into(), vocabulary: 512, full_bytes: 0 };
//! let mut learner = Learner::start(RunConfig::default(), parts, "run".as_ref()).await?;
//! let summary = learner.run(|event| println!("{event:?}")).await?;
//! println!("{} versions", summary.versions);
//! # Ok(())
//! # }
//! ```

mod asynchronous;
mod events;
mod published;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use echo_rollout::admission::{All, Regrade, Shape};
use echo_rollout::asynchronous::{Impossible, NotAsked};
use echo_rollout::environment::Environment;
use echo_rollout::service::{Collector, CollectorConfig, CollectorError};
use echo_rollout::snapshot::SignedSnapshot;
use echo_rollout::sync::{SequentialConfig, SequentialSync};
use echo_rollout::text::Text;
use echo_rollout::{DropReason, GroupId, Weights};
use lattica_bitswap::{Blocks, PublishError};
use lattica_net::{Node, StreamError};
use swarm_wire::signed::Signer;
use swarm_wire::{PeerId, PolicyVersion};
use tokio::task::JoinHandle;

use super::assistants::{Assistants, AssistantsConfig};
use super::checkpoint_dir::{self, CheckpointDirError};
use super::evaluation::{Evaluation, EvaluationError, Player, Sampler, evaluate};
use super::publisher::{Publisher, Update};
use crate::averaging::Exclusion;
use crate::checkpoint::CheckpointError;
use crate::error::{AddError, StepError};
use crate::metrics::StepReport;
use crate::run::{Mode, RunConfig, RunFaults};
use crate::trainer::{Group, Trainer};

pub use events::{LearnerEvent, RunSummary, StalenessCounts, StepEvent, TrajectoryCounts};

/// The journal of leases and trajectories, in the run's directory.
pub const JOURNAL: &str = "rollouts.redb";

/// The file of the newest weights of this kind, in the run's directory: an adapter, or all weights, with which it is a model
/// directory.
pub fn weights_file(weights: &Weights) -> String {
    format!("{}.safetensors", weights.kind())
}

/// What a learner is wired from.
#[expect(missing_debug_implementations, reason = "engines and tokenizers have none")]
pub struct Parts<P> {
    /// The trainer's node; workers know its peer id.
    pub node: Node,
    /// Serves the adapters.
    pub blocks: Blocks,
    /// The freshly loaded policy.
    pub policy: P,
    /// The engine for held-out tasks.
    pub sampler: Arc<dyn Sampler>,
    /// Tokenizer and chat template.
    pub text: Arc<dyn Text>,
    /// What is trained on: the one that the settings name.
    pub environment: Arc<dyn Environment>,
    /// Identity of the base checkpoint; workers with another one, or with another format of its weights than
    /// `trainer.base_dtype`, are refused.
    pub base_model_id: String,
    /// Tokens that the model has.
    pub vocabulary: u32,
    /// Bytes of all weights, to compare an update with.
    pub full_bytes: u64,
}

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LearnerError {
    /// Settings.
    #[error(transparent)]
    Config(#[from] RunFaults),
    /// The settings are not those of the checkpoint in the directory.
    #[error("{} holds a run with other trainer settings; restore them, or name another directory", path.display())]
    OtherSettings {
        /// The run's directory.
        path: PathBuf,
    },
    /// Nobody came.
    #[error(
        "no worker registered within {seconds} s; start some with the trainer's address, or raise workers_timeout_s"
    )]
    NoWorkers {
        /// How long the learner waited.
        seconds: u64,
    },
    /// Leases and trajectories.
    #[error(transparent)]
    Collector(#[from] CollectorError),
    /// The assistants' protocol: a bug.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Settings with which an asynchronous run could not go on.
    #[error(transparent)]
    Impossible(#[from] Impossible),
    /// The loops of an asynchronous run were mixed up: a bug.
    #[error(transparent)]
    Order(#[from] NotAsked),
    /// A group that the dispatcher gave and the trainer does not take: a bug.
    #[error(transparent)]
    Add(#[from] AddError),
    /// A step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The state of the run.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The directory.
    #[error(transparent)]
    CheckpointDir(#[from] CheckpointDirError),
    /// The adapter's blocks.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Held-out tasks.
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    /// The learner's own engine.
    #[error("installing {version} in the learner's engine: {reason}")]
    Install {
        /// The version.
        version: PolicyVersion,
        /// The engine's own words.
        reason: String,
    },
    /// The books do not add up: a bug.
    #[error("book-keeping: {0}")]
    Books(String),
}

/// The learner of one run.
pub struct Learner<P> {
    config: RunConfig,
    dir: PathBuf,
    collector: Collector,
    publisher: Publisher,
    trainer: Arc<Mutex<Trainer<P>>>,
    assistants: Assistants,
    player: Player,
    base_model_id: String,
    full_bytes: u64,
    /// The newest weights: the base model's before the first step.
    newest: (PolicyVersion, Weights),
    /// The newest version that is out; `None` before the first, and when what was out before a restart is not here.
    published: Option<PolicyVersion>,
}

/// A step that is on disk.
struct Learned {
    report: StepReport,
    weights: Weights,
    flat_groups: u64,
    completion_tokens: usize,
    /// Shares that assistants computed, and those of them that were left out.
    assisted: usize,
    left_out: Vec<(PeerId, Exclusion)>,
}

/// What the loops of both modes keep count of.
struct Loops<T> {
    tell: T,
    /// No step begins after this; `None` is a time that no clock reaches.
    until: Option<Instant>,
    training: Duration,
    convicted: BTreeSet<PeerId>,
}

impl<T: FnMut(LearnerEvent)> Loops<T> {
    fn new(tell: T) -> Self {
        Self { tell, until: None, training: Duration::ZERO, convicted: BTreeSet::new() }
    }

    /// Whether the run's time is over.
    fn is_late(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() > until)
    }

    /// Tells of each convicted worker once.
    fn tell_convicted(&mut self, collector: &Collector) {
        for (peer, audits) in collector.convicted() {
            if self.convicted.insert(peer.clone()) {
                (self.tell)(LearnerEvent::Convicted { peer, audits });
            }
        }
    }

    /// Tells of a step that ran `ahead` batches ahead with the rollouts of `workers`; times of its rollouts, its training, and
    /// the whole.
    fn tell_step(
        &mut self,
        learned: &Learned,
        ahead: u64,
        workers: usize,
        [rollouts, train, step]: [Duration; 3],
    ) {
        self.training += train;
        for (peer, why) in &learned.left_out {
            (self.tell)(LearnerEvent::LeftOut {
                peer: peer.clone(),
                reason: why.to_string(),
                dismissed: why.is_final(),
            });
        }
        let report = &learned.report;
        (self.tell)(LearnerEvent::Step(StepEvent {
            version: report.version,
            reward: report.reward_mean,
            loss: report.loss.loss,
            ratio_deviation_max: report.loss.ratio_deviation_max,
            grad_norm: report.grad_norm,
            staleness_max: report.staleness_max,
            staleness_mean: report.staleness_mean,
            workers,
            ahead,
            update_bytes: learned.weights.bytes().len() as u64,
            flat_groups: learned.flat_groups,
            completion_tokens: learned.completion_tokens,
            assisted: learned.assisted,
            rollouts_s: rollouts.as_secs_f64(),
            train_s: train.as_secs_f64(),
            step_s: step.as_secs_f64(),
        }));
    }
}

impl<P> std::fmt::Debug for Learner<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Learner({} in {})", self.config.run(), self.dir.display())
    }
}

impl<P: Update + Send + 'static> Learner<P> {
    /// Starts to answer workers on the node; the run in `dir` goes on if there is one.
    ///
    /// # Errors
    /// Settings out of range, another run in `dir`, a directory that cannot be written.
    pub async fn start(config: RunConfig, parts: Parts<P>, dir: &Path) -> Result<Self, LearnerError> {
        config.validate()?;
        let environment = parts.environment;
        let base_model_id = config.trainer.base_dtype.model_id(&parts.base_model_id);
        let trainer = open_trainer(&config, parts.policy, &base_model_id, dir)?;
        let secret = audit_secret(parts.node.identity(), config.seed);
        let collector_config = CollectorConfig {
            auditors: config.auditors.clone(),
            audit_timeout: Duration::from_secs(config.audit_timeout_s),
            ..CollectorConfig::new(
                config.dispatch(secret),
                base_model_id.clone(),
                environment.name().to_owned(),
                environment.version(),
            )
        };
        let shape = Shape {
            environment: environment.name().to_owned(),
            vocabulary: parts.vocabulary,
            rewards: environment.reward_range(),
            commitment: config.is_audited(),
        };
        let regrade = Regrade::new(environment.clone(), parts.text.clone());
        let admission = Arc::new(All(vec![Box::new(shape), Box::new(regrade)]));
        let (node, steps) = (parts.node.clone(), trainer.version().0);
        let newest = match trainer.version() {
            PolicyVersion(0) => Weights::Base,
            _ => trainer.policy().weights()?,
        };
        let newest = (trainer.version(), newest);
        if config.trainer.full {
            trainer.policy().save_companions(dir)?;
        }
        let mut assistants = Assistants::start(
            parts.node.clone(),
            AssistantsConfig {
                peers: config.assistants.clone(),
                run: config.run(),
                // They are told the format with the settings.
                base_model_id: parts.base_model_id,
                trainer: config.trainer.clone(),
                patience: Duration::from_secs(config.assistant_timeout_s),
                check: config.assistant_check,
                secret,
            },
        )?;
        trainer.introduce(&mut assistants);
        let journal = Some(dir.join(JOURNAL));
        // The collector gives out its newest version and so many before it, and the oldest while the next one is published.
        let kept = usize::try_from(collector_config.dispatch.snapshots_kept()).unwrap_or(usize::MAX);
        let collector = Collector::start(node, collector_config, admission, journal, steps).await?;
        let kept = kept.saturating_add(2);
        let publisher = Publisher::new(config.run(), base_model_id.as_str(), &parts.node, parts.blocks, kept);
        let published = match config.mode {
            Mode::Sequential => None,
            Mode::Async => published::again(&collector, &publisher, dir).await?,
        };
        Ok(Self {
            publisher,
            published,
            config,
            dir: dir.to_owned(),
            collector,
            trainer: Arc::new(Mutex::new(trainer)),
            assistants,
            player: Player { sampler: parts.sampler, text: parts.text, environment },
            base_model_id,
            full_bytes: parts.full_bytes,
            newest,
        })
    }

    /// The trainer's side of the rollout swarm.
    pub fn collector(&self) -> &Collector {
        &self.collector
    }

    /// Who computes shares of its steps.
    pub fn assistants(&self) -> &Assistants {
        &self.assistants
    }

    /// The version of the present weights.
    pub fn version(&self) -> PolicyVersion {
        self.trainer().version()
    }

    /// Waits for workers, then makes the steps that are left, or as many as the time allows.
    ///
    /// # Errors
    /// No workers, a full disk, a model that cannot be trained. What was reported as a step is on disk.
    pub async fn run(&mut self, mut tell: impl FnMut(LearnerEvent)) -> Result<RunSummary, LearnerError> {
        let started = Instant::now();
        let patience = Duration::from_secs(self.config.workers_timeout_s);
        if self.collector.wait_for_workers(self.config.workers, patience).await == 0 {
            return Err(LearnerError::NoWorkers { seconds: self.config.workers_timeout_s });
        }
        if self.published.is_none() {
            self.collector.publish(&self.snapshot(&self.newest).await?).await?;
            self.published = Some(self.version());
        }
        tell(LearnerEvent::Eval(self.evaluate().await?));
        let until = started.checked_add(Duration::from_secs(self.config.seconds));
        let mut loops = Loops { until, ..Loops::new(tell) };
        let loop_started = Instant::now();
        match self.config.mode {
            Mode::Sequential => self.alternate(&mut loops).await?,
            Mode::Async => self.newest = asynchronous::run(self, &mut loops).await?,
        }
        let loop_s = loop_started.elapsed().as_secs_f64();
        self.collector.check().map_err(|broken| LearnerError::Books(broken.to_string()))?;
        self.collector.publish(&self.snapshot(&self.newest).await?).await?;
        (loops.tell)(LearnerEvent::Eval(self.evaluate().await?));
        Ok(self.summary(loops.training.as_secs_f64() / loop_s.max(1e-9)))
    }

    /// The sequential mode: sample, learn, publish, and again.
    async fn alternate(&mut self, loops: &mut Loops<impl FnMut(LearnerEvent)>) -> Result<(), LearnerError> {
        let round = SequentialConfig {
            groups_per_step: u32::try_from(self.config.trainer.groups_per_step).unwrap_or(u32::MAX),
            min_workers: 1,
            ack_timeout_ms: self.config.ack_timeout_ms,
        };
        let first = self.version();
        let mut sync = SequentialSync::new(round, first, first.0);
        for _ in first.0..self.config.trainer.steps {
            if loops.is_late() {
                break;
            }
            let began = Instant::now();
            let snapshot = self.snapshot(&self.newest).await?;
            let groups = loop {
                let groups = self.collector.round(&mut sync, &snapshot).await?;
                loops.tell_convicted(&self.collector);
                if !self.gave_back(self.version().0, &groups).await? {
                    break groups;
                }
                if loops.is_late() {
                    return Ok(());
                }
            };
            let rollouts = began.elapsed();
            let learning = Instant::now();
            let learned = self.learn(&groups).await.expect("a training step does not panic")?;
            self.collector.commit(&mut sync).await?;
            self.newest = (learned.report.version, learned.weights.clone());
            loops.tell_step(
                &learned,
                0,
                self.workers().len(),
                [rollouts, learning.elapsed(), began.elapsed()],
            );
        }
        Ok(())
    }

    /// Tells workers and auditors that the run is over, waits for their goodbyes for at most `grace`, and closes the
    /// journal.
    pub async fn finish(&self, grace: Duration) {
        tokio::join!(self.collector.finish(grace), self.assistants.finish(grace));
        self.collector.close();
    }

    fn trainer(&self) -> MutexGuard<'_, Trainer<P>> {
        self.trainer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn workers(&self) -> Vec<PeerId> {
        self.collector.workers().into_iter().map(|worker| worker.peer).collect()
    }

    /// A version's weights, published and signed.
    async fn snapshot(
        &self,
        (version, weights): &(PolicyVersion, Weights),
    ) -> Result<SignedSnapshot, LearnerError> {
        Ok(self.publisher.weights(*version, weights, &self.workers()).await?)
    }

    /// Whether dynamic sampling wants other groups for `step` instead of some of these; then all of them are with the collector
    /// again.
    async fn gave_back(&self, step: u64, groups: &[echo_rollout::Group]) -> Result<bool, LearnerError> {
        if !self.config.trainer.dynamic_sampling {
            return Ok(false);
        }
        let flat = {
            let groups: Vec<Group> = groups.iter().map(Group::from).collect();
            self.trainer().flat(&groups, self.collector.flat_groups())
        };
        if !flat.is_empty() {
            self.collector.give_back(step, flat.iter().copied().map(GroupId).collect()).await?;
        }
        Ok(!flat.is_empty())
    }

    /// One step, its checkpoint with the leases that it consumed, and its weights; off the runtime's threads.
    fn learn(&self, groups: &[echo_rollout::Group]) -> JoinHandle<Result<Learned, LearnerError>> {
        let completions = groups.iter().flat_map(|g| &g.trajectories).map(|t| t.completion().len());
        let completion_tokens = completions.sum();
        let flat_groups = self.collector.flat_groups();
        let groups: Vec<Group> = groups.iter().map(Group::from).collect();
        let (trainer, dir) = (Arc::clone(&self.trainer), self.dir.clone());
        let mut assistants = self.assistants.clone();
        let (run, base_model_id) = (self.config.run(), self.base_model_id.clone());
        let ahead = self.config.mode == Mode::Async;
        let kept = self.config.dispatch(0).snapshots_kept().saturating_add(self.config.publish_every);
        tokio::task::spawn_blocking(move || {
            let mut trainer = trainer.lock().unwrap_or_else(PoisonError::into_inner);
            for group in groups {
                trainer.add_group(group)?;
            }
            let report = trainer.train_step_with(&mut assistants)?;
            let weights = trainer.policy().weights()?;
            checkpoint_dir::write(&dir.join(weights_file(&weights)), weights.bytes())?;
            if ahead {
                published::keep(&dir, report.version, &weights, kept)?;
            }
            checkpoint_dir::save(&dir, &trainer.checkpoint(run, &base_model_id)?)?;
            let (assisted, left_out) = (assistants.assisted(), assistants.take_news());
            Ok(Learned { report, weights, flat_groups, completion_tokens, assisted, left_out })
        })
    }

    /// Measures the present weights with the learner's own engine.
    async fn evaluate(&self) -> Result<Evaluation, LearnerError> {
        let (version, weights) = self.newest.clone();
        let installed = self.player.sampler.install(version, weights).await;
        installed.map_err(|reason| LearnerError::Install { version, reason })?;
        let (n_tasks, max_tokens) = (self.config.eval_tasks, self.config.trainer.max_completion_tokens);
        Ok(evaluate(&self.player, version, n_tasks, max_tokens).await?)
    }

    fn summary(&self, learner_utilisation: f64) -> RunSummary {
        let counts = self.collector.counts();
        let versions = self.version().0;
        RunSummary {
            versions,
            learner_utilisation,
            trajectories: TrajectoryCounts {
                leased: counts.leased,
                consumed: counts.consumed,
                dropped_stale: counts.dropped_stale(),
                dropped_flat: counts.dropped_for(DropReason::Flat),
                rejected: counts.rejected(),
                unproven: counts.dropped_for(DropReason::Unproven),
                lost: counts.lost,
                duplicated: counts.duplicated,
                open: counts.open,
            },
            staleness: StalenessCounts {
                budget: self.config.trainer.max_staleness,
                max: counts.staleness_max,
                mean: counts.staleness_mean,
                by_age: self.collector.staleness_by_age(),
            },
            poisoned_trained: counts.consumed_of_convicted,
            update_bytes: self.newest.1.bytes().len() as u64,
            full_bytes: self.full_bytes,
            adapter: (versions > 0).then(|| self.dir.join(weights_file(&self.newest.1))),
        }
    }
}

/// Decides which trajectories are audited: known to the owner of the node's key alone, and the same after a restart, so that
/// the journal's commands mean the same. It is taken from a signature that is never sent: Ed25519 gives the same one each
/// time, and nobody else can make it.
fn audit_secret(node: &impl Signer, run: u64) -> u64 {
    const PURPOSE: &str = "echo-trainer audit draw v1";
    let signature = node.signature(&[PURPOSE.as_bytes(), &run.to_le_bytes()].concat());
    let secret = blake3::derive_key(PURPOSE, &signature);
    u64::from_le_bytes(secret[..8].try_into().expect("eight bytes"))
}

/// The trainer of the checkpoint in `dir`, or a new one. More steps than before may be asked for; nothing else changes.
fn open_trainer<P: Update + Send>(
    config: &RunConfig,
    policy: P,
    base_model_id: &str,
    dir: &Path,
) -> Result<Trainer<P>, LearnerError> {
    checkpoint_dir::create(dir)?;
    let Some(checkpoint) = checkpoint_dir::load(dir)? else {
        return Ok(Trainer::new(policy, config.trainer.clone())?);
    };
    let mut saved = checkpoint.manifest.config.clone();
    saved.steps = config.trainer.steps;
    if saved != config.trainer {
        return Err(LearnerError::OtherSettings { path: dir.to_owned() });
    }
    Ok(Trainer::resume(policy, &checkpoint, config.run(), base_model_id)?)
}

#[cfg(test)]
mod tests {
    use lattica_net::Identity;

    use super::*;

    #[test]
    fn the_audit_draw_is_the_learners_own_and_stays_the_same() {
        let [one, other] = [1, 2].map(|seed| Identity::from_seed([seed; 32]));
        assert_eq!(audit_secret(&one, 7), audit_secret(&one.clone(), 7));
        assert_ne!(audit_secret(&one, 7), audit_secret(&other, 7), "another learner draws differently");
        assert_ne!(audit_secret(&one, 7), audit_secret(&one, 8));
    }
}
