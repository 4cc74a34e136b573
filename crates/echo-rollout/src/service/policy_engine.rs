//! An engine that policy versions are installed in: the base checkpoint, an adapter over it, or other weights altogether.
//!
//! The surprise: an engine whose weights were replaced has no base checkpoint to put an adapter on any more. It is read again
//! then, so whoever is to take all weights brings a way to read them; the adapter is put on it before it takes its place, so that
//! the base checkpoint alone is never sampled with under the adapter's version.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use parallax_engine::{AdapterFile, EngineHandle, StageError, StageRunner};
use swarm_wire::PolicyVersion;
use tokio::sync::Mutex;

use crate::snapshot::Weights;

/// Reads all weights from a safetensors file in memory, or those of the base checkpoint.
pub type ReadWeights = dyn Fn(Option<Bytes>) -> Result<Box<dyn StageRunner>, String> + Send + Sync;

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
        let (full, adapter) = match weights {
            Weights::Full(bytes) => (Some(bytes), None),
            Weights::Base => (None, None),
            Weights::Lora(bytes) => (None, Some(Vec::from(bytes))),
        };
        let is_full = full.is_some();
        if !is_full && !*replaced {
            return Ok(self.engine.swap_adapter(version, adapter).await?);
        }
        let runner = self.runner(version, full, adapter).await?;
        // Set before, so that a dropped future does not leave other weights taken for the base checkpoint's; the other mistake
        // only costs reading it again.
        *replaced = true;
        self.engine.swap_weights(version, runner).await?;
        *replaced = is_full;
        Ok(())
    }

    /// All weights or the base checkpoint's, with this adapter on them.
    async fn runner(
        &self,
        version: PolicyVersion,
        full: Option<Bytes>,
        adapter: Option<Vec<u8>>,
    ) -> Result<Box<dyn StageRunner>, InstallError> {
        let Some(read) = self.read.clone() else { return Err(InstallError::FullWeights { version }) };
        let read = tokio::task::spawn_blocking(move || {
            let mut runner = read(full).map_err(|reason| InstallError::Read { version, reason })?;
            if let Some(adapter) = adapter {
                runner.set_adapter(version, Some(&AdapterFile::new(adapter)))?;
            }
            Ok(runner)
        });
        let crashed = |_| Err(InstallError::Read { version, reason: "reading them crashed".to_owned() });
        read.await.unwrap_or_else(crashed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use parallax_engine::{
        Batch, Completion, EngineConfig, Event, LogSoftmax, Request, StageOutput, StageShape, Tensor,
    };
    use swarm_wire::LayerRange;

    use super::*;

    const VOCABULARY: usize = 32;

    /// Says the last token plus its weights, again and again: those of a file (one byte), or the base checkpoint's, which are 1,
    /// and an adapter's (one byte) on top.
    struct Counter {
        weights: u32,
        adapter: u32,
        /// How often adapters were set or taken off.
        set: Arc<AtomicUsize>,
    }

    impl Counter {
        fn new(weights: u32, set: &Arc<AtomicUsize>) -> Self {
            Self { weights, adapter: 0, set: Arc::clone(set) }
        }
    }

    impl StageRunner for Counter {
        fn shape(&self) -> StageShape {
            StageShape {
                layers: LayerRange::new(0, 1).unwrap(),
                n_layers: 1,
                hidden: 1,
                vocab: VOCABULARY,
                max_context: 1024,
                page_tokens: 16,
                n_pages: 64,
                state_slots: 0,
            }
        }

        fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
            let ids = input.to_ids(batch.n_rows())?;
            let wanted = batch.wanted_rows();
            let next = |row: &usize| (ids[*row] + self.weights + self.adapter) as usize % VOCABULARY;
            let one_hot = |next| (0..VOCABULARY).map(move |token| f32::from(u8::from(token == next)));
            let logits: Vec<f32> = wanted.iter().map(next).flat_map(one_hot).collect();
            let hidden =
                batch.want_hidden.then(|| Tensor::from_f32(&[wanted.len(), 1], vec![0.0; wanted.len()]));
            let logits = Some(Tensor::from_f32(&[wanted.len(), VOCABULARY], logits));
            Ok(StageOutput { hidden, logits })
        }

        fn set_adapter(
            &mut self,
            version: PolicyVersion,
            adapter: Option<&AdapterFile>,
        ) -> Result<(), StageError> {
            let byte = adapter.map_or(Some(0), |bytes| bytes.first().copied().filter(|byte| *byte < 8));
            let byte = byte.ok_or_else(|| StageError::Adapter { version, reason: "too large".to_owned() })?;
            self.adapter = u32::from(byte);
            self.set.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }

        fn log_softmax(&self) -> LogSoftmax {
            |logits| logits.iter().map(|l| l - 1.0).collect()
        }
    }

    /// An engine that reads weights of one byte, and how often its runners' adapters were set.
    fn engine() -> (PolicyEngine, Arc<AtomicUsize>) {
        let set = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&set);
        let read = move |bytes: Option<Bytes>| -> Result<Box<dyn StageRunner>, String> {
            let weights = bytes.map_or(Some(1), |bytes| bytes.first().copied().map(u32::from));
            Ok(Box::new(Counter::new(weights.ok_or("no bytes")?, &counted)))
        };
        let handle = EngineHandle::start(Box::new(Counter::new(1, &set)), EngineConfig::default()).unwrap();
        (PolicyEngine::from(handle).reading(Arc::new(read)), set)
    }

    fn full(byte: u8) -> Weights {
        Weights::Full(Bytes::from(vec![byte]))
    }

    fn lora(byte: u8) -> Weights {
        Weights::Lora(Bytes::from(vec![byte]))
    }

    /// The engine's version, and by how much it counts.
    async fn sampled(engine: &PolicyEngine) -> (u64, u32) {
        let completion = engine.engine().generate(Request::greedy(vec![3], 1)).await.unwrap();
        let token = &completion.tokens[0];
        assert_eq!(token.version, engine.engine().version());
        (token.version.0, token.id - 3)
    }

    #[tokio::test]
    async fn adapters_and_whole_models_follow_each_other() {
        let (engine, _) = engine();
        let mut version = 0;
        for (weights, counts_by) in [
            (lora(4), 5),
            (full(9), 9),
            (full(7), 7),
            (lora(2), 3),
            (lora(3), 4),
            (full(6), 6),
            (Weights::Base, 1),
            (lora(5), 6),
            (Weights::Base, 1),
        ] {
            version += 1;
            engine.install(PolicyVersion(version), weights).await.unwrap();
            assert_eq!(sampled(&engine).await, (version, counts_by));
        }
    }

    #[tokio::test]
    async fn what_cannot_be_installed_leaves_what_was() {
        let (engine, _) = engine();
        engine.install(PolicyVersion(1), full(9)).await.unwrap();
        // The base checkpoint can be read again; the adapter does not fit on it.
        let refused = engine.install(PolicyVersion(2), lora(200)).await.unwrap_err();
        assert!(matches!(refused, InstallError::Engine(StageError::Adapter { .. })), "{refused}");
        assert_eq!(sampled(&engine).await, (1, 9));
        let unread = engine.install(PolicyVersion(2), Weights::Full(Bytes::new())).await.unwrap_err();
        assert!(matches!(unread, InstallError::Read { .. }), "{unread}");
        assert_eq!(sampled(&engine).await, (1, 9));
        engine.install(PolicyVersion(3), lora(2)).await.unwrap();
        assert_eq!(sampled(&engine).await, (3, 3));
    }

    #[tokio::test]
    async fn samples_in_the_making_go_over_to_a_new_policy_in_one_step() {
        let (engine, set) = engine();
        engine.install(PolicyVersion(1), full(9)).await.unwrap();
        let mut stream = engine.engine().submit(Request::greedy(vec![3], 900)).unwrap();
        while !matches!(stream.next().await, Some(Event::Token(_))) {}
        engine.install(PolicyVersion(2), Weights::Base).await.unwrap();
        assert_eq!(set.load(Ordering::Relaxed), 0, "the base checkpoint is read without an adapter");
        engine.install(PolicyVersion(3), full(9)).await.unwrap();
        engine.install(PolicyVersion(4), lora(2)).await.unwrap();
        assert_eq!(set.load(Ordering::Relaxed), 1);
        let mut rest = Completion::default();
        while let Some(event) = stream.next().await {
            rest.take(event);
        }
        for pair in rest.tokens.windows(2) {
            let by = [9, 1, 9, 3][pair[1].version.0 as usize - 1];
            assert_eq!(pair[1].id, (pair[0].id + by) % VOCABULARY as u32, "as its version says");
        }
    }
}
