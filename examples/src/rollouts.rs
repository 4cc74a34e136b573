//! What ties rollouts to a real model: its tokenizer and chat template as [`Text`], its forward pass as an auditor's
//! [`ModelReplay`], its engine as a learner's [`Sampler`].

mod reach;
mod replay;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use echo_rollout::environment::cards::Speaker;
use echo_rollout::environment::maths::{BrokenLines, Maths};
use echo_rollout::environment::{Environment, Guests, by_name_with, is_address};
use echo_rollout::service::external::TIME_LIMIT;
use echo_rollout::service::{
    Committer, Endpoint, EndpointConfig, External, ExternalConfig, InFlight, PolicyEngine, Spreads,
    VeriCommitter, Worker, WorkerConfig,
};
use echo_rollout::text::{Text, TextError, until_stop};
use echo_rollout::{Task, Weights};
use echo_trainer::RunConfig;
use echo_trainer::service::evaluation::BoxFuture;
use echo_trainer::service::{Judge, Judged, Learner, Parts, SampleRequest, Sampled, Sampler};
use lattica_bitswap::{BlockStore, Blocks, MemoryStore};
use lattica_net::Node;
use parallax_engine::local::LocalStage;
use parallax_engine::{EngineConfig, EngineHandle, Request, SamplingParams, StageRunner};
use parallax_model::train::{LoraConfig, TrainModel, TrainOptions};
use parallax_model::{
    BaseDtype, ChatMessage, ChatTemplate, Checkpoint, DeviceKind, KvFormat, LoadOptions, Tokenizer,
    WeightDtype,
};
use swarm_wire::PolicyVersion;

use crate::program;

pub(crate) use reach::reach;
pub use replay::ModelReplay;

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

    /// What the environment says is a user message, whatever the template makes of it.
    fn observation(&self, task: &Task, said: &str) -> Result<Vec<u32>, TextError> {
        let failed = |reason: String| TextError { seed: task.seed, reason };
        let Some(template) = &self.template else {
            return Err(failed("several turns need a model with a chat template".to_owned()));
        };
        // The policy's own words are not rendered again: only what follows them in the template is taken.
        let words = "[the words of the assistant]";
        let turns = [("user", task.prompt.as_str()), ("assistant", words), ("user", said)];
        let messages = turns.map(|(role, content)| ChatMessage::new(role, content));
        let chat = template.render(&messages, true).map_err(|e| failed(e.to_string()))?;
        let parts: Vec<&str> = chat.split(words).collect();
        let [_, after] = parts[..] else {
            return Err(failed("the chat template does not show an assistant's words once".to_owned()));
        };
        let mut tokens = self.tokenizer.encode(after, false).map_err(|e| failed(e.to_string()))?;
        // The policy has said the end of its turn itself.
        if tokens.first().is_some_and(|first| self.stop_ids.contains(first)) {
            tokens.remove(0);
        }
        Ok(tokens)
    }

    fn answer(&self, task: &Task, said: &str) -> Result<Vec<u32>, TextError> {
        let failed = |e: &dyn std::fmt::Display| TextError { seed: task.seed, reason: e.to_string() };
        let mut tokens = self.tokenizer.encode(said, false).map_err(|e| failed(&e))?;
        tokens.push(self.stop_ids[0]);
        Ok(tokens)
    }

    /// Tokens that are no text give an empty answer, which no verifier takes for a right one.
    fn completion(&self, tokens: &[u32]) -> String {
        self.tokenizer.decode(until_stop(tokens, &self.stop_ids)).unwrap_or_default()
    }

    fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }
}

/// How rollouts are computed, by workers and auditors alike: the whole model on the CPU, with a cache in f32 for
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

/// An engine over the whole model, loaded by [`load_options`].
///
/// # Errors
/// Weights that cannot be read.
pub fn engine(
    checkpoint: &Checkpoint,
    dtype: WeightDtype,
    cache_tokens: usize,
) -> anyhow::Result<EngineHandle> {
    let stage = LocalStage::load(checkpoint, &load_options(checkpoint, dtype, cache_tokens))?;
    Ok(EngineHandle::start(Box::new(stage), EngineConfig::default())?)
}

/// The same, for policy versions: adapters, and whole models, which are read as the first one was.
///
/// # Errors
/// Weights that cannot be read.
pub fn policy_engine(
    checkpoint: &Checkpoint,
    dtype: WeightDtype,
    cache_tokens: usize,
) -> anyhow::Result<PolicyEngine> {
    let options = load_options(checkpoint, dtype, cache_tokens);
    let location = checkpoint.location().to_string_lossy().into_owned();
    let read = move |bytes: Option<Bytes>| -> Result<Box<dyn StageRunner>, String> {
        let base = Checkpoint::resolve(&location).map_err(|e| e.to_string())?;
        let model = match bytes {
            // A copy only when somebody else has the bytes too.
            Some(bytes) => base.with_weights(bytes.into()).map_err(|e| e.to_string())?,
            None => base,
        };
        Ok(Box::new(LocalStage::load(&model, &options).map_err(|e| e.to_string())?))
    };
    Ok(PolicyEngine::from(engine(checkpoint, dtype, cache_tokens)?).reading(Arc::new(read)))
}

