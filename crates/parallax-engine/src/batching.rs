//! Continuous batching: which rows run in the next step.
//!
//! A step has a budget of rows. Every decoding sequence gets its one row first, so that a long prompt never stops the
//! answers that are being written; then prompts in chunks, in the order of admission; what is left goes to drafted
//! tokens. Prompts with few rows to go may come before all others for a few steps in a row: when many users ask
//! behind one cached beginning, half of them have their first token before the answers of the others take the rows.
//! Rows whose logits are wanted have a budget of their own. Waiting sequences are admitted in the order of [`FairQueue`]
//! and only with room for all the tokens they have.
//! When pages run out, the sequence that was admitted last gives its pages up and goes back to the head of its queue; it
//! is prefilled again later (with batch-invariant kernels, to the same bits). Drafts never cost anybody a page.
//!
//! Progress: the sequence admitted first is never preempted and always fits into the cache alone, so every step has rows.

mod queue;

use swarm_wire::RequestId;
use swarm_wire::limits::TENSOR_MAX_BYTES;

use crate::batch::{Batch, BatchSequence, Want};
use crate::config::EngineConfig;
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;
use crate::speculate::{DraftQuery, Drafter};
use crate::stage::StageShape;
pub use queue::FairQueue;

/// Logits of one step, in bytes: half of what a pipeline's last stage can send in one tensor, so that hidden rows have
/// room beside them.
pub const LOGITS_BYTES: usize = TENSOR_MAX_BYTES / 2;

/// Work that a generated token counts for in the fair order; a prompt row counts 1.
const TOKEN_WORK: u64 = 2;

/// Rows that prompts get beside decoding sequences however short a step should be: below, a step costs more than its rows.
const LEAST_PROMPT_ROWS: usize = 16;

/// A prompt with at most so many rows to go is nearly done: what a user asks behind a beginning that is cached.
const NEARLY_DONE_ROWS: usize = 32;
/// Steps in a row in which nearly done prompts come before everything else.
const MOST_HELD_BACK: usize = 3;

/// Running sequences, first admitted first, and waiting ones.
#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    vocab: usize,
    /// Rows of one step that may go through the head.
    logits_rows: usize,
    /// Rows of the next step, if fewer than the configured ones.
    limit: usize,
    /// Steps in a row in which nearly done prompts left a running sequence without a row.
    held_back: usize,
    running: Vec<Sequence>,
    waiting: FairQueue,
    preempted: Vec<RequestId>,
    preemptions: u64,
    steps: u64,
    looked_up: u64,
    found: u64,
}

impl Scheduler {
    /// No sequences.
    pub fn new(mut config: EngineConfig, shape: &StageShape) -> Self {
        let logits_rows = (LOGITS_BYTES / (4 * shape.vocab.max(1))).max(1);
        // Every running sequence may want a row in the same step, and has a state, beside which there is one to begin with.
        config.running_sequences = config.running_sequences.min(logits_rows);
        if shape.state_slots > 0 {
            config.running_sequences = config.running_sequences.min(shape.state_slots - 1);
        }
        Self {
            vocab: shape.vocab,
            logits_rows,
            config,
            limit: usize::MAX,
            held_back: 0,
            running: Vec::new(),
            waiting: FairQueue::default(),
            preempted: Vec::new(),
            preemptions: 0,
            steps: 0,
            looked_up: 0,
            found: 0,
        }
    }

    /// Sequences that hold pages, first admitted first.
    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// Sequences that can run together at most.
    pub fn most_running(&self) -> usize {
        self.config.running_sequences
    }

    /// Sequences that hold none.
    pub fn waiting(&self) -> &FairQueue {
        &self.waiting
    }

    /// Sequences in all.
    pub fn len(&self) -> usize {
        self.running.len() + self.waiting.len()
    }

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How often a sequence lost its pages to another.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Prompt tokens that were looked up in the prefix index, and those that were found.
    pub fn prefix_lookups(&self) -> (u64, u64) {
        (self.looked_up, self.found)
    }

    /// Sequences that were preempted since the last call: a runner may drop what it keeps under their ids.
    pub fn take_preempted(&mut self) -> Vec<RequestId> {
        std::mem::take(&mut self.preempted)
    }

