//! An engine that policy versions are installed in: the base checkpoint, an adapter over it, or other weights altogether.
//!
//! The surprise: an engine whose weights were replaced has no base checkpoint to put an adapter on any more. It is read again
//! then, so whoever is to take all weights brings a way to read them.

use std::fmt;
use std::sync::Arc;

use parallax_engine::{EngineHandle, StageError, StageRunner};
use swarm_wire::PolicyVersion;
use tokio::sync::Mutex;

use crate::snapshot::Weights;

/// Reads all weights from a safetensors file in memory, or those of the base checkpoint.
pub type ReadWeights = dyn Fn(Option<&[u8]>) -> Result<Box<dyn StageRunner>, String> + Send + Sync;

/// Why a version was not installed. The weights from before stay.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    /// The engine takes adapters only.
    #[error("version {version} replaces all weights, and this engine takes adapters only")]
    FullWeights {
        /// The version.
        version: PolicyVersion,
    },
    /// Weights that cannot be read.
    #[error("weights of version {version}: {reason}")]
    Read {
        /// The version.
        version: PolicyVersion,
        /// Why not.
        reason: String,
    },
    /// The engine refused them.
    #[error(transparent)]
    Engine(#[from] StageError),
}

/// An engine and the weights that it runs. A cheap handle.
#[derive(Clone)]
pub struct PolicyEngine {
    engine: EngineHandle,
    read: Option<Arc<ReadWeights>>,
    /// Whether other weights than the base checkpoint's are in it. Locked while something is installed.
    replaced: Arc<Mutex<bool>>,
}

impl fmt::Debug for PolicyEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyEngine({})", if self.read.is_some() { "any weights" } else { "adapters" })
    }
}

impl From<EngineHandle> for PolicyEngine {
    /// Takes adapters only; the engine has loaded the base checkpoint.
    fn from(engine: EngineHandle) -> Self {
        Self { engine, read: None, replaced: Arc::default() }
    }
}

impl PolicyEngine {
    /// Takes all weights, too, as `read` reads them.
    #[must_use]
    pub fn reading(self, read: Arc<ReadWeights>) -> Self {
        Self { read: Some(read), ..self }
    }

    /// The engine.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Whether it takes all weights.
    pub fn takes_all_weights(&self) -> bool {
        self.read.is_some()
    }

    /// Samples with `version` from now on. Weights are read beside the present ones, which go on meanwhile. Dropping the future
    /// leaves the old or the new ones.
    ///
    /// # Errors
    /// Weights that cannot be read or do not fit; the old ones stay.
    pub async fn install(&self, version: PolicyVersion, weights: Weights) -> Result<(), InstallError> {
        let mut replaced = self.replaced.lock().await;
        let adapter = match weights {
            Weights::Full(bytes) => {
                let runner = self.runner(version, Some(bytes)).await?;
                // Set before, so that a dropped future does not leave them taken for the base checkpoint's.
                *replaced = true;
                return Ok(self.engine.swap_weights(version, runner).await?);
            }
            Weights::Base => None,
            Weights::Lora(bytes) => Some(bytes.to_vec()),
        };
        if *replaced {
            let runner = self.runner(version, None).await?;
            self.engine.swap_weights(version, runner).await?;
            *replaced = false;
        }
        Ok(self.engine.swap_adapter(version, adapter).await?)
    }

    async fn runner(
        &self,
        version: PolicyVersion,
        bytes: Option<bytes::Bytes>,
    ) -> Result<Box<dyn StageRunner>, InstallError> {
        let Some(read) = self.read.clone() else { return Err(InstallError::FullWeights { version }) };
        let read = tokio::task::spawn_blocking(move || read(bytes.as_deref()));
        let read = read.await.unwrap_or_else(|_| Err("reading them crashed".to_owned()));
        read.map_err(|reason| InstallError::Read { version, reason })
    }
}
