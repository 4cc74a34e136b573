//! An earlier version of the policy in the other seat: an engine of its own, with one of the versions that were.

use std::sync::{Mutex, PoisonError};

use echo_rollout::environment::cards::{Said, Speaker};
use echo_rollout::environment::draws::Draws;
use echo_rollout::service::PolicyEngine;
use echo_rollout::text::{Text, TextError};
use echo_rollout::{Task, Weights};
use echo_trainer::RunConfig;
use parallax_engine::{Request, SamplingParams};
use parallax_model::Checkpoint;
use swarm_wire::PolicyVersion;

use crate::rollouts::{ModelText, policy_engine};

/// Versions that are kept; when there are more, every other one goes.
const MOST_KEPT: usize = 32;
/// The same where each is a whole model.
const MOST_MODELS: usize = 4;
/// Most tokens that it says in one turn.
const MOST_TOKENS: usize = 16;

/// Plays as an earlier version of the policy, another one at each step.
#[derive(Debug)]
pub(super) struct PastSelf {
    engine: PolicyEngine,
    text: ModelText,
    kept: Mutex<Vec<(PolicyVersion, Weights)>>,
    seed: u64,
}

impl PastSelf {
    /// Loads the whole model in the format in which `run` trains it.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub(super) fn load(
        checkpoint: &Checkpoint,
        run: &RunConfig,
        cache_tokens: usize,
    ) -> anyhow::Result<Self> {
        let engine = policy_engine(checkpoint, run.trainer.base_dtype.weights(), cache_tokens)?;
        Ok(Self { engine, text: ModelText::open(checkpoint)?, kept: Mutex::default(), seed: run.seed })
    }

    /// Keeps the `weights` of `version`, and plays as one of those kept, each alike, until it is called again.
    ///
    /// # Errors
    /// Weights that the engine does not take.
    pub(super) async fn meet(&self, version: PolicyVersion, weights: &Weights) -> anyhow::Result<()> {
        let (chosen, weights) = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.push((version, weights.clone()));
            let most = if matches!(weights, Weights::Full(_)) { MOST_MODELS } else { MOST_KEPT };
            if kept.len() > most {
                let mut numbers = 0..;
                kept.retain(|_| numbers.next().is_some_and(|n| n % 2 == 0));
            }
            let mut draws = Draws::keyed("training-swarm past self v1", self.seed, &version.0.to_le_bytes());
            kept[draws.below(kept.len())].clone()
        };
        Ok(self.engine.install(chosen, weights).await?)
    }

    fn context(&self, before: &[Said], shown: &str) -> Result<Vec<u32>, TextError> {
        let first = before.first().map_or(shown, |turn| &turn.shown);
        let task = Task { seed: 0, prompt: first.to_owned(), answer: String::new() };
        let mut tokens = self.text.prompt(&task)?;
        let later = before.iter().skip(1).map(|turn| turn.shown.as_str()).chain([shown]);
        for (turn, shown) in before.iter().zip(later) {
            tokens.extend(self.text.answer(&task, &turn.said)?);
            tokens.extend(self.text.observation(&task, shown)?);
        }
        Ok(tokens)
    }
}

impl Speaker for PastSelf {
    fn say(&self, before: &[Said], shown: &str, seed: u64) -> Result<String, String> {
        let prompt = self.context(before, shown).map_err(|e| e.to_string())?;
        let sampling = SamplingParams {
            temperature: 1.0,
            seed,
            max_tokens: MOST_TOKENS,
            stop_ids: self.text.stop_ids().to_vec(),
            ..SamplingParams::default()
        };
        let request = Request { prompt, sampling, ..Request::default() };
        let completion = self.engine.engine().generate_blocking(request).map_err(|e| e.to_string())?;
        Ok(self.text.completion(&completion.token_ids()))
    }
}
