//! How the engine shares its steps and its memory among requests: options of the commands that serve.

use anyhow::{Context as _, anyhow, bail, ensure};
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
    /// Tokens of one step, of prompts and answers together [default: 128, or --running-sequences where that is more]
    #[arg(long, value_name = "N")]
    step_tokens: Option<usize>,
    /// Milliseconds that a step should take at most; prompts are then taken in smaller pieces. 0: any time
    #[arg(long, default_value_t = EngineConfig::default().step_ms, value_name = "MS")]
    step_ms: u64,
    /// Seconds that answers in the making wait when a machine is lost and others can take its place; then they end with an
    /// error
    #[arg(long, default_value_t = EngineConfig::default().patience_ms / 1000, value_name = "S")]
    patience_s: u64,
    /// Requests that are computed together, at most --step-tokens; others wait in a queue that is fair between API keys
    /// [default: 64, or --step-tokens where that is less]
    #[arg(long, value_name = "N")]
    running_sequences: Option<usize>,
    /// Requests in the engine, waiting and running; one more gets 429
    #[arg(long, default_value_t = EngineConfig::default().queued_requests, value_name = "N")]
    queued_requests: usize,
    /// What becomes of answers in the making when the weights change, where --allow-weight-updates lets clients change them
    #[arg(long, value_enum, default_value = "recompute", requires = "allow_weight_updates")]
    on_swap: SwapPolicy,
    /// Compute every prompt whole, also when another began with the same tokens
    #[arg(long)]
    no_prefix_cache: bool,
    /// Guess tokens ahead, which changes no answer: `lookup` guesses what followed the same words before; or a small model
    /// with the same vocabulary
    #[arg(long, value_name = "lookup|MODEL")]
    draft: Option<String>,
    /// Tokens to guess at most, for each answer and step, with --draft: 1 to 64 [default: 8]
    #[arg(long, value_name = "N", requires = "draft")]
    draft_tokens: Option<usize>,
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
        // Before a draft model is loaded: a typing error should not cost a load.
        let config = self.config(model)?;
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

    /// What the engine of `model` is started with.
    ///
    /// # Errors
    /// Options outside their ranges, by name.
    fn config(&self, model: &str) -> anyhow::Result<EngineConfig> {
        let usual = EngineConfig::default();
        // What was not said follows what was: of the pair, one option alone always fits.
        let roomy = self
            .running_sequences
            .unwrap_or(usual.running_sequences)
            .clamp(usual.step_tokens, EngineConfig::MAX_STEP_TOKENS);
        let step_tokens = self.step_tokens.unwrap_or(roomy);
        let fitting = usual.running_sequences.min(step_tokens);
        let draft_tokens = self.draft_tokens.unwrap_or(usual.draft_tokens);
        if let (Some(draft), 0) = (&self.draft, draft_tokens) {
            bail!(
                "--draft {draft} with --draft-tokens 0 guesses nothing: leave out --draft, or give --draft-tokens 1 to 64"
            );
        }
        let config = EngineConfig {
            step_tokens,
            step_ms: self.step_ms,
            patience_ms: self.patience_s.saturating_mul(1000),
            running_sequences: self.running_sequences.unwrap_or(fitting),
            queued_requests: self.queued_requests,
            on_swap: match self.on_swap {
                SwapPolicy::Recompute => OnSwap::Recompute,
                SwapPolicy::Keep => OnSwap::Keep,
                SwapPolicy::Finish => OnSwap::Finish,
            },
            prefix_cache: !self.no_prefix_cache,
            draft_tokens,
            model: model.to_owned(),
        };
        config.validate().map_err(|fault| {
            let ConfigError { field, value, expected } = fault;
            let (option, expected) =
                (field.replace('_', "-"), expected.replace("step_tokens", "--step-tokens"));
            anyhow!("--{option} {value} is out of range, expected {expected}")
        })?;
        Ok(config)
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

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser};

    use super::super::adapters::AdapterArgs;
    use super::*;

    /// As in the commands that serve.
    #[derive(Debug, Parser)]
    #[command(no_binary_name = true)]
    struct Options {
        #[command(flatten)]
        engine: EngineArgs,
        #[command(flatten)]
        _adapters: AdapterArgs,
    }

    /// What becomes of these options: tokens of a step and requests computed together, or what is wrong.
    fn room(options: &[&str]) -> Result<(usize, usize), String> {
        let options = Options::try_parse_from(options).map_err(|error| error.to_string())?;
        let config = options.engine.config("tiny").map_err(|error| error.to_string())?;
        Ok((config.step_tokens, config.running_sequences))
    }

    #[test]
    fn what_was_not_said_fits_what_was() {
        let said: [(&[&str], (usize, usize)); 6] = [
            (&[], (128, 64)),
            (&["--step-tokens", "16"], (16, 16)),
            (&["--step-tokens", "100"], (100, 64)),
            (&["--running-sequences", "8"], (128, 8)),
            (&["--running-sequences", "200"], (200, 200)),
            (&["--step-tokens", "16", "--running-sequences", "4"], (16, 4)),
        ];
        for (options, expected) in said {
            assert_eq!(room(options), Ok(expected), "{options:?}");
        }
        let wrong: [(&[&str], &str); 4] = [
            (&["--step-tokens", "0"], "--step-tokens 0 is out of range"),
            (&["--running-sequences", "0"], "--running-sequences 0 is out of range, expected 1..=128"),
            (&["--running-sequences", "70000"], "70000 is out of range, expected 1..=65536 (--step-tokens)"),
            (&["--step-tokens", "16", "--running-sequences", "64"], "--running-sequences 64 is out of range"),
        ];
        for (options, named) in wrong {
            let error = room(options).unwrap_err();
            assert!(error.contains(named), "{options:?}: {error}");
        }
    }

    #[test]
    fn an_option_that_would_do_nothing_is_refused() {
        let idle: [(&[&str], &str); 3] = [
            (&["--draft", "lookup", "--draft-tokens", "0"], "leave out --draft"),
            (&["--draft-tokens", "4"], "--draft <lookup|MODEL>"),
            (&["--on-swap", "keep"], "--allow-weight-updates"),
        ];
        for (options, named) in idle {
            let error = room(options).unwrap_err();
            assert!(error.contains(named), "{options:?}: {error}");
        }
        assert!(room(&["--draft", "lookup", "--draft-tokens", "4"]).is_ok());
        assert!(room(&["--on-swap", "keep", "--allow-weight-updates"]).is_ok());
    }

    #[test]
    fn help_says_the_defaults() {
        let (command, usual) = (Options::command(), EngineConfig::default());
        for (option, default) in [
            ("step_tokens", usual.step_tokens),
            ("running_sequences", usual.running_sequences),
            ("draft_tokens", usual.draft_tokens),
        ] {
            let argument = command.get_arguments().find(|argument| argument.get_id() == option).unwrap();
            let help = argument.get_help().unwrap().to_string();
            assert!(help.contains(&format!("[default: {default}")), "{option}: {help}");
        }
    }
}
