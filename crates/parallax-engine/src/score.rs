//! Scoring given tokens with one prefill: no sampling, no cache left behind.

use swarm_wire::RequestId;

use crate::batch::{Batch, BatchSequence, Tensor, Want};
use crate::error::{RequestError, StageError};
use crate::request::{Request, RequestLimits};
use crate::sampler::argmax;
use crate::stage::StageRunner;

/// Rows of one forward pass; bounds the logits in memory.
const CHUNK_ROWS: usize = 128;

/// What a model thinks of a sequence.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scored {
    /// `logprobs[t]` = log p(ids[t+1] | ids[..=t]); one less than there are ids.
    pub logprobs: Vec<f32>,
    /// Likeliest token after each position.
    pub argmax: Vec<u32>,
}

/// A sequence that cannot be scored.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ScoreError {
    /// It is longer than the context.
    #[error("the sequence has {tokens} tokens, the context holds {context_tokens}; shorten it")]
    TooLong {
        /// Its length.
        tokens: usize,
        /// The context.
        context_tokens: usize,
    },
    /// It does not fit the model.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The forward pass failed.
    #[error(transparent)]
    Stage(#[from] StageError),
}

/// Scores `ids` with a runner of a whole model that serves nobody else meanwhile: pages from 0 on are overwritten.
///
/// # Errors
/// Empty or overlong sequences, unknown tokens, a failed forward pass.
pub fn score(runner: &mut dyn StageRunner, ids: &[u32]) -> Result<Scored, ScoreError> {
    let shape = runner.shape();
    let (tokens, context_tokens) = (ids.len(), shape.context_tokens());
    if tokens > context_tokens {
        return Err(ScoreError::TooLong { tokens, context_tokens });
    }
    // One more than the context: scoring asks for no new token.
    let limits = RequestLimits { vocab: shape.vocab, context_tokens: context_tokens + 1 };
    Request::greedy(ids.to_vec(), 1).validate(&limits)?;
    let request = RequestId(0);
    let scored = run(runner, request, ids);
    // Also after a failure: a runner may keep state under the id.
    runner.close(request);
    scored
}

fn run(runner: &mut dyn StageRunner, request: RequestId, ids: &[u32]) -> Result<Scored, ScoreError> {
    let (shape, log_softmax) = (runner.shape(), runner.log_softmax());
    let mut scored = Scored::default();
    for (chunk_index, chunk) in ids.chunks(CHUNK_ROWS).enumerate() {
        let start = chunk_index * CHUNK_ROWS;
        let position = |n: usize| u32::try_from(n).expect("a context has fewer than 2^32 positions");
        let n_pages = (start + chunk.len()).div_ceil(shape.page_tokens);
        let rows = BatchSequence {
            request,
            start: position(start),
            rows: position(chunk.len()),
            pages: (0..position(n_pages)).collect(),
            want: Want::AllLogits,
            ..BatchSequence::default()
        };
        let batch = Batch { step: chunk_index as u64 + 1, sequences: vec![rows], ..Batch::default() };
        let output = runner.forward(&batch, Tensor::from_ids(chunk))?;
        let logits = output.logits.ok_or_else(|| StageError::Tensor {
            expected: format!("logits of {} rows", chunk.len()),
            got: "none".into(),
        })?;
        let logits = logits.to_f32_rows(chunk.len(), shape.vocab)?;
        for (row, logits) in logits.chunks_exact(shape.vocab).enumerate() {
            scored.argmax.push(position(argmax(logits)));
            if let Some(next) = ids.get(start + row + 1) {
                scored.logprobs.push(log_softmax(logits)[*next as usize]);
            }
        }
    }
    Ok(scored)
}
