//! What bounds the engine: rows per step, sequences, queue.

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// Bounds of one engine. The defaults suit a small model on a small machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineConfig {
    /// Rows (tokens) of one forward pass, 1..=65536. Decoding sequences take one each, the rest goes to prompts. Small steps let
    /// nobody wait for the end of others' prompts; a processor is as fast with 128 rows as with more, a GPU wants more.
    pub step_tokens: usize,
    /// Milliseconds that a step should take at most; 0: any time. Where one takes longer, the engine thread of
    /// [`crate::EngineHandle`] takes smaller pieces of prompts, though at least 16 tokens: a step is what new tokens, new
    /// requests and the pages of broken-off ones wait for.
    pub step_ms: u64,
    /// Milliseconds that requests wait at most for others to take the place of a lost stage. They are computed again there
    /// and go on with the same tokens; without anybody who could take the place they end at once.
    pub patience_ms: u64,
    /// Sequences that hold cache pages at the same time, 1..=`step_tokens`, so that each can decode in every step.
    pub running_sequences: usize,
    /// Requests in the engine, waiting and running; one more is refused. At least 1.
    pub queued_requests: usize,
    /// What a weight swap does to sequences that have already cached keys and values.
    pub on_swap: OnSwap,
    /// Keep the pages of finished requests, and let later ones with the same beginning use them. Hits give the bits of
    /// misses.
    pub prefix_cache: bool,
    /// Tokens to guess per sequence and step at most, 0..=64; used once a [`crate::Drafter`] is set.
    pub draft_tokens: usize,
    /// What the model is called in the prefix index.
    pub model: String,
}

/// What becomes of cached keys and values when the weights change under a running sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OnSwap {
    /// Drop them and prefill again under the new weights. Each token is then a function of its version and the tokens
    /// before it, so that one prefill per version can recompute its log-probability.
    #[default]
    Recompute,
    /// Keep them: cheaper, but the tokens that follow mix two versions and no prefill reproduces them.
    Keep,
    /// Let the requests in flight finish on the old weights; later ones wait for the new. The engine thread of
    /// [`crate::EngineHandle`] does the waiting.
    Finish,
    /// End the requests in flight ([`crate::FinishReason::Aborted`]), by [`crate::EngineHandle`] too.
    Abort,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            step_tokens: 128,
            step_ms: 45,
            patience_ms: 60_000,
            running_sequences: 64,
            queued_requests: 1024,
            on_swap: OnSwap::default(),
            prefix_cache: true,
            draft_tokens: 8,
            model: String::new(),
        }
    }
}

impl EngineConfig {
    /// The most that `step_tokens` can be.
    pub const MAX_STEP_TOKENS: usize = 65_536;

    /// Checks the ranges.
    ///
    /// # Errors
    /// A field outside its range, by name.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fault = |field, value, expected: String| Err(ConfigError { field, value, expected });
        if self.step_tokens == 0 || self.step_tokens > Self::MAX_STEP_TOKENS {
            return fault("step_tokens", self.step_tokens, format!("1..={}", Self::MAX_STEP_TOKENS));
        }
        if self.running_sequences == 0 || self.running_sequences > self.step_tokens {
            let expected = format!("1..={} (step_tokens)", self.step_tokens);
            return fault("running_sequences", self.running_sequences, expected);
        }
        if self.queued_requests == 0 {
            return fault("queued_requests", 0, "at least 1".into());
        }
        if self.draft_tokens > 64 {
            return fault("draft_tokens", self.draft_tokens, "0..=64".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bound_is_checked() {
        assert!(EngineConfig::default().validate().is_ok());
        for (bad, field) in [
            (EngineConfig { step_tokens: 0, ..EngineConfig::default() }, "step_tokens"),
            (EngineConfig { running_sequences: 129, ..EngineConfig::default() }, "running_sequences"),
            (EngineConfig { queued_requests: 0, ..EngineConfig::default() }, "queued_requests"),
            (EngineConfig { draft_tokens: 65, ..EngineConfig::default() }, "draft_tokens"),
        ] {
            assert_eq!(bad.validate().unwrap_err().field, field);
        }
    }
}
