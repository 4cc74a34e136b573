//! Makes a tiny model from a configuration: random weights, chat lines, a model directory with bf16 weights.
//!
//! Single-threaded in its decisions and seeded throughout: the same configuration gives the same bytes on machines whose
//! kernels add in the same order.

use std::path::Path;
use std::time::Instant;

use echo_rollout::environment::{
    Arithmetic, Countdown, Environment, UnknownEnvironment, by_name, held_out_seed,
};
use parallax_model::tokenizer::Tokenizer;
use parallax_model::train::TrainModel;
use parallax_model::{ChatTemplate, ModelConfig};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::Serialize;

use super::checkpoint_dir::{self, CheckpointDirError};
use crate::config::PretrainConfig;
use crate::data::{ChatEncoder, DataError, LineDraws};
use crate::error::StepError;
use crate::policy::{Policy, values};
use crate::pretrain::TextTrainer;
use crate::step::{Labelled, labelled_logprobs};
use crate::vocabulary;

/// Held-out questions that the reported reward is computed over.
const HELD_OUT: u64 = 256;
/// Hands that are looked at for one line: some are over before anything can be said.
const MOST_DRAWS: u32 = 100;
/// Steps between two progress reports.
const REPORT_EVERY: u64 = 100;

/// What a run came to.
#[derive(Debug, Clone, Serialize)]
pub struct PretrainReport {
    /// Updates.
    pub steps: u64,
    /// Mean cross entropy of the answers over the first batch, in nats per token, before learning.
    pub loss_before: f64,
    /// The same over the last batch, after learning.
    pub loss_after: f64,
    /// Wall time.
    pub seconds: f64,
    /// Expected reward of a sampled answer on held-out questions: the mean probability of exactly the right answer. In a game,
    /// where the rewards are not asked: the mean probability that the first word is the teacher's best one.
    pub held_out_reward: f64,
    /// Number of parameters.
    pub parameters: u64,
    /// Tokens seen.
    pub tokens: u64,
}

/// Progress, for people.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Updates so far.
    pub step: u64,
    /// Loss of the last batch.
    pub loss: f64,
    /// As [`PretrainReport::held_out_reward`].
    pub held_out_reward: f64,
    /// Wall time so far.
    pub seconds: f64,
}

/// Why no model came out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PretrainError {
    /// A setting, or the model refused it.
    #[error("pre-training: {0}")]
    Model(String),
    /// What is to be learnt.
    #[error(transparent)]
    Environment(#[from] UnknownEnvironment),
    /// Text.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] CheckpointDirError),
}

fn model_error(error: impl std::fmt::Display) -> PretrainError {
    PretrainError::Model(error.to_string())
}

/// The shape as an HF configuration.
fn model_config(config: &PretrainConfig) -> Result<ModelConfig, PretrainError> {
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": config.hidden, "intermediate_size": config.ffn, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": 32,
        "vocab_size": vocabulary::TOKENS, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "max_position_embeddings": config.max_context, "bos_token_id": 1, "eos_token_id": vocabulary::EOS
    });
    ModelConfig::from_hf_json(&json.to_string()).map_err(model_error)
}

/// The tiny model's text side.
///
/// # Errors
/// Never in practice: tokenizer and template are constants.
pub fn tiny_encoder() -> Result<ChatEncoder, PretrainError> {
    let tokenizer = Tokenizer::from_json(vocabulary::tokenizer_json().as_bytes()).map_err(model_error)?;
    let template = ChatTemplate::new(vocabulary::CHAT_TEMPLATE, "<bos>", "<eos>").map_err(model_error)?;
    Ok(ChatEncoder::new(tokenizer, Some(template), vocabulary::EOS))
}

