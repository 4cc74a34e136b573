//! The seam between the engine and whatever computes: a stage here, a chain of stages, or a pipeline of peers.

use std::fmt;

use swarm_wire::{LayerRange, PolicyVersion, RequestId};

use crate::adapter_file::{AdapterFile, AdapterParser};
use crate::batch::{Batch, StageOutput, Tensor};
use crate::error::StageError;

/// What the engine has to know about a runner before it can plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageShape {
    /// The layers it runs.
    pub layers: LayerRange,
    /// Layers of the whole model.
    pub n_layers: u32,
    /// Width of a hidden row (H).
    pub hidden: usize,
    /// Size of the vocabulary (V).
    pub vocab: usize,
    /// Positions the model was made for.
    pub max_context: usize,
    /// Cache positions per page.
    pub page_tokens: usize,
    /// Cache pages, shared by all sequences.
    pub n_pages: usize,
    /// Recurrent states that can be kept, for sequences and for copies that later ones begin with: at least 2, or 0 where no layer
    /// keeps a state that is not in the pages.
    pub state_slots: usize,
}

impl StageShape {
    /// Takes token ids rather than hidden rows.
    pub fn is_first(&self) -> bool {
        self.layers.start() == 0
    }

    /// Returns logits rather than hidden rows.
    pub fn is_last(&self) -> bool {
        self.layers.end() == self.n_layers
    }

    /// Tokens of prompt and answer that one request can have: the model's context or the whole cache.
    pub fn context_tokens(&self) -> usize {
        self.max_context.min(self.page_tokens * self.n_pages)
    }
}

/// Whether others take the place of a lost stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recovery {
    /// Nobody does.
    #[default]
    None,
    /// They are about to.
    Pending,
    /// They have, or nothing is lost.
    Done,
}

/// The log-softmax `[V]` of logits `[V]`.
///
/// There is one log-probability in this workspace, `parallax_model::logprob`; runners pass it on, so that sampler,
/// trainer and verifier agree in every bit without this core importing a tensor library.
pub type LogSoftmax = fn(logits: &[f32]) -> Vec<f32>;

/// Runs batches through layers. The numbers of pages and state slots in a batch are the engine's to hand out; the runner
/// owns the memory behind them.
///
/// The result of a row must not depend on its neighbours in the batch: continuous batching, preemption and recovery
/// rely on it.
pub trait StageRunner: Send {
    /// What is being run. Constant over the life of the runner.
    fn shape(&self) -> StageShape;

    /// One forward pass. `input` is ids `[T]` for the first stage, hidden rows [T, H] otherwise.
    ///
    /// # Errors
    /// A failure after which none of the batch's sequences can be continued; the engine ends them with its text and
    /// may call again with new ones.
    fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError>;

    /// Replaces the adapter from the next forward pass on; `None` is the base model.
    ///
    /// # Errors
    /// An adapter that does not fit; the old one stays.
    fn set_adapter(
        &mut self,
        version: PolicyVersion,
        adapter: Option<&AdapterFile>,
    ) -> Result<(), StageError>;

    /// What reads adapters for this runner before it takes them up; without one it reads them then.
    fn adapter_parser(&self) -> Option<AdapterParser> {
        None
    }

    /// Makes an adapter resident under `id`, beside what [`Self::set_adapter`] installed; rows name it with
    /// [`crate::BatchSequence::adapter`]. Numbers begin at 1.
    ///
    /// # Errors
    /// An adapter that does not fit, or a runner that holds one adapter at a time.
    fn add_adapter(&mut self, _id: u32, _adapter: &AdapterFile) -> Result<(), StageError> {
        Err(StageError::Unfit { reason: "this runner holds one adapter at a time; swap it instead".into() })
    }

    /// A resident adapter is no longer used.
    fn remove_adapter(&mut self, _id: u32) {}

    /// No resident adapter is used any more: somebody else takes the runner over.
    fn remove_adapters(&mut self) {}

    /// It takes the place of another runner now, between two steps.
    fn take_over(&mut self) {}

    /// Counts how often the pages were lost without the engine's doing (another machine took the layers over). When it
    /// changes, nothing that was cached before is used again.
    fn generation(&self) -> u64 {
        0
    }

    /// What becomes of a lost stage.
    fn recovery(&self) -> Recovery {
        Recovery::None
    }

    /// The log-softmax that belongs to the model being run.
    fn log_softmax(&self) -> LogSoftmax;

    /// A request of the engine that drives this runner is over: what is remembered under its id, such as handles of page tables, may
    /// go. Its pages may already appear under other requests.
    fn close(&mut self, _request: RequestId) {}
}

impl fmt::Debug for dyn StageRunner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StageRunner").field("shape", &self.shape()).finish()
    }
}
