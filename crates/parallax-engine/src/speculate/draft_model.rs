//! Guessing with a smaller model of the same vocabulary.
//!
//! The draft model keeps its own cache. It chooses with the request's own sampling parameters and random numbers: where
//! both models agree on the likely tokens, they then draw the same one, also at high temperatures.

use std::collections::HashMap;

use swarm_wire::RequestId;

use super::{DraftQuery, Drafter};
use crate::batch::{Batch, BatchSequence, Tensor, Want};
use crate::error::StageError;
use crate::kv_cache::KvCache;
use crate::sampler::{Place, Sampler};
use crate::sampling::SamplingParams;
use crate::stage::StageRunner;

/// Rows of one pass of the draft model.
const STEP_ROWS: usize = 512;

/// A runner that guesses for another.
#[derive(Debug)]
pub struct DraftModel {
    runner: Box<dyn StageRunner>,
    sampler: Sampler,
    cache: KvCache,
    /// The tokens whose keys and values each request has in the cache.
    seen: HashMap<RequestId, Vec<u32>>,
    steps: u64,
    failed: bool,
}

/// One request while its tokens are being guessed.
struct Guessing {
    /// Index of the query.
    query: usize,
    request: RequestId,
    sampling: SamplingParams,
    /// Tokens of the query, and the guesses.
    tokens: Vec<u32>,
    cached: usize,
    /// Length of `tokens` when all guesses are made.
    end: usize,
}

impl DraftModel {
    /// A draft model over a runner that serves nobody else. It must have the vocabulary of the model it guesses for; a
    /// recurrent one cannot take wrong guesses back and is refused.
    pub fn new(runner: Box<dyn StageRunner>) -> Option<Self> {
        let shape = runner.shape();
        let whole = shape.is_first() && shape.is_last() && !shape.recurrent;
        whole.then(|| Self {
            sampler: Sampler::new(runner.log_softmax()),
            cache: KvCache::new(shape.n_pages, shape.page_tokens),
            runner,
            seen: HashMap::new(),
            steps: 0,
            failed: false,
        })
    }
    /// What can be guessed for, with pages for all of it.
    fn prepare(&mut self, queries: &[DraftQuery<'_>]) -> Vec<Guessing> {
        let context = self.runner.shape().context_tokens();
        let mut prepared = Vec::with_capacity(queries.len());
        for (i, query) in queries.iter().enumerate() {
            let end = (query.tokens.len() + query.most).min(context);
            let seen = self.seen.get(&query.request).map_or(&[][..], |seen| seen);
            let common = seen.iter().zip(query.tokens).take_while(|(a, b)| a == b).count();
            // The newest token always runs.
            let cached = common.min(query.tokens.len() - 1);
            if end <= query.tokens.len() || self.cache.reserve(query.request, cached, end).is_err() {
                continue;
            }
            prepared.push(Guessing {
                query: i,
                request: query.request,
                sampling: SamplingParams { top_logprobs: 0, ..query.sampling.clone() },
                tokens: query.tokens.to_vec(),
                cached,
                end,
            });
        }
        prepared
    }

    /// One pass over those that are not at their end. False when there is none.
    fn step(&mut self, guessing: &mut [Guessing]) -> Result<bool, StageError> {
        let position = |n: usize| u32::try_from(n).expect("a context has fewer than 2^32 positions");
        let (mut ids, mut sequences, mut planned) = (Vec::new(), Vec::new(), Vec::new());
        for (i, g) in guessing.iter().enumerate().filter(|(_, g)| g.tokens.len() < g.end) {
            let rows = (g.tokens.len() - g.cached).min(STEP_ROWS - ids.len());
            if rows == 0 {
                break;
            }
            let ends = g.cached + rows == g.tokens.len();
            ids.extend_from_slice(&g.tokens[g.cached..g.cached + rows]);
            sequences.push(BatchSequence {
                request: g.request,
                start: position(g.cached),
                rows: position(rows),
                pages: self.cache.pages(g.request).to_vec(),
                want: if ends { Want::LastLogits } else { Want::Nothing },
                adapter: None,
            });
            planned.push((i, rows, ends));
        }
        if planned.is_empty() {
            return Ok(false);
        }
        self.steps += 1;
        let batch = Batch { step: self.steps, sequences, ..Batch::default() };
        let output = self.runner.forward(&batch, Tensor::from_ids(&ids))?;
        let vocab = self.runner.shape().vocab;
        let logits = match output.logits {
            Some(logits) => logits.to_f32_rows(batch.n_wanted(), vocab)?,
            None => Vec::new(),
        };
        let mut logits = logits.chunks_exact(vocab);
        for (i, rows, ends) in planned {
            let g = &mut guessing[i];
            g.cached += rows;
            if !ends {
                continue;
            }
            // A guess need not follow every rule of the request: a wrong one is dropped later.
            let place = Place { position: g.tokens.len() as u64, generated: usize::MAX, history: None };
            let guess = logits.next().and_then(|row| self.sampler.sample(row, &g.sampling, place, None).ok());
            match guess {
                Some(sampled) => g.tokens.push(sampled.id),
                None => g.end = g.tokens.len(),
            }
        }
        Ok(true)
    }
}

impl Drafter for DraftModel {
    fn propose(&mut self, queries: &[DraftQuery<'_>]) -> Vec<Vec<u32>> {
        let mut guesses = vec![Vec::new(); queries.len()];
        if self.failed {
            return guesses;
        }
        let mut guessing = self.prepare(queries);
        loop {
            match self.step(&mut guessing) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, "the draft model failed, speculation is off from now on");
                    self.failed = true;
                    return guesses;
                }
            }
        }
        for mut g in guessing {
            guesses[g.query] = g.tokens[queries[g.query].tokens.len()..].to_vec();
            g.tokens.truncate(g.cached);
            self.seen.insert(g.request, g.tokens);
        }
        guesses
    }

    fn close(&mut self, request: RequestId) {
        self.cache.release(request);
        self.seen.remove(&request);
        self.runner.close(request);
    }
}
