//! Guessing with a smaller model of the same vocabulary.
//!
//! The draft model keeps its own cache. It chooses with the request's own sampling parameters and random numbers: where
//! both models agree on the likely tokens, they then draw the same one, also at high temperatures.

use std::borrow::Cow;
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
/// Rows that a request may lag behind and still get guesses at once. One that lags more, a long prompt for instance, first
/// catches up, one pass at a time: nobody else's answer waits for it.
const LAG_ROWS: usize = 128;

/// A runner that guesses for another.
#[derive(Debug)]
pub struct DraftModel {
    runner: Box<dyn StageRunner>,
    sampler: Sampler,
    cache: KvCache,
    seen: HashMap<RequestId, Seen>,
    /// How often it was asked.
    rounds: u64,
    steps: u64,
    failed: bool,
}

/// What a request has in the cache.
#[derive(Debug, Default)]
struct Seen {
    /// The tokens that keys and values are of.
    tokens: Vec<u32>,
    /// So many of them were no guesses: a recurrent state cannot go back behind them.
    firm: usize,
    /// The round in which it was asked for last.
    asked: u64,
}

/// One request while its tokens are being guessed.
struct Guessing<'q> {
    /// Index of the query.
    query: usize,
    request: RequestId,
    sampling: Cow<'q, SamplingParams>,
    /// Tokens of the query.
    known: &'q [u32],
    guesses: Vec<u32>,
    cached: usize,
    /// Guesses to make; none when it only catches up.
    wanted: usize,
}

impl Guessing<'_> {
    fn n_tokens(&self) -> usize {
        self.known.len() + self.guesses.len()
    }

    /// Tokens `cached..`, which the draft model has not seen.
    fn due(&self) -> impl Iterator<Item = u32> {
        self.known.iter().chain(&self.guesses).skip(self.cached).copied()
    }
}

impl DraftModel {
    /// A draft model over a runner that serves nobody else. It must have the vocabulary of the model it guesses for.
    ///
    /// # Panics
    /// When the runner does not run a whole model.
    pub fn new(runner: Box<dyn StageRunner>) -> Self {
        let shape = runner.shape();
        assert!(shape.is_first() && shape.is_last(), "whole models guess, got layers {}", shape.layers);
        Self {
            sampler: Sampler::new(runner.log_softmax()),
            cache: KvCache::new(shape.n_pages, shape.page_tokens, shape.state_slots),
            runner,
            seen: HashMap::new(),
            rounds: 0,
            steps: 0,
            failed: false,
        }
    }

    /// Makes positions `written..tokens` of `request` writable. Requests that nobody asks for in this round, because they wait for
    /// pages of the other model, make room where needed: first the one that was asked for longest ago.
    fn reserve(&mut self, request: RequestId, written: usize, tokens: usize) -> bool {
        while self.cache.reserve(request, written, tokens).is_err() {
            let idle = self.seen.iter().filter(|(_, seen)| seen.asked < self.rounds);
            let Some((_, oldest)) = idle.map(|(id, seen)| (seen.asked, id.0)).min() else { return false };
            self.close(RequestId(oldest));
        }
        true
    }

