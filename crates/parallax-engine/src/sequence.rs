//! One request's progress: its tokens, and how many of them the cache has seen.
//!
//! Prompt and answer are one list. A row is due for every token the cache has not seen; when the last one is due, its
//! logits are wanted. Prefill, decode and the recomputation after a preemption are therefore the same thing.

use swarm_wire::RequestId;

use crate::request::{Request, SamplingParams};

/// A request inside the engine. Invariant: `cached < tokens.len()`.
#[derive(Debug, Clone)]
pub struct Sequence {
    id: RequestId,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    cached: usize,
    allowance: usize,
    sampling: SamplingParams,
    capture_hidden: bool,
}

impl Sequence {
    /// A sequence that may get `allowance` new tokens.
    pub fn new(id: RequestId, request: Request, allowance: usize) -> Self {
        let Request { prompt, sampling, capture_hidden } = request;
        Self {
            id,
            prompt_tokens: prompt.len(),
            tokens: prompt,
            cached: 0,
            allowance,
            sampling,
            capture_hidden,
        }
    }

    /// The request.
    pub fn id(&self) -> RequestId {
        self.id
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

    /// The next `rows` due tokens.
    pub fn due_tokens(&self, rows: usize) -> &[u32] {
        &self.tokens[self.cached..self.cached + rows]
    }

    /// `rows` rows ran. Returns whether a token is to be chosen now.
    pub fn advance(&mut self, rows: usize) -> bool {
        assert!(rows <= self.due(), "rows that are not due cannot have run");
        self.cached += rows;
        self.cached == self.tokens.len()
    }

    /// The chosen token. Its own row becomes due.
    pub fn push(&mut self, token: u32) {
        assert_eq!(self.cached, self.tokens.len(), "a token is chosen when no row is due");
        self.tokens.push(token);
    }

    /// Whether the answer is as long as it may get.
    pub fn is_full(&self) -> bool {
        self.generated() >= self.allowance
    }

    /// The cache has lost this sequence.
    pub fn forget_cache(&mut self) {
        self.cached = 0;
    }
}
