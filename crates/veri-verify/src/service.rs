//! An auditor on this machine: recomputes a claimed answer with one causal prefill of prompt and output.

use parallax_model::{
    Adapter, AdapterError, ForwardBatch, ForwardError, SequenceRows, Stage, StageInput, Want, logprob,
};

use crate::job::{Answer, Job};
use crate::verifier::Replay;

/// Rows of one forward pass. Bounds the memory for logits to this many times the vocabulary; the rows' values do not
/// depend on it (docs/NUMERICS.md).
const CHUNK_ROWS: usize = 64;

/// Draws output token i again from its logits `[V]`: the claimed one, where rounding can explain it.
pub type Draw<'a> = &'a mut dyn FnMut(usize, &[f32]) -> u32;

/// Why an answer could not be recomputed. Not the worker's fault, so never a verdict.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// An audit needs the whole model.
    #[error("an auditor needs all {n_layers} layers, this stage holds layers {start}..{end}")]
    PartialModel {
        /// First layer of the stage.
        start: usize,
        /// One past its last layer.
        end: usize,
        /// Layers of the model.
        n_layers: usize,
    },
    /// Nothing to recompute.
    #[error("a job needs a prompt and an answer: {n_prompt} prompt tokens and {n_output} output tokens")]
    Empty {
        /// Prompt tokens.
        n_prompt: usize,
        /// Output tokens.
        n_output: usize,
    },
    /// The answer does not fit the auditor's key-value store.
    #[error("{n_tokens} tokens do not fit the auditor's {capacity_tokens}: give it more key-value pages")]
    TooLong {
        /// Tokens of prompt and output.
        n_tokens: usize,
        /// Tokens that fit.
        capacity_tokens: usize,
    },
    /// The forward pass failed.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The adapter does not fit the model.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
}

/// Recomputes answers with a model of its own.
#[derive(Debug)]
pub struct Auditor {
    stage: Stage,
}

impl Auditor {
    /// An auditor that recomputes with `stage`, which must hold the whole model in the precision that workers claim.
    ///
    /// # Errors
    /// When the stage lacks layers.
    pub fn new(stage: Stage, n_layers: usize) -> Result<Self, ReplayError> {
        let layers = &stage.options().layers;
        if *layers != (0..n_layers) {
            return Err(ReplayError::PartialModel { start: layers.start, end: layers.end, n_layers });
        }
        Ok(Self { stage })
    }

    /// Applies the adapter of the policy version that is audited next.
    ///
    /// # Errors
    /// When it does not fit the model.
    pub fn set_adapter(&mut self, adapter: Option<&Adapter>) -> Result<(), ReplayError> {
        Ok(self.stage.set_adapter(adapter)?)
    }

    /// Recomputes the rows and log-probabilities behind every sampled token. `draw(i, logits)` replays the sampler for
    /// output token i from its logits `[V]`; `None` when the sampler cannot be replayed.
    ///
    /// # Errors
    /// When job or answer are empty, too long, or the forward pass fails.
    pub fn replay(
        &mut self,
        job: &Job,
        answer: &Answer,
        mut draw: Option<Draw<'_>>,
    ) -> Result<Replay, ReplayError> {
        let (n_prompt, n_output) = (job.prompt.len(), answer.tokens.len());
        if n_prompt == 0 || n_output == 0 {
            return Err(ReplayError::Empty { n_prompt, n_output });
        }
        let tokens: Vec<u32> = job.prompt.iter().chain(&answer.tokens[..n_output - 1]).copied().collect();
        let options = self.stage.options();
        let page_tokens = options.kv_page_tokens;
        let capacity_tokens = page_tokens * options.kv_pages;
        if tokens.len() > capacity_tokens {
            return Err(ReplayError::TooLong { n_tokens: tokens.len(), capacity_tokens });
        }
        let index = |i: usize| u32::try_from(i).expect("the key-value store is far below 2^32 tokens");
        let pages: Vec<u32> = (0..index(tokens.len().div_ceil(page_tokens))).collect();
        let mut replay = Replay { tokens: draw.is_some().then(Vec::new), ..Replay::default() };
        let sampled = answer.sampled();
        // The prompt's last row is behind the first output token; nothing is wanted of those before it.
        let (before, rest) = tokens.split_at(n_prompt - 1);
        let chunks = before.chunks(CHUNK_ROWS).map(|chunk| (chunk, Want::Nothing));
        let mut start = 0;
        for (chunk, want) in chunks.chain(rest.chunks(CHUNK_ROWS).map(|chunk| (chunk, Want::AllLogits))) {
            let silent = matches!(want, Want::Nothing);
            let rows = SequenceRows {
                start: index(start),
                rows: index(chunk.len()),
                pages: pages.clone(),
                want,
                ..SequenceRows::default()
            };
            let output =
                self.stage.forward(&ForwardBatch { sequences: vec![rows] }, StageInput::Tokens(chunk))?;
            let first = start;
            start += chunk.len();
            if silent {
                continue;
            }
            let (width, vocab) = (output.hidden.len() / chunk.len(), output.logits.len() / chunk.len());
            for row in 0..chunk.len() {
                let output_index = first + row + 1 - n_prompt;
                if sampled.binary_search(&output_index).is_err() {
                    continue;
                }
                let logits = &output.logits[row * vocab..(row + 1) * vocab];
                replay.rows.push(output.hidden[row * width..(row + 1) * width].to_vec());
                let token = answer.tokens[output_index] as usize;
                let logprob = logprob::log_softmax(logits).get(token).copied();
                replay.logprobs.push(logprob.unwrap_or(f32::NEG_INFINITY));
                if let (Some(draw), Some(drawn)) = (draw.as_mut(), replay.tokens.as_mut()) {
                    drawn.push(draw(output_index, logits));
                }
            }
        }
        Ok(replay)
    }
}
