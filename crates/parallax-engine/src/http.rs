//! An OpenAI-compatible HTTP server over an engine, and the chat page at `/`. Feature `http`.
//!
//! Routes: `POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models`, `GET /health`, `GET /metrics`, `GET /`.
//! Errors are JSON in OpenAI's shape; a failure in the middle of a stream is an `error` event, then the stream ends.

mod answer;
mod error;
mod generation;
mod metrics;
mod openai;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request as HttpRequest, State};
use axum::http::header;
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use parallax_model::{ChatMessage, ChatTemplate, Tokenizer};
use serde_json::json;

pub use error::ApiError;

use crate::service::EngineHandle;
use crate::stop_strings::StopStrings;
use generation::Generation;
use openai::{ChatBody, Common, CompletionBody, OneOrMany};

/// Largest request body by default: a long context as JSON.
pub const DEFAULT_BODY_LIMIT_BYTES: usize = 8 * 1024 * 1024;

/// The chat page: one file, no outside resources.
const CHAT_PAGE: &str = include_str!("../assets/chat.html");

/// Says whether requests can be served now, else why not; a pipeline that waits for stages answers `Err`.
pub type Readiness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Everything that the server needs.
#[derive(Clone)]
pub struct HttpState {
    /// The engine.
    pub engine: EngineHandle,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Renders conversations; without one, chat requests are refused.
    pub template: Option<Arc<ChatTemplate>>,
    /// Name under which the model is listed.
    pub model_name: String,
    /// Ids that end an answer.
    pub stop_ids: Vec<u32>,
    /// Key that clients must send; `None` lets everyone in.
    pub api_key: Option<String>,
    /// Largest request body.
    pub body_limit_bytes: usize,
    /// Asked before every request.
    pub readiness: Option<Readiness>,
}

impl std::fmt::Debug for HttpState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpState").field("model_name", &self.model_name).finish_non_exhaustive()
    }
}

struct Server {
    state: HttpState,
    started: u64,
    requests: AtomicU64,
}

type Shared = Arc<Server>;

/// The routes, to be merged with others or served by [`serve`].
pub fn router(state: HttpState) -> Router {
    let limit = state.body_limit_bytes;
    let server = Arc::new(Server { state, started: unix_seconds(), requests: AtomicU64::new(0) });
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(complete))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route_layer(middleware::from_fn_with_state(server.clone(), authorize))
        .route("/health", get(health))
        .route("/metrics", get(metrics_text))
        .route("/", get(|| async { Html(CHAT_PAGE) }))
        .fallback(|| async { ApiError::not_found("no such route") })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(DefaultBodyLimit::max(limit))
        .with_state(server)
}

/// Serves until the listener fails or the future is dropped (dropping it is safe: requests in flight are aborted).
///
/// # Errors
/// When accepting connections fails.
pub async fn serve(listener: tokio::net::TcpListener, state: HttpState) -> std::io::Result<()> {
    axum::serve(listener, router(state)).await
}

async fn authorize(State(server): State<Shared>, request: HttpRequest, next: Next) -> Response {
    if let Some(key) = &server.state.api_key {
        let sent = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        let sent = sent.and_then(|v| v.strip_prefix("Bearer ")).unwrap_or_default();
        // Hashes compare in constant time, whatever the length of what was sent.
        if blake3::hash(sent.as_bytes()) != blake3::hash(key.as_bytes()) {
            return ApiError::unauthorized().into_response();
        }
    }
    next.run(request).await
}

async fn chat(
    State(server): State<Shared>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body: ChatBody = openai::parse(&server.body(body)?)?;
    let conversation = body.conversation()?;
    let template = server.state.template.as_ref().ok_or_else(|| {
        ApiError::invalid("messages", "this model has no chat template: use /v1/completions")
    })?;
    let messages: Vec<ChatMessage> =
        conversation.into_iter().map(|(role, text)| ChatMessage::new(role, text)).collect();
    let prompt = template
        .render(&messages, true)
        .map_err(|e| ApiError::invalid("messages", format!("the model's chat template refuses this: {e}")))?;
    let generation = server.start(&body.common, &prompt, false)?;
    let shape = answer::Shape::Chat { logprobs: body.logprobs == Some(true) };
    answer::respond(generation, &body.common, shape, server.state.model_name.clone(), server.answer_id())
        .await
}

