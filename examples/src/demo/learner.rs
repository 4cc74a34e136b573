//! The learner's role: leases rollouts to workers, trains on what passed the audits, publishes every update as a signed
//! adapter, and measures itself on held-out tasks.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use echo_rollout::DispatchConfig;
use echo_rollout::admission::{All, Regrade, Shape};
use echo_rollout::config::AuditPolicy;
use echo_rollout::environment::{Environment, by_name, held_out_seed};
use echo_rollout::lease::SamplingSpec;
use echo_rollout::service::{Collector, CollectorConfig};
use echo_rollout::snapshot::{Artefact, Payload, SignedSnapshot, SnapshotManifest};
use echo_rollout::sync::{SequentialConfig, SequentialSync};
use echo_rollout::text::Text;
use echo_trainer::service::checkpoint_dir;
use echo_trainer::{Group, Trainer, TrainerConfig};
use ed25519_dalek::SigningKey;
use lattica_bitswap::{BlockStore, Blocks, MemoryStore};
use lattica_net::Node;
use parallax_engine::local::LocalStage;
use parallax_engine::{EngineConfig, EngineHandle, Request, SamplingParams};
use parallax_model::train::{LoraConfig, TrainModel, TrainOptions};
use parallax_model::{Checkpoint, WeightDtype};
use serde_json::{Value, json};
use swarm_wire::{PeerId, PolicyVersion, RunId};

use super::process::say;
use super::role::NodeArgs;
use crate::rollouts::{ModelText, load_options};

/// Cached positions of the learner's own engine, which only evaluates.
const EVAL_CACHE_TOKENS: usize = 8192;
/// How long a round waits for slow workers to take up a version.
const ACK_TIMEOUT_MS: u64 = 10_000;
/// How long workers have to appear.
const WORKERS_TIMEOUT: Duration = Duration::from_secs(60);

/// Options of the learner.
#[derive(Debug, Clone, clap::Args)]
pub struct LearnerArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// The model to train.
    #[arg(long, default_value = "tiny")]
    model: String,
    /// The environment.
    #[arg(long, default_value = "arithmetic")]
    env: String,
    /// Directory of the checkpoint and the journal.
    #[arg(long)]
    dir: PathBuf,
    /// Workers to wait for before the first lease.
    #[arg(long)]
    workers: usize,
    /// The auditor's peer id.
    #[arg(long)]
    auditor: PeerId,
    /// Share of trajectories that are audited.
    #[arg(long)]
    audit_fraction: f64,
    /// Trajectories of a new worker that are always audited.
    #[arg(long)]
    audit_first: u32,
    /// Seed of sampling and of the adapter's first values.
    #[arg(long)]
    seed: u64,
    /// Learner steps.
    #[arg(long)]
    steps: u64,
    /// Learning rate, when not the trainer's.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// End before this many seconds have passed.
    #[arg(long)]
    seconds: u64,
    /// Held-out tasks of one evaluation.
    #[arg(long)]
    eval_tasks: u64,
}