    /// What can be guessed for, with pages for all of it; first those that get guesses.
    fn prepare<'q>(&mut self, queries: &[DraftQuery<'q>]) -> Vec<Guessing<'q>> {
        self.rounds += 1;
        for query in queries {
            self.seen.entry(query.request).or_default().asked = self.rounds;
        }
        let shape = self.runner.shape();
        let context = shape.context_tokens();
        let mut prepared = Vec::with_capacity(queries.len());
        for (i, query) in queries.iter().enumerate() {
            let end = (query.tokens.len() + query.most).min(context);
            let Seen { tokens, firm, .. } = &self.seen[&query.request];
            let common = tokens.iter().zip(query.tokens).take_while(|(a, b)| a == b).count();
            // The newest token always runs.
            let cached = common.min(query.tokens.len() - 1);
            // Where the model that is guessed for lost a step, it asks for the same once more.
            let cached = if shape.state_slots > 0 && cached < *firm { 0 } else { cached };
            if end <= query.tokens.len() || !self.reserve(query.request, cached, end) {
                continue;
            }
            let lags = query.tokens.len() - cached > LAG_ROWS;
            let sampling = if query.sampling.top_logprobs > 0 {
                Cow::Owned(SamplingParams { top_logprobs: 0, ..query.sampling.clone() })
            } else {
                Cow::Borrowed(query.sampling)
            };
            prepared.push(Guessing {
                query: i,
                request: query.request,
                sampling,
                known: query.tokens,
                guesses: Vec::new(),
                cached,
                wanted: if lags { 0 } else { end - query.tokens.len() },
            });
        }
        prepared.sort_by_key(|g| g.wanted == 0);
        prepared
    }

    /// One pass over those that want more guesses, and in the first pass over those that catch up. False when there is
    /// none.
    fn step(&mut self, guessing: &mut [Guessing<'_>], is_first: bool) -> Result<bool, StageError> {
        let position = |n: usize| u32::try_from(n).expect("a context has fewer than 2^32 positions");
        let (mut ids, mut sequences, mut planned) = (Vec::new(), Vec::new(), Vec::new());
        let runs = |g: &Guessing<'_>| g.guesses.len() < g.wanted || (is_first && g.wanted == 0);
        for (i, g) in guessing.iter().enumerate().filter(|(_, g)| runs(g)) {
            let rows = (g.n_tokens() - g.cached).min(STEP_ROWS - ids.len());
            if rows == 0 {
                break;
            }
            let end = g.cached + rows;
            let chooses = g.wanted > 0 && end == g.n_tokens();
            ids.extend(g.due().take(rows));
            sequences.push(BatchSequence {
                request: g.request,
                start: position(g.cached),
                rows: position(rows),
                pages: self.cache.pages(g.request).to_vec(),
                state: self.cache.state(g.request),
                drafted: position(end.saturating_sub(g.known.len())),
                want: if chooses { Want::LastLogits } else { Want::Nothing },
                ..BatchSequence::default()
            });
            planned.push((i, rows, chooses));
        }
        if planned.is_empty() {
            return Ok(false);
        }
        self.steps += 1;
        let batch = Batch { step: self.steps, sequences, ..Batch::default() };
        let output = self.runner.forward(&batch, Tensor::from_ids(&ids))?;
        let vocab = self.runner.shape().vocab;
        let logits = match &output.logits {
            Some(logits) => logits.to_f32_rows(batch.n_wanted(), vocab)?,
            None => Cow::default(),
        };
        let mut logits = logits.chunks_exact(vocab);
        for (i, rows, chooses) in planned {
            let g = &mut guessing[i];
            g.cached += rows;
            if !chooses {
                continue;
            }
            // A guess need not follow every rule of the request: a wrong one is dropped later.
            let place = Place { position: g.n_tokens() as u64, generated: usize::MAX, history: None };
            let guess = logits.next().and_then(|row| self.sampler.sample(row, &g.sampling, place, None).ok());
            match guess {
                Some(sampled) => g.guesses.push(sampled.id),
                None => g.wanted = g.guesses.len(),
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
        let mut is_first = true;
        loop {
            match self.step(&mut guessing, is_first) {
                Ok(true) => is_first = false,
                Ok(false) => break,
                Err(error) => {
                    tracing::warn!(%error, "the draft model failed, speculation is off from now on");
                    self.failed = true;
                    return guesses;
                }
            }
        }
        for g in guessing {
            let Seen { tokens, firm, .. } = self.seen.entry(g.request).or_default();
            let common = tokens.iter().zip(g.known).take_while(|(a, b)| a == b).count();
            tokens.truncate(common);
            tokens.extend(g.known[common..].iter().chain(&g.guesses));
            tokens.truncate(g.cached);
            *firm = g.known.len().min(g.cached);
            guesses[g.query] = g.guesses;
        }
        guesses
    }

    fn close(&mut self, request: RequestId) {
        self.cache.release(request);
        self.seen.remove(&request);
        self.runner.close(request);
    }
}
