//! Sampling parameters: how the next token is chosen, and what ends an answer. What they do is in [`crate::sampler`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::RequestError;

/// Most alternatives that can be reported per token.
pub const TOP_LOGPROBS_MAX: usize = 64;
/// Most entries of [`SamplingParams::logit_bias`].
pub const LOGIT_BIAS_MAX: usize = 4096;

/// How the next token is chosen. The default is greedy and runs to the context's end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Divides the logits, 0..=100; 0 is greedy (the highest logit, the lowest id among equals).
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of likeliest tokens with this much probability, 0 < p <= 1; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the likeliest, 0 <= p < 1; 0 keeps all.
    pub min_p: f32,
    /// Keep the smallest set of tokens with this much probability whose surprise is nearest to the expected one,
    /// 0 < p <= 1; 1 keeps all (Meister et al. 2022, locally typical sampling).
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of every token of prompt and answer, 0 < p <= 100; 1 changes
    /// nothing (Keskar et al. 2019).
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every token of the answer, -2..=2.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token once for each time the answer has it, -2..=2.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, -100..=100 each.
    pub logit_bias: BTreeMap<u32, f32>,
    /// First half of the random key. The same seed, stream and position give the same random number in any batch.
    pub seed: u64,
    /// Second half of the random key: which of several samples of one prompt this is.
    pub stream: u64,
    /// New tokens at most, at least 1; cut to what the context leaves.
    pub max_tokens: usize,
    /// Stop tokens are not chosen before the answer has this many tokens; at most `max_tokens`.
    pub min_tokens: usize,
    /// Tokens that end the answer; the one met is the answer's last token. Empty: run to `max_tokens`.
    pub stop_ids: Vec<u32>,
    /// Report this many likeliest tokens with each token, at most [`TOP_LOGPROBS_MAX`].
    pub top_logprobs: usize,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
            stream: 0,
            max_tokens: usize::MAX,
            min_tokens: 0,
            stop_ids: Vec::new(),
            top_logprobs: 0,
        }
    }
}

impl SamplingParams {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`RequestError::Parameter`] with the name of the first that is out of range.
    pub fn validate(&self) -> Result<(), RequestError> {
        let fraction = |p: f32| p > 0.0 && p <= 1.0;
        let penalty = |p: f32| (-2.0..=2.0).contains(&p);
        let bias = self.logit_bias.values().copied().find(|b| !(-100.0..=100.0).contains(b));
        let checks = [
            ("temperature", self.temperature, (0.0..=100.0).contains(&self.temperature), "0 to 100"),
            ("top_p", self.top_p, fraction(self.top_p), "above 0, at most 1"),
            ("min_p", self.min_p, (0.0..1.0).contains(&self.min_p), "at least 0, below 1"),
            ("typical_p", self.typical_p, fraction(self.typical_p), "above 0, at most 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0 && self.repetition_penalty <= 100.0,
                "above 0, at most 100",
            ),
            ("presence_penalty", self.presence_penalty, penalty(self.presence_penalty), "-2 to 2"),
            ("frequency_penalty", self.frequency_penalty, penalty(self.frequency_penalty), "-2 to 2"),
            ("logit_bias", bias.unwrap_or(0.0), bias.is_none(), "-100 to 100"),
            (
                "entries of logit_bias",
                self.logit_bias.len() as f32,
                self.logit_bias.len() <= LOGIT_BIAS_MAX,
                "at most 4096",
            ),
            ("max_tokens", 0.0, self.max_tokens > 0, "at least 1"),
            ("min_tokens", self.min_tokens as f32, self.min_tokens <= self.max_tokens, "at most max_tokens"),
            ("top_logprobs", self.top_logprobs as f32, self.top_logprobs <= TOP_LOGPROBS_MAX, "at most 64"),
        ];
        for (field, value, fits, expected) in checks {
            if !fits {
                return Err(RequestError::Parameter { field, value: f64::from(value), expected });
            }
        }
        Ok(())
    }

    /// Whether logits depend on the tokens that are there already.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty.to_bits() != 1.0f32.to_bits()
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_outside_their_range_are_named() {
        let base = SamplingParams::default();
        for (params, name) in [
            (SamplingParams { temperature: -1.0, ..base.clone() }, "temperature"),
            (SamplingParams { temperature: f32::NAN, ..base.clone() }, "temperature"),
            (SamplingParams { top_p: 0.0, ..base.clone() }, "top_p"),
            (SamplingParams { min_p: 1.0, ..base.clone() }, "min_p"),
            (SamplingParams { typical_p: f32::NAN, ..base.clone() }, "typical_p"),
            (SamplingParams { repetition_penalty: 0.0, ..base.clone() }, "repetition_penalty"),
            (SamplingParams { presence_penalty: 2.5, ..base.clone() }, "presence_penalty"),
            (SamplingParams { frequency_penalty: f32::NAN, ..base.clone() }, "frequency_penalty"),
            (SamplingParams { logit_bias: [(1, f32::NAN)].into(), ..base.clone() }, "logit_bias"),
            (SamplingParams { logit_bias: [(1, 101.0)].into(), ..base.clone() }, "logit_bias"),
            (SamplingParams { max_tokens: 0, ..base.clone() }, "max_tokens"),
            (SamplingParams { max_tokens: 2, min_tokens: 3, ..base.clone() }, "min_tokens"),
            (SamplingParams { top_logprobs: 65, ..base.clone() }, "top_logprobs"),
        ] {
            assert!(params.validate().unwrap_err().to_string().contains(name), "{name}");
        }
        assert!(base.validate().is_ok());
    }
}
