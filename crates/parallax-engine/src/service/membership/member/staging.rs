//! Weights that are to replace those that serve: fetched and read while the stage works on.

use std::pin::Pin;

use parallax_sched::wire;
use swarm_wire::generated::parallax::v1 as pb;
use swarm_wire::{DecodeError, LayerRange, PeerId};

use super::super::load_stage;
use super::super::updates::NoRoom;
use super::{JoinOptions, MemberError, fetched, load_options};
use crate::service::weights::WeightExchange;
use crate::stage::StageRunner;

/// A stage in memory beside the one that serves.
pub(super) struct Staged {
    pub(super) model: pb::ModelDescription,
    pub(super) layers: LayerRange,
    pub(super) runner: Box<dyn StageRunner>,
}

impl Staged {
    /// Whether this is what the head wants of a member with this assignment.
    pub(super) fn is(&self, next: &pb::NextWeights, assignment: &pb::Assignment) -> bool {
        let layers = (self.layers.start(), self.layers.end());
        self.model.checkpoint_id == checkpoint_id(next)
            && layers == (assignment.layers_start, assignment.layers_end)
    }
}

/// The checkpoint that is wanted.
pub(super) fn checkpoint_id(next: &pb::NextWeights) -> &str {
    next.model.as_ref().map_or("", |model| &model.checkpoint_id)
}

/// The staging that goes on.
pub(super) type Staging<'a> = Pin<Box<dyn Future<Output = Result<Staged, MemberError>> + Send + 'a>>;

/// The outcome of what goes on; never comes if nothing does.
pub(super) async fn outcome(staging: &mut Option<Staging<'_>>) -> Result<Staged, MemberError> {
    let Some(running) = staging else { return std::future::pending().await };
    let staged = running.await;
    *staging = None;
    staged
}

/// Fetches and reads the assigned layers of the next weights.
pub(super) async fn stage<X: WeightExchange>(
    exchange: Option<&X>,
    options: &JoinOptions,
    head: PeerId,
    next: pb::NextWeights,
    assignment: pb::Assignment,
) -> Result<Staged, MemberError> {
    let layers = LayerRange::new(assignment.layers_start, assignment.layers_end)?;
    let model = next.model.ok_or_else(|| DecodeError::invalid("next weights", "no model"))?;
    NoRoom::check(&wire::model_profile(&model), model.context_tokens, layers, options.memory_bytes)?;
    let checkpoint = fetched(exchange, options, &head, &model, (&next.files, layers), |_, _| ()).await?;
    let load = load_options(options, &model, layers, &assignment)?;
    let failed = |reason: String| MemberError::Load { layers, reason };
    let loaded = tokio::task::spawn_blocking(move || load_stage(&checkpoint, &load)).await;
    let runner = loaded.map_err(|e| failed(e.to_string()))?.map_err(failed)?;
    Ok(Staged { model, layers, runner })
}
