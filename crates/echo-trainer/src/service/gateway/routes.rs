//! HTTP: who may come in, what is asked, and errors as JSON with a message.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Inner;
use super::api_error::ApiError;
use super::datum::{self, Batch};
use super::desk::Answered;
use super::promises::{Answer, Outcome};
use super::sampling::{self, SampleBody};
use super::store::{Kind, LoraSpec, SavedPath};
use super::training::Job;
use crate::optim::{OptimConfig, Schedule};

type Gateway = State<Arc<Inner>>;

/// Largest question for an answer: it holds a name.
const POLL_BYTES: usize = 4096;

pub(super) fn router(inner: &Arc<Inner>) -> Router {
    let api = Router::new()
        .route("/get_server_capabilities", get(capabilities))
        .route("/client/config", post(client_config))
        .route("/client/dynamic_config", post(|| async { Json(json!({})) }))
        .route("/telemetry", post(|| async { Json(json!({"status": "accepted"})) }))
        .route("/create_session", post(create_session))
        .route("/session_heartbeat", post(heartbeat))
        .route("/sessions/{id}/finish", post(finish_session))
        .route("/create_model", post(create_model))
        .route("/get_info", post(get_info))
        .route("/forward_backward", post(forward_backward))
        .route("/optim_step", post(optim_step))
        .route("/save_weights", post(save_weights))
        .route("/load_weights", post(load_weights))
        .route("/save_weights_for_sampler", post(save_for_sampler))
        .route("/weights_info", post(weights_info))
        .route("/training_runs/{id}/checkpoints", get(list_checkpoints))
        .route("/training_runs/{id}/checkpoints/{*checkpoint}", delete(delete_checkpoint))
        .route("/create_sampling_session", post(create_sampling_session))
        .route("/join_sampling_session", post(join_sampling_session))
        .route("/samplers/{id}", get(get_sampler))
        .route("/asample", post(asample))
        .route_layer(middleware::from_fn_with_state(Arc::clone(inner), admitted))
        .route("/healthz", get(|| async { Json(json!({"status": "ok"})) }));
    let polls = Router::new()
        .route("/retrieve_future", post(retrieve_future))
        .layer(DefaultBodyLimit::max(POLL_BYTES))
        .route_layer(middleware::from_fn_with_state(Arc::clone(inner), polled));
    Router::new()
        .nest("/api/v1", api.merge(polls))
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "this server has no such route") })
        .layer(DefaultBodyLimit::max(inner.config.body_bytes))
        .with_state(Arc::clone(inner))
}

/// Lets in whoever has a key, as far as there are seats, for as long as a request may take.
async fn admitted(State(inner): Gateway, request: Request, next: Next) -> Result<Response, ApiError> {
    check_key(&inner.keys, request.headers())?;
    let _seat = seat(&inner.seats, inner.config.concurrent_requests)?;
    let limit = inner.config.request_timeout;
    tokio::time::timeout(limit, next.run(request)).await.map_err(|_| {
        let detail = format!("not read and answered within {} s", limit.as_secs());
        ApiError::new(StatusCode::REQUEST_TIMEOUT, detail)
    })
}

/// The same for questions after answers. They wait on seats of their own, so that nothing else waits for them.
async fn polled(State(inner): Gateway, request: Request, next: Next) -> Result<Response, ApiError> {
    check_key(&inner.keys, request.headers())?;
    let _seat = seat(&inner.polls, inner.config.max_pending)?;
    let limit = inner.config.request_timeout + inner.config.long_poll;
    let answered = tokio::time::timeout(limit, next.run(request)).await;
    answered.map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the question was not read in time"))
}

fn seat(seats: &Arc<Semaphore>, limit: usize) -> Result<OwnedSemaphorePermit, ApiError> {
    let seat = Arc::clone(seats).try_acquire_owned();
    seat.map_err(|_| ApiError::busy(format!("{limit} requests are being answered: try again")))
}

