//! Worker, collector and auditor on real nodes on this machine, with a model of three lines.

mod protocol;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use ed25519_dalek::SigningKey;
use lattica_bitswap::{Blocks, MemoryStore};
use lattica_net::{Identity, NodeConfig};
use parallax_engine::sampler::Place;
use parallax_engine::{
    AdapterFile, Batch, EngineConfig, EngineHandle, LogSoftmax, SamplingParams, StageError, StageOutput,
    StageRunner, StageShape, Tensor,
};
use swarm_wire::{LayerRange, RunId};
use veri_verify::{Answer, Job};

use super::*;
use crate::admission::tests::ByteText;
use crate::admission::{All, Regrade, Shape};
use crate::config::AuditPolicy;
use crate::environment::Arithmetic;
use crate::lease::{DropReason, SamplingSpec};
use crate::service::{
    Audited, AuditorConfig, BoxFuture, PayloadSource, PolicyEngine, Replay, VeriCommitter, Worker,
    WorkerConfig, WorkerError, run_auditor,
};
use crate::snapshot::{Artefact, Payload, SnapshotManifest, Weights};
use crate::sync::SequentialConfig;

const VOCABULARY: usize = 128;

/// The row of a token depends on the token and on the installed weights alone.
fn row(token: u32, weights: f32) -> Vec<f32> {
    vec![token as f32 / 100.0 + 1.0, weights]
}

/// A digit or the end, all equally likely.
fn logits(row: &[f32]) -> Vec<f32> {
    (0..VOCABULARY).map(|t| if t == 0 || (48..58).contains(&t) { row[0] } else { -1e9 }).collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f32 = logits.iter().map(|l| (l - largest).exp()).sum();
    logits.iter().map(|l| l - largest - sum.ln()).collect()
}

/// The weights are one number: the base model's, or the first byte of an adapter or of all weights.
struct Model {
    base: f32,
    weights: f32,
}

impl StageRunner for Model {
    fn shape(&self) -> StageShape {
        let layers = LayerRange::new(0, 1).unwrap();
        StageShape {
            layers,
            n_layers: 1,
            hidden: 2,
            vocab: VOCABULARY,
            max_context: 64,
            page_tokens: 16,
            n_pages: 64,
            state_slots: 0,
        }
    }

    fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
        let ids = input.to_ids(batch.n_rows())?;
        let wanted = batch.wanted_rows();
        let hidden: Vec<f32> = wanted.iter().flat_map(|r| row(ids[*r], self.weights)).collect();
        let scores: Vec<f32> = hidden.chunks(2).flat_map(logits).collect();
        Ok(StageOutput {
            hidden: Some(Tensor::from_f32(&[wanted.len(), 2], hidden)),
            logits: Some(Tensor::from_f32(&[wanted.len(), VOCABULARY], scores)),
        })
    }

    fn set_adapter(&mut self, _: PolicyVersion, adapter: Option<&AdapterFile>) -> Result<(), StageError> {
        self.weights = adapter.map_or(self.base, |bytes| f32::from(bytes[0]) + self.base);
        Ok(())
    }

    fn log_softmax(&self) -> LogSoftmax {
        log_softmax
    }
}

/// The auditor's own copy of the model, with what is installed and its hash.
#[derive(Default)]
struct Recompute(Option<(Option<[u8; 32]>, f32)>);

impl Replay for Recompute {
    fn holds(&self, hash: Option<[u8; 32]>) -> bool {
        self.0.is_some_and(|(held, _)| held == hash)
    }

    fn install(&mut self, hash: Option<[u8; 32]>, weights: Weights) -> Result<(), String> {
        self.0 = Some((hash, weights.bytes().first().map_or(0.0, |byte| f32::from(*byte))));
        Ok(())
    }

    fn replay(&mut self, job: &Job, answer: &Answer) -> Result<veri_verify::Replay, String> {
        let (held, weights) = self.0.ok_or("nothing is installed")?;
        assert_eq!(held, job.adapter_hash);
        let before = job.prompt.last().into_iter().chain(&answer.tokens);
        let rows: Vec<Vec<f32>> = before.take(answer.tokens.len()).map(|t| row(*t, weights)).collect();
        let scored = rows.iter().zip(&answer.tokens);
        let logprobs = scored.map(|(row, t)| log_softmax(&logits(row))[*t as usize]).collect();
        let sampler = parallax_engine::Sampler::new(log_softmax);
        let (seed, temperature) = (job.sampling.seed, job.sampling.temperature);
        let params = SamplingParams { seed, temperature, ..SamplingParams::default() };
        let draw = |(row, i): (&Vec<f32>, usize)| {
            let place = Place { position: (job.prompt.len() + i) as u64, generated: i, history: None };
            sampler.sample(&logits(row), &params, place, None).unwrap().id
        };
        let tokens = Some(rows.iter().zip(0..).map(draw).collect());
        Ok(veri_verify::Replay { rows, logprobs, tokens })
    }
}