/// A learner's own engine: it samples answers to held-out tasks.
#[derive(Debug)]
pub struct EngineSampler {
    engine: PolicyEngine,
    stop_ids: Vec<u32>,
}

impl EngineSampler {
    /// Loads the whole model in the learner's format, with a cache for `cache_tokens` positions.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn load(checkpoint: &Checkpoint, base_dtype: BaseDtype, cache_tokens: usize) -> anyhow::Result<Self> {
        let engine = policy_engine(checkpoint, base_dtype.weights(), cache_tokens)?;
        Ok(Self { engine, stop_ids: checkpoint.config().eos.clone() })
    }
}

impl Sampler for EngineSampler {
    fn install(&self, version: PolicyVersion, weights: Weights) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { self.engine.install(version, weights).await.map_err(|e| e.to_string()) })
    }

    fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Sampled, String>> {
        let sampling = SamplingParams {
            temperature: request.temperature,
            seed: request.seed,
            max_tokens: request.max_tokens as usize,
            stop_ids: self.stop_ids.clone(),
            ..SamplingParams::default()
        };
        let request = Request { prompt: request.prompt, sampling, ..Request::default() };
        let answer = self.engine.engine().generate(request);
        Box::pin(async move {
            let completion = answer.await.map_err(|e| e.to_string())?;
            let logprobs = completion.tokens.iter().map(|t| t.sampled_logprob).collect();
            Ok(Sampled { tokens: completion.token_ids(), logprobs })
        })
    }
}

/// A block store in memory: adapters are small, only the last are kept, and whoever restarts publishes anew.
pub fn memory_blocks() -> Arc<dyn BlockStore> {
    Arc::new(MemoryStore::new())
}

/// The environment called `name`, or the one in another program when one is given: the program, then its arguments. An
/// environment or an opponent by its http address is asked there, the latter with the key in `OPENAI_API_KEY` if there is one;
/// `maths:FILE` reads the file.
///
/// # Errors
/// An unknown name; a program or a server that cannot be asked or does not introduce itself.
pub fn environment(name: &str, program: &[String]) -> anyhow::Result<Arc<dyn Environment>> {
    let speaker = |who: &str| match who {
        "self" => Err("an earlier version of the policy plays in one process only; train with \
                       training-swarm solo"
            .to_owned()),
        address => endpoint(address),
    };
    environment_with(name, program, &Guests { speaker: &speaker, ..guests() })
}

/// Who comes to environments whatever is trained: question sets by their files, reward models by their directories, environments
/// by their addresses.
pub fn guests() -> Guests<'static> {
    Guests { questions: &questions, elsewhere: &elsewhere, judge: &judge, ..Guests::none() }
}

/// As [`environment`], with other guests.
///
/// # Errors
/// As [`environment`].
pub fn environment_with(
    name: &str,
    program: &[String],
    guests: &Guests<'_>,
) -> anyhow::Result<Arc<dyn Environment>> {
    let Some((program, arguments)) = program.split_first() else {
        return Ok(Arc::from(by_name_with(name, guests)?));
    };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Ok(Arc::new(External::start(ExternalConfig::new(program, &arguments))?))
}

/// The question set in a file of JSON lines. Lines that are left out are said, the first few with the reason.
///
/// # Errors
/// A file that cannot be read or is no question set.
pub fn questions(path: &str, broken: BrokenLines) -> Result<Maths, String> {
    const NAMED: usize = 5;
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let maths = Maths::parse(&text, broken).map_err(|e| e.to_string())?;
    if !maths.broken().is_empty() {
        program::say(&format!("{path}: {} broken lines are left out", maths.broken().len()));
    }
    for b in maths.broken().iter().take(NAMED) {
        program::say(&format!("{path}: line {}: {}", b.line, b.reason));
    }
    Ok(maths)
}

/// `tasks` with the reward model in `directory` for a verifier.
fn judge(tasks: Box<dyn Environment>, directory: &str) -> Result<Box<dyn Environment>, String> {
    let judge = Judge::load(Path::new(directory)).map_err(|e| e.to_string())?;
    Ok(Box::new(Judged::new(tasks, judge).map_err(|e| e.to_string())?))
}

/// The environment at an http address.
fn elsewhere(address: &str) -> Result<Box<dyn Environment>, String> {
    Ok(Box::new(External::connect(address, TIME_LIMIT).map_err(|e| e.to_string())?))
}

/// Who plays from an http address.
///
/// # Errors
/// An address that is none.
pub fn endpoint(address: &str) -> Result<Arc<dyn Speaker>, String> {
    let api_key = std::env::var("OPENAI_API_KEY").ok();
    let config = EndpointConfig { api_key, ..EndpointConfig::new(address) };
    Ok(Arc::new(Endpoint::new(config).map_err(|e| e.to_string())?))
}

