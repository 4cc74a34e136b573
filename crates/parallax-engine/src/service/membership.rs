//! Taking part in a swarm with a real model: [`serve`] at the head, [`join`] everywhere else; [`WeightUpdates`] replaces what
//! the swarm serves.
//!
//! The head publishes its checkpoint by reference and plans from what members report; a member measures itself, joins,
//! gets the bytes of its layers if it has no copy, loads them, and serves its stage until it is told otherwise.

mod measure;
mod member;
mod updates;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lattica_net::{Node, StreamError};
use parallax_model::{Checkpoint, DeviceKind, KvFormat, LoadOptions, WeightDtype};
use parallax_sched::service::MembershipServer;
use parallax_sched::{
    Coordinator, CoordinatorConfig, JoinError, ModelProfile, NodeId, NodeProfile, PlanError, PlanOptions,
    profile::roofline,
};
use swarm_wire::LayerRange;
use swarm_wire::generated::parallax::v1 as pb;

use crate::local::LocalStage;
use crate::service::head::{Head, HeadOptions, PipelineRunner, StageLoader};
use crate::service::weights::{self, WeightExchange};
use crate::stage::{StageRunner, StageShape};
pub use measure::bandwidth_gbps;
pub use member::{JoinOptions, MemberError, MemberNews, join};
pub use updates::{UpdateError, WeightUpdates};

/// How the head serves a model.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Name of the swarm.
    pub swarm: String,
    /// The model as the operator named it.
    pub model: String,
    /// Weight type on every stage.
    pub dtype: WeightDtype,
    /// Where the head computes its own layers.
    pub device: DeviceKind,
    /// Whether the head takes layers itself.
    pub take_layers: bool,
    /// Memory for the head's own layers and cache.
    pub memory_bytes: u64,
    /// Layers that the head must take.
    pub pinned: Option<LayerRange>,
    /// Cache pages on every stage.
    pub kv_pages: usize,
    /// Positions per page.
    pub kv_page_tokens: usize,
    /// How every stage keeps keys and values.
    pub kv_format: KvFormat,
    /// How long one step may take.
    pub step_timeout: Duration,
}

