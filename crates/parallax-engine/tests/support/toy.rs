//! A toy language model behind the runner trait: deterministic, and strict about what it is given.
//!
//! It keeps real "pages" (the token at each position, and the weights it was computed with) and computes each row from
//! what the page table leads to. A wrong page, a wrong position, a page that is written by two sequences or one of other
//! weights therefore gives wrong tokens or a panic, not a pass. With slots for states it also keeps all that each state has
//! seen, and compares that with the pages.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use parallax_engine::{
    AdapterFile, AdapterParser, Batch, BatchSequence, LogSoftmax, Recovery, Request, SamplingParams,
    StageError, StageOutput, StageRunner, StageShape, Tensor,
};
use swarm_wire::{LayerRange, PolicyVersion};

/// Size of the toy vocabulary.
pub const VOCAB: usize = 97;
/// Width of its hidden rows.
pub const HIDDEN: usize = 4;
const EMPTY: u32 = u32::MAX;

/// What a recurrent model would have seen.
#[derive(Clone, Default)]
struct ToyState {
    seen: Vec<(u32, u64)>,
    /// So much of it can no longer be taken back.
    firm: usize,
}

/// The toy model.
pub struct ToyModel {
    shape: StageShape,
    cache: Vec<(u32, u64)>,
    states: Vec<ToyState>,
    /// Salts of the resident adapters.
    pub adapters: BTreeMap<u32, u64>,
    /// Counts losses of all pages.
    pub generation: u64,
    /// Rows may meet keys of other weights (a swap that keeps them).
    pub mixes: bool,
    /// Ids that were closed.
    pub closed: Vec<u64>,
    /// Added to every hash: what an adapter changes.
    pub salt: u64,
    /// Rows of every step so far, also for who gave the model away.
    rows_per_step: Arc<Mutex<Vec<usize>>>,
    /// Fail at this step.
    pub fail_at: Option<u64>,
    /// What becomes of the stage that failed.
    pub recovery: Recovery,
}

impl ToyModel {
    /// A model with this cache.
    pub fn new(n_pages: usize, page_tokens: usize) -> Self {
        let shape = StageShape {
            layers: LayerRange::new(0, 2).unwrap(),
            n_layers: 2,
            hidden: HIDDEN,
            vocab: VOCAB,
            max_context: 4096,
            page_tokens,
            n_pages,
            state_slots: 0,
        };
        Self {
            shape,
            states: Vec::new(),
            cache: vec![(EMPTY, 0); n_pages * page_tokens],
            adapters: BTreeMap::new(),
            generation: 0,
            mixes: false,
            closed: Vec::new(),
            salt: 0,
            rows_per_step: Arc::default(),
            fail_at: None,
            recovery: Recovery::None,
        }
    }
}

impl ToyModel {
    /// The same with recurrent layers.
    pub fn recurrent(n_pages: usize, page_tokens: usize, state_slots: usize) -> Self {
        let mut model = Self::new(n_pages, page_tokens);
        model.shape.state_slots = state_slots;
        model.states = vec![ToyState::default(); state_slots];
        model
    }

    /// Moves the state of a sequence over its rows, and keeps copies on the way.
    fn recur(&mut self, sequence: &BatchSequence, rows: &[(u32, u64)]) {
        let (start, end) = (sequence.start as usize, sequence.start as usize + rows.len());
        let state = &mut self.states[sequence.state as usize];
        if start == 0 {
            *state = ToyState::default();
        }
        assert!(
            (state.firm..=state.seen.len()).contains(&start),
            "position {start} is within {}..={}",
            state.firm,
            state.seen.len()
        );
        state.seen.truncate(start);
        state.seen.extend(rows);
        let drafted = sequence.drafted as usize;
        assert!(end - state.firm >= drafted, "drafts are behind what is firm");
        state.firm = end - drafted;
        let seen = state.seen.clone();
        for save in &sequence.saves {
            let firm = save.position as usize;
            assert!(
                (start..end).contains(&firm) && save.slot != sequence.state,
                "states are kept on the way"
            );
            self.states[save.slot as usize] = ToyState { seen: seen[..firm].to_vec(), firm };
        }
    }

    /// Rows of every step so far.
    pub fn passes(&self) -> Arc<Mutex<Vec<usize>>> {
        Arc::clone(&self.rows_per_step)
    }
}

/// Logits and hidden row after a prefix.
pub fn toy_logits(prefix: &[u32], salt: u64) -> (Vec<f32>, Vec<f32>) {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ salt;
    for (position, token) in prefix.iter().enumerate() {
        hash = (hash ^ u64::from(*token) ^ ((position as u64) << 20)).wrapping_mul(0x0100_0000_01b3);
        hash ^= hash >> 29;
    }
    let value = |i: u64| {
        let mut x = hash.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((x >> 40) as f32) / (1u64 << 24) as f32 * 8.0
    };
    ((0..VOCAB as u64).map(value).collect(), (1000..1000 + HIDDEN as u64).map(value).collect())
}

/// The greedy continuation, computed naively.
pub fn toy_greedy(prompt: &[u32], n: usize, salt: u64) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..n {
        let (logits, _) = toy_logits(&tokens, salt);
        let best = (0..VOCAB).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}

/// A plain log-softmax in f64: the toy's own.
pub fn toy_log_softmax(logits: &[f32]) -> Vec<f32> {
    let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    logits.iter().map(|l| (f64::from(*l) - sum.ln()) as f32).collect()
}

