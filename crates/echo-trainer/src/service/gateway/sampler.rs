//! What samples for the gateway. The engine belongs to whoever wires a gateway: this crate imports none.

use crate::service::evaluation::BoxFuture;

/// What ends an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The model's own end of a sequence.
    Model,
    /// These tokens; none: nothing but the limit.
    Tokens(Vec<u32>),
    /// These texts.
    Texts(Vec<String>),
}

/// Answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleTask {
    /// Name of an adapter that was added; `None`: the base checkpoint.
    pub adapter: Option<String>,
    /// The tokens to continue.
    pub prompt: Vec<u32>,
    /// How many answers.
    pub samples: usize,
    /// Most tokens of each; `None`: to the end of the context.
    pub max_tokens: Option<usize>,
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep so many likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens up to this probability.
    pub top_p: f32,
    /// Key of the random numbers.
    pub seed: u64,
    /// What ends an answer; the token that does is part of it.
    pub stop: Stop,
    /// Whether the prompt's own log-probabilities are wanted.
    pub prompt_logprobs: bool,
    /// How many of the likeliest tokens are wanted with each token.
    pub top_logprobs: usize,
}

/// One answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SampledAnswer {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// The log-probability of each under the distribution that it was drawn from.
    pub logprobs: Vec<f32>,
    /// Whether a stop ended it, and not the limit.
    pub stopped: bool,
    /// The likeliest tokens with each token, if they were asked for.
    pub top: Vec<Vec<(u32, f32)>>,
}

/// All answers to one prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SampledAnswers {
    /// As many as were asked for.
    pub answers: Vec<SampledAnswer>,
    /// Log-probabilities of the prompt's tokens from the second on, if they were asked for.
    pub prompt_logprobs: Vec<f32>,
    /// Tokens of the prompt that were found in a cache.
    pub cached_tokens: usize,
}

/// Why there are no answers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// The request cannot be served.
    #[error("{reason}")]
    Invalid {
        /// Why not.
        reason: String,
    },
    /// The engine failed.
    #[error("sampling: {reason}")]
    Failed {
        /// The engine's own words.
        reason: String,
    },
}

/// An inference engine with the gateway's base checkpoint and adapters beside it.
pub trait TaskSampler: Send + Sync {
    /// Makes an adapter (PEFT safetensors) known under `name`.
    fn add(&self, name: &str, adapter: Vec<u8>) -> BoxFuture<'_, Result<(), String>>;

    /// Forgets an adapter; answers in the making are finished with it.
    fn remove(&self, name: &str);

    /// Samples. The request has its adapter when this returns, before the future is waited for.
    fn sample(&self, task: SampleTask) -> BoxFuture<'static, Result<SampledAnswers, SampleError>>;
}
