//! Other weights for a whole pipeline: every machine reads them beside those that serve, and a new epoch takes them into
//! service everywhere at once. No pass ever mixes them: a stream belongs to one epoch, and an epoch to one checkpoint.

use std::sync::Arc;
use std::time::Duration;

use parallax_sched::{NodeId, StagingError};
use swarm_wire::LayerRange;
use swarm_wire::generated::parallax::v1 as pb;
use tokio::sync::OwnedMutexGuard;

use super::forming::FORM_POLL;
use super::{Head, PipelineRunner, Shared, StageLoader, State};
use crate::stage::StageRunner;

/// How long the machines may take to fetch and read the weights.
const STAGING_TIMEOUT: Duration = Duration::from_secs(3600);

/// How long the engine waits for the pipeline after the change.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the weights of a pipeline cannot be replaced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StageWeightsError {
    /// One update at a time.
    #[error("other weights are being staged; wait for them")]
    Busy,
    /// The members cannot.
    #[error(transparent)]
    Members(#[from] StagingError),
    /// The head itself cannot.
    #[error("the head cannot stage layers {layers}: {reason}")]
    Own {
        /// Its layers.
        layers: LayerRange,
        /// Why.
        reason: String,
    },
    /// Somebody takes too long.
    #[error("not staged within {} s by {}", STAGING_TIMEOUT.as_secs(), .waiting.iter().map(NodeId::as_str).collect::<Vec<_>>().join(", "))]
    Late {
        /// Who.
        waiting: Vec<NodeId>,
    },
}

/// Weights that all machines hold beside those that serve; dropping it lets them go.
pub(super) struct Next {
    shared: Arc<Shared>,
    loader: Option<StageLoader>,
    own: Option<(LayerRange, Box<dyn StageRunner>)>,
    _turn: OwnedMutexGuard<()>,
}

impl std::fmt::Debug for Next {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Next")
            .field("own", &self.own.as_ref().map(|(layers, _)| layers))
            .finish_non_exhaustive()
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        self.shared.membership.withdraw();
    }
}

impl Head {
    /// Has the pipeline's machines read their layers of another checkpoint beside those that serve, and the head its own with
    /// `loader`. The runner that comes back changes them over when it takes the place of the one that serves
    /// ([`StageRunner::take_over`]); until then, and if it is dropped, nothing changes. Safe to drop.
    ///
    /// # Errors
    /// When another update is on its way, or a machine cannot have the weights in time.
    pub async fn stage(
        &self,
        description: pb::ModelDescription,
        complete: impl Fn(&mut pb::Assignment) + Send + Sync + 'static,
        loader: Option<StageLoader>,
    ) -> Result<PipelineRunner, StageWeightsError> {
        let shared = &self.shared;
        let turn = Arc::clone(&shared.staging).try_lock_owned().map_err(|_| StageWeightsError::Busy)?;
        let id = description.checkpoint_id.clone();
        shared.membership.stage(description, complete);
        let mut next = Next { shared: Arc::clone(shared), loader, own: None, _turn: turn };
        let members = tokio::time::timeout(STAGING_TIMEOUT, until_staged(shared, &id));
        let (members, own) = tokio::join!(members, own_stage(shared, next.loader.as_ref()));
        members.unwrap_or_else(|_| Err(StageWeightsError::Late { waiting: waiting(shared, &id)? }))?;
        next.own = own?;
        Ok(PipelineRunner::new(Arc::clone(shared), Some(next)))
    }
}

/// The members that have not staged this checkpoint yet.
fn waiting(shared: &Shared, checkpoint_id: &str) -> Result<Vec<NodeId>, StagingError> {
    let me = NodeId::from(&shared.node.peer_id());
    let mut waiting = shared.membership.read(|c| c.unstaged(checkpoint_id))?;
    waiting.retain(|id| *id != me);
    Ok(waiting)
}

async fn until_staged(shared: &Shared, checkpoint_id: &str) -> Result<(), StageWeightsError> {
    while !waiting(shared, checkpoint_id)?.is_empty() {
        tokio::time::sleep(FORM_POLL).await;
    }
    Ok(())
}

async fn own_stage(
    shared: &Shared,
    loader: Option<&StageLoader>,
) -> Result<Option<(LayerRange, Box<dyn StageRunner>)>, StageWeightsError> {
    let (Some(layers), Some(loader)) = (shared.own.layers(), loader.cloned()) else { return Ok(None) };
    let failed = |reason| StageWeightsError::Own { layers, reason };
    let load = tokio::task::spawn_blocking(move || loader(layers)).await;
    let runner = load.map_err(|e| failed(e.to_string()))?.map_err(failed)?;
    Ok(Some((layers, runner)))
}

impl Next {
    /// From here on, this is what the pipeline serves; who fails now comes back with these weights. Waits until the machines have
    /// taken them up, which needs a heartbeat of each and new streams; if that lasts, steps have to wait for a lost stage.
    pub(super) async fn adopt(mut self) {
        let shared = Arc::clone(&self.shared);
        shared.own.change(self.loader.take(), self.own.take());
        *super::lock(&shared.adapter) = None;
        shared.membership.adopt();
        // The engine's next step finds the old pipeline gone, even before a task has taken it down.
        let epoch = shared.membership.read(|c| c.view().epoch);
        shared.state.send_if_modified(|state| {
            let is_old = matches!(state, State::Ready(link) if link.epoch != epoch);
            if is_old {
                *state = State::Forming("the pipeline takes up other weights".to_owned());
            }
            is_old
        });
        let mut state = shared.state.subscribe();
        let ready = state.wait_for(|state| matches!(state, State::Ready(_)));
        if tokio::time::timeout(CHANGE_TIMEOUT, ready).await.is_err() {
            tracing::warn!("the pipeline has not taken up the other weights yet");
        }
    }
}
