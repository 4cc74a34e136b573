//! An HTTP server over an engine: OpenAI's and Anthropic's APIs, and pages for people. Feature `http`.
//!
//! | Route | What |
//! |---|---|
//! | `POST /v1/chat/completions`, `/v1/completions`, `/v1/responses` | OpenAI |
//! | `POST /v1/messages`, `/v1/messages/count_tokens` | Anthropic |
//! | `GET /v1/models`, `/v1/models/{id}` | the model and its resident adapters |
//! | `POST /v1/load_lora_adapter`, `/v1/unload_lora_adapter`, `/v1/update_weights` | for operators who allow it |
//! | `POST /tokenize`, `/detokenize` | as vLLM has them |
//! | `GET /health`, `/ping`, `/version`, `/metrics` | for operators; metrics under vLLM's names |
//! | `GET /`, `/cluster`, `/cluster/status` | the chat page, the cluster page and what it shows |
//!
//! Errors are JSON in the shape of the API that was asked; a failure in the middle of a stream is an error event, then the
//! stream ends.

mod answer;
mod chat;
mod completions;
mod conversation;
mod envelope;
mod error;
mod fields;
mod format;
mod gate;
mod generation;
mod logprobs;
mod messages;
mod metrics;
mod pages;
mod prompt;
mod responses;
mod sampling;
mod server;
mod tokens;
mod tools;
mod turns;
mod updates;
mod waiting;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request as HttpRequest, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::Listener;
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use parallax_model::{ChatTemplate, Tokenizer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tower_http::catch_panic::CatchPanicLayer;

pub use error::ApiError;
pub use gate::{DEFAULT_BODY_LIMIT_BYTES, HttpLimits};
pub use updates::{Updates, WeightLoader};

use crate::sampling::SamplingParams;
use crate::service::EngineHandle;
use metrics::Scrape;
use server::{Ask, Entry, Placement, Server, unix_seconds};

/// Longest name of a request that is given back.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// Says whether requests can be served now, else why not; a pipeline that waits for stages answers `Err`.
pub type Readiness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What the cluster page shows: the status object of a swarm's head.
pub type ClusterSource = Arc<dyn Fn() -> Value + Send + Sync>;

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
    /// What requests are sampled with where they do not say: temperature, top-p, top-k, min-p and repetition penalty.
    pub defaults: SamplingParams,
    /// Who may come in, and how much at once.
    pub limits: HttpLimits,
    /// Asked before every request.
    pub readiness: Option<Readiness>,
    /// Who computes; `None`: this machine alone.
    pub cluster: Option<ClusterSource>,
    /// What clients may change while it runs; `None`: nothing.
    pub updates: Option<Updates>,
}

impl HttpState {
    /// A server for everybody, with the default limits.
    pub fn new(engine: EngineHandle, tokenizer: Tokenizer, model_name: impl Into<String>) -> Self {
        Self {
            engine,
            tokenizer,
            template: None,
            model_name: model_name.into(),
            stop_ids: Vec::new(),
            defaults: SamplingParams { temperature: 1.0, ..SamplingParams::default() },
            limits: HttpLimits::default(),
            readiness: None,
            cluster: None,
            updates: None,
        }
    }
}

impl std::fmt::Debug for HttpState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpState").field("model_name", &self.model_name).finish_non_exhaustive()
    }
}

type Shared = Arc<Server>;

/// How long the last bytes of answers may take to leave, and connections to close, once all answers have ended.
const GOODBYE: Duration = Duration::from_secs(1);

/// The routes, to be merged with others. Only [`serve`] and [`serve_until`] bound how long the head of a request may take,
/// how long a connection may be idle, and how long an answer waits to be taken.
pub fn router(state: HttpState) -> Router {
    routes(&Arc::new(Server::new(state)))
}