/// Why a head could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Open(#[from] parallax_model::OpenError),
    /// The model or options cannot be planned with.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The head itself cannot be a member.
    #[error("the head cannot take layers: {0}")]
    Join(#[from] JoinError),
    /// The files cannot be published.
    #[error("cannot publish the model's files: {0}")]
    Publish(#[from] lattica_bitswap::PublishError),
    /// The files could not be hashed.
    #[error("cannot hash the model's files: {0}")]
    Hash(String),
    /// The node refused.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A size that no stage can have.
    #[error("{what} = {value} is out of range")]
    Size {
        /// Which.
        what: &'static str,
        /// Its value.
        value: usize,
    },
}

/// Milliseconds since 1970: grows with every start of a process on a machine whose clock works.
pub fn incarnation_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Becomes the head of a swarm: publishes the model over `exchange` (without one, members need copies of their own),
/// answers members, forms pipelines. The runner is for the engine.
///
/// # Errors
/// When the checkpoint cannot be read or published, or the options make no sense.
pub async fn serve(
    node: &Node,
    exchange: Option<&impl WeightExchange>,
    checkpoint: Arc<Checkpoint>,
    options: ServeOptions,
) -> Result<(Head, PipelineRunner), ServeError> {
    let local = own_loader(&checkpoint, &options);
    let Offer { model, description, complete } = offer(exchange, &checkpoint, &options).await?;
    let (head_id, context_tokens) = (NodeId::from(&node.peer_id()), description.context_tokens);
    let config = CoordinatorConfig {
        first_epoch: incarnation_now(),
        plan: PlanOptions {
            context_tokens,
            first_stage: options.take_layers.then(|| head_id.clone()),
            ..CoordinatorConfig::default().plan
        },
        ..CoordinatorConfig::default()
    };
    let coordinator = Coordinator::new(model.clone(), config)?;
    let membership = MembershipServer::start(node, coordinator, description, complete);
    if options.take_layers {
        let (decode_ms_per_layer, head_ms) = roofline(&model, bandwidth_gbps(), 0.0);
        let profile = NodeProfile {
            id: head_id,
            memory_bytes: options.memory_bytes,
            decode_ms_per_layer,
            head_ms,
            prefill_ms_per_layer_token: 0.0,
            overhead_ms: 0.0,
            pinned: options.pinned,
        };
        membership.join_local(profile, incarnation_now(), &options.device.to_string())?;
    }
    let config = checkpoint.config();
    let shape = StageShape {
        layers: LayerRange::new(0, model.n_layers)
            .map_err(|_| ServeError::Size { what: "n_layers", value: 0 })?,
        n_layers: model.n_layers,
        hidden: config.hidden,
        vocab: config.vocab,
        max_context: config.max_context,
        page_tokens: options.kv_page_tokens,
        n_pages: options.kv_pages,
        state_slots: config.state_slots(context_tokens, options.kv_format),
    };
    let log_softmax = crate::local::log_softmax;
    Ok(Head::start(
        node,
        membership,
        HeadOptions { shape, log_softmax, local, step_timeout: options.step_timeout },
    )?)
}

/// Reads the head's own layers, if it takes any.
fn own_loader(checkpoint: &Arc<Checkpoint>, options: &ServeOptions) -> Option<StageLoader> {
    options.take_layers.then(|| {
        let (checkpoint, options) = (Arc::clone(checkpoint), options.clone());
        let load = move |layers: LayerRange| {
            let load = LoadOptions {
                layers: layers.as_range(),
                dtype: options.dtype,
                device: options.device,
                kv_page_tokens: options.kv_page_tokens,
                kv_pages: options.kv_pages,
                kv_format: options.kv_format,
            };
            load_stage(&checkpoint, &load)
        };
        Arc::new(load) as StageLoader
    })
}

/// A checkpoint as members hear of it.
struct Offer<C> {
    model: ModelProfile,
    description: pb::ModelDescription,
    /// Completes assignments of its layers.
    complete: C,
}

/// Publishes a checkpoint and describes it.
async fn offer(
    exchange: Option<&impl WeightExchange>,
    checkpoint: &Arc<Checkpoint>,
    options: &ServeOptions,
) -> Result<Offer<impl Fn(&mut pb::Assignment) + Send + Sync + 'static>, ServeError> {
    let size = |what, value: usize| u32::try_from(value).map_err(|_| ServeError::Size { what, value });
    let (kv_pages, kv_page_tokens) =
        (size("kv_pages", options.kv_pages)?, size("kv_page_tokens", options.kv_page_tokens)?);
    let context_tokens = u64::from(kv_pages) * u64::from(kv_page_tokens);
    let (dtype, kv_format) = (options.dtype, options.kv_format);
    let model = weights::model_profile(&options.model, checkpoint, dtype, kv_format, context_tokens);
    let files = weights::published_files(checkpoint);
    let weights_root = match (files.first().and_then(|f| f.parent()), exchange) {
        (Some(dir), Some(exchange)) => exchange.publish(dir, &files).await?.to_bytes().into(),
        _ => bytes::Bytes::new(),
    };
    let checkpoint_id = {
        let checkpoint = Arc::clone(checkpoint);
        let id = tokio::task::spawn_blocking(move || checkpoint.id()).await;
        id.map_err(|e| ServeError::Hash(e.to_string()))??
    };
    let description = pb::ModelDescription {
        swarm: options.swarm.clone(),
        name: options.model.clone(),
        checkpoint_id: checkpoint_id.clone(),
        n_layers: model.n_layers,
        hidden: model.hidden,
        layer_bytes: model.layer_bytes,
        embedding_bytes: model.embedding_bytes,
        head_bytes: if model.tied { 0 } else { model.head_bytes },
        kv_bytes_per_token_layer: model.kv_bytes_per_token_layer,
        weight_dtype: dtype.to_string(),
        kv_format: kv_format.to_string(),
        weights_root,
        context_tokens,
        head_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let (checkpoint, published) = (Arc::clone(checkpoint), !description.weights_root.is_empty());
    let complete = move |assignment: &mut pb::Assignment| {
        (assignment.kv_pages, assignment.kv_page_tokens) = (kv_pages, kv_page_tokens);
        assignment.checkpoint_id.clone_from(&checkpoint_id);
        if let (true, Ok(layers)) =
            (published, LayerRange::new(assignment.layers_start, assignment.layers_end))
        {
            match weights::file_spans(&checkpoint, layers) {
                Ok(files) => assignment.files = files,
                Err(error) => tracing::warn!(%error, "the model's files cannot be listed for a member"),
            }
        }
    };
    Ok(Offer { model, description, complete })
}

fn load_stage(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Box<dyn StageRunner>, String> {
    LocalStage::load(checkpoint, options)
        .map(|s| Box::new(s) as Box<dyn StageRunner>)
        .map_err(|e| e.to_string())
}