/// Adapters by version: the version itself as one byte, wrong on request.
#[derive(Default)]
struct Adapters {
    corrupt: bool,
    fetched: AtomicU64,
}

impl PayloadSource for Adapters {
    fn fetch<'a>(&'a self, m: &'a SnapshotManifest, _: &'a PeerId) -> BoxFuture<'a, Result<Bytes, String>> {
        self.fetched.fetch_add(1, Ordering::Relaxed);
        let byte = if self.corrupt { 255 } else { m.version.0 as u8 };
        Box::pin(async move { Ok(Bytes::from(vec![byte])) })
    }
}

async fn node(seed: u8) -> Node {
    let config = NodeConfig::loopback("127.0.0.1", "rollout-test");
    Node::start(Identity::from_seed([seed; 32]), config).await.unwrap()
}

async fn connected(seed: u8, to: &Node) -> Node {
    let node = node(seed).await;
    node.dial(&to.listen_addrs().await[0]).await.unwrap();
    node
}

fn snapshot(seed: u8, version: u64) -> SignedSnapshot {
    snapshot_of(seed, version, if version == 0 { |_| Payload::Base } else { Payload::Lora })
}

/// The same with all weights in every version.
fn full_snapshot(seed: u8, version: u64) -> SignedSnapshot {
    snapshot_of(seed, version, Payload::Full)
}

fn snapshot_of(seed: u8, version: u64, payload: fn(Artefact) -> Payload) -> SignedSnapshot {
    let key = SigningKey::from_bytes(&[seed; 32]);
    let hash = *blake3::hash(&[version as u8]).as_bytes();
    let root = swarm_wire::cid::raw(swarm_wire::cid::HASH_BLAKE3, &hash);
    let manifest = SnapshotManifest {
        run: RunId(7),
        version: PolicyVersion(version),
        parent: version.checked_sub(1).map(PolicyVersion),
        payload: payload(Artefact { root, hash, bytes: 1, spread: false }),
        base_model_id: "three lines".to_owned(),
        created_by: PeerId::from_ed25519(&key.verifying_key().to_bytes()),
    };
    manifest.sign(&key)
}

fn config(auditors: Vec<PeerId>) -> CollectorConfig {
    let first = if auditors.is_empty() { 0 } else { 2 };
    let audit = AuditPolicy { fraction: if first > 0 { 0.25 } else { 0.0 }, first, seed: 3 };
    let sampling = SamplingSpec { max_tokens: 4, ..SamplingSpec::default() };
    let dispatch = DispatchConfig {
        group_size: 4,
        groups_per_step: 5,
        sampling,
        audit,
        ..DispatchConfig::new(RunId(7))
    };
    CollectorConfig { auditors, ..CollectorConfig::new(dispatch, "three lines", "arithmetic", 1) }
}

fn admission() -> Arc<dyn Admission> {
    let shape = Shape {
        environment: "arithmetic".to_owned(),
        vocabulary: VOCABULARY as u32,
        rewards: 0.0..=1.0,
        commitment: true,
    };
    let regrade = Regrade::new(Arc::new(Arithmetic::default()), Arc::new(ByteText));
    Arc::new(All(vec![Box::new(shape), Box::new(regrade)]))
}

/// The collector of a trainer that writes nothing down.
async fn collecting(trainer: &Node, config: CollectorConfig) -> Collector {
    Collector::start(trainer.clone(), config, admission(), None, 0).await.unwrap()
}

/// One that goes on from the journal at `path`, with a checkpoint of so many steps.
async fn going_on(trainer: &Node, path: &Path, steps: u64) -> Result<Collector, CollectorError> {
    Collector::start(trainer.clone(), config(vec![]), admission(), Some(path.to_path_buf()), steps).await
}

/// A worker whose base weights are off by `error`.
fn worker(node: &Node, trainer: &PeerId, seed: u8, error: f32, corrupt: bool) -> Worker {
    worker_with(node, trainer, seed, error, Arc::new(Adapters { corrupt, ..Adapters::default() }))
}