    /// Puts a sequence into the queue.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push(sequence);
    }

    /// Takes a sequence out. Its pages stay the caller's business.
    pub fn remove(&mut self, id: RequestId) -> Option<Sequence> {
        let removed = match self.running.iter().position(|s| s.id() == id) {
            Some(i) => Some(self.running.remove(i)),
            None => self.waiting.take(id),
        };
        if let Some(sequence) = &removed {
            self.waiting.left(sequence.user());
        }
        removed
    }

    /// The running sequence `id`, to record what became of its rows.
    pub fn running_mut(&mut self, id: RequestId) -> Option<&mut Sequence> {
        self.running.iter_mut().find(|s| s.id() == id)
    }

    /// All sequences, to change what they run with.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.running.iter_mut().chain(self.waiting.iter_mut())
    }

    /// Takes the waiting sequences that share the prompt of `leader` out of the queue, as many as have a place and a state.
    pub fn take_followers(&mut self, leader: RequestId, cache: &KvCache) -> Vec<Sequence> {
        let states = cache.states();
        let states = if states.is_empty() { usize::MAX } else { states.n_available() };
        let places = self.config.running_sequences.saturating_sub(self.running.len()).min(states);
        // One that ran by itself before and was preempted has tokens of its own.
        let follows = |s: &&Sequence| s.leader() == Some(leader) && s.generated() == 0;
        let mut ids: Vec<RequestId> = self.waiting.iter().filter(follows).map(Sequence::id).collect();
        ids.sort_unstable();
        ids.truncate(if self.config.prefix_cache { places } else { 0 });
        ids.into_iter().filter_map(|id| self.waiting.take(id)).collect()
    }

    /// A sequence that got its pages by a fork.
    pub fn run(&mut self, sequence: Sequence) {
        self.running.push(sequence);
    }

    /// Takes all sequences out: running ones first admitted first, then waiting ones, oldest first.
    pub fn drain(&mut self) -> Vec<Sequence> {
        self.running.drain(..).chain(self.waiting.drain()).collect()
    }

    /// Sends every running sequence back to the queue without its pages, in order.
    pub fn requeue_all(&mut self, cache: &mut KvCache) {
        while let Some(sequence) = self.running.pop() {
            self.requeue(sequence, cache);
        }
    }

    fn requeue(&mut self, mut sequence: Sequence, cache: &mut KvCache) {
        cache.release(sequence.id());
        sequence.forget_cache();
        self.preempted.push(sequence.id());
        self.waiting.push_back_in(sequence);
    }

    /// The next steps have about so many rows, within the configured bound; there is one for each sequence that decodes, and some
    /// for prompts.
    pub fn limit_rows(&mut self, rows: usize) {
        self.limit = rows;
    }

    /// The rows of the next step, with pages reserved, or `None` when there is no sequence.
    pub fn plan(
        &mut self,
        cache: &mut KvCache,
        drafter: Option<&mut (dyn Drafter + 'static)>,
    ) -> Option<Batch> {
        let mut rows = vec![0usize; self.running.len()];
        let decoding = self.running.iter().filter(|s| s.is_decoding()).count();
        let mut budget = Budget {
            rows: self.config.step_tokens.min(self.limit.max(decoding + LEAST_PROMPT_ROWS)),
            // Each running sequence has a row of its own, used or not.
            logits: self.logits_rows.saturating_sub(self.running.len()),
        };
        let all = budget.rows;
        if self.held_back < MOST_HELD_BACK {
            self.schedule(is_nearly_done, &mut rows, &mut budget, cache);
            self.admit(NEARLY_DONE_ROWS, &mut rows, &mut budget, cache);
        }
        let came_before = budget.rows < all;
        self.schedule(Sequence::is_decoding, &mut rows, &mut budget, cache);
        self.schedule(|s| !s.is_decoding(), &mut rows, &mut budget, cache);
        self.admit(usize::MAX, &mut rows, &mut budget, cache);
        self.held_back = if came_before && rows.contains(&0) { self.held_back + 1 } else { 0 };
        if let Some(drafter) = drafter {
            self.draft(&rows, budget, cache, drafter);
        }
        for (sequence, rows) in self.running.iter().zip(&rows) {
            let tokens = if *rows == sequence.due() { TOKEN_WORK } else { 0 };
            let prompt = if sequence.is_decoding() { 0 } else { *rows as u64 };
            self.waiting.charge(sequence.user(), prompt + tokens);
        }
        let scheduled = self.running.iter().zip(&rows).filter(|(_, rows)| **rows > 0);
        let want_hidden = scheduled.clone().any(|(s, rows)| s.capture_hidden() && *rows == s.due());
        let reuse = self.config.prefix_cache;
        let sequences: Vec<BatchSequence> =
            scheduled.map(|(s, &rows)| batch_sequence(s, rows, reuse, cache)).collect();
        if sequences.is_empty() {
            assert!(self.is_empty(), "the sequence admitted first can always run");
            return None;
        }
        self.steps += 1;
        let (copies, state_copies) = (cache.take_copies(), cache.take_state_copies());
        Some(Batch { step: self.steps, want_hidden, copies, state_copies, sequences })
    }

    /// Gives rows to the running sequences that are `chosen` and have none yet, first admitted first.
    fn schedule(
        &mut self,
        chosen: impl Fn(&Sequence) -> bool,
        rows: &mut Vec<usize>,
        budget: &mut Budget,
        cache: &mut KvCache,
    ) {
        let mut i = 0;
        while i < self.running.len() && budget.rows > 0 {
            let sequence = &self.running[i];
            if rows[i] == 0 && chosen(sequence) {
                let chunk = budget.chunk(sequence);
                if self.reserve(i, chunk, rows, budget, cache) {
                    rows[i] = chunk;
                    budget.take(&self.running[i], chunk);
                }
            }
            i += 1;
        }
    }

    /// Reserves pages for `chunk` more rows of running sequence `i`, at the cost of later ones. False when `i` itself was
    /// the last and had to go.
    fn reserve(
        &mut self,
        i: usize,
        chunk: usize,
        rows: &mut Vec<usize>,
        budget: &mut Budget,
        cache: &mut KvCache,
    ) -> bool {
        let (id, cached) = (self.running[i].id(), self.running[i].cached());
        while cache.reserve(id, cached, cached + chunk).is_err() {
            let last = self.running.pop().expect("sequence i is running");
            budget.rows += rows.pop().expect("one entry per running sequence");
            self.requeue(last, cache);
            self.preemptions += 1;
            if self.running.len() == i {
                return false;
            }
        }
        true
    }

    /// Admits waiting sequences while rows, places and pages last; stops at the first that does not fit or has more
    /// than `most_due` rows to go, so that nobody overtakes it. Sequences that will be forked from a running prompt wait for that.
    fn admit(&mut self, most_due: usize, rows: &mut Vec<usize>, budget: &mut Budget, cache: &mut KvCache) {
        while budget.rows > 0 && budget.logits > 0 && self.running.len() < self.config.running_sequences {
            let running = &self.running;
            let forked_soon = |s: &Sequence| {
                self.config.prefix_cache
                    && s.generated() == 0
                    && s.leader().is_some_and(|l| running.iter().any(|r| r.id() == l && r.generated() == 0))
            };
            let Some(next) = self.waiting.peek(|s| !forked_soon(s)) else { return };
            // Pages that the running prompts have not taken yet are spoken for.
            let promised: usize = self
                .running
                .iter()
                .map(|s| cache.pages_for(s.tokens().len()).saturating_sub(cache.pages(s.id()).len()))
                .sum();
            let id = next.id();
            let looked_up = self.config.prefix_cache && !next.wants_prompt_logprobs();
            let found = match next.root().filter(|_| looked_up) {
                Some(root) => {
                    cache.attach(id, root, next.tokens()).expect("there are more states than places")
                }
                None => 0,
            };
            let missing = cache.pages_for(next.tokens().len()) - cache.pages(id).len();
            if next.tokens().len() - found > most_due || missing + promised > cache.n_free() {
                cache.release(id);
                return;
            }
            let mut sequence = self.waiting.take(id).expect("it was seen a moment ago");
            if looked_up && sequence.generated() == 0 {
                self.looked_up += sequence.prompt_tokens() as u64;
                self.found += found as u64;
            }
            sequence.reuse(found);
            budget.logits -= 1;
            let chunk = budget.chunk(&sequence);
            cache.reserve(id, found, found + chunk).expect("pages were counted");
            budget.take(&sequence, chunk);
            self.running.push(sequence);
            rows.push(chunk);
        }
    }

    /// Asks for guesses of the tokens after those that decode in this step, as far as rows and pages are left over.
    fn draft(&mut self, rows: &[usize], mut budget: Budget, cache: &mut KvCache, drafter: &mut dyn Drafter) {
        let mut asked = Vec::new();
        for (i, sequence) in self.running.iter().enumerate() {
            // The last token of an answer is never put in again.
            let most = sequence.drafts_wanted().min(budget.rows).min(budget.logits);
            if rows[i] == 1 && sequence.is_decoding() && most > 0 {
                (budget.rows, budget.logits) = (budget.rows - most, budget.logits - most);
                asked.push((i, most));
            }
        }
        if asked.is_empty() {
            return;
        }
        let queries: Vec<DraftQuery<'_>> = asked
            .iter()
            .map(|&(i, most)| DraftQuery {
                request: self.running[i].id(),
                tokens: self.running[i].tokens(),
                sampling: self.running[i].sampling(),
                most,
            })
            .collect();
        let drafts = drafter.propose(&queries);
        for ((i, most), mut draft) in asked.into_iter().zip(drafts) {
            let sequence = &mut self.running[i];
            let known = draft.iter().take(most).take_while(|id| (**id as usize) < self.vocab).count();
            draft.truncate(known);
            let (cached, wanted) = (sequence.cached(), sequence.tokens().len() + draft.len());
            if !draft.is_empty() && cache.reserve(sequence.id(), cached, wanted).is_ok() {
                sequence.set_draft(draft);
            }
        }
    }
}

