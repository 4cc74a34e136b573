//! One request's progress: its tokens, and how many of them the cache has seen.
//!
//! Prompt and answer are one list. A row is due for every token the cache has not seen; when the last one is due, its
//! logits are wanted. Prefill, decode and the recomputation after a preemption are therefore the same thing. Behind the
//! due rows there may be drafted ones: tokens that somebody guessed, to be kept only where they are what the sampler
//! chooses.

use swarm_wire::{PolicyVersion, RequestId};

use crate::constraint::ConstraintState;
use crate::kv_cache::BlockHash;
use crate::request::{Request, Usage};
use crate::sampler::{History, Place, SampleError, Sampled, Sampler};
use crate::sampling::SamplingParams;

/// A request inside the engine. Invariant: `cached < tokens.len()` between steps.
#[derive(Debug)]
pub struct Sequence {
    id: RequestId,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    cached: usize,
    reused: usize,
    losses: u32,
    allowance: usize,
    sampling: SamplingParams,
    capture_hidden: bool,
    history: Option<History>,
    constraint: Option<Box<dyn ConstraintState>>,
    /// Collected until the prompt is through; `None` when not asked for or handed out.
    prompt_logprobs: Option<Vec<f32>>,
    draft: Vec<u32>,
    user: String,
    priority: i32,
    leader: Option<RequestId>,
    salt: String,
    adapter: Option<ResidentAdapter>,
    root: Option<BlockHash>,
    /// Tokens to guess next time: doubled when all were right, halved when none was.
    speculation: usize,
}

/// A resident adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidentAdapter {
    /// What the runner calls it.
    pub id: u32,
    /// Hash of its bytes.
    pub hash: [u8; 32],
}

impl Sequence {
    /// A sequence that may get `allowance` new tokens.
    pub fn new(id: RequestId, request: Request, allowance: usize) -> Self {
        let Request {
            prompt,
            sampling,
            capture_hidden,
            constraint,
            prompt_logprobs,
            user,
            priority,
            adapter: _,
            cache_salt,
        } = request;
        Self {
            id,
            user,
            priority,
            leader: None,
            salt: cache_salt,
            adapter: None,
            root: None,
            speculation: 0,
            prompt_tokens: prompt.len(),
            history: sampling.has_penalties().then(|| History::new(&prompt)),
            constraint: constraint.map(|c| c.start()),
            prompt_logprobs: prompt_logprobs.then(Vec::new),
            tokens: prompt,
            cached: 0,
            reused: 0,
            losses: 0,
            allowance,
            sampling,
            capture_hidden,
            draft: Vec::new(),
        }
    }

    /// The request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// On whose behalf.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Higher goes first.
    pub fn priority(&self) -> i32 {
        self.priority
    }

    /// The sequence whose prompt this one shares, if it is one of several answers.
    pub fn leader(&self) -> Option<RequestId> {
        self.leader
    }

    /// Makes it one of several answers to the prompt of `leader`.
    pub fn follow(&mut self, leader: RequestId) {
        self.leader = Some(leader);
    }

    /// Computes it with `adapter`.
    pub fn set_adapter(&mut self, adapter: Option<ResidentAdapter>) {
        self.adapter = adapter;
    }

    /// The resident adapter of its rows.
    pub fn adapter(&self) -> Option<u32> {
        self.adapter.map(|adapter| adapter.id)
    }

    /// Its pages are those of `model` at `version`.
    pub fn index_under(&mut self, model: &str, version: PolicyVersion) {
        let adapter = self.adapter.as_ref().map(|adapter| &adapter.hash);
        self.root = Some(BlockHash::root(model, version.0, adapter, &self.salt));
    }

    /// Its pages are of no single version: they stay out of the prefix index.
    pub fn leave_index(&mut self) {
        self.root = None;
    }

    /// Where its chain of pages begins; `None` keeps it out of the prefix index.
    pub fn root(&self) -> Option<BlockHash> {
        self.root
    }

    /// Guesses to ask for: none when the answer ends with the next token anyway, and none before the first one, where other
    /// answers to the prompt begin with the pages as they are then.
    pub fn drafts_wanted(&self) -> usize {
        match self.generated() {
            0 => 0,
            generated => self.speculation.min(self.allowance.saturating_sub(generated + 1)),
        }
    }

    /// How many tokens to guess at most from now on; at first, that many.
    pub fn start_speculating(&mut self, most: usize) {
        self.speculation = most;
    }

    /// How many of the last guesses were right.
    pub fn learn(&mut self, guessed: usize, right: usize, most: usize) {
        if guessed > 0 && right == guessed {
            self.speculation = (self.speculation * 2).min(most);
        } else if right == 0 && guessed > 0 {
            self.speculation = (self.speculation / 2).max(1);
        }
    }

    /// How to choose the next token.
    pub fn sampling(&self) -> &SamplingParams {
        &self.sampling
    }