fn worker_with(node: &Node, trainer: &PeerId, seed: u8, error: f32, adapters: Arc<Adapters>) -> Worker {
    let engine =
        EngineHandle::start(Box::new(Model { base: error, weights: error }), EngineConfig::default())
            .unwrap();
    let read = move |bytes: Option<Bytes>| -> Result<Box<dyn StageRunner>, String> {
        let weights = error + bytes.map_or(0.0, |bytes| f32::from(bytes[0]));
        Ok(Box::new(Model { base: error, weights }))
    };
    let engine = PolicyEngine::from(engine).reading(Arc::new(read));
    let committer = VeriCommitter::new(Identity::from_seed([seed; 32]), "three lines".to_owned(), 1);
    Worker::new(
        node.clone(),
        engine,
        Arc::new(Arithmetic::default()),
        Arc::new(ByteText),
        adapters,
        Some(Arc::new(committer)),
        WorkerConfig {
            max_leases: 3,
            call_timeout: Duration::from_secs(600),
            ..WorkerConfig::new(trainer.clone(), "three lines".to_owned())
        },
    )
}

fn round_config() -> SequentialConfig {
    SequentialConfig { groups_per_step: 5, min_workers: 1, ack_timeout_ms: 2000 }
}

/// What an auditor found.
#[derive(Debug, Default)]
struct Found {
    /// Versions whose rollouts passed, once for each.
    passed: Vec<u64>,
    /// The evidence against a liar, with all weights where there are any.
    proof: Option<(veri_verify::Evidence, Option<Bytes>)>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rounds_go_from_snapshot_to_audited_groups_and_a_cheater_is_never_trained_on() {
    let Found { passed, proof } = audited_rounds(1, snapshot, 0.25).await;
    assert!(passed.len() > 5);
    let (evidence, all_weights) = proof.unwrap();
    assert!(!evidence.full && all_weights.is_none());
    let opened = evidence.open().unwrap();
    let weights = opened.adapter().map_or(Weights::Base, |bytes| Weights::Lora(bytes.to_vec().into()));
    let mut again = Recompute::default();
    again.install(evidence.job.adapter_hash, weights).unwrap();
    let again = again.replay(&evidence.job, &evidence.answer).unwrap();
    assert_eq!(opened.judge(&again, &veri_verify::Profile::f32()), evidence.verdict, "anyone finds the same");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whole_models_are_audited_with_the_very_version_that_was_sampled_with() {
    let Found { passed, proof } = audited_rounds(101, full_snapshot, 1.0).await;
    for version in 0..3 {
        let n = passed.iter().filter(|v| **v == version).count();
        assert!(n >= 20, "all rollouts of version {version}, not {n}");
    }
    let (evidence, all_weights) = proof.unwrap();
    assert!(evidence.full && evidence.adapter.is_none(), "a whole model is not carried along");
    let all_weights = all_weights.expect("but handed over to be kept");
    assert_eq!(all_weights[..], [evidence.job.policy_version as u8]);
    let opened = evidence.open().unwrap();
    assert_eq!(opened.all_weights(), Some(*blake3::hash(&all_weights).as_bytes()));
    let mut again = Recompute::default();
    again.install(opened.all_weights(), Weights::Full(all_weights)).unwrap();
    let again = again.replay(&evidence.job, &evidence.answer).unwrap();
    assert_eq!(opened.judge(&again, &veri_verify::Profile::f32()), evidence.verdict, "anyone finds the same");
}

/// Three rounds of a trainer with this seed, an honest worker and a liar, of whose rollouts so many are audited.
async fn audited_rounds(seed: u8, snapshot: fn(u8, u64) -> SignedSnapshot, fraction: f64) -> Found {
    let trainer = node(seed).await;
    let auditor = connected(seed + 3, &trainer).await;
    let mut settings = config(vec![auditor.peer_id()]);
    settings.dispatch.audit.fraction = fraction;
    let collector = collecting(&trainer, settings).await;
    let (honest, liar) = (connected(seed + 1, &trainer).await, connected(seed + 2, &trainer).await);
    let id = trainer.peer_id();
    let honest_worker = worker(&honest, &id, seed + 1, 0.0, false);
    let mut stats = honest_worker.stats();
    let honest_run = tokio::spawn(honest_worker.run());
    let liar_run = tokio::spawn(worker(&liar, &id, seed + 2, 0.5, false).run());
    let found = Arc::new(Mutex::new(Found::default()));
    let kept = Arc::clone(&found);
    let audits = tokio::spawn(async move {
        let mut n = 0u8;
        let fresh = move || {
            n = n.wrapping_add(1);
            [n; 32]
        };
        let on_verdict = |audited: &Audited<'_>| {
            let mut found = kept.lock().unwrap();
            match audited.verdict {
                veri_verify::Verdict::Pass { .. } => found.passed.push(audited.trajectory.lease().version.0),
                veri_verify::Verdict::Fail { .. } => {
                    found.proof = Some((audited.evidence(), audited.all_weights().cloned()));
                }
                _ => {}
            }
        };
        let config = AuditorConfig::new(id);
        let mut replay = Recompute::default();
        run_auditor(&auditor, &Adapters::default(), &mut replay, &config, fresh, on_verdict).await
    });

    assert_eq!(collector.wait_for_workers(2, Duration::from_secs(20)).await, 2);
    let mut sync = SequentialSync::new(round_config(), PolicyVersion(0), 0);
    for version in 0..3u64 {
        let snapshot = snapshot(seed, version);
        let round = collector.round(&mut sync, &snapshot);
        let groups = tokio::time::timeout(Duration::from_secs(60), round).await.unwrap().unwrap();
        assert_eq!(groups.len(), 5);
        for t in groups.iter().flat_map(|g| &g.trajectories) {
            assert_eq!(*t.worker(), honest.peer_id(), "a liar's trajectory reached the learner");
            assert!(t.steps().iter().all(|s| s.version.0 == version));
            assert!(!t.commitment().is_empty());
        }
        collector.commit(&mut sync).await.unwrap();
    }
    let ended = tokio::time::timeout(Duration::from_secs(20), liar_run).await.unwrap().unwrap();
    assert!(matches!(ended, Err(WorkerError::Refused { .. })), "{ended:?}");
    let convicted = collector.convicted();
    assert_eq!(convicted.len(), 1);
    assert_eq!(convicted[0].0, liar.peer_id());
    let counts = collector.counts();
    assert_eq!(counts.consumed, 60);
    assert_eq!((counts.lost, counts.duplicated, counts.consumed_of_convicted), (0, 0, 0));
    assert!(counts.dropped_for(DropReason::Convicted) > 0);
    let found = std::mem::take(&mut *found.lock().unwrap());
    assert_eq!(found.proof.as_ref().unwrap().0.worker(), Some(liar.peer_id()));
    collector.check().unwrap();
    // The worker counts an answer a moment after the trainer has counted the trajectory.
    let counted = stats.wait_for(|s| s.accepted >= 60);
    let counted = *tokio::time::timeout(Duration::from_secs(20), counted).await.unwrap().unwrap();
    assert_eq!(counted.version, Some(2));
    honest_run.abort();
    audits.abort();
    for node in [trainer, honest, liar] {
        node.shutdown().await;
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_is_acknowledged_as_soon_as_it_is_installed() {
    let trainer = node(91).await;
    let rollouts = connected(92, &trainer).await;
    // Whoever waits for an open question to run out waits longer than this test.
    let settings = CollectorConfig { long_poll: Duration::from_secs(300), ..config(vec![]) };
    let collector = collecting(&trainer, settings).await;
    let run = tokio::spawn(worker(&rollouts, &trainer.peer_id(), 92, 0.0, false).run());
    let mut sync = SequentialSync::new(
        SequentialConfig { ack_timeout_ms: 600_000, ..round_config() },
        PolicyVersion(0),
        0,
    );
    for version in 0..4 {
        let snapshot = snapshot(91, version);
        let round = collector.round(&mut sync, &snapshot);
        let groups = tokio::time::timeout(Duration::from_secs(60), round).await.unwrap().unwrap();
        assert!(groups.iter().flat_map(|g| &g.trajectories).all(|t| t.steps()[0].version.0 == version));
        collector.commit(&mut sync).await.unwrap();
    }
    run.abort();
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_trainer_goes_on_where_its_checkpoint_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal.redb");
    let trainer = node(11).await;
    let rollouts = connected(12, &trainer).await;
    let adapters = Arc::new(Adapters::default());
    let run = tokio::spawn(worker_with(&rollouts, &trainer.peer_id(), 12, 0.0, Arc::clone(&adapters)).run());
    let start = |steps| going_on(&trainer, &path, steps);

    let collector = start(0).await.unwrap();
    let mut sync = SequentialSync::new(round_config(), PolicyVersion(0), 0);
    collector.round(&mut sync, &snapshot(11, 0)).await.unwrap();
    collector.commit(&mut sync).await.unwrap();
    let lost = collector.round(&mut sync, &snapshot(11, 1)).await.unwrap();
    // The trainer dies with the second batch in training; the checkpoint has one step.
    collector.close();
    let resumed = start(1).await.unwrap();
    resumed.check().unwrap();
    assert_eq!(resumed.counts().consumed, 20);
    let mut sync = SequentialSync::new(round_config(), PolicyVersion(1), 1);
    let again = resumed.round(&mut sync, &snapshot(11, 1)).await.unwrap();
    assert_eq!(again, lost, "what was acknowledged is not sampled again");
    resumed.commit(&mut sync).await.unwrap();
    resumed.check().unwrap();
    assert_eq!((resumed.counts().consumed, resumed.counts().lost), (40, 0));
    assert_eq!(adapters.fetched.load(Ordering::Relaxed), 1, "version 1 was fetched before the restart");
    resumed.close();
    let other = config(vec![trainer.peer_id()]);
    let other = Collector::start(trainer.clone(), other, admission(), Some(path.clone()), 2).await;
    assert!(matches!(other, Err(CollectorError::Journal(JournalError::OtherSettings { .. }))), "{other:?}");
    for steps in [0, 1, 4] {
        let torn = start(steps).await;
        assert!(matches!(torn, Err(CollectorError::Journal(JournalError::OtherCheckpoint { .. }))));
    }
    run.abort();
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_is_only_reported_after_its_hash_matched() {
    let trainer = node(21).await;
    let rollouts = connected(22, &trainer).await;
    let collector = collecting(&trainer, config(vec![])).await;
    let broken = worker(&rollouts, &trainer.peer_id(), 22, 0.0, true);
    let stats = broken.stats();
    let run = tokio::spawn(broken.run());
    collector.publish(&snapshot(21, 0)).await.unwrap();
    let mut changed = stats.clone();
    changed.wait_for(|s| s.version == Some(0)).await.unwrap();
    collector.publish(&snapshot(21, 1)).await.unwrap();
    // Its copy of version 1 is damaged: it tries again and again, and stays at version 0.
    let mut sync = SequentialSync::new(round_config(), PolicyVersion(1), 1);
    let given = snapshot(21, 1);
    let round = collector.round(&mut sync, &given);
    assert!(tokio::time::timeout(Duration::from_secs(2), round).await.is_err());
    assert_eq!(collector.workers()[0].version, Some(PolicyVersion(0)));
    assert_eq!(collector.counts().leased, 0);
    run.abort();
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_come_over_bitswap_and_only_as_they_were_signed() {
    let trainer = node(41).await;
    let rollouts = connected(42, &trainer).await;
    let source = Blocks::start(trainer.clone(), Arc::new(MemoryStore::new()));
    let copy = Blocks::start(rollouts.clone(), Arc::new(MemoryStore::new()));
    let adapter = Bytes::from(vec![5; 300_000]);
    let root = source.publish_bytes("adapter", "lora", adapter.clone()).await.unwrap();
    let hash = *blake3::hash(&adapter).as_bytes();
    let artefact = Artefact { root, hash, bytes: adapter.len() as u64, spread: false };
    let manifest =
        SnapshotManifest { payload: Payload::Lora(artefact.clone()), ..snapshot(41, 1).manifest().clone() };
    let fetched = PayloadSource::fetch(&copy, &manifest, &trainer.peer_id()).await.unwrap();
    assert_eq!(fetched, adapter);
    manifest.check_payload(&fetched).unwrap();
    let longer = Artefact { bytes: artefact.bytes + 1, ..artefact };
    let manifest = SnapshotManifest { payload: Payload::Lora(longer), ..manifest };
    let error = PayloadSource::fetch(&copy, &manifest, &trainer.peer_id()).await.unwrap_err();
    assert!(error.contains("300000"), "{error}");
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_nonsense_get_an_answer_and_change_nothing() {
    let trainer = node(31).await;
    let stranger = connected(32, &trainer).await;
    let auditor = PeerId::from_ed25519(&[9; 32]);
    let collector = collecting(&trainer, config(vec![auditor])).await;
    let before = collector.counts();
    for method in [
        "echo/register",
        "echo/lease",
        "echo/submit",
        "echo/audit/next",
        "echo/audit/open",
        "echo/audit/verdict",
    ] {
        for body in [&b""[..], b"\xff\xff\xff\xff", &[8; 5000]] {
            let (id, body) = (trainer.peer_id(), Bytes::copy_from_slice(body));
            let answer = stranger.call(&id, method, body, Duration::from_secs(5)).await;
            assert!(answer.is_err(), "{method}");
        }
    }
    assert_eq!(collector.counts(), before);
    assert!(collector.workers().is_empty());
    let nobody = Collector::start(
        trainer.clone(),
        CollectorConfig { auditors: vec![], ..config(vec![stranger.peer_id()]) },
        admission(),
        None,
        0,
    );
    assert!(matches!(nobody.await, Err(CollectorError::NoAuditor)));
    trainer.shutdown().await;
    stranger.shutdown().await;
}