/// Runs the learner until its steps or its time are over.
///
/// # Errors
/// No workers, a broken invariant, a full disk, a model that cannot be trained.
pub async fn run(args: LearnerArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let checkpoint = Checkpoint::resolve(&args.model)?;
    let node = args.node.start().await?;
    let store: Arc<dyn BlockStore> = Arc::new(MemoryStore::new());
    let blocks = Blocks::start(node.clone(), store);
    let mut learner = Learner::new(&args, &checkpoint, node.clone(), blocks).await?;
    say(&json!({"event": "ready", "peer": node.peer_id(), "addrs": node.listen_addrs().await}));

    let found = learner.collector.wait_for_workers(args.workers, WORKERS_TIMEOUT).await;
    ensure!(found > 0, "no worker registered within {} s", WORKERS_TIMEOUT.as_secs());
    let mut snapshot = learner.snapshot(None).await?;
    learner.collector.publish(&snapshot).await?;
    say(&learner.evaluate(args.eval_tasks).await?);

    let round = SequentialConfig {
        groups_per_step: u32::try_from(learner.trainer.config().groups_per_step)?,
        min_workers: 1,
        ack_timeout_ms: ACK_TIMEOUT_MS,
    };
    let mut sync = SequentialSync::new(round, PolicyVersion(0), 0);
    let mut next_seed = 0_u64..;
    let (mut training, mut convicted) = (Duration::ZERO, 0);
    let loop_started = Instant::now();
    for _ in 0..args.steps {
        if started.elapsed() > Duration::from_secs(args.seconds) {
            break;
        }
        let step_started = Instant::now();
        let seeds = |n: u32| next_seed.by_ref().take(n as usize).map(|i| task_seed(args.seed, i)).collect();
        let groups = learner.collector.round(&mut sync, &snapshot, seeds).await?;
        let rollouts_s = step_started.elapsed().as_secs_f64();
        for (peer, audits) in learner.collector.convicted().into_iter().skip(convicted) {
            convicted += 1;
            say(&json!({"event": "convicted", "peer": peer, "audits": audits}));
        }
        let completion_tokens: usize =
            groups.iter().flat_map(|g| &g.trajectories).map(|t| t.completion().len()).sum();
        let train_started = Instant::now();
        let report = tokio::task::block_in_place(|| learner.train(&groups))?;
        training += train_started.elapsed();
        snapshot = learner.snapshot(Some(report.version)).await?;
        learner.collector.commit(&mut sync).await?;
        learner.collector.check()?;
        let update_bytes = snapshot.manifest().payload.artefact().map_or(0, |a| a.bytes);
        say(
            &json!({"event": "step", "version": report.version, "reward": report.reward_mean, "loss": report.loss.loss,
            "ratio_deviation_max": report.loss.ratio_deviation_max, "grad_norm": report.grad_norm,
            "staleness_max": report.staleness_max, "update_bytes": update_bytes,
            "completion_tokens": completion_tokens, "rollouts_s": rollouts_s,
            "train_s": train_started.elapsed().as_secs_f64(), "step_s": step_started.elapsed().as_secs_f64()}),
        );
    }
    let loop_s = loop_started.elapsed().as_secs_f64();
    learner.collector.publish(&snapshot).await?;
    let last = learner.evaluate(args.eval_tasks).await?;
    say(&last);
    say(&learner.summary(&args.dir, training.as_secs_f64() / loop_s.max(1e-9))?);
    // Workers see that the run is over and end by themselves.
    learner.collector.close();
    node.shutdown().await;
    Ok(())
}

/// Different runs see different tasks; all stay below the held-out seeds.
fn task_seed(run_seed: u64, index: u64) -> u64 {
    (run_seed % (1 << 20)) << 40 | index
}

struct Learner {
    run: RunId,
    base_model_id: String,
    full_bytes: u64,
    key: SigningKey,
    node: Node,
    blocks: Blocks,
    collector: Collector,
    trainer: Trainer<TrainModel>,
    engine: EngineHandle,
    text: Arc<dyn Text>,
    environment: Arc<dyn Environment>,
    dir: PathBuf,
    adapter: Option<Vec<u8>>,
}

impl Learner {
    async fn new(
        args: &LearnerArgs,
        checkpoint: &Checkpoint,
        node: Node,
        blocks: Blocks,
    ) -> anyhow::Result<Self> {
        let mut config = TrainerConfig { steps: args.steps, ..TrainerConfig::default() };
        config.optim.learning_rate = args.learning_rate.unwrap_or(config.optim.learning_rate);
        let (run, base_model_id) = (RunId(args.seed), checkpoint.id()?);
        let environment: Arc<dyn Environment> = Arc::from(by_name(&args.env)?);
        let text: Arc<dyn Text> = Arc::new(ModelText::open(checkpoint)?);
        let sampling = SamplingSpec {
            max_tokens: config.max_completion_tokens,
            seed: args.seed,
            ..SamplingSpec::default()
        };
        let dispatch = DispatchConfig {
            group_size: u32::try_from(config.group_size)?,
            sampling,
            audit: AuditPolicy { fraction: args.audit_fraction, first: args.audit_first, seed: args.seed },
            ..DispatchConfig::new(run)
        };
        let collector_config = CollectorConfig {
            auditors: vec![args.auditor.clone()],
            ..CollectorConfig::new(dispatch, base_model_id.clone(), args.env.clone(), environment.version())
        };
        let shape = Shape {
            environment: args.env.clone(),
            vocabulary: u32::try_from(checkpoint.config().vocab)?,
            rewards: environment.reward_range(),
            commitment: args.audit_fraction > 0.0 || args.audit_first > 0,
        };
        let regrade = Regrade { environment: environment.clone(), text: text.clone() };
        let admission = Arc::new(All(vec![Box::new(shape), Box::new(regrade)]));
        std::fs::create_dir_all(&args.dir).with_context(|| format!("creating {}", args.dir.display()))?;
        let journal = Some(args.dir.join("rollouts.redb"));
        let collector = Collector::start(node.clone(), collector_config, admission, journal, 0).await?;

        let lora = LoraConfig {
            rank: config.lora_rank,
            alpha: config.lora_alpha,
            targets: Vec::new(),
            seed: args.seed,
        };
        let policy =
            TrainModel::from_checkpoint(checkpoint, &TrainOptions { lora: Some(lora), full: false })?;
        let stage =
            LocalStage::load(checkpoint, &load_options(checkpoint, WeightDtype::F32, EVAL_CACHE_TOKENS))?;
        Ok(Self {
            run,
            base_model_id,
            full_bytes: checkpoint.config().stage_bytes(&(0..checkpoint.config().n_layers), WeightDtype::F32),
            key: SigningKey::from_bytes(&node.identity().secret_seed()),
            node,
            blocks,
            collector,
            trainer: Trainer::new(policy, config)?,
            engine: EngineHandle::start(Box::new(stage), EngineConfig::default())?,
            text,
            environment,
            dir: args.dir.clone(),
            adapter: None,
        })
    }

