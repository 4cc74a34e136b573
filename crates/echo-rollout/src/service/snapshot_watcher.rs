//! From a signed manifest to installed weights: verify, fetch, hash, swap, and only then say the version.

use std::fmt;
use std::sync::Arc;

use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::{DecodeError, PeerId, PolicyVersion, RunId};

use super::BoxFuture;
use super::payload_source::PayloadSource;
use super::policy_engine::{InstallError, PolicyEngine};
use crate::snapshot::{Payload, PayloadMismatch, SignedSnapshot, SnapshotManifest, Weights};

/// Why a snapshot was not installed. The weights from before stay, under their own version.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Not signed by the trainer, or malformed.
    #[error(transparent)]
    Refused(#[from] DecodeError),
    /// Made for another run or base model.
    #[error("snapshot is for {what} {got}, this worker serves {expected}; start it with the same model")]
    Mismatch {
        /// Run or base model.
        what: &'static str,
        /// The snapshot's.
        got: String,
        /// The worker's.
        expected: String,
    },
    /// An older version than the one installed.
    #[error("snapshot {got} is older than the installed {installed}; versions never go back")]
    Rollback {
        /// The snapshot's version.
        got: PolicyVersion,
        /// The installed one.
        installed: PolicyVersion,
    },
    /// The bytes did not come.
    #[error("payload of {version} did not arrive: {reason}")]
    Fetch {
        /// The version.
        version: PolicyVersion,
        /// Why.
        reason: String,
    },
    /// The bytes are not those that were signed.
    #[error(transparent)]
    Payload(#[from] PayloadMismatch),
    /// The engine does not take it.
    #[error(transparent)]
    Install(#[from] InstallError),
}

/// Keeps an engine at the trainer's newest version.
pub struct SnapshotWatcher {
    trainer: PeerId,
    run: RunId,
    base_model_id: String,
    engine: PolicyEngine,
    source: Arc<dyn PayloadSource>,
    active: Option<(PolicyVersion, Option<[u8; 32]>)>,
}

impl fmt::Debug for SnapshotWatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotWatcher({} at {:?})", self.run, self.active)
    }
}

impl SnapshotWatcher {
    /// Watches `trainer`'s snapshots of `run` for `engine`, which has loaded the base model.
    pub fn new(
        trainer: PeerId,
        run: RunId,
        base_model_id: String,
        engine: PolicyEngine,
        source: Arc<dyn PayloadSource>,
    ) -> Self {
        Self { trainer, run, base_model_id, engine, source, active: None }
    }

    /// The version whose hash was checked and that is installed.
    pub fn active(&self) -> Option<PolicyVersion> {
        self.active.map(|(version, _)| version)
    }

    /// Hash of the installed adapter or weights; `None` for the base model.
    pub fn adapter_hash(&self) -> Option<[u8; 32]> {
        self.active.and_then(|(_, hash)| hash)
    }

    /// The run whose snapshots are watched.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// Checks a snapshot's signature, run, base model and version; `None` when it is the installed one.
    ///
    /// # Errors
    /// When it is not one for this engine.
    pub fn check(&self, signed: Signed) -> Result<Option<SnapshotManifest>, SnapshotError> {
        let snapshot = SignedSnapshot::verify(signed, &self.trainer)?;
        let manifest = snapshot.manifest();
        let version = manifest.version;
        let mismatch = |what, got: String, expected: String| SnapshotError::Mismatch { what, got, expected };
        if manifest.run != self.run {
            return Err(mismatch("run", manifest.run.to_string(), self.run.to_string()));
        }
        if manifest.base_model_id != self.base_model_id {
            return Err(mismatch("base model", manifest.base_model_id.clone(), self.base_model_id.clone()));
        }
        match self.active() {
            Some(active) if active == version => return Ok(None),
            Some(installed) if installed > version => {
                return Err(SnapshotError::Rollback { got: version, installed });
            }
            _ => {}
        }
        if matches!(manifest.payload, Payload::Full(_)) && !self.engine.takes_all_weights() {
            return Err(InstallError::FullWeights { version }.into());
        }
        Ok(Some(manifest.clone()))
    }

    /// Fetches and hashes the payload of a checked snapshot; the engine goes on meanwhile.
    pub fn fetch(&self, manifest: SnapshotManifest) -> BoxFuture<'static, Result<Staged, SnapshotError>> {
        let (source, trainer) = (Arc::clone(&self.source), self.trainer.clone());
        Box::pin(async move {
            let version = manifest.version;
            let Some(hash) = manifest.payload.artefact().map(|a| a.hash) else {
                return Ok(Staged { version, hash: None, weights: Weights::Base });
            };
            let fetched = source.fetch(&manifest, &trainer).await;
            let bytes = fetched.map_err(|reason| SnapshotError::Fetch { version, reason })?;
            manifest.check_payload(&bytes)?;
            Ok(Staged { version, hash: Some(hash), weights: manifest.payload.weights(bytes) })
        })
    }

    /// Swaps a fetched snapshot in. Dropping the future leaves the engine with the old or the new weights; the version
    /// says the old one, so that it is installed again.
    ///
    /// # Errors
    /// When the engine refuses; the old weights stay.
    pub async fn install(&mut self, staged: Staged) -> Result<PolicyVersion, SnapshotError> {
        let Staged { version, hash, weights } = staged;
        self.engine.install(version, weights).await?;
        self.active = Some((version, hash));
        tracing::info!(%version, run = %self.run, "installed policy");
        Ok(version)
    }
}

/// A snapshot that is here and whose hash matched.
#[derive(Debug)]
pub struct Staged {
    version: PolicyVersion,
    hash: Option<[u8; 32]>,
    weights: Weights,
}

impl Staged {
    /// Its version.
    pub fn version(&self) -> PolicyVersion {
        self.version
    }
}