async fn complete(
    State(server): State<Shared>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body: CompletionBody = openai::parse(&server.body(body)?)?;
    let prompt = match &body.prompt {
        OneOrMany::One(prompt) => prompt,
        OneOrMany::Many(prompts) => match &prompts[..] {
            [prompt] => prompt,
            _ => return Err(ApiError::invalid("prompt", "one prompt per request is supported")),
        },
    };
    if body.echo == Some(true) {
        return Err(ApiError::invalid("echo", "echo is not supported by this server"));
    }
    let generation = server.start(&body.common, prompt, true)?;
    answer::respond(
        generation,
        &body.common,
        answer::Shape::Text,
        server.state.model_name.clone(),
        server.answer_id(),
    )
    .await
}

async fn models(State(server): State<Shared>) -> Response {
    Json(json!({"object": "list", "data": [server.model_card()]})).into_response()
}

async fn model(
    State(server): State<Shared>,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Result<Response, ApiError> {
    server.check_model(Some(&id))?;
    Ok(Json(server.model_card()).into_response())
}

async fn health(State(server): State<Shared>) -> Result<Response, ApiError> {
    server.check_ready()?;
    Ok(Json(json!({"status": "ok"})).into_response())
}

async fn metrics_text(State(server): State<Shared>) -> Response {
    let text = metrics::text(&server.state.engine.metrics(), &server.state.model_name);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

impl Server {
    fn body(&self, body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
        body.map_err(|rejection| match rejection.status() {
            axum::http::StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(self.state.body_limit_bytes),
            _ => ApiError::invalid(None, "the request body could not be read"),
        })
    }

    fn check_ready(&self) -> Result<(), ApiError> {
        match &self.state.readiness {
            Some(ready) => ready().map_err(ApiError::unavailable),
            None => Ok(()),
        }
    }

    fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(name) if name != self.state.model_name => Err(ApiError::not_found(format!(
                "the model {name:?} is not served here; this server has {:?}",
                self.state.model_name
            ))),
            _ => Ok(()),
        }
    }

    fn start(&self, common: &Common, prompt: &str, add_special: bool) -> Result<Generation, ApiError> {
        self.check_ready()?;
        self.check_model(common.model.as_deref())?;
        let state = &self.state;
        let limits = state.engine.limits();
        let prompt = state
            .tokenizer
            .encode(prompt, add_special)
            .map_err(|e| ApiError::invalid(None, format!("the prompt cannot be tokenised: {e}")))?;
        let room = limits.context_tokens.saturating_sub(prompt.len()).max(1);
        let (mut sampling, stops) = common.sampling(room, self.fresh_seed())?;
        sampling.stop_ids.clone_from(&state.stop_ids);
        let stops = StopStrings::new(stops);
        Generation::start(&state.engine, prompt, sampling, state.tokenizer.stream(), stops)
    }

    /// A seed for a request that names none: different for every request and every start of the server.
    fn fresh_seed(&self) -> u64 {
        let n = self.requests.fetch_add(1, Ordering::Relaxed);
        let mut hash = blake3::Hasher::new();
        hash.update(&self.started.to_le_bytes())
            .update(&n.to_le_bytes())
            .update(&std::process::id().to_le_bytes());
        u64::from_le_bytes(hash.finalize().as_bytes()[..8].try_into().expect("eight of 32 bytes"))
    }

    fn answer_id(&self) -> String {
        format!("{:016x}", self.fresh_seed())
    }

    fn model_card(&self) -> serde_json::Value {
        json!({"id": self.state.model_name, "object": "model", "created": self.started, "owned_by": "local"})
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
