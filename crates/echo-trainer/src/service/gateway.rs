//! A Tinker-compatible HTTP service over one base model: the unmodified PyPI client `tinker` trains adapters on it and samples
//! from them. Feature `gateway`.
//!
//! | Route below `/api/v1` | What |
//! |---|---|
//! | `GET healthz`, `get_server_capabilities`; `POST client/config`, `client/dynamic_config`, `telemetry` | about the server |
//! | `POST create_session`, `session_heartbeat`, `sessions/{id}/finish` | sessions |
//! | `POST create_model`, `get_info` | a LoRA adapter to train |
//! | `POST forward_backward`, `optim_step` | protobuf in and out; JSON |
//! | `POST save_weights`, `load_weights`, `save_weights_for_sampler`, `weights_info` | what is kept on disk |
//! | `GET training_runs/{id}/checkpoints`, `DELETE training_runs/{id}/checkpoints/{kind}/{name}` | the same |
//! | `POST create_sampling_session`, `join_sampling_session`, `asample`; `GET samplers/{id}` | sampling |
//! | `POST retrieve_future` | the answer to anything that takes time |
//!
//! Requests to one model are carried out in the order of their numbers; a number that was used gives the same promise again, so
//! that a client may repeat what it is not sure of. What is not served is refused with a message: images, sparse tensors,
//! targets with weight that are not the input shifted by one, other losses, other optimisers than Adam, likeliest prompt tokens.
//!
//! Map: [`config`] (limits), `routes` and `api_error` (HTTP), `desk` (requests to queues), `sessions` (who is here), `training` (models and their queues), `sampling`,
//! `promises`, `store` (the disk); pure: `datum` (requests to sequences), `model` (gradients and steps), `order`, `proto`.

mod api_error;
pub mod config;
mod datum;
mod desk;
mod model;
mod order;
mod promises;
mod proto;
mod routes;
mod sampler;
mod sampling;
mod sessions;
mod store;
mod training;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use parallax_model::{Checkpoint, OpenError};
use tokio::sync::Semaphore;

pub use config::GatewayConfig;
pub use sampler::{SampleError, SampleTask, SampledAnswer, SampledAnswers, Stop, TaskSampler};

use datum::DatumLimits;
use promises::{PromiseLimits, Promises};
use sampling::SampleLimits;
use sessions::Registry;
use store::{Store, StoreError};

/// Why a gateway cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// The base checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] OpenError),
    /// The directory.
    #[error("the gateway's directory: {reason}")]
    Directory {
        /// What is wrong with it.
        reason: String,
    },
}

impl From<StoreError> for GatewayError {
    fn from(error: StoreError) -> Self {
        Self::Directory { reason: error.to_string() }
    }
}

/// A Tinker-compatible service. A cheap handle; models end with the last one.
#[derive(Clone)]
pub struct Gateway {
    inner: Arc<Inner>,
}

struct Inner {
    config: GatewayConfig,
    checkpoint: Checkpoint,
    limits: DatumLimits,
    sampler: Arc<dyn TaskSampler>,
    store: Store,
    promises: Promises,
    registry: Mutex<Registry>,
    /// One model trains at a time: all of them share the cores.
    training: Semaphore,
    /// Requests that are read or answered.
    seats: Arc<Semaphore>,
    /// Questions for answers, which may wait for long.
    polls: Arc<Semaphore>,
    /// Answers that the sampler makes.
    samples: Semaphore,
    sample_limits: SampleLimits,
    /// Adapters that the sampler has, the one used last at the end.
    resident: tokio::sync::Mutex<VecDeque<String>>,
    keys: Vec<blake3::Hash>,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gateway({})", self.inner.config.model_name)
    }
}

impl Gateway {
    /// A service for `checkpoint`, which `sampler` samples from with weights in `config.base_dtype`; what clients save goes below
    /// `dir`.
    ///
    /// # Errors
    /// A checkpoint without an id, a directory that cannot be written.
    pub fn open(
        config: GatewayConfig,
        checkpoint: Checkpoint,
        sampler: Arc<dyn TaskSampler>,
        dir: &Path,
    ) -> Result<Self, GatewayError> {
        let id = config.base_dtype.model_id(&checkpoint.id()?);
        let shape = checkpoint.config();
        let limits = DatumLimits {
            vocabulary: u32::try_from(shape.vocab).unwrap_or(u32::MAX),
            context_tokens: shape.max_context.min(config.sequence_tokens),
            batch_tokens: config.batch_tokens,
        };
        let concurrent_samples = config.concurrent_samples.clamp(1, Semaphore::MAX_PERMITS);
        let promises =
            Promises::new(PromiseLimits { pending: config.max_pending, kept_bytes: config.kept_bytes });
        let inner = Inner {
            store: Store::open(dir, &id, config.max_saved)?,
            keys: config.api_keys.iter().map(|key| blake3::hash(key.as_bytes())).collect(),
            seats: Arc::new(Semaphore::new(config.concurrent_requests.max(1))),
            polls: Arc::new(Semaphore::new(config.max_pending.max(1))),
            samples: Semaphore::new(concurrent_samples),
            sample_limits: SampleLimits {
                samples: config.max_samples.min(concurrent_samples),
                context_tokens: shape.max_context,
            },
            training: Semaphore::new(1),
            registry: Mutex::default(),
            resident: tokio::sync::Mutex::default(),
            promises,
            limits,
            sampler,
            checkpoint,
            config,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The routes, to be merged with others or served by [`Gateway::serve`].
    pub fn router(&self) -> axum::Router {
        routes::router(&self.inner)
    }

    /// Serves until the listener fails or the future is dropped.
    ///
    /// # Errors
    /// When accepting connections fails.
    pub async fn serve(&self, listener: tokio::net::TcpListener) -> std::io::Result<()> {
        axum::serve(listener, self.router()).await
    }
}

impl Inner {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.registry.get_mut().unwrap_or_else(PoisonError::into_inner).close();
    }
}
