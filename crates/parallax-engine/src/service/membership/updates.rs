//! Other weights for a swarm that serves: the head publishes them, every machine reads its layers beside the old ones.

use std::sync::Arc;

use parallax_model::Checkpoint;
use parallax_sched::ModelProfile;
use swarm_wire::{Cid, LayerRange};
use tokio::sync::Mutex;

use super::{Offer, ServeError, ServeOptions, offer, own_loader};
use crate::service::head::{Head, PipelineRunner, StageWeightsError};
use crate::service::weights::WeightExchange;

/// Why a swarm cannot change its weights.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// Another architecture.
    #[error("its configuration differs from that of the model that is served; start a swarm for it")]
    OtherModel,
    /// The head has no room for two copies.
    #[error(transparent)]
    Room(#[from] NoRoom),
    /// The checkpoint cannot be read or published.
    #[error(transparent)]
    Offer(#[from] ServeError),
    /// A machine cannot have it.
    #[error(transparent)]
    Staging(#[from] StageWeightsError),
}

/// Two copies of a stage's weights, and its cache, do not fit.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error(
    "old and new weights of layers {layers} need {needed_bytes} bytes together where {memory_bytes} may be used: allow more \
     with --memory-gb, or restart the swarm with the new weights"
)]
pub struct NoRoom {
    layers: LayerRange,
    needed_bytes: u64,
    memory_bytes: u64,
}

impl NoRoom {
    /// Whether the stage of these layers may be in memory twice for a while.
    pub(super) fn check(
        model: &ModelProfile,
        context_tokens: u64,
        layers: LayerRange,
        memory_bytes: u64,
    ) -> Result<(), Self> {
        let n_layers = u64::from(layers.len());
        let ends = model.endpoint_bytes(layers.start() == 0, layers.end() == model.n_layers);
        let weights = model.layer_bytes.saturating_mul(n_layers).saturating_add(ends);
        let cache = model.kv_bytes_per_token_layer.saturating_mul(context_tokens).saturating_mul(n_layers);
        let needed_bytes = weights.saturating_mul(2).saturating_add(cache);
        if needed_bytes > memory_bytes { Err(Self { layers, needed_bytes, memory_bytes }) } else { Ok(()) }
    }
}

/// Replaces the weights of a swarm that serves.
#[derive(Debug)]
pub struct WeightUpdates<X> {
    head: Arc<Head>,
    exchange: X,
    served: Arc<Checkpoint>,
    options: ServeOptions,
    /// What was published and may still be.
    published: Mutex<Vec<Cid>>,
}

impl<X: WeightExchange> WeightUpdates<X> {
    /// For the swarm of `head`, which [`super::serve`] made of these.
    pub fn new(head: Arc<Head>, exchange: X, served: Arc<Checkpoint>, options: ServeOptions) -> Self {
        let published = head.weights_root().into_iter().collect();
        Self { head, exchange, served, options, published: Mutex::new(published) }
    }

    /// Has every machine of the pipeline read its layers of another checkpoint of the same architecture, beside those that it
    /// serves. The runner changes the pipeline over when an engine swaps to it; dropped before, it changes nothing.
    ///
    /// # Errors
    /// When the checkpoint cannot be read or published or has another architecture, another one is being staged, or a machine
    /// cannot have it.
    pub async fn stage(&self, checkpoint: Arc<Checkpoint>) -> Result<PipelineRunner, UpdateError> {
        if checkpoint.config() != self.served.config() {
            return Err(UpdateError::OtherModel);
        }
        let mut published = self.published.lock().await;
        self.unpublish(&mut published).await;
        let Offer { model, description, complete } =
            offer(Some(&self.exchange), &checkpoint, &self.options).await?;
        published.extend(swarm_wire::cid::decode(&description.weights_root));
        if let Some(layers) = self.head.own_layers() {
            NoRoom::check(&model, description.context_tokens, layers, self.options.memory_bytes)?;
        }
        let loader = own_loader(&checkpoint, &self.options);
        Ok(self.head.stage(description, complete, loader).await?)
    }

    /// Nobody needs what is served no more, or never was.
    async fn unpublish(&self, published: &mut Vec<Cid>) {
        let served = self.head.weights_root();
        let (kept, gone) = published.drain(..).partition::<Vec<_>, _>(|root| Some(*root) == served);
        *published = kept;
        for root in gone {
            if let Err(error) = self.exchange.unpublish(&root, published).await {
                tracing::warn!(%root, %error, "replaced weights stay published");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_needed_for_both_copies_and_one_cache() {
        let mut model = ModelProfile::uniform("m", 8, 100);
        (model.embedding_bytes, model.head_bytes, model.kv_bytes_per_token_layer) = (1000, 2000, 2);
        let check = |start, end, memory| {
            NoRoom::check(&model, 10, LayerRange::new(start, end).unwrap(), memory).is_ok()
        };
        assert!(check(2, 5, 660) && !check(2, 5, 659));
        assert!(check(0, 2, 2440) && !check(0, 2, 2439));
        assert!(check(6, 8, 4440) && !check(6, 8, 4439));
        let error = NoRoom::check(&model, 10, LayerRange::new(2, 5).unwrap(), 1).unwrap_err().to_string();
        assert!(error.contains("layers 2..5 need 660 bytes") && error.contains("--memory-gb"), "{error}");
    }
}