    /// Publishes the weights of `version` (`None`: the base model) and signs what was published.
    async fn snapshot(&mut self, version: Option<PolicyVersion>) -> anyhow::Result<SignedSnapshot> {
        let payload = match version {
            None => Payload::Base,
            Some(version) => {
                let adapter = self.trainer.policy().adapter().context("the run trains an adapter")?;
                let bytes = adapter.to_bytes()?;
                let hash = *blake3::hash(&bytes).as_bytes();
                let name = format!("adapter-{version}.safetensors");
                let root = self.blocks.publish_bytes(&name, "adapter", Bytes::from(bytes.clone())).await?;
                self.engine.swap_adapter(version, Some(bytes.clone())).await?;
                let artefact = Artefact { root, hash, bytes: bytes.len() as u64 };
                self.adapter = Some(bytes);
                Payload::Lora(artefact)
            }
        };
        let version = version.unwrap_or_default();
        let manifest = SnapshotManifest {
            run: self.run,
            version,
            parent: version.0.checked_sub(1).map(PolicyVersion),
            payload,
            base_model_id: self.base_model_id.clone(),
            created_by: self.node.peer_id(),
        };
        Ok(manifest.sign(&self.key))
    }

    /// One step, and its checkpoint with the leases that it consumed.
    fn train(&mut self, groups: &[echo_rollout::Group]) -> anyhow::Result<echo_trainer::metrics::StepReport> {
        for group in groups {
            self.trainer.add_group(Group::from(group))?;
        }
        let report = self.trainer.train_step()?;
        checkpoint_dir::save(&self.dir, &self.trainer.checkpoint(self.run, &self.base_model_id)?)?;
        Ok(report)
    }

    /// Mean reward on held-out tasks: sampled as in training, and greedy.
    async fn evaluate(&self, n_tasks: u64) -> anyhow::Result<Value> {
        let mut sums = [0.0_f64; 2];
        for (sum, temperature) in sums.iter_mut().zip([1.0, 0.0]) {
            let mut answers = Vec::new();
            for index in 0..n_tasks {
                let task = self.environment.task(held_out_seed(index));
                let sampling = SamplingParams {
                    temperature,
                    seed: index,
                    max_tokens: self.trainer.config().max_completion_tokens as usize,
                    stop_ids: self.text.stop_ids().to_vec(),
                    ..SamplingParams::default()
                };
                let prompt = self.text.prompt(&task)?;
                answers
                    .push((task, self.engine.generate(Request { prompt, sampling, ..Request::default() })));
            }
            let (tasks, answers): (Vec<_>, Vec<_>) = answers.into_iter().unzip();
            for (task, answer) in tasks.iter().zip(futures::future::join_all(answers).await) {
                let completion = self.text.completion(&answer?.token_ids());
                *sum += f64::from(self.environment.verify(task, &completion)?.value());
            }
        }
        let n = n_tasks.max(1) as f64;
        Ok(
            json!({"event": "eval", "version": self.trainer.version(), "eval": sums[0] / n, "eval_greedy": sums[1] / n}),
        )
    }

    fn summary(&self, dir: &Path, learner_utilisation: f64) -> anyhow::Result<Value> {
        let counts = self.collector.counts();
        let adapter = dir.join("adapter.safetensors");
        if let Some(bytes) = &self.adapter {
            std::fs::write(&adapter, bytes).with_context(|| format!("writing {}", adapter.display()))?;
        }
        Ok(
            json!({"event": "done", "versions": self.trainer.version().0, "learner_utilisation": learner_utilisation,
            "trajectories": {"leased": counts.leased, "consumed": counts.consumed,
                "dropped_stale": counts.dropped_stale(), "rejected": counts.rejected(), "lost": counts.lost,
                "duplicated": counts.duplicated, "open": counts.open},
            "staleness": {"budget": self.trainer.config().max_staleness, "max": counts.staleness_max,
                "mean": counts.staleness_mean},
            "poisoned_trained": counts.consumed_of_convicted,
            "update_bytes": self.adapter.as_ref().map_or(0, Vec::len), "full_bytes": self.full_bytes,
            "adapter": adapter}),
        )
    }
}
