//! What goes into the engine and what comes out of it: requests, tokens, endings.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use swarm_wire::{PolicyVersion, RequestId};

use crate::constraint::Constraint;
use crate::error::{Failure, RequestError};
use crate::sampling::SamplingParams;

/// Continue these tokens.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// How to choose tokens, and when to stop.
    pub sampling: SamplingParams,
    /// Hand out, with each token, the final-norm hidden row `[H]` that produced it.
    pub capture_hidden: bool,
    /// Which tokens may come next: structured output.
    pub constraint: Option<Arc<dyn Constraint>>,
    /// Report the log-probabilities of the prompt's tokens before the first token of the answer.
    pub prompt_logprobs: bool,
    /// Name of a resident adapter; `None` is the model as it is installed for everybody.
    pub adapter: Option<String>,
    /// Cached prefixes are shared only among requests of one salt.
    pub cache_salt: String,
    /// On whose behalf: the engine is fair between users.
    pub user: String,
    /// Higher goes first, before fairness.
    pub priority: i32,
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
            ..Self::default()
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
        let unknown = |id: &&u32| **id as usize >= limits.vocab;
        if let Some(&id) = self.sampling.logit_bias.keys().find(unknown) {
            let expected = "the id of a token of the vocabulary";
            return Err(RequestError::Parameter { field: "logit_bias", value: f64::from(id), expected });
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
    /// A stage failed, or no token could be chosen: [`Failure`] says which.
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
    /// Log-probability under the distribution it was drawn from: everything in [`SamplingParams`] and the constraint
    /// applied. Equals `logprob`, bit for bit, at temperature 1 with nothing changed or cut off; 0 when greedy.
    pub sampled_logprob: f32,
    /// Weights that produced it.
    pub version: PolicyVersion,
    /// Final-norm hidden row `[H]` that produced it, when [`Request::capture_hidden`] asked for it.
    pub hidden: Option<Vec<f32>>,
    /// The likeliest tokens and their log-probabilities under the model, likeliest first (the lower id among equals), as
    /// many as [`SamplingParams::top_logprobs`] asked for.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// What a request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens that were not computed for this answer: see [`Event::Prompt`].
    pub cached_tokens: usize,
    /// Tokens of the answer.
    pub completion_tokens: usize,
    /// Of these, tokens of thoughts: 0 from the engine, which reads no texts; who does counts them.
    pub reasoning_tokens: usize,
}

/// What happened to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt is through; once, before the first token.
    Prompt {
        /// Tokens whose keys and values were found in the prefix index, or were computed for another answer to the same
        /// prompt.
        cached_tokens: usize,
        /// `log p(prompt[t + 1] | prompt[..=t])` for every `t`, one less than the prompt has tokens, when
        /// [`Request::prompt_logprobs`] asked for it.
        logprobs: Option<Vec<f32>>,
    },
    /// One more token.
    Token(Token),
    /// The last event of a request.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What failed, with [`FinishReason::Error`].
        error: Option<Failure>,
        /// What the request took.
        usage: Usage,
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
            _ => None,
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
    /// What failed, with [`FinishReason::Error`].
    pub error: Option<Failure>,
    /// Log-probabilities of the prompt's tokens from the second on, if they were asked for.
    pub prompt_logprobs: Vec<f32>,
    /// What the request took.
    pub usage: Usage,
}

impl Default for Completion {
    fn default() -> Self {
        Self {
            tokens: Vec::new(),
            reason: FinishReason::Aborted,
            error: None,
            prompt_logprobs: Vec::new(),
            usage: Usage::default(),
        }
    }
}

impl Completion {
    /// Adds what an event says.
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Token(token) => self.tokens.push(token),
            Event::Prompt { cached_tokens, logprobs } => {
                self.usage.cached_tokens = cached_tokens;
                self.prompt_logprobs = logprobs.unwrap_or_default();
            }
            Event::Finished { reason, error, usage } => {
                (self.reason, self.error, self.usage) = (reason, error, usage);
            }
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
        let mut biased = Request::greedy(vec![1], 1);
        biased.sampling.logit_bias = [(10, 1.0)].into();
        assert!(biased.validate(&LIMITS).unwrap_err().to_string().contains("logit_bias = 10"));
    }

    #[test]
    fn the_allowance_ends_with_the_context() {
        assert_eq!(Request::greedy(vec![0; 5], 100).token_allowance(&LIMITS), 3);
        assert_eq!(Request::greedy(vec![0; 5], 2).token_allowance(&LIMITS), 2);
    }
}
