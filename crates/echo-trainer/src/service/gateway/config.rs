//! Limits of a gateway, each with its unit and default.

use std::time::Duration;

use parallax_model::BaseDtype;

/// Limits of a gateway.
#[derive(Debug, Clone, PartialEq)]
pub struct GatewayConfig {
    /// Name under which clients ask for the base model.
    pub model_name: String,
    /// Format of the frozen weights under the adapters; the sampler has to have the same one, and what was saved over another is
    /// refused. Default: f32.
    pub base_dtype: BaseDtype,
    /// Keys that clients may send; empty lets everyone in. The PyPI client only sends keys that begin with `tml-`.
    pub api_keys: Vec<String>,
    /// Largest request body in bytes. Default: 16 MiB; the client cuts its requests at 5 MB.
    pub body_bytes: usize,
    /// Requests that are read or answered at the same time, questions for answers apart; one more gets 429. Default: 1024.
    pub concurrent_requests: usize,
    /// How long a request may take to be read and answered. Default: 2 minutes.
    pub request_timeout: Duration,
    /// Sessions at a time. Default: 64.
    pub max_sessions: usize,
    /// Models in training at a time, each with a copy of the base weights. Default: 4.
    pub max_models: usize,
    /// Sampling sessions at a time, all sessions together. Default: 1024.
    pub max_samplers: usize,
    /// A session that was not heard of for so long makes room for others. Default: 5 minutes.
    pub session_timeout: Duration,
    /// Requests to one model that may wait. Default: 256.
    pub max_queued: usize,
    /// How long a request that was lost on its way is waited for, while those behind it wait too. Default: 60 s.
    pub gap_timeout: Duration,
    /// Answers that may be in the making, all clients together; one more gets 429. Default: 4096.
    pub max_pending: usize,
    /// Bytes of answers that are kept for clients to fetch, oldest dropped first. Default: 256 MiB.
    pub kept_bytes: usize,
    /// How long a question for an answer is kept open. Default: 20 s.
    pub long_poll: Duration,
    /// Tokens of one sequence to train on. Default: 16384.
    pub sequence_tokens: usize,
    /// Tokens of one training request. Default: 65536.
    pub batch_tokens: usize,
    /// Tokens of one forward and backward pass. Default: 8192.
    pub micro_batch_tokens: usize,
    /// Answers that the sampler is asked for at the same time, all clients together; more wait. Default: 1024, as many as
    /// the engine takes.
    pub concurrent_samples: usize,
    /// Answers of one sampling request, at most `concurrent_samples`. Default: 256.
    pub max_samples: usize,
    /// Largest rank of an adapter. Default: 256.
    pub max_rank: usize,
    /// Numerator of the scale alpha / rank. Default: 32, as Tinker has it.
    pub lora_alpha: f32,
    /// Saved checkpoints, all clients together. Default: 1024.
    pub max_saved: usize,
    /// Adapters of a model that were saved without a name, for one sampling session each: so many are kept. Default: 8.
    pub unnamed_kept: usize,
    /// Adapters that the sampler holds at a time; others are read again when they are needed. Default: 8.
    pub resident_adapters: usize,
}

impl GatewayConfig {
    /// The defaults, for a base model of this name.
    pub fn new(model_name: impl Into<String>) -> Self {
        Self {
            model_name: model_name.into(),
            base_dtype: BaseDtype::F32,
            api_keys: Vec::new(),
            body_bytes: 16 << 20,
            concurrent_requests: 1024,
            request_timeout: Duration::from_secs(120),
            max_sessions: 64,
            max_models: 4,
            max_samplers: 1024,
            session_timeout: Duration::from_secs(300),
            max_queued: 256,
            gap_timeout: Duration::from_secs(60),
            max_pending: 4096,
            kept_bytes: 256 << 20,
            long_poll: Duration::from_secs(20),
            sequence_tokens: 16_384,
            batch_tokens: 65_536,
            micro_batch_tokens: 8192,
            concurrent_samples: 1024,
            max_samples: 256,
            max_rank: 256,
            lora_alpha: 32.0,
            max_saved: 1024,
            unnamed_kept: 8,
            resident_adapters: 8,
        }
    }
}
