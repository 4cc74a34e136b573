//! What ties rollouts to a real model: its tokenizer and chat template as [`Text`], its forward pass as an auditor's
//! [`Replay`], its engine as a learner's [`Sampler`].

use std::path::Path;
use std::sync::Arc;

use echo_rollout::Task;
use echo_rollout::environment::by_name;
use echo_rollout::service::{
    Committer, InFlight, PayloadSource, Replay, VeriCommitter, Worker, WorkerConfig,
};
use echo_rollout::text::{Text, TextError, until_stop};
use echo_trainer::RunConfig;
use echo_trainer::service::evaluation::BoxFuture;
use echo_trainer::service::{Learner, Parts, SampleRequest, Sampler};
use lattica_bitswap::{BlockStore, Blocks, MemoryStore};
use lattica_net::Node;
use parallax_engine::local::LocalStage;
use parallax_engine::{EngineConfig, EngineHandle, Request, SamplingParams};
use parallax_model::train::{LoraConfig, TrainModel, TrainOptions};
use parallax_model::{
    Adapter, ChatMessage, ChatTemplate, Checkpoint, DeviceKind, KvFormat, LoadOptions, Stage, Tokenizer,
    WeightDtype,
};
use swarm_wire::PolicyVersion;
use veri_verify::service::Auditor;
use veri_verify::{Answer, Job};

/// Tokens of a cache page.
pub const PAGE_TOKENS: usize = 16;
/// Cached positions of a learner's own engine, which only evaluates.
const EVAL_CACHE_TOKENS: usize = 8192;

/// A checkpoint's tokenizer and chat template.
#[derive(Debug)]
pub struct ModelText {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    stop_ids: Vec<u32>,
}

impl ModelText {
    /// Reads both from `checkpoint`. Without a template the task is the plain prompt.
    ///
    /// # Errors
    /// A checkpoint without a tokenizer, or without a token that ends a sequence.
    pub fn open(checkpoint: &Checkpoint) -> anyhow::Result<Self> {
        let stop_ids = checkpoint.config().eos.clone();
        anyhow::ensure!(!stop_ids.is_empty(), "the model names no end-of-sequence token; rollouts need one");
        Ok(Self { tokenizer: checkpoint.tokenizer()?, template: checkpoint.chat_template()?, stop_ids })
    }
}

impl Text for ModelText {
    fn prompt(&self, task: &Task) -> Result<Vec<u32>, TextError> {
        let failed = |reason: String| TextError { seed: task.seed, reason };
        let Some(template) = &self.template else {
            return self.tokenizer.encode(&task.prompt, true).map_err(|e| failed(e.to_string()));
        };
        let messages = [ChatMessage::new("user", task.prompt.as_str())];
        let prompt = template.render(&messages, true).map_err(|e| failed(e.to_string()))?;
        self.tokenizer.encode(&prompt, false).map_err(|e| failed(e.to_string()))
    }

    /// Tokens that are no text give an empty answer, which no verifier takes for a right one.
    fn completion(&self, tokens: &[u32]) -> String {
        self.tokenizer.decode(until_stop(tokens, &self.stop_ids)).unwrap_or_default()
    }

    fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }
}

/// How rollouts are computed, by workers and auditors alike: the whole model in f32 on the CPU, with a cache for
/// `cache_tokens` positions.
pub fn load_options(checkpoint: &Checkpoint, dtype: WeightDtype, cache_tokens: usize) -> LoadOptions {
    LoadOptions {
        layers: 0..checkpoint.config().n_layers,
        dtype,
        device: DeviceKind::Cpu,
        kv_page_tokens: PAGE_TOKENS,
        kv_pages: cache_tokens.div_ceil(PAGE_TOKENS).max(1),
        // What auditors recompute must not be rounded.
        kv_format: KvFormat::F32,
    }
}

/// An auditor's own copy of the model.
#[derive(Debug)]
pub struct ModelReplay {
    auditor: Auditor,
    installed: Option<PolicyVersion>,
}

impl ModelReplay {
    /// Loads the whole model in f32 for answers of up to `max_tokens`, prompt included.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn load(checkpoint: &Checkpoint, max_tokens: usize) -> anyhow::Result<Self> {
        let stage = Stage::load(checkpoint, &load_options(checkpoint, WeightDtype::F32, max_tokens))?;
        Ok(Self { auditor: Auditor::new(stage, checkpoint.config().n_layers)?, installed: None })
    }
}

impl Replay for ModelReplay {
    fn replay(
        &mut self,
        version: PolicyVersion,
        adapter: Option<&[u8]>,
        job: &Job,
        answer: &Answer,
    ) -> Result<veri_verify::Replay, String> {
        if self.installed != Some(version) {
            self.installed = None;
            let adapter = adapter.map(Adapter::from_bytes).transpose().map_err(|e| e.to_string())?;
            self.auditor.set_adapter(adapter.as_ref()).map_err(|e| e.to_string())?;
            self.installed = Some(version);
        }
        self.auditor.replay(job, answer, None).map_err(|e| e.to_string())
    }
}