/// It has few rows to go before a token, and does not merely go on with its answer.
fn is_nearly_done(sequence: &Sequence) -> bool {
    let goes_on = sequence.is_decoding() && sequence.generated() > 0;
    !goes_on && sequence.due() <= NEARLY_DONE_ROWS
}

/// What is left of a step.
struct Budget {
    rows: usize,
    /// Rows through the head, beside the one that each running sequence has.
    logits: usize,
}

impl Budget {
    /// Due rows of a running sequence that fit.
    fn chunk(&self, sequence: &Sequence) -> usize {
        let bound = if sequence.wants_prompt_logprobs() { self.logits + 1 } else { usize::MAX };
        sequence.due().min(self.rows).min(bound)
    }

    fn take(&mut self, sequence: &Sequence, chunk: usize) {
        self.rows -= chunk;
        if sequence.wants_prompt_logprobs() {
            self.logits -= chunk - 1;
        }
    }
}

/// What a sequence has in a step with `rows` of its due rows, and its draft behind them.
fn batch_sequence(sequence: &Sequence, rows: usize, reuse: bool, cache: &mut KvCache) -> BatchSequence {
    let position = |n: usize| u32::try_from(n).expect("a context has fewer than 2^32 positions");
    let ends = rows == sequence.due();
    let (id, start, drafted) = (sequence.id(), sequence.cached(), sequence.draft().len());
    let saves = if reuse && sequence.root().is_some() {
        let all = start..start + rows + drafted;
        cache.plan_saves(id, all, sequence.tokens().len(), sequence.prompt_tokens())
    } else {
        Vec::new()
    };
    BatchSequence {
        request: id,
        start: position(start),
        rows: position(rows + drafted),
        pages: cache.pages(id).to_vec(),
        state: cache.state(id),
        drafted: position(drafted),
        saves,
        want: if sequence.wants_prompt_logprobs() || !sequence.draft().is_empty() {
            Want::AllLogits
        } else if ends {
            Want::LastLogits
        } else {
            Want::Nothing
        },
        adapter: sequence.adapter(),
    }
}
