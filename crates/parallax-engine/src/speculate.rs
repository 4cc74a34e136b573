//! Speculation: somebody guesses the next tokens, and one pass of the model checks all of them.
//!
//! A guess is only ever compared with what the sampler chooses from the model's own logits at that position, so that
//! tokens, log-probabilities and endings are those of plain decoding, bit for bit, at any temperature. A wrong guess
//! costs rows, nothing else.

mod draft_model;
mod lookup;

use std::fmt::Debug;

use swarm_wire::RequestId;

use crate::sampling::SamplingParams;
pub use draft_model::DraftModel;
pub use lookup::PromptLookup;

/// One sequence whose next tokens are to be guessed.
#[derive(Debug, Clone, Copy)]
pub struct DraftQuery<'a> {
    /// Whose; stable over the life of a request.
    pub request: RequestId,
    /// Prompt and answer so far.
    pub tokens: &'a [u32],
    /// How its tokens are chosen.
    pub sampling: &'a SamplingParams,
    /// Guesses that can be used, at least one.
    pub most: usize,
}

/// Guesses tokens.
pub trait Drafter: Send + Debug {
    /// Guesses for each query, in order; fewer than wanted or none where nothing comes to mind. Wrong guesses and ids
    /// outside the vocabulary do no harm, the engine drops the latter.
    fn propose(&mut self, queries: &[DraftQuery<'_>]) -> Vec<Vec<u32>>;

    /// A request is over.
    fn close(&mut self, _request: RequestId) {}
}
