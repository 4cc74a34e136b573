//! Changing what a running server serves: adapters and weights, from paths on its own machine. Off unless [`Updates`] says
//! otherwise: whoever may ask can make the server read files.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use parallax_model::{Adapter, AdapterError};
use serde_json::{Value, json};
use swarm_wire::PolicyVersion;

use super::error::ApiError;
use super::fields::Fields;
use super::{JsonBody, Server};
use crate::config::OnSwap;
use crate::error::StageError;
use crate::stage::StageRunner;

/// Longest name of an adapter.
const MAX_NAME_BYTES: usize = 256;

/// Loads the weights at a path into a runner of the shape that is served; blocking.
pub type WeightLoader = Arc<dyn Fn(&Path) -> Result<Box<dyn StageRunner>, String> + Send + Sync>;

/// What clients may change.
#[derive(Clone, Default)]
pub struct Updates {
    /// Reads other weights; without one, only adapters come and go.
    pub loader: Option<WeightLoader>,
}

impl std::fmt::Debug for Updates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Updates").field("weights", &self.loader.is_some()).finish()
    }
}

impl Server {
    fn updates(&self) -> Result<&Updates, ApiError> {
        let why = "this server does not let clients change its weights; start it with --allow-weight-updates";
        self.state.updates.as_ref().ok_or_else(|| ApiError::not_found(why))
    }
}

/// vLLM's `POST /v1/load_lora_adapter`: `{"lora_name", "lora_path", "load_inplace"}`; `on_swap` says what becomes of requests
/// on a replaced one, which finish on it otherwise.
///
/// # Errors
/// 400 for what does not fit or is loaded already, 404 for what is not there.
pub(super) async fn load_adapter(
    State(server): State<Arc<Server>>,
    body: JsonBody,
) -> Result<String, ApiError> {
    server.updates()?;
    server.check_ready()?;
    let (name, bytes, on_swap) = server.read(body, |server, body, _| adapter(server, body)).await?;
    let added = server.state.engine.add_adapter_as(&name, bytes, on_swap).await;
    added.map_err(|error| match error {
        StageError::Lost { .. } | StageError::NotReady { .. } => ApiError::unavailable(error.to_string()),
        error => ApiError::invalid(Some("lora_path"), error.to_string()),
    })?;
    Ok(format!("Success: LoRA adapter '{name}' added successfully."))
}

fn adapter(server: &Server, body: &Fields<'_>) -> Result<(String, Vec<u8>, OnSwap), ApiError> {
    let on_swap = on_swap(body)?.unwrap_or(OnSwap::Finish);
    let (name, path) = (body.required_text("lora_name")?, body.required_text("lora_path")?);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name == server.state.model_name {
        let why = format!("must have 1 to {MAX_NAME_BYTES} bytes and not be the model's own name");
        return Err(body.fault("lora_name", why));
    }
    let in_place = body.flag("load_inplace")?.unwrap_or(false);
    if !in_place && server.state.engine.adapters().contains(name) {
        let why = format!("{name:?} is loaded already: unload it first, or send \"load_inplace\": true");
        return Err(body.fault("lora_name", why));
    }
    let bytes = Adapter::load(Path::new(path)).and_then(|adapter| adapter.to_bytes());
    let bytes = bytes.map_err(|error| match error {
        AdapterError::Io { .. } => ApiError::not_found(error.to_string()),
        error => body.fault("lora_path", format!("cannot be loaded: {error}")),
    })?;
    Ok((name.to_owned(), bytes, on_swap))
}

/// vLLM's `POST /v1/unload_lora_adapter`: `{"lora_name"}`. Requests in flight finish on it.
///
/// # Errors
/// 404 for a name that no adapter has.
pub(super) async fn unload_adapter(
    State(server): State<Arc<Server>>,
    body: JsonBody,
) -> Result<String, ApiError> {
    server.updates()?;
    let read = |_: &Arc<Server>, body: &Fields<'_>, _| body.required_text("lora_name").map(str::to_owned);
    let name = server.read(body, read).await?;
    if !server.state.engine.adapters().contains(&name) {
        return Err(ApiError::not_found(format!("The lora adapter '{name}' cannot be found.")));
    }
    let unloaded = server.state.engine.unload_adapter(&name).await;
    unloaded.map_err(|error| ApiError::unavailable(error.to_string()))?;
    Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
}

/// `POST /v1/update_weights`: `{"path", "on_swap": "finish" | "switch" | "abort"}`. The new weights are read beside the old
/// ones, which serve meanwhile; the change itself falls between two steps.
///
/// # Errors
/// 400 for weights that cannot be read or have another shape; the old ones stay.
pub(super) async fn update_weights(
    State(server): State<Arc<Server>>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let loader = server.updates()?.loader.clone();
    let loader = loader.ok_or_else(|| {
        ApiError::invalid(None, "this server cannot read other weights; adapters can be loaded and unloaded")
    })?;
    let (path, on_swap) = server.read(body, |_, body, _| change(body)).await?;
    let _turn = server.updating.lock().await;
    let started = Instant::now();
    let loaded = tokio::task::spawn_blocking(move || loader(&path)).await;
    let refused = |why: &str| ApiError::invalid(Some("path"), format!("path cannot be served: {why}"));
    let runner =
        loaded.map_err(|_| ApiError::internal("this server has a bug"))?.map_err(|why| refused(&why))?;
    let load_ms = started.elapsed().as_secs_f64() * 1e3;
    let engine = &server.state.engine;
    let version = PolicyVersion(engine.version().0 + 1);
    let swapped = match on_swap {
        Some(on_swap) => engine.swap_weights_as(version, runner, on_swap).await,
        None => engine.swap_weights(version, runner).await,
    };
    swapped.map_err(|error| refused(&error.to_string()))?;
    let total_ms = started.elapsed().as_secs_f64() * 1e3;
    Ok(Json(json!({"version": version.0, "load_ms": load_ms, "swap_ms": total_ms - load_ms})))
}

fn change(body: &Fields<'_>) -> Result<(PathBuf, Option<OnSwap>), ApiError> {
    let on_swap = on_swap(body)?;
    Ok((body.required_text("path")?.into(), on_swap))
}

fn on_swap(body: &Fields<'_>) -> Result<Option<OnSwap>, ApiError> {
    let words = [("finish", OnSwap::Finish), ("switch", OnSwap::Recompute), ("abort", OnSwap::Abort)];
    body.choice("on_swap", &words)
}
