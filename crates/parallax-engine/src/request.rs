//! What goes into the engine and what comes out of it: requests, sampling parameters, tokens, endings.

use serde::{Deserialize, Serialize};
use swarm_wire::{PolicyVersion, RequestId};

use crate::error::RequestError;

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
    /// First half of the random key. The same seed, stream and position give the same random number in any batch.
    pub seed: u64,
    /// Second half of the random key: which of several samples of one prompt this is.
    pub stream: u64,
    /// New tokens at most, at least 1; cut to what the context leaves.
    pub max_tokens: usize,
    /// Tokens that end the answer; the one met is the answer's last token. Empty: run to `max_tokens`.
    pub stop_ids: Vec<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            stream: 0,
            max_tokens: usize::MAX,
            stop_ids: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`RequestError::Parameter`] with the name of the first that is out of range.
    pub fn validate(&self) -> Result<(), RequestError> {
        let checks = [
            ("temperature", self.temperature, (0.0..=100.0).contains(&self.temperature), "0 to 100"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0, at most 1"),
            ("min_p", self.min_p, (0.0..1.0).contains(&self.min_p), "at least 0, below 1"),
            ("max_tokens", 0.0, self.max_tokens > 0, "at least 1"),
        ];
        for (field, value, fits, expected) in checks {
            if !fits {
                return Err(RequestError::Parameter { field, value: f64::from(value), expected });
            }
        }
        Ok(())
    }
}

/// Continue these tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// How to choose tokens, and when to stop.
    pub sampling: SamplingParams,
    /// Hand out, with each token, the final-norm hidden row `[H]` that produced it.
    pub capture_hidden: bool,
}

/// What an engine can take, known before a request is queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Tokens of prompt and answer: the smaller of the model's context and the cache.
    pub context_tokens: usize,
}

impl Request {
    /// A request with default (greedy) sampling of at most `max_tokens` tokens.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            sampling: SamplingParams { max_tokens, ..SamplingParams::default() },
            capture_hidden: false,
        }
    }

    /// Whether an engine with these limits can serve this.
    ///
    /// # Errors
    /// An empty or overlong prompt, an unknown token, a parameter out of range.
    pub fn validate(&self, limits: &RequestLimits) -> Result<(), RequestError> {
        if self.prompt.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        if self.prompt.len() >= limits.context_tokens {
            return Err(RequestError::PromptTooLong {
                prompt_tokens: self.prompt.len(),
                context_tokens: limits.context_tokens,
            });
        }
        if let Some(position) = self.prompt.iter().position(|&id| id as usize >= limits.vocab) {
            return Err(RequestError::UnknownToken {
                id: self.prompt[position],
                position,
                vocab: limits.vocab,
            });
        }
        self.sampling.validate()
    }

    /// New tokens that this request may get under `limits`.
    pub fn token_allowance(&self, limits: &RequestLimits) -> usize {
        self.sampling.max_tokens.min(limits.context_tokens.saturating_sub(self.prompt.len()))
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token (or, above the engine, a stop string).
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// The caller went away.
    Aborted,
    /// A stage failed.
    Error,
}

impl FinishReason {
    /// As OpenAI's API and our reports spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Aborted => "aborted",
            Self::Error => "error",
        }
    }
}

/// One token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Log-probability under the model: temperature 1, nothing cut off.
    pub logprob: f32,
    /// Log-probability under the distribution it was drawn from: temperature, top-k, top-p and min-p applied. Equals
    /// `logprob`, bit for bit, at temperature 1 with nothing cut off; 0 when greedy.
    pub sampled_logprob: f32,
    /// Weights that produced it.
    pub version: PolicyVersion,
    /// Final-norm hidden row `[H]` that produced it, when [`Request::capture_hidden`] asked for it.
    pub hidden: Option<Vec<f32>>,
}

/// What happened to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// One more token.
    Token(Token),
    /// The last event of a request.
    Finished {
        /// Why.
        reason: FinishReason,
        /// The text of the failure, with [`FinishReason::Error`].
        error: Option<String>,
    },
}

/// An event and whose it is.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestEvent {
    /// The request.
    pub request: RequestId,
    /// What happened.
    pub event: Event,
}

impl RequestEvent {
    /// The id, if this is a token.
    pub fn token_id(&self) -> Option<u32> {
        match &self.event {
            Event::Token(token) => Some(token.id),
            Event::Finished { .. } => None,
        }
    }
}

/// A whole answer, or what there is of it: [`FinishReason::Aborted`] until the end was seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The tokens in order, a met stop token included.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub reason: FinishReason,
    /// The text of the failure, with [`FinishReason::Error`].
    pub error: Option<String>,
}

impl Default for Completion {
    fn default() -> Self {
        Self { tokens: Vec::new(), reason: FinishReason::Aborted, error: None }
    }
}

impl Completion {
    /// Adds what an event says.
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Token(token) => self.tokens.push(token),
            Event::Finished { reason, error } => (self.reason, self.error) = (reason, error),
        }
    }

    /// Ids of the tokens.
    pub fn token_ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }

    /// Log-probabilities of the tokens under the model.
    pub fn logprobs(&self) -> Vec<f32> {
        self.tokens.iter().map(|t| t.logprob).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RequestLimits = RequestLimits { vocab: 10, context_tokens: 8 };

    #[test]
    fn prompts_that_cannot_be_served_are_refused_with_the_reason() {
        assert_eq!(Request::greedy(vec![], 1).validate(&LIMITS), Err(RequestError::EmptyPrompt));
        let long = Request::greedy(vec![1; 8], 1).validate(&LIMITS).unwrap_err();
        assert!(long.to_string().contains("8 tokens"), "{long}");
        let unknown = Request::greedy(vec![1, 10], 1).validate(&LIMITS).unwrap_err();
        assert_eq!(unknown, RequestError::UnknownToken { id: 10, position: 1, vocab: 10 });
        assert!(Request::greedy(vec![9; 7], 1).validate(&LIMITS).is_ok());
    }

    #[test]
    fn parameters_outside_their_range_are_named() {
        let base = SamplingParams::default();
        for (params, name) in [
            (SamplingParams { temperature: -1.0, ..base.clone() }, "temperature"),
            (SamplingParams { temperature: f32::NAN, ..base.clone() }, "temperature"),
            (SamplingParams { top_p: 0.0, ..base.clone() }, "top_p"),
            (SamplingParams { min_p: 1.0, ..base.clone() }, "min_p"),
            (SamplingParams { max_tokens: 0, ..base.clone() }, "max_tokens"),
        ] {
            assert!(params.validate().unwrap_err().to_string().contains(name));
        }
        assert!(base.validate().is_ok());
    }

    #[test]
    fn the_allowance_ends_with_the_context() {
        assert_eq!(Request::greedy(vec![0; 5], 100).token_allowance(&LIMITS), 3);
        assert_eq!(Request::greedy(vec![0; 5], 2).token_allowance(&LIMITS), 2);
    }
}