/// A learner's own engine: it samples answers to held-out tasks.
#[derive(Debug)]
pub struct EngineSampler {
    engine: EngineHandle,
    stop_ids: Vec<u32>,
}

impl EngineSampler {
    /// Loads the whole model in f32.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn load(checkpoint: &Checkpoint) -> anyhow::Result<Self> {
        let options = load_options(checkpoint, WeightDtype::F32, EVAL_CACHE_TOKENS);
        let stage = LocalStage::load(checkpoint, &options)?;
        let engine = EngineHandle::start(Box::new(stage), EngineConfig::default())?;
        Ok(Self { engine, stop_ids: checkpoint.config().eos.clone() })
    }
}

impl Sampler for EngineSampler {
    fn install(&self, version: PolicyVersion, adapter: Option<Vec<u8>>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { self.engine.swap_adapter(version, adapter).await.map_err(|e| e.to_string()) })
    }

    fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Vec<u32>, String>> {
        let sampling = SamplingParams {
            temperature: request.temperature,
            seed: request.seed,
            max_tokens: request.max_tokens as usize,
            stop_ids: self.stop_ids.clone(),
            ..SamplingParams::default()
        };
        let request = Request { prompt: request.prompt, sampling, ..Request::default() };
        let answer = self.engine.generate(request);
        Box::pin(async move { Ok(answer.await.map_err(|e| e.to_string())?.token_ids()) })
    }
}

/// A block store in memory: adapters are small, and published anew by whoever restarts.
pub fn memory_blocks() -> Arc<dyn BlockStore> {
    Arc::new(MemoryStore::new())
}

/// Loads the model, with an adapter to train and once more to evaluate, and makes a learner that answers workers.
///
/// # Errors
/// Settings out of range, weights that cannot be read, a directory that cannot be written.
pub async fn start_learner(
    node: Node,
    blocks: Blocks,
    checkpoint: &Checkpoint,
    config: RunConfig,
    dir: &Path,
) -> anyhow::Result<Learner<TrainModel>> {
    let shape = checkpoint.config();
    let lora = LoraConfig {
        rank: config.trainer.lora_rank,
        alpha: config.trainer.lora_alpha,
        targets: Vec::new(),
        seed: config.seed,
    };
    let parts = Parts {
        node,
        blocks,
        policy: TrainModel::from_checkpoint(checkpoint, &TrainOptions { lora: Some(lora), full: false })?,
        sampler: Arc::new(EngineSampler::load(checkpoint)?),
        text: Arc::new(ModelText::open(checkpoint)?),
        base_model_id: checkpoint.id()?,
        vocabulary: u32::try_from(shape.vocab)?,
        full_bytes: shape.stage_bytes(&(0..shape.n_layers), WeightDtype::F32),
    };
    Ok(Learner::start(config, parts, dir).await?)
}

/// How a worker takes part in a run.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Address of the trainer, with its /p2p/ part.
    pub trainer: String,
    /// The trainer's environment.
    pub environment: String,
    /// Weights in memory; a trainer that audits expects f32.
    pub dtype: WeightDtype,
    /// Samples made at once.
    pub leases: u32,
    /// Positions of the key-value cache.
    pub cache_tokens: usize,
    /// What becomes of samples in the making when a newer policy is here.
    pub in_flight: InFlight,
}

/// Loads the model, dials the trainer and makes a worker that is ready to run, commitments included unless samples switch policies.
///
/// # Errors
/// A trainer that cannot be reached, weights that cannot be read, an unknown environment.
pub async fn start_worker(
    node: Node,
    checkpoint: &Checkpoint,
    options: &WorkerOptions,
) -> anyhow::Result<Worker> {
    let trainer = node.dial(&options.trainer).await?;
    let source: Arc<dyn PayloadSource> = Arc::new(Blocks::start(node.clone(), memory_blocks()));
    let stage = LocalStage::load(checkpoint, &load_options(checkpoint, options.dtype, options.cache_tokens))?;
    let engine = EngineHandle::start(Box::new(stage), EngineConfig::default())?;
    let id = checkpoint.id()?;
    let n_layers = u32::try_from(checkpoint.config().n_layers)?;
    // A commitment is about one policy, which samples that switch are not.
    let commits = options.in_flight != InFlight::Switch;
    let committer = commits.then(|| -> Arc<dyn Committer> {
        Arc::new(VeriCommitter::new(&node.identity().secret_seed(), id.clone(), n_layers))
    });
    Ok(Worker::new(
        node,
        engine,
        Arc::from(by_name(&options.environment)?),
        Arc::new(ModelText::open(checkpoint)?),
        source,
        committer,
        WorkerConfig {
            max_leases: options.leases,
            in_flight: options.in_flight,
            ..WorkerConfig::new(trainer, id)
        },
    ))
}