fn routes(server: &Shared) -> Router {
    let limit = server.state.limits.body_bytes;
    let counted = Router::new()
        .route("/v1/chat/completions", post(chat::respond))
        .route("/v1/completions", post(completions::respond))
        .route("/v1/responses", post(responses::respond))
        .route("/v1/messages", post(messages::respond))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route_layer(middleware::from_fn_with_state(Arc::clone(server), limited));
    let known = Router::new()
        .route("/v1/load_lora_adapter", post(updates::load_adapter))
        .route("/v1/unload_lora_adapter", post(updates::unload_adapter))
        .route("/v1/update_weights", post(updates::update_weights))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/cluster/status", get(cluster_status))
        .route_layer(middleware::from_fn_with_state(Arc::clone(server), authorized));
    let all = Router::new()
        .merge(counted)
        .merge(known)
        .route("/health", get(health))
        .route("/ping", get(health))
        .route("/version", get(|| async { Json(json!({"version": env!("CARGO_PKG_VERSION")})) }))
        .route("/metrics", get(metrics_text))
        .route("/", get(|| async { pages::chat() }))
        .route("/cluster", get(|| async { pages::cluster() }))
        .fallback(|method: Method, uri: Uri| async move { ApiError::no_route(&method, uri.path()) })
        .method_not_allowed_fallback(|method: Method, uri: Uri| async move {
            ApiError::method_not_allowed(&method, uri.path())
        })
        .layer(DefaultBodyLimit::max(limit))
        .layer(CatchPanicLayer::custom(|_| ApiError::internal("this server has a bug").into_response()))
        .layer(middleware::from_fn(in_the_shape_of_the_api));
    // Outside of what makes new answers of errors: pages from elsewhere may read those, too.
    let all = match server.state.limits.cors() {
        Some(cors) => all.layer(cors),
        None => all,
    };
    all.layer(middleware::from_fn_with_state(Arc::clone(server), named)).with_state(Arc::clone(server))
}

/// Serves until the future is dropped; connections that are still busy then end with the runtime.
///
/// # Errors
/// None: whoever cannot be let in now is let in later.
pub async fn serve(listener: TcpListener, state: HttpState) -> std::io::Result<()> {
    let server = Arc::new(Server::new(state));
    serve_connections(listener, &server, Router::new(), std::future::pending()).await;
    Ok(())
}

/// As [`serve`], with `more` routes beside these, until `stop`: then new requests get 503 and those in flight have
/// `patience` to end. Connections that are busy even then end with the runtime.
///
/// # Errors
/// As [`serve`].
pub async fn serve_until(
    listener: TcpListener,
    state: HttpState,
    more: Router,
    stop: impl Future<Output = ()>,
    patience: Duration,
) -> std::io::Result<()> {
    let server = Arc::new(Server::new(state));
    let (close, closed) = oneshot::channel::<()>();
    let last = async move {
        // An error means that the other end is gone, which is as good.
        let _ = closed.await;
    };
    let mut serving = pin!(serve_connections(listener, &server, more, last));
    tokio::select! {
        () = &mut serving => return Ok(()),
        () = stop => {}
    }
    tokio::select! {
        () = &mut serving => return Ok(()),
        _ = tokio::time::timeout(patience, server.gate.close()) => {}
    }
    drop(close);
    // Who has not gone by then is left behind.
    let _ = tokio::time::timeout(GOODBYE, serving).await;
    Ok(())
}

/// Serves connections until `stop`, and on until the last of them is closed: at the end of its answer, or at once where
/// there is none. Dropping the future asks them to close as well.
async fn serve_connections(
    mut listener: TcpListener,
    server: &Shared,
    more: Router,
    stop: impl Future<Output = ()>,
) {
    let limits = &server.state.limits;
    let service = TowerToHyperService::new(routes(server).merge(more).with_state::<()>(()));
    let (closing, _) = watch::channel(());
    let mut stop = pin!(stop);
    loop {
        let (stream, _) = tokio::select! {
            // The trait's own tries again after errors, such as too many open files.
            accepted = Listener::accept(&mut listener) => accepted,
            () = &mut stop => break,
        };
        let (stream, timer) = waiting::timed(stream, limits);
        let (service, mut told) = (service.clone(), closing.subscribe());
        // HTTP/1 alone, whose timer runs from the first moment.
        let mut builder = http1::Builder::new();
        builder.timer(timer).header_read_timeout(limits.read_time);
        tokio::spawn(async move {
            let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
            tokio::select! {
                // However it ended, its client is gone.
                _ = connection.as_mut() => return,
                _ = told.changed() => connection.as_mut().graceful_shutdown(),
            }
            let _ = connection.await;
        });
    }
    drop(listener);
    closing.send_replace(());
    closing.closed().await;
}

/// Which key a request came with; without keys all clients are one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Caller(usize);

