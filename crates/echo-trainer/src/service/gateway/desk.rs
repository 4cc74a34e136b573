//! What the routes do with what is asked: find the session, the model, the sampler, and queue the request.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::Inner;
use super::api_error::ApiError;
use super::order::Place;
use super::promises::Outcome;
use super::sessions::{Refused, Room, SamplerSlot};
use super::store::{Kind, LoraSpec, SavedPath, Store};
use super::training::{Job, ModelSlot, Queued, work};

/// An answer in JSON.
pub(super) type Answered = Result<Json<Value>, ApiError>;

impl Inner {
    pub(super) fn room(&self) -> Room {
        Room {
            sessions: self.config.max_sessions,
            models: self.config.max_models,
            samplers: self.config.max_samplers,
            timeout: self.config.session_timeout,
        }
    }

    pub(super) fn too_many_pending(&self) -> ApiError {
        ApiError::busy(format!("{} answers are in the making: try again", self.config.max_pending))
    }

    pub(super) fn check_session(&self, id: &str) -> Result<(), ApiError> {
        if self.registry().touch(id, Instant::now()) { Ok(()) } else { Err(Refused::NoSession.into()) }
    }

    /// Does something with the disk, off the runtime's threads.
    pub(super) async fn on_disk<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> T {
        let inner = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&inner.store)).await;
        done.expect("reading and writing files does not panic")
    }

    pub(super) fn check_base(&self, name: &str) -> Result<(), ApiError> {
        let known = &self.config.model_name;
        if name == known {
            return Ok(());
        }
        let detail = format!(
            "this server's base model is {known:?}, not {:?}",
            name.chars().take(200).collect::<String>()
        );
        Err(ApiError::new(StatusCode::NOT_FOUND, detail))
    }

    pub(super) fn model(&self, id: &str) -> Result<Arc<ModelSlot>, ApiError> {
        let model = self.registry().model(id, Instant::now());
        model.ok_or_else(|| ApiError::not_found("model", id))
    }

    pub(super) fn sampler_path(&self, id: &str) -> Result<Option<SavedPath>, ApiError> {
        let mut registry = self.registry();
        let sampler = registry.sampler(id, Instant::now());
        Ok(sampler.ok_or_else(|| ApiError::not_found("sampling session", id))?.path.clone())
    }

    /// What to sample from.
    pub(super) async fn sampled_path(
        self: &Arc<Self>,
        path: Option<&str>,
        base: Option<&str>,
    ) -> Result<Option<SavedPath>, ApiError> {
        base.map_or(Ok(()), |base| self.check_base(base))?;
        let Some(path) = path else {
            return if base.is_some() {
                Ok(None)
            } else {
                Err(ApiError::bad("give model_path or base_model"))
            };
        };
        let path = SavedPath::parse(path)?;
        if path.kind != Kind::Sampler {
            return Err(ApiError::bad(format!(
                "{path} is for training; weights to sample from are under /sampler_weights/"
            )));
        }
        let saved = path.clone();
        self.on_disk(move |store| store.read(&saved)).await?;
        Ok(Some(path))
    }

    /// Adds a sampling session.
    pub(super) fn open_sampler(
        &self,
        session: &str,
        id: &str,
        path: Option<SavedPath>,
    ) -> Result<(), Refused> {
        let slot = SamplerSlot { session: session.to_owned(), path, joined: 0 };
        self.registry().open_sampler(id, slot, Instant::now(), &self.room())
    }

    /// A new model whose first request is `job`; the same request once more gives the same promise.
    pub(super) fn add_model(
        self: &Arc<Self>,
        session: &str,
        number: u64,
        lora: LoraSpec,
        job: Job,
    ) -> Answered {
        let id = format!("{session}:train:{number}");
        let slot = Arc::new(ModelSlot::new(id, session.to_owned(), lora, self.config.max_queued));
        let (model, is_new) = self.registry().add_model(slot, Instant::now(), &self.room())?;
        if is_new {
            tokio::spawn(work(Arc::clone(&model), Arc::downgrade(self)));
        }
        self.submit(&model, 0, Ok(job))
    }

    /// Queues request `seq` to `model`. One that is refused keeps its place, so that nothing waits for it.
    pub(super) fn submit(&self, model: &ModelSlot, seq: u64, job: Result<Job, ApiError>) -> Answered {
        let promise = format!("{}:{seq}", model.id);
        let accepted = Json(json!({"request_id": promise, "model_id": model.id}));
        let full =
            || ApiError::busy(format!("{} requests to this model wait: try again", self.config.max_queued));
        match model.place(seq) {
            Place::Repeated if self.promises.is_known(&promise) => return Ok(accepted),
            Place::Repeated => {
                return Err(ApiError::bad(format!("request {seq} was refused, or is long over")));
            }
            Place::Full => return Err(full()),
            Place::Closed => return Err(ApiError::not_found("model", &model.id)),
            Place::Taken => {}
        }
        let job = match job {
            Ok(job) => job,
            Err(error) => {
                model.offer(seq, None);
                return Err(error);
            }
        };
        if !self.promises.open(&promise) {
            return Err(self.too_many_pending());
        }
        match model.offer(seq, Some(Queued { promise: promise.clone(), job })) {
            // Another copy of the request was faster.
            Place::Taken | Place::Repeated => Ok(accepted),
            refused @ (Place::Full | Place::Closed) => {
                let gone = refused == Place::Closed;
                let error = if gone { ApiError::not_found("model", &model.id) } else { full() };
                self.promises.keep(&promise, Outcome::Failed { message: error.detail.clone(), user: gone });
                Err(error)
            }
        }
    }
}
