//! Continuous batching: which rows run in the next step.
//!
//! A step has a budget of rows. Every decoding sequence gets its one row first, so that a long prompt never stops the
//! answers that are being written; what is left goes to prompts, in chunks, oldest first. Sequences are admitted
//! strictly in the order of arrival, and only with room for all the tokens they have. When pages run out, the youngest
//! running sequence gives its pages up and goes back to the head of the queue; it is prefilled again later (with
//! batch-invariant kernels, to the same bits).
//!
//! Progress: the oldest sequence is never preempted and always fits into the cache alone, so every step has rows.

use std::collections::VecDeque;

use swarm_wire::RequestId;

use crate::batch::{Batch, BatchSequence, Want};
use crate::config::EngineConfig;
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;

/// Running and waiting sequences, oldest first in each. Invariant: every running sequence is older than every waiting
/// one.
#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    preemptions: u64,
    steps: u64,
}

impl Scheduler {
    /// No sequences.
    pub fn new(config: EngineConfig) -> Self {
        Self { config, running: Vec::new(), waiting: VecDeque::new(), preemptions: 0, steps: 0 }
    }

    /// Sequences that hold pages, oldest first.
    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// Sequences that hold none, in the order in which they will be admitted.
    pub fn waiting(&self) -> impl Iterator<Item = &Sequence> {
        self.waiting.iter()
    }

    /// Sequences in all.
    pub fn len(&self) -> usize {
        self.running.len() + self.waiting.len()
    }

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How often a sequence lost its pages to an older one.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Puts a sequence at the end of the queue.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Takes a sequence out. Its pages stay the caller's business.
    pub fn remove(&mut self, id: RequestId) -> Option<Sequence> {
        if let Some(i) = self.running.iter().position(|s| s.id() == id) {
            return Some(self.running.remove(i));
        }
        let i = self.waiting.iter().position(|s| s.id() == id)?;
        self.waiting.remove(i)
    }

    /// The running sequence `id`, to record what became of its rows.
    pub fn running_mut(&mut self, id: RequestId) -> Option<&mut Sequence> {
        self.running.iter_mut().find(|s| s.id() == id)
    }

    /// Takes all sequences out, oldest first.
    pub fn drain(&mut self) -> Vec<Sequence> {
        self.running.drain(..).chain(self.waiting.drain(..)).collect()
    }

    /// Sends every running sequence back to the queue without its pages, in order.
    pub fn requeue_all(&mut self, cache: &mut KvCache) {
        while let Some(mut sequence) = self.running.pop() {
            cache.release(sequence.id());
            sequence.forget_cache();
            self.waiting.push_front(sequence);
        }
    }

    /// The rows of the next step, with pages reserved, or `None` when there is no sequence.
    pub fn plan(&mut self, cache: &mut KvCache) -> Option<Batch> {
        let mut rows = vec![0usize; self.running.len()];
        let mut budget = self.config.step_tokens;
        for decoding in [true, false] {
            let mut i = 0;
            while i < self.running.len() {
                let sequence = &self.running[i];
                if sequence.is_decoding() == decoding && budget > 0 {
                    let chunk = sequence.due().min(budget);
                    if self.reserve(i, chunk, &mut rows, &mut budget, cache) {
                        rows[i] = chunk;
                        budget -= chunk;
                    }
                }
                i += 1;
            }
        }
        self.admit(&mut rows, &mut budget, cache);
        let scheduled = self.running.iter().zip(&rows).filter(|(_, rows)| **rows > 0);
        let sequences: Vec<BatchSequence> =
            scheduled.map(|(s, &rows)| batch_sequence(s, rows, cache)).collect();
        if sequences.is_empty() {
            assert!(self.is_empty(), "the oldest sequence can always run");
            return None;
        }
        self.steps += 1;
        let want_hidden = sequences.iter().any(|b| {
            b.want != Want::Nothing && self.running.iter().any(|s| s.id() == b.request && s.capture_hidden())
        });
        Some(Batch { step: self.steps, want_hidden, sequences })
    }

    /// Reserves pages for `chunk` more rows of running sequence `i`, at the cost of younger ones. False when `i` itself
    /// was the youngest and had to go.
    fn reserve(
        &mut self,
        i: usize,
        chunk: usize,
        rows: &mut Vec<usize>,
        budget: &mut usize,
        cache: &mut KvCache,
    ) -> bool {
        let (id, covered) = (self.running[i].id(), self.running[i].cached() + chunk);
        while cache.reserve(id, covered).is_err() {
            let mut youngest = self.running.pop().expect("sequence i is running");
            *budget += rows.pop().expect("one entry per running sequence");
            cache.release(youngest.id());
            youngest.forget_cache();
            self.waiting.push_front(youngest);
            self.preemptions += 1;
            if self.running.len() == i {
                return false;
            }
        }
        true
    }

    /// Admits waiting sequences while rows, places and pages last; stops at the first that does not fit, so that nobody
    /// overtakes it.
    fn admit(&mut self, rows: &mut Vec<usize>, budget: &mut usize, cache: &mut KvCache) {
        while *budget > 0 && self.running.len() < self.config.running_sequences {
            let Some(first) = self.waiting.front() else { return };
            // Pages that the running prompts have not taken yet are spoken for.
            let promised: usize = self
                .running
                .iter()
                .map(|s| cache.pages_for(s.tokens().len()).saturating_sub(cache.pages(s.id()).len()))
                .sum();
            if cache.pages_for(first.tokens().len()) + promised > cache.n_free() {
                return;
            }
            let chunk = first.due().min(*budget);
            cache.reserve(first.id(), chunk).expect("pages were counted");
            self.running.extend(self.waiting.pop_front());
            rows.push(chunk);
            *budget -= chunk;
        }
    }
}

fn batch_sequence(sequence: &Sequence, rows: usize, cache: &KvCache) -> BatchSequence {
    let position = |n: usize| u32::try_from(n).expect("a context has fewer than 2^32 positions");
    BatchSequence {
        request: sequence.id(),
        start: position(sequence.cached()),
        rows: position(rows),
        pages: cache.pages(sequence.id()).to_vec(),
        want: if rows == sequence.due() { Want::LastLogits } else { Want::Nothing },
    }
}
