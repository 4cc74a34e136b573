//! Policy versions on their way out: bytes become blocks, and a manifest that names them is signed.

use bytes::Bytes;
use echo_rollout::snapshot::{Artefact, Payload, SignedSnapshot, SnapshotManifest};
use lattica_bitswap::{Blocks, PublishError};
use lattica_net::{Identity, Node};
use parallax_model::train::TrainModel;
use swarm_wire::{PeerId, PolicyVersion, RunId};

use crate::error::StepError;
use crate::policy::Policy;

/// A policy whose update is small enough to be sent after every step.
pub trait Update: Policy {
    /// The update over the base checkpoint, as workers install it: PEFT safetensors.
    ///
    /// # Errors
    /// When the policy trains all weights, or cannot be encoded.
    fn update_bytes(&self) -> Result<Vec<u8>, StepError>;
}

impl Update for TrainModel {
    fn update_bytes(&self) -> Result<Vec<u8>, StepError> {
        let adapter =
            self.adapter().ok_or_else(|| StepError::model("it trains all weights, not an adapter"))?;
        adapter.to_bytes().map_err(StepError::model)
    }
}

/// Publishes and signs the versions of one run.
#[derive(Debug)]
pub struct Publisher {
    run: RunId,
    base_model_id: String,
    trainer: PeerId,
    identity: Identity,
    blocks: Blocks,
}

impl Publisher {
    /// Signs with the node's key; the blocks are served by `blocks`.
    pub fn new(run: RunId, base_model_id: impl Into<String>, node: &Node, blocks: Blocks) -> Self {
        Self {
            run,
            base_model_id: base_model_id.into(),
            trainer: node.peer_id(),
            identity: node.identity().clone(),
            blocks,
        }
    }

    /// Version 0: the base checkpoint as it is.
    pub fn base(&self) -> SignedSnapshot {
        self.sign(PolicyVersion(0), Payload::Base)
    }

    /// Publishes an adapter as `version`.
    ///
    /// # Errors
    /// When the blocks cannot be stored.
    pub async fn adapter(
        &self,
        version: PolicyVersion,
        bytes: Bytes,
    ) -> Result<SignedSnapshot, PublishError> {
        let hash = *blake3::hash(&bytes).as_bytes();
        let length = bytes.len() as u64;
        let name = format!("adapter-{version}.safetensors");
        let root = self.blocks.publish_bytes(&name, "adapter", bytes).await?;
        Ok(self.sign(version, Payload::Lora(Artefact { root, hash, bytes: length })))
    }

    fn sign(&self, version: PolicyVersion, payload: Payload) -> SignedSnapshot {
        let manifest = SnapshotManifest {
            run: self.run,
            version,
            parent: version.0.checked_sub(1).map(PolicyVersion),
            payload,
            base_model_id: self.base_model_id.clone(),
            created_by: self.trainer.clone(),
        };
        manifest.sign(&self.identity)
    }
}