/// Keys are compared by their hashes, in constant time.
fn check_key(keys: &[blake3::Hash], headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = text("authorization").and_then(|value| value.strip_prefix("Bearer "));
    let sent = blake3::hash(text("x-api-key").or(bearer).unwrap_or_default().as_bytes());
    if keys.is_empty() || keys.contains(&sent) {
        return Ok(());
    }
    let detail = "unknown API key; send the one that this server was started with as X-API-Key";
    Err(ApiError::new(StatusCode::UNAUTHORIZED, detail))
}

fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|e| ApiError::bad(format!("the body is not what this route takes: {e}")))
}

async fn capabilities(State(inner): Gateway) -> Json<Value> {
    let model = json!({"model_name": inner.config.model_name, "max_context_length": inner.limits.context_tokens,
        "trainable": true, "sampleable": true});
    Json(json!({"supported_models": [model]}))
}

/// Flags of the client: what this server does not have is off, and requests are cut to what it takes.
async fn client_config(State(inner): Gateway) -> Json<Value> {
    Json(json!({"pjwt_auth_enabled": false, "use_pyqwest_transport": false, "proto_compress_fwdbwd": false,
        "sample_use_retrieve_futures": false, "custom_loss_server_side": false,
        "fwdbwd_max_chunk_bytes_count": (12 * inner.config.batch_tokens).min(inner.config.body_bytes / 2)}))
}

#[derive(Deserialize)]
struct SessionId {
    session_id: String,
}

async fn create_session(State(inner): Gateway) -> Answered {
    let id = format!("{:016x}{:016x}", rand::random::<u64>(), rand::random::<u64>());
    if !inner.registry().open_session(&id, Instant::now(), &inner.room()) {
        return Err(ApiError::busy(format!(
            "{} sessions are open: try again later",
            inner.config.max_sessions
        )));
    }
    Ok(Json(json!({"type": "create_session", "session_id": id})))
}

async fn heartbeat(State(inner): Gateway, body: Bytes) -> Answered {
    let SessionId { session_id } = read(&body)?;
    inner.check_session(&session_id)?;
    Ok(Json(json!({"type": "session_heartbeat"})))
}

