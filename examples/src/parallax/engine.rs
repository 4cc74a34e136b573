//! How the engine shares its steps and its memory among requests: options of the commands that serve.

use anyhow::{Context as _, anyhow, ensure};
use clap::{Args, ValueEnum};
use parallax_engine::speculate::PromptLookup;
use parallax_engine::{ConfigError, DraftModel, Drafter, EngineConfig, EngineHandle, OnSwap, StageRunner};
use parallax_model::{Checkpoint, DeviceKind};

use super::model::ModelArgs;

/// What becomes of answers in the making when the weights change.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum SwapPolicy {
    /// Compute their tokens again under the new weights, then go on
    Recompute,
    /// Go on with what the old weights cached
    Keep,
    /// Finish them on the old weights; later requests wait
    Finish,
}

/// Options of an engine that serves.
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// Tokens of one step, of prompts and answers together
    #[arg(long, default_value_t = EngineConfig::default().step_tokens, value_name = "N")]
    step_tokens: usize,
    /// Milliseconds that a step should take at most; prompts are then taken in smaller pieces. 0: any time
    #[arg(long, default_value_t = EngineConfig::default().step_ms, value_name = "MS")]
    step_ms: u64,
    /// Seconds that answers in the making wait when a machine is lost and others can take its place; then they end with an
    /// error
    #[arg(long, default_value_t = EngineConfig::default().patience_ms / 1000, value_name = "S")]
    patience_s: u64,
    /// Requests that are computed together, at most --step-tokens; others wait in a queue that is fair between API keys
    #[arg(long, default_value_t = EngineConfig::default().running_sequences, value_name = "N")]
    running_sequences: usize,
    /// Requests in the engine, waiting and running; one more gets 429
    #[arg(long, default_value_t = EngineConfig::default().queued_requests, value_name = "N")]
    queued_requests: usize,
    /// What becomes of answers in the making when the weights change
    #[arg(long, value_enum, default_value = "recompute")]
    on_swap: SwapPolicy,
    /// Compute every prompt whole, also when another began with the same tokens
    #[arg(long)]
    no_prefix_cache: bool,
    /// Guess tokens ahead, which changes no answer: `lookup` guesses what followed the same words before; or a small model
    /// with the same vocabulary
    #[arg(long, value_name = "lookup|MODEL")]
    draft: Option<String>,
    /// Tokens to guess at most, for each answer and step
    #[arg(long, default_value_t = EngineConfig::default().draft_tokens, value_name = "N")]
    draft_tokens: usize,
}

impl EngineArgs {
    /// Starts the engine of `model` over its runner; a draft model is loaded here, with a cache for as many tokens.
    ///
    /// # Errors
    /// Options outside their ranges, a draft model that cannot be loaded or has another vocabulary.
    pub fn start(
        &self,
        model: &str,
        checkpoint: &Checkpoint,
        runner: Box<dyn StageRunner>,
        device: DeviceKind,
    ) -> anyhow::Result<EngineHandle> {
        let config = EngineConfig {
            step_tokens: self.step_tokens,
            step_ms: self.step_ms,
            patience_ms: self.patience_s.saturating_mul(1000),
            running_sequences: self.running_sequences,
            queued_requests: self.queued_requests,
            on_swap: match self.on_swap {
                SwapPolicy::Recompute => OnSwap::Recompute,
                SwapPolicy::Keep => OnSwap::Keep,
                SwapPolicy::Finish => OnSwap::Finish,
            },
            prefix_cache: !self.no_prefix_cache,
            draft_tokens: self.draft_tokens,
            model: model.to_owned(),
        };
        // Before a draft model is loaded: a typing error should not cost a load.
        config.validate().map_err(|fault| {
            let ConfigError { field, value, expected } = fault;
            let (option, expected) =
                (field.replace('_', "-"), expected.replace("step_tokens", "--step-tokens"));
            anyhow!("--{option} {value} is out of range, expected {expected}")
        })?;
        let shape = runner.shape();
        let drafter: Option<Box<dyn Drafter>> = match self.draft.as_deref() {
            None => None,
            Some("lookup") => Some(Box::new(PromptLookup::default())),
            Some(draft) => {
                Some(Box::new(draft_model(draft, checkpoint, shape.page_tokens * shape.n_pages, device)?))
            }
        };
        Ok(EngineHandle::start_speculating(runner, config, drafter)?)
    }
}

fn draft_model(
    model: &str,
    target: &Checkpoint,
    cache_tokens: usize,
    device: DeviceKind,
) -> anyhow::Result<DraftModel> {
    let args = ModelArgs::of(model, device);
    let draft = args.open().with_context(|| format!("--draft {model}"))?;
    let (guesses, wanted) = (draft.config().vocab, target.config().vocab);
    ensure!(
        guesses == wanted,
        "--draft {model} has a vocabulary of {guesses} tokens, the model one of {wanted}; a draft model must be of the same family"
    );
    let loaded = args.load(draft, cache_tokens)?;
    Ok(DraftModel::new(Box::new(loaded.pipeline)))
}