/// Lets in whoever has a key.
async fn authorized(
    State(server): State<Shared>,
    mut request: HttpRequest,
    next: Next,
) -> Result<Response, ApiError> {
    let key = server.gate.key(request.headers())?;
    request.extensions_mut().insert(Caller(key));
    Ok(next.run(request).await)
}

/// Lets in whoever has a key and has not used up its rate.
async fn limited(
    State(server): State<Shared>,
    mut request: HttpRequest,
    next: Next,
) -> Result<Response, ApiError> {
    let key = server.gate.key(request.headers())?;
    server.gate.rate(key)?;
    request.extensions_mut().insert(Caller(key));
    Ok(next.run(request).await)
}

/// Errors under Anthropic's routes get Anthropic's shape.
async fn in_the_shape_of_the_api(request: HttpRequest, next: Next) -> Response {
    let is_anthropic = request.uri().path().starts_with("/v1/messages");
    let response = next.run(request).await;
    match response.extensions().get::<ApiError>() {
        Some(error) if is_anthropic => {
            let mut shaped = error.clone().into_anthropic_response();
            if let Some(allowed) = response.headers().get(header::ALLOW) {
                shaped.headers_mut().insert(header::ALLOW, allowed.clone());
            }
            shaped
        }
        _ => response,
    }
}

/// Every answer has the name that its request came with, or else a new one, where the clients of both APIs look for it;
/// refusals are counted.
async fn named(State(server): State<Shared>, request: HttpRequest, next: Next) -> Response {
    let given = request.headers().get("x-request-id").filter(|id| id.len() <= MAX_REQUEST_ID_BYTES).cloned();
    let mut response = next.run(request).await;
    let fresh = || HeaderValue::from_str(&format!("req_{}", server.answer_id()));
    server.gate.refusals.count(response.status());
    if let Some(id) = given.or_else(|| fresh().ok()) {
        response.headers_mut().insert("x-request-id", id.clone());
        response.headers_mut().insert("request-id", id);
    }
    response
}

/// A body that says it is JSON, still as bytes: reading it is work, see [`Server::read`]. One that does not say so may come
/// from a page of any origin: only for JSON do browsers ask whether it may.
#[derive(Debug)]
struct JsonBody {
    bytes: Bytes,
    caller: Caller,
}

impl FromRequest<Shared> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: HttpRequest, server: &Shared) -> Result<Self, ApiError> {
        let value = request.headers().get(header::CONTENT_TYPE);
        let kind = value.map(|value| value.to_str().unwrap_or("unreadable"));
        let essence = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default();
        let essence = essence.trim().to_ascii_lowercase();
        if essence != "application/json"
            && !(essence.starts_with("application/") && essence.ends_with("+json"))
        {
            return Err(ApiError::unsupported_media(kind));
        }
        let caller = request.extensions().get().copied().unwrap_or_default();
        let limits = &server.state.limits;
        let read = tokio::time::timeout(limits.read_time, Bytes::from_request(request, server)).await;
        let read = read.map_err(|_| ApiError::timed_out(limits.read_time))?;
        let bytes = read.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(limits.body_bytes),
            _ => ApiError::invalid(None, "the request body could not be read"),
        })?;
        Ok(Self { bytes, caller })
    }
}

async fn models(State(server): State<Shared>) -> Response {
    Json(json!({"object": "list", "data": server.models()})).into_response()
}

async fn model(
    id: Result<Path<String>, PathRejection>,
    State(server): State<Shared>,
) -> Result<Response, ApiError> {
    let Path(id) = id?;
    server.model(Some(&id))?;
    let card = server.models().into_iter().find(|card| card["id"] == id);
    Ok(Json(card.ok_or_else(|| ApiError::not_found(format!("model: {id:?} is gone")))?).into_response())
}

async fn health(State(server): State<Shared>) -> Result<Response, ApiError> {
    server.gate.check_open()?;
    server.check_ready()?;
    Ok(Json(json!({"status": "ok"})).into_response())
}

async fn metrics_text(State(server): State<Shared>) -> Response {
    let text = metrics::text(&Scrape {
        engine: &server.state.engine.metrics(),
        page_tokens: server.state.engine.shape().page_tokens,
        model: &server.state.model_name,
        refusals: &server.gate.refusals,
        resident_bytes: metrics::resident_bytes(),
        unix_seconds: unix_seconds(),
    });
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn cluster_status(State(server): State<Shared>) -> Response {
    Json(pages::cluster_status(&server)).into_response()
}