async fn finish_session(State(inner): Gateway, Path(id): Path<String>) -> Answered {
    inner.registry().finish(&id);
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
struct Lora {
    rank: usize,
    seed: Option<u64>,
    #[serde(default = "yes")]
    train_mlp: bool,
    #[serde(default = "yes")]
    train_attn: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct Optimiser {
    r#type: String,
}

#[derive(Deserialize)]
struct CreateModel {
    session_id: String,
    model_seq_id: u64,
    base_model: String,
    lora_config: Option<Lora>,
    optimizer_config: Option<Optimiser>,
}

fn check_optimiser(optimiser: Option<&Optimiser>) -> Result<(), ApiError> {
    match optimiser.filter(|o| o.r#type != "adamw") {
        Some(other) => Err(ApiError::bad(format!("optimizer {:?} is not served; use adamw", other.r#type))),
        None => Ok(()),
    }
}

async fn create_model(State(inner): Gateway, body: Bytes) -> Answered {
    let asked: CreateModel = read(&body)?;
    inner.check_base(&asked.base_model)?;
    check_optimiser(asked.optimizer_config.as_ref())?;
    let lora =
        asked.lora_config.ok_or_else(|| ApiError::bad("only adapters are trained; give a lora_config"))?;
    if lora.rank == 0 || lora.rank > inner.config.max_rank {
        let (rank, limit) = (lora.rank, inner.config.max_rank);
        return Err(ApiError::bad(format!("rank is {rank}, 1 to {limit} are allowed")));
    }
    if !lora.train_attn && !lora.train_mlp {
        return Err(ApiError::bad(
            "adapters are on attention and feed-forward layers; train at least one of them",
        ));
    }
    let spec = LoraSpec { rank: lora.rank, attention: lora.train_attn, mlp: lora.train_mlp };
    let seed = lora.seed.unwrap_or_else(rand::random);
    inner.add_model(&asked.session_id, asked.model_seq_id, spec, Job::Create { seed })
}

#[derive(Deserialize)]
struct ModelId {
    model_id: String,
}

async fn get_info(State(inner): Gateway, body: Bytes) -> Answered {
    let ModelId { model_id } = read(&body)?;
    let model = inner.model(&model_id)?;
    let name = &inner.config.model_name;
    Ok(Json(json!({"type": "get_info", "model_id": model.id, "model_name": name,
        "model_data": {"model_name": name}, "is_lora": true, "lora_rank": model.lora.rank})))
}

async fn forward_backward(State(inner): Gateway, headers: HeaderMap, body: Bytes) -> Answered {
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING) {
        let detail = format!("Content-Encoding {encoding:?} is not taken; send the body as it is");
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
    }
    let message = datum::message(body).map_err(ApiError::bad)?;
    let model = inner.model(&message.model_id)?;
    let seq = u64::try_from(message.seq_id).map_err(|_| ApiError::bad("seq_id is negative"))?;
    let job =
        Batch::read(&message, &inner.limits).map(|batch| Job::Pass(Box::new(batch))).map_err(ApiError::bad);
    inner.submit(&model, seq, job)
}

/// Tinker's defaults.
#[derive(Deserialize)]
#[serde(default)]
struct Adam {
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    grad_clip_norm: f64,
}

impl Default for Adam {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-12,
            weight_decay: 0.0,
            grad_clip_norm: 0.0,
        }
    }
}

#[derive(Deserialize)]
struct OptimStep {
    model_id: String,
    seq_id: u64,
    adam_params: Option<Adam>,
    optimizer_params: Option<Optimiser>,
}

async fn optim_step(State(inner): Gateway, body: Bytes) -> Answered {
    let asked: OptimStep = read(&body)?;
    let model = inner.model(&asked.model_id)?;
    let job = check_optimiser(asked.optimizer_params.as_ref()).and_then(|()| {
        let adam = asked.adam_params.unwrap_or_default();
        let config = OptimConfig {
            learning_rate: adam.learning_rate,
            beta1: adam.beta1,
            beta2: adam.beta2,
            epsilon: adam.eps,
            weight_decay: adam.weight_decay,
            max_grad_norm: adam.grad_clip_norm,
            schedule: Schedule::default(),
        };
        config.validate().map_err(ApiError::bad)?;
        Ok(Job::Step(config))
    });
    inner.submit(&model, asked.seq_id, job)
}

#[derive(Deserialize)]
struct SaveWeights {
    model_id: String,
    seq_id: u64,
    path: Option<String>,
    #[serde(default)]
    overwrite: bool,
}

async fn save_weights(State(inner): Gateway, body: Bytes) -> Answered {
    let asked: SaveWeights = read(&body)?;
    let model = inner.model(&asked.model_id)?;
    let name = asked.path.unwrap_or_else(|| format!("step-{}", asked.seq_id));
    let path = SavedPath::new(&model.id, Kind::Weights, &name).map_err(ApiError::from);
    inner.submit(&model, asked.seq_id, path.map(|path| Job::Save { path, overwrite: asked.overwrite }))
}

#[derive(Deserialize)]
struct LoadWeights {
    model_id: Option<String>,
    seq_id: Option<u64>,
    session_id: Option<String>,
    model_seq_id: Option<u64>,
    base_model: Option<String>,
    path: String,
    optimizer: bool,
    optimizer_config: Option<Optimiser>,
}

/// Into a model that is there, or as the first request of a new one, whose adapter is that of what is loaded.
async fn load_weights(State(inner): Gateway, body: Bytes) -> Answered {
    let asked: LoadWeights = read(&body)?;
    let path = || -> Result<SavedPath, ApiError> {
        let path = SavedPath::parse(&asked.path)?;
        if path.kind != Kind::Weights {
            return Err(ApiError::bad(format!(
                "{path} is for sampling; weights to train on are under /weights/"
            )));
        }
        Ok(path)
    };
    check_optimiser(asked.optimizer_config.as_ref())?;
    let optimiser = asked.optimizer;
    match (&asked.model_id, asked.seq_id, &asked.session_id, asked.model_seq_id) {
        (Some(id), Some(seq), None, None) => {
            let model = inner.model(id)?;
            inner.submit(&model, seq, path().map(|path| Job::Load { path, optimiser }))
        }
        (None, _, Some(session), Some(number)) => {
            asked.base_model.as_deref().map_or(Ok(()), |base| inner.check_base(base))?;
            let path = path()?;
            let known = path.clone();
            let saved = inner.on_disk(move |store| store.read(&known)).await?;
            inner.add_model(session, number, saved.lora, Job::Load { path, optimiser })
        }
        _ => Err(ApiError::bad("give model_id with seq_id, or session_id with model_seq_id")),
    }
}

#[derive(Deserialize)]
struct SaveForSampler {
    model_id: String,
    seq_id: u64,
    path: Option<String>,
    sampling_session_seq_id: Option<u64>,
    kind: Option<String>,
}

async fn save_for_sampler(State(inner): Gateway, body: Bytes) -> Answered {
    let asked: SaveForSampler = read(&body)?;
    let model = inner.model(&asked.model_id)?;
    let job = match (&asked.path, asked.sampling_session_seq_id) {
        _ if asked.kind.as_deref().is_some_and(|kind| kind != "snapshot") => {
            Err(ApiError::bad("only snapshots are served, no weights that change under a sampler"))
        }
        (Some(name), None) => {
            let path = SavedPath::new(&model.id, Kind::Sampler, name).map_err(ApiError::from);
            path.map(|path| Job::SaveSampler { path, session: None })
        }
        (None, Some(number)) => {
            let session = Some(sampler_id(&model.session, number));
            Ok(Job::SaveSampler { path: SavedPath::unnamed(&model.id, number), session })
        }
        _ => Err(ApiError::bad("give either path or sampling_session_seq_id")),
    };
    inner.submit(&model, asked.seq_id, job)
}

#[derive(Deserialize)]
struct TinkerPath {
    tinker_path: String,
}

async fn weights_info(State(inner): Gateway, body: Bytes) -> Answered {
    let TinkerPath { tinker_path } = read(&body)?;
    let path = SavedPath::parse(&tinker_path)?;
    let LoraSpec { rank, attention, mlp } = inner.on_disk(move |store| store.read(&path)).await?.lora;
    Ok(Json(json!({"base_model": inner.config.model_name, "is_lora": true, "lora_rank": rank,
        "train_attn": attention, "train_mlp": mlp, "train_unembed": false})))
}

async fn list_checkpoints(State(inner): Gateway, Path(run): Path<String>) -> Answered {
    SavedPath::parse(&format!("tinker://{run}/weights/any"))?;
    let listed = inner.on_disk(move |store| store.list(&run)).await;
    let checkpoints: Vec<Value> = listed
        .into_iter()
        .map(|saved| {
            let (folder, of) = match saved.path.kind {
                Kind::Weights => ("weights", "training"),
                Kind::Sampler => ("sampler_weights", "sampler"),
            };
            json!({"checkpoint_id": format!("{folder}/{}", saved.path.name), "checkpoint_type": of,
                "time": saved.unix_s, "tinker_path": saved.path.to_string(), "size_bytes": saved.bytes})
        })
        .collect();
    Ok(Json(json!({"checkpoints": checkpoints})))
}

async fn delete_checkpoint(
    State(inner): Gateway,
    Path((run, checkpoint)): Path<(String, String)>,
) -> Answered {
    let path = SavedPath::parse(&format!("tinker://{run}/{checkpoint}"))?;
    let known = path.clone();
    inner.on_disk(move |store| store.delete(&known)).await?;
    let mut resident = inner.resident.lock().await;
    sampling::forget(&inner, &mut resident, &path);
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
struct CreateSamplingSession {
    session_id: String,
    sampling_session_seq_id: u64,
    base_model: Option<String>,
    model_path: Option<String>,
}

fn sampler_id(session: &str, number: u64) -> String {
    format!("{session}:sample:{number}")
}

async fn create_sampling_session(State(inner): Gateway, body: Bytes) -> Answered {
    let asked: CreateSamplingSession = read(&body)?;
    inner.check_session(&asked.session_id)?;
    let path = inner.sampled_path(asked.model_path.as_deref(), asked.base_model.as_deref()).await?;
    let id = sampler_id(&asked.session_id, asked.sampling_session_seq_id);
    inner.open_sampler(&asked.session_id, &id, path)?;
    Ok(Json(json!({"type": "create_sampling_session", "sampling_session_id": id})))
}

#[derive(Deserialize)]
struct JoinSamplingSession {
    sampling_session_id: String,
}

async fn join_sampling_session(State(inner): Gateway, body: Bytes) -> Answered {
    let JoinSamplingSession { sampling_session_id: id } = read(&body)?;
    let mut registry = inner.registry();
    let sampler = registry.sampler(&id, Instant::now());
    let sampler = sampler.ok_or_else(|| ApiError::not_found("sampling session", &id))?;
    sampler.joined += 1;
    Ok(Json(json!({"type": "join_sampling_session", "client_counter": sampler.joined})))
}

async fn get_sampler(State(inner): Gateway, Path(id): Path<String>) -> Answered {
    let path = inner.sampler_path(&id)?;
    let path = path.map(|path| path.to_string());
    Ok(Json(json!({"sampler_id": id, "base_model": inner.config.model_name, "model_path": path})))
}

async fn asample(State(inner): Gateway, body: Bytes) -> Answered {
    let asked: SampleBody = read(&body)?;
    let (name, path) = match (&asked.sampling_session_id, asked.seq_id) {
        (Some(session), Some(seq)) => (format!("{session}:{seq}"), inner.sampler_path(session)?),
        (None, _) => {
            let path = inner.sampled_path(asked.model_path.as_deref(), asked.base_model.as_deref()).await?;
            (format!("sample:{:016x}", rand::random::<u64>()), path)
        }
        (Some(_), None) => return Err(ApiError::bad("seq_id is missing")),
    };
    let samples = asked.into_task(rand::random(), &inner.sample_limits).map_err(ApiError::bad)?;
    let ids: Vec<String> = (0..samples.task.samples).map(|i| format!("{name}:{i}")).collect();
    let accepted = json!({"request_id": name, "sample_sequence_ids": ids});
    if !inner.promises.is_known(&name) {
        if !inner.promises.open(&name) {
            return Err(inner.too_many_pending());
        }
        tokio::spawn(sampling::sample(Arc::clone(&inner), name, path, samples));
    }
    Ok(Json(accepted))
}

#[derive(Deserialize)]
struct RetrieveFuture {
    request_id: String,
}

async fn retrieve_future(State(inner): Gateway, body: Bytes) -> Result<Response, ApiError> {
    let RetrieveFuture { request_id } = read(&body)?;
    let until = tokio::time::Instant::now() + inner.config.long_poll;
    Ok(match inner.promises.get(&request_id, until).await {
        Answer::Unknown => {
            let detail = "no such request, or its answer was dropped to make room; send it again";
            return Err(ApiError::new(StatusCode::GONE, detail));
        }
        Answer::Pending => {
            let again = json!({"type": "try_again", "request_id": request_id, "queue_state": "active"});
            (StatusCode::REQUEST_TIMEOUT, Json(again)).into_response()
        }
        Answer::Ready(Outcome::Json(value)) => Json(value).into_response(),
        Answer::Ready(Outcome::Proto(bytes)) => {
            ([(header::CONTENT_TYPE, "application/x-protobuf")], bytes).into_response()
        }
        Answer::Ready(Outcome::Failed { message, user }) => {
            let category = if user { "user" } else { "server" };
            Json(json!({"error": message, "category": category})).into_response()
        }
    })
}