    /// Whether hidden rows go out with the tokens.
    pub fn capture_hidden(&self) -> bool {
        self.capture_hidden
    }

    /// Prompt and answer.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Tokens of the answer so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Positions in the cache.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Rows that must run before the next token can be chosen, at least one.
    pub fn due(&self) -> usize {
        self.tokens.len() - self.cached
    }

    /// Only the newest token is due.
    pub fn is_decoding(&self) -> bool {
        self.due() == 1 && self.cached > 0
    }

    /// Tokens that may follow the newest one.
    pub fn draft(&self) -> &[u32] {
        &self.draft
    }

    /// Proposes tokens to follow the newest one, for the next step only.
    pub fn set_draft(&mut self, draft: Vec<u32>) {
        self.draft = draft;
    }

    /// Takes the proposal of this step.
    pub fn take_draft(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.draft)
    }

    /// Input of the next `rows` rows: due tokens, then drafted ones.
    pub fn due_tokens(&self, rows: usize) -> impl Iterator<Item = u32> {
        self.tokens[self.cached..].iter().chain(&self.draft).copied().take(rows)
    }

    /// `rows` rows ran. Returns whether a token is to be chosen now.
    pub fn advance(&mut self, rows: usize) -> bool {
        assert!(rows <= self.due(), "rows that are not due cannot have run");
        self.cached += rows;
        self.cached == self.tokens.len()
    }

    /// Chooses the next token from logits `[V]` and appends it; its own row becomes due.
    ///
    /// # Errors
    /// A constraint that failed or left no token: the request ends.
    pub fn choose(&mut self, sampler: &Sampler, logits: &[f32]) -> Result<Sampled, SampleError> {
        assert_eq!(self.cached, self.tokens.len(), "a token is chosen when no row is due");
        let place = Place {
            position: self.tokens.len() as u64,
            generated: self.generated(),
            history: self.history.as_ref(),
        };
        let constraint = self.constraint.as_deref_mut();
        let sampled = sampler.sample(logits, &self.sampling, place, constraint)?;
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(sampled.id).map_err(|reason| SampleError::Constraint { reason })?;
        }
        if let Some(history) = &mut self.history {
            history.push(sampled.id);
        }
        self.tokens.push(sampled.id);
        Ok(sampled)
    }

    /// Whether the logits of prompt rows are still to be looked at.
    pub fn wants_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// The prompt token whose log-probability the row at `position` tells, if that is asked for.
    pub fn prompt_target(&self, position: usize) -> Option<u32> {
        let next = position + 1;
        let wanted = self.prompt_logprobs.as_ref().is_some_and(|known| known.len() == position);
        (wanted && next < self.prompt_tokens).then(|| self.tokens[next])
    }

    /// The log-probability of the next prompt token.
    pub fn push_prompt_logprob(&mut self, logprob: f32) {
        self.prompt_logprobs.get_or_insert_default().push(logprob);
    }

    /// The log-probabilities of the prompt, once.
    pub fn take_prompt_logprobs(&mut self) -> Option<Vec<f32>> {
        self.prompt_logprobs.take()
    }

    /// What is known of the prompt's log-probabilities belongs to other weights: all of them are asked for again.
    pub fn forget_prompt_logprobs(&mut self) {
        if let Some(known) = &mut self.prompt_logprobs {
            known.clear();
        }
    }

    /// Whether the answer is as long as it may get.
    pub fn is_full(&self) -> bool {
        self.generated() >= self.allowance
    }

    /// Whether the newest token ends the answer: a stop token, or the last one that the constraint allows.
    pub fn is_stopped(&self) -> bool {
        if self.generated() > 0 && self.constraint.as_ref().is_some_and(|c| c.is_complete()) {
            return true;
        }
        self.generated() > 0
            && self.tokens.last().is_some_and(|newest| self.sampling.stop_ids.contains(newest))
    }

    /// Its pages hold the first `positions` positions already.
    pub fn reuse(&mut self, positions: usize) {
        assert!(positions < self.tokens.len(), "the newest token always runs");
        self.cached = positions;
        // What counts is the prompt that its first admission did not have to compute.
        if self.generated() == 0 {
            self.reused = positions.min(self.prompt_tokens);
        }
    }

    /// The cache has lost this sequence.
    pub fn forget_cache(&mut self) {
        self.cached = 0;
        self.draft.clear();
    }

    /// A stage was lost with a batch that it was in. Returns how often that has happened.
    pub fn count_loss(&mut self) -> u32 {
        self.losses += 1;
        self.losses
    }

    /// It begins with the cached prompt of its leader.
    pub fn begin_forked(&mut self, leader: &Self) {
        self.cached = self.prompt_tokens;
        self.reused = self.prompt_tokens;
        self.root = leader.root;
    }

    /// What it has taken so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.reused,
            completion_tokens: self.generated(),
            reasoning_tokens: 0,
        }
    }
}
