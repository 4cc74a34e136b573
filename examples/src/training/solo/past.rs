//! An earlier version of the policy in the other seat: an engine of its own, with one of the adapters that were.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use echo_rollout::Task;
use echo_rollout::environment::cards::{Said, Speaker};
use echo_rollout::environment::draws::Draws;
use echo_rollout::text::{Text, TextError};
use parallax_engine::{EngineHandle, Request, SamplingParams};
use parallax_model::{Checkpoint, WeightDtype};
use swarm_wire::PolicyVersion;

use crate::rollouts::{ModelText, engine};

/// Versions that are kept; when there are more, every other one goes.
const MOST_KEPT: usize = 32;
/// Most tokens that it says in one turn.
const MOST_TOKENS: usize = 16;

/// Plays as an earlier version of the policy, another one at each step.
#[derive(Debug)]
pub(super) struct PastSelf {
    engine: EngineHandle,
    text: ModelText,
    kept: Mutex<Vec<(PolicyVersion, Option<Bytes>)>>,
    seed: u64,
}

impl PastSelf {
    /// Loads the whole model in f32.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub(super) fn load(checkpoint: &Checkpoint, cache_tokens: usize, seed: u64) -> anyhow::Result<Self> {
        let engine = engine(checkpoint, WeightDtype::F32, cache_tokens)?;
        Ok(Self { engine, text: ModelText::open(checkpoint)?, kept: Mutex::default(), seed })
    }

    /// Keeps `adapter` of `version`, and plays as one of those kept, each alike, until it is called again.
    ///
    /// # Errors
    /// An adapter that the engine does not take.
    pub(super) async fn meet(&self, version: PolicyVersion, adapter: Option<&Bytes>) -> anyhow::Result<()> {
        let (chosen, bytes) = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.push((version, adapter.cloned()));
            if kept.len() > MOST_KEPT {
                let mut numbers = 0..;
                kept.retain(|_| numbers.next().is_some_and(|n| n % 2 == 0));
            }
            let mut draws = Draws::keyed("training-swarm past self v1", self.seed, &version.0.to_le_bytes());
            kept[draws.below(kept.len())].clone()
        };
        self.engine.swap_adapter(chosen, bytes.map(|b| b.to_vec())).await?;
        Ok(())
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
        let completion = self.engine.generate_blocking(request).map_err(|e| e.to_string())?;
        Ok(self.text.completion(&completion.token_ids()))
    }
}
