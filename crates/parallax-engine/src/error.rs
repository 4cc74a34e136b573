//! Errors, one type per family of operations.

use swarm_wire::PolicyVersion;

use crate::sampler::SampleError;

/// A configuration field outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value} is out of range, expected {expected}")]
pub struct ConfigError {
    /// Name of the field.
    pub field: &'static str,
    /// Its value.
    pub value: usize,
    /// The range.
    pub expected: String,
}

/// A request that cannot be served, whatever the load.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// Nothing to continue.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// No room for a single new token.
    #[error(
        "the prompt has {prompt_tokens} tokens, the context holds {context_tokens} with at least one new token; shorten the prompt"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens of prompt and answer that fit.
        context_tokens: usize,
    },
    /// A token id that the model does not have.
    #[error("token id {id} at position {position} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Index in the prompt.
        position: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A sampling parameter outside its range.
    #[error("{field} = {value} is out of range, expected {expected}")]
    Parameter {
        /// Name of the parameter.
        field: &'static str,
        /// Its value.
        value: f64,
        /// The range.
        expected: &'static str,
    },
    /// No such adapter is resident.
    #[error("adapter {name:?} is not loaded; loaded are: {loaded}")]
    UnknownAdapter {
        /// The name.
        name: String,
        /// Names that are.
        loaded: String,
    },
    /// The bounded queue is full; trying again later helps.
    #[error("{queued} requests are queued already, which is the limit; try again later")]
    QueueFull {
        /// The limit.
        queued: usize,
    },
    /// The engine has ended.
    #[error("the engine has stopped")]
    Stopped,
}

impl RequestError {
    /// [`Self::UnknownAdapter`] with the names of those that there are.
    pub fn unknown_adapter<'a>(name: &str, loaded: impl Iterator<Item = &'a str>) -> Self {
        let names: Vec<&str> = loaded.collect();
        let loaded = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Self::UnknownAdapter { name: name.to_owned(), loaded }
    }
}

/// A stage that could not run a batch or change its weights. Every request in flight ends with this text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StageError {
    /// The forward pass refused the batch or gave something that is not a number.
    #[error("layers {layers}: {reason}")]
    Forward {
        /// The stage, as `start..end`.
        layers: String,
        /// What went wrong.
        reason: String,
    },
    /// Tensor of another type or shape than the stage takes.
    #[error("expected a tensor {expected}, got {got}")]
    Tensor {
        /// Type and shape that fit.
        expected: String,
        /// Type and shape there were.
        got: String,
    },
    /// A remote stage is gone.
    #[error("stage {peer} (layers {layers}) is lost: {reason}")]
    Lost {
        /// The peer, shortened.
        peer: String,
        /// Its layers.
        layers: String,
        /// How that was noticed.
        reason: String,
    },
    /// No pipeline covers the model at the moment.
    #[error("no pipeline: {reason}")]
    NotReady {
        /// What is missing.
        reason: String,
    },
    /// Weights or an adapter that the runner cannot take up.
    #[error("{reason}")]
    Unfit {
        /// Why.
        reason: String,
    },
    /// An adapter that does not fit.
    #[error("adapter {version}: {reason}")]
    Adapter {
        /// The version that was to be loaded.
        version: PolicyVersion,
        /// What does not fit.
        reason: String,
    },
}

/// Why an answer could not be finished.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The engine refused the request when it came to it.
    #[error(transparent)]
    Refused(#[from] RequestError),
    /// The request's own rules left no token to choose: trying again cannot help.
    #[error(transparent)]
    Sampling(#[from] SampleError),
    /// A stage failed, and with it every request in flight.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The engine thread died.
    #[error("the engine stopped in the middle of this request")]
    Stopped,
}

/// Cache pages ran out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} cache pages needed, {free} free")]
pub struct OutOfPages {
    /// Pages asked for.
    pub needed: usize,
    /// Pages there are.
    pub free: usize,
}