/// What an adapter adds: parsed before, or here for who calls the engine without a thread.
fn salt(adapter: &AdapterFile) -> Result<u64, String> {
    match adapter.parsed() {
        Some(salt) => Ok(*salt),
        None => AdapterFile::parsed_by(&**adapter, ToyModel::new(1, 1).adapter_parser().unwrap())
            .and_then(|f| salt(&f)),
    }
}

impl StageRunner for ToyModel {
    fn shape(&self) -> StageShape {
        self.shape
    }

    fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
        let ids = input.to_ids(batch.n_rows())?;
        self.rows_per_step.lock().unwrap().push(ids.len());
        if self.fail_at == Some(batch.step) {
            return Err(StageError::Lost {
                peer: "toy".into(),
                layers: "0..2".into(),
                reason: "unplugged".into(),
            });
        }
        let page_tokens = self.shape.page_tokens;
        let slot = |pages: &[u32], p: usize| pages[p / page_tokens] as usize * page_tokens + p % page_tokens;
        for copy in &batch.copies {
            let (from, to) = (copy.from as usize * page_tokens, copy.to as usize * page_tokens);
            assert_ne!(from, to, "a page is not copied to itself");
            self.cache.copy_within(from..from + page_tokens, to);
        }
        for copy in &batch.state_copies {
            self.states[copy.to as usize] = self.states[copy.from as usize].clone();
        }
        let slots = || batch.sequences.iter().flat_map(|s| s.saves.iter().map(|s| s.slot).chain([s.state]));
        assert!(
            self.states.is_empty() || slots().collect::<BTreeSet<_>>().len() == slots().count(),
            "nobody has the slot of another"
        );
        let mut next = ids.iter();
        let (mut logits, mut hidden) = (Vec::new(), Vec::new());
        for sequence in &batch.sequences {
            let (start, rows) = (sequence.start as usize, sequence.rows as usize);
            assert!(rows > 0, "sequences without rows are not in a batch");
            assert!(sequence.pages.len() * page_tokens >= start + rows, "the page table covers the rows");
            let salt = match sequence.adapter {
                None => self.salt,
                Some(id) => self.adapters[&id],
            };
            let input: Vec<(u32, u64)> = next.by_ref().take(rows).map(|id| (*id, salt)).collect();
            if !self.states.is_empty() {
                self.recur(sequence, &input);
            }
            for (position, row) in (start..start + rows).zip(input) {
                self.cache[slot(&sequence.pages, position)] = row;
                let wanted =
                    sequence.n_wanted() == rows || (sequence.n_wanted() == 1 && position + 1 == start + rows);
                if wanted {
                    let seen: Vec<(u32, u64)> =
                        (0..=position).map(|p| self.cache[slot(&sequence.pages, p)]).collect();
                    assert!(seen.iter().all(|(t, _)| *t != EMPTY), "every position was written before");
                    if let Some(state) = self.states.get(sequence.state as usize) {
                        assert_eq!(state.seen[..=position], seen, "the state has seen what the pages hold");
                    }
                    assert!(
                        self.mixes || seen.iter().all(|(_, s)| *s == salt),
                        "all keys are of one weights"
                    );
                    let prefix: Vec<u32> = seen.iter().map(|(t, _)| *t).collect();
                    let (row, state) = toy_logits(&prefix, salt);
                    logits.extend(row);
                    hidden.extend(state);
                }
            }
        }
        let wanted = batch.n_wanted();
        Ok(StageOutput {
            hidden: batch.want_hidden.then(|| Tensor::from_f32(&[wanted, HIDDEN], hidden)),
            logits: (wanted > 0).then(|| Tensor::from_f32(&[wanted, VOCAB], logits)),
        })
    }

    fn set_adapter(
        &mut self,
        version: PolicyVersion,
        adapter: Option<&AdapterFile>,
    ) -> Result<(), StageError> {
        let wrong = |reason| StageError::Adapter { version, reason };
        self.salt = adapter.map_or(Ok(0), salt).map_err(wrong)?;
        Ok(())
    }

    fn adapter_parser(&self) -> Option<AdapterParser> {
        Some(|bytes| match bytes {
            b"bad" => Err("not an adapter".into()),
            good => Ok(Arc::new(good.iter().map(|b| u64::from(*b)).sum::<u64>())),
        })
    }

    fn add_adapter(&mut self, id: u32, adapter: &AdapterFile) -> Result<(), StageError> {
        let salt = salt(adapter).map_err(|reason| StageError::NotReady { reason })?;
        self.adapters.insert(id, salt);
        Ok(())
    }

    fn remove_adapter(&mut self, id: u32) {
        self.adapters.remove(&id);
    }

    fn recovery(&self) -> Recovery {
        self.recovery
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn close(&mut self, request: swarm_wire::RequestId) {
        self.closed.push(request.0);
    }

    fn log_softmax(&self) -> LogSoftmax {
        toy_log_softmax
    }
}

/// A sampled request.
pub fn sampled(prompt: Vec<u32>, max_tokens: usize, stream: u64) -> Request {
    let sampling =
        SamplingParams { temperature: 1.0, seed: 7, stream, max_tokens, ..SamplingParams::default() };
    Request { prompt, sampling, capture_hidden: true, ..Request::default() }
}
