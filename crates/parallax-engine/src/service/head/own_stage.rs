//! The head's own layers: loaded once, kept over epochs while they stay the same, one load at a time.

use std::sync::{Arc, Mutex, MutexGuard};

use swarm_wire::LayerRange;

use super::{StageLoader, lock};
use crate::stage::StageRunner;

/// The stage that the head runs itself, if any.
pub(super) struct OwnStage {
    /// What reads the weights, and the number of those weights.
    source: Mutex<(u64, Option<StageLoader>)>,
    /// Locked for whole forward passes.
    runner: Mutex<Option<Box<dyn StageRunner>>>,
    /// The layers of `runner` and the number of its weights, for those who must not wait for a pass.
    held: Mutex<Option<(LayerRange, u64)>>,
    /// A load cannot be stopped: the one of a plan that is over ends before the next begins.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl OwnStage {
    pub(super) fn new(loader: Option<StageLoader>) -> Self {
        Self {
            source: Mutex::new((0, loader)),
            runner: Mutex::new(None),
            held: Mutex::new(None),
            turn: Arc::default(),
        }
    }

    /// The runner; waits for a pass that goes on.
    pub(super) fn runner(&self) -> MutexGuard<'_, Option<Box<dyn StageRunner>>> {
        lock(&self.runner)
    }

    /// The layers that are held.
    pub(super) fn layers(&self) -> Option<LayerRange> {
        lock(&self.held).map(|(layers, _)| layers)
    }

    /// Has these layers of today's weights; calls `loading` if they must be read.
    pub(super) async fn bring(
        self: &Arc<Self>,
        layers: LayerRange,
        loading: impl FnOnce(),
    ) -> Result<(), String> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let (weights, loader) = lock(&self.source).clone();
        if *lock(&self.held) == Some((layers, weights)) {
            return Ok(());
        }
        loading();
        let loader = loader.ok_or("the head has no layers to give")?;
        let own = Arc::clone(self);
        let load = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            // The old layers go first, so that there is room; a pass that still runs on them is waited for here.
            own.put(None);
            own.put(Some((layers, weights, loader(layers)?)));
            Ok(())
        });
        load.await.map_err(|e| e.to_string())?
    }

    /// Other weights, and perhaps a stage of them.
    pub(super) fn change(
        &self,
        loader: Option<StageLoader>,
        stage: Option<(LayerRange, Box<dyn StageRunner>)>,
    ) {
        let mut source = lock(&self.source);
        *source = (source.0 + 1, loader);
        self.put(stage.map(|(layers, runner)| (layers, source.0, runner)));
    }

    fn put(&self, stage: Option<(LayerRange, u64, Box<dyn StageRunner>)>) {
        let mut runner = self.runner();
        *lock(&self.held) = stage.as_ref().map(|(layers, weights, _)| (*layers, *weights));
        *runner = stage.map(|(.., runner)| runner);
    }
}