/// The trainable copy of a checkpoint: an adapter of the run's rank over frozen weights, or all weights.
///
/// # Errors
/// Weights that cannot be read.
pub fn trainable(checkpoint: &Checkpoint, config: &RunConfig) -> anyhow::Result<TrainModel> {
    let lora = LoraConfig {
        rank: config.trainer.lora_rank,
        alpha: config.trainer.lora_alpha,
        targets: config.trainer.lora_targets.clone(),
        seed: config.seed,
        base_dtype: config.trainer.base_dtype,
    };
    let full = config.trainer.full;
    let options = TrainOptions { lora: (!full).then_some(lora), full };
    let mut model = TrainModel::from_checkpoint(checkpoint, &options)?;
    model.set_activation_checkpointing(config.trainer.activation_checkpointing);
    Ok(model)
}

/// What reports call the environment of a run: the name in its settings, or what its program or its server calls itself.
pub fn environment_name(config: &RunConfig, environment: &dyn Environment) -> String {
    let foreign = !config.environment_program.is_empty() || is_address(&config.environment);
    if foreign { environment.name().to_owned() } else { config.environment.clone() }
}

/// Loads the model, once to train and once more to evaluate, and makes a learner of `environment` that answers
/// workers.
///
/// # Errors
/// Settings out of range, weights that cannot be read, a directory that cannot be written.
pub async fn start_learner(
    node: Node,
    blocks: Blocks,
    checkpoint: &Checkpoint,
    environment: Arc<dyn Environment>,
    config: RunConfig,
    dir: &Path,
) -> anyhow::Result<Learner<TrainModel>> {
    let shape = checkpoint.config();
    let parts = Parts {
        environment,
        node,
        blocks,
        policy: trainable(checkpoint, &config)?,
        sampler: Arc::new(EngineSampler::load(checkpoint, config.trainer.base_dtype, EVAL_CACHE_TOKENS)?),
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
    /// How long to dial a trainer that does not answer.
    pub patience: Duration,
    /// The trainer's environment.
    pub environment: String,
    /// The program that is the environment, with its arguments; empty for a built-in one.
    pub environment_program: Vec<String>,
    /// Format of the learner's frozen weights; one that trains over another refuses the worker.
    pub base_dtype: BaseDtype,
    /// Weights in memory; a trainer that audits expects those of `base_dtype`.
    pub dtype: WeightDtype,
    /// Samples made at once.
    pub leases: u32,
    /// Positions of the key-value cache.
    pub cache_tokens: usize,
    /// What becomes of samples in the making when a newer policy is here.
    pub in_flight: InFlight,
}

/// Reaches the trainer, loads the model and makes a worker that is ready to run, commitments included unless samples switch policies.
///
/// # Errors
/// A trainer that cannot be reached in that time, weights that cannot be read, an unknown environment.
pub async fn start_worker(
    node: Node,
    checkpoint: &Checkpoint,
    options: &WorkerOptions,
) -> anyhow::Result<Worker> {
    let trainer = reach(&node, &options.trainer, options.patience).await?;
    let source = Arc::new(Spreads::new(Blocks::start(node.clone(), memory_blocks())));
    let engine = policy_engine(checkpoint, options.dtype, options.cache_tokens)?;
    let id = options.base_dtype.model_id(&checkpoint.id()?);
    let n_layers = u32::try_from(checkpoint.config().n_layers)?;
    // A commitment is about one policy, which samples that switch are not.
    let commits = options.in_flight != InFlight::Switch;
    let committer = commits.then(|| -> Arc<dyn Committer> {
        Arc::new(VeriCommitter::new(node.identity().clone(), id.clone(), n_layers))
    });
    Ok(Worker::new(
        node,
        engine,
        environment(&options.environment, &options.environment_program)?,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transcript_of_turns_is_what_the_template_makes_of_it() {
        let text = ModelText::open(&Checkpoint::resolve("tiny").unwrap()).unwrap();
        let task = Task { seed: 1, prompt: "What is 2+3?".to_owned(), answer: "5".to_owned() };
        let said = text.tokenizer.encode("<calc>2+3</calc><eos>", false).unwrap();
        let heard = text.observation(&task, "5").unwrap();
        let transcript = [text.prompt(&task).unwrap(), said, heard].concat();
        let messages = [("user", "What is 2+3?"), ("assistant", "<calc>2+3</calc>"), ("user", "5")]
            .map(|(role, content)| ChatMessage::new(role, content));
        let chat = text.template.as_ref().unwrap().render(&messages, true).unwrap();
        assert_eq!(transcript, text.tokenizer.encode(&chat, false).unwrap());
        let echo = text.observation(&task, "[the words of the assistant]").unwrap_err();
        assert!(echo.to_string().contains("once"), "{echo}");
    }
}