/// Pre-trains and writes a model directory to `out`.
///
/// # Errors
/// A setting out of range, a diverging run, a full disk.
pub fn pretrain(
    config: &PretrainConfig,
    out: &Path,
    mut progress: impl FnMut(Progress),
) -> Result<PretrainReport, PretrainError> {
    let started = Instant::now();
    // First: a directory that cannot be written should not cost a training run.
    checkpoint_dir::create(out)?;
    let shape = model_config(config)?;
    let encoder = tiny_encoder()?;
    let lessons = Lessons::new(config, encoder)?;
    let mut model = TrainModel::new_random(&shape, config.seed).map_err(model_error)?;
    model.set_text_file("tokenizer.json", vocabulary::tokenizer_json().into_bytes());
    let settings = vocabulary::tokenizer_config_json(config.max_context);
    model.set_text_file("tokenizer_config.json", settings.into_bytes());
    let mut trainer = TextTrainer::new(model, config.optim, usize::MAX)?;
    let batch = |step: u64| lessons.batch(step);
    let held_out = lessons.held_out()?;

    let mut report = PretrainReport {
        steps: config.steps,
        loss_before: trainer.loss(&batch(0)?)?,
        loss_after: 0.0,
        seconds: 0.0,
        held_out_reward: 0.0,
        parameters: shape.parameters(),
        tokens: 0,
    };
    for step in 0..config.steps {
        let lines = batch(step)?;
        report.tokens += lines.iter().map(|l| l.tokens.len() as u64).sum::<u64>();
        let done = trainer.step(&lines)?;
        if (step + 1) % REPORT_EVERY == 0 {
            let held_out_reward = expected_reward(trainer.policy(), &held_out)?;
            let seconds = started.elapsed().as_secs_f64();
            progress(Progress { step: step + 1, loss: done.loss, held_out_reward, seconds });
        }
    }
    report.loss_after = trainer.loss(&batch(config.steps.saturating_sub(1))?)?;
    report.held_out_reward = expected_reward(trainer.policy(), &held_out)?;
    let model = trainer.into_policy();
    model.save_checkpoint(out).map_err(model_error)?;
    narrow_weights(&out.join("model.safetensors"))?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// What is learnt, line by line.
struct Lessons<'a> {
    config: &'a PretrainConfig,
    encoder: ChatEncoder,
    environment: Box<dyn Environment>,
    /// Words that are offered are said, instead of the teacher's answers.
    game: bool,
}

impl<'a> Lessons<'a> {
    fn new(config: &'a PretrainConfig, encoder: ChatEncoder) -> Result<Self, PretrainError> {
        let environment: Box<dyn Environment> = match (config.environment.as_str(), config.max_operand) {
            ("arithmetic", Some(most)) => Box::new(Arithmetic::new(most, true)),
            ("countdown-sums", Some(most)) => Box::new(Countdown::sums(i64::from(most))),
            (other, _) => by_name(other)?,
        };
        let game = environment.turns() > 1;
        Ok(Self { config, encoder, environment, game })
    }

    fn batch(&self, step: u64) -> Result<Vec<Labelled>, DataError> {
        let Self { config, encoder, environment, .. } = self;
        let line = |row| {
            if !self.game {
                return encoder.draw(&**environment, &config.teacher, config.seed, step, row);
            }
            let mut draws = LineDraws::new(config.seed, step, row);
            for _ in 0..MOST_DRAWS {
                // The upper half of all seeds is held out for evaluation.
                let seed = draws.next_u64() >> 1;
                if let Some(line) = encoder.played(&**environment, seed, &mut draws, config.max_context)? {
                    return Ok(line);
                }
            }
            Err(DataError { reason: format!("{} offers no words to say", environment.name()) })
        };
        (0..config.batch).map(line).collect()
    }

    /// Held-out questions with their right answer, or with the word that the teacher says most often where a game begins; hands
    /// that are over before anything can be said are left out.
    fn held_out(&self) -> Result<Vec<Labelled>, DataError> {
        let mut lines = Vec::new();
        for i in 0..HELD_OUT {
            let task = self.environment.task(held_out_seed(i))?;
            let options = if self.game { self.environment.episode(&task).options() } else { Vec::new() };
            let best = options.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(word, _)| word);
            if let Some(answer) = best.or_else(|| (!self.game).then_some(&*task.answer)) {
                lines.push(self.encoder.line(&task.prompt, answer, false)?);
            }
        }
        Ok(lines)
    }
}

/// Mean probability that a sampled answer is exactly the marked one.
///
/// # Errors
/// When the model refuses the lines.
pub fn expected_reward(policy: &impl Policy, lines: &[Labelled]) -> Result<f64, StepError> {
    let mut sum = 0.0;
    for part in lines.chunks(64) {
        let logprobs = values(labelled_logprobs(policy, part)?.into_data());
        let mut rows = logprobs.iter();
        for line in part {
            let marked = line.learn[1..].iter().zip(rows.by_ref()).filter(|(learn, _)| **learn);
            sum += marked.map(|(_, l)| f64::from(*l)).sum::<f64>().exp();
        }
    }
    Ok(sum / lines.len().max(1) as f64)
}

/// Rewrites f32 weights as bf16 (round to nearest even), which halves the file.
fn narrow_weights(path: &Path) -> Result<(), PretrainError> {
    let bytes = std::fs::read(path).map_err(checkpoint_dir::io_error("reading", path))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(model_error)?;
    let narrow = |data: &[u8]| -> Vec<u8> {
        let values = data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect()
    };
    let parts: Vec<(String, Vec<usize>, Vec<u8>)> =
        tensors.iter().map(|(name, t)| (name.to_owned(), t.shape().to_vec(), narrow(t.data()))).collect();
    let mut views = Vec::with_capacity(parts.len());
    for (name, shape, data) in &parts {
        views.push((name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), data).map_err(model_error)?));
    }
    let narrowed = serialize(views, None).map_err(model_error)?;
    Ok(checkpoint_dir::write(path, &narrowed)?)
}
