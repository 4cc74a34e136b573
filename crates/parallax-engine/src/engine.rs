//! `Engine`: requests in, batches out to a runner, tokens back.
//!
//! Getters: `limits`, `version`, `metrics`, `is_busy`, `adapters`. Commands: `add`, `add_group`, `abort`, `set_version`,
//! `lose_pages`, `postpone`, `abort_all`, `hand_adapters_to`, `add_adapter`, `add_adapter_as`, `remove_adapter`, `set_drafter`, `limit_rows`. Either call `step`, which does a whole forward pass, or
//! `housekeep`, `plan`, run the batch elsewhere, and `complete` it; never plan twice without completing.

mod adapters;
mod outcome;

use std::collections::{BTreeMap, BTreeSet};

use swarm_wire::{PolicyVersion, RequestId};

use crate::adapter_file::AdapterFile;
use crate::batch::{Batch, StageOutput, Tensor};
use crate::batching::Scheduler;
use crate::config::{EngineConfig, OnSwap};
use crate::error::{ConfigError, RequestError, StageError};
use crate::kv_cache::KvCache;
use crate::metrics::EngineMetrics;
use crate::request::{Event, FinishReason, Request, RequestEvent, RequestLimits};
use crate::sampler::Sampler;
use crate::sequence::Sequence;
use crate::speculate::Drafter;
use crate::stage::{LogSoftmax, StageRunner, StageShape};
pub use adapters::Adapters;

/// Lost stages that a request survives.
pub const MAX_LOSSES: u32 = 8;

/// The pure engine: no clock, no thread, no randomness of its own.
#[derive(Debug)]
pub struct Engine {
    shape: StageShape,
    queued_requests: usize,
    on_swap: OnSwap,
    scheduler: Scheduler,
    cache: KvCache,
    sampler: Sampler,
    version: PolicyVersion,
    model: String,
    adapters: Adapters,
    drafter: Option<Box<dyn Drafter>>,
    draft_tokens: usize,
    /// [`EngineConfig::prefix_cache`].
    reuse: bool,
    /// [`StageRunner::generation`] when the pages were last known to be whole.
    generation: u64,
    next_request: u64,
    counted: EngineMetrics,
}

impl Engine {
    /// An engine for a runner of this shape, which must run the whole model.
    ///
    /// # Errors
    /// A configuration outside its ranges.
    ///
    /// # Panics
    /// When `shape` is not the whole model: a part of it has no tokens to give.
    pub fn new(
        shape: StageShape,
        log_softmax: LogSoftmax,
        config: EngineConfig,
    ) -> Result<Self, ConfigError> {
        config.validate()?;
        assert!(
            shape.is_first() && shape.is_last(),
            "an engine drives whole models, got layers {}",
            shape.layers
        );
        if shape.context_tokens() < 2 {
            return Err(ConfigError {
                field: "n_pages * page_tokens",
                value: shape.context_tokens(),
                expected: "at least 2 positions".into(),
            });
        }
        if shape.state_slots == 1 {
            let expected = "none, or at least 2".into();
            return Err(ConfigError { field: "state_slots", value: 1, expected });
        }
        Ok(Self {
            shape,
            queued_requests: config.queued_requests,
            on_swap: config.on_swap,
            model: config.model.clone(),
            draft_tokens: config.draft_tokens,
            adapters: Adapters::default(),
            drafter: None,
            reuse: config.prefix_cache,
            generation: 0,
            scheduler: Scheduler::new(config, &shape),
            cache: KvCache::new(shape.n_pages, shape.page_tokens, shape.state_slots),
            sampler: Sampler::new(log_softmax),
            version: PolicyVersion(0),
            next_request: 0,
            counted: EngineMetrics::default(),
        })
    }

    /// What requests must keep to.
    pub fn limits(&self) -> RequestLimits {
        RequestLimits { vocab: self.shape.vocab, context_tokens: self.shape.context_tokens() }
    }

    /// Weights that tokens are tagged with.
    pub fn version(&self) -> PolicyVersion {
        self.version
    }

    /// There are sequences to run.
    pub fn is_busy(&self) -> bool {
        !self.scheduler.is_empty()
    }

    /// Counters and the present fill.
    pub fn metrics(&self) -> EngineMetrics {
        let (prefix_cache_queries, prefix_cache_hits) = self.scheduler.prefix_lookups();
        let states = self.cache.states();
        EngineMetrics {
            prefix_cache_queries,
            prefix_cache_hits,
            running: self.scheduler.running().len(),
            most_running: self.scheduler.most_running(),
            waiting: self.scheduler.waiting().len(),
            preemptions: self.scheduler.preemptions(),
            pages: self.cache.n_pages(),
            pages_used: self.cache.n_pages() - self.cache.n_free(),
            states: states.len(),
            states_used: states.len() - states.n_available(),
            states_kept: states.n_kept(),
            running_adapters: self.adapters_of(self.scheduler.running().iter()),
            waiting_adapters: self.adapters_of(self.scheduler.waiting().iter()),
            ..self.counted.clone()
        }
    }

    /// What the resident adapters that these sequences pass through are called.
    fn adapters_of<'a>(&self, sequences: impl Iterator<Item = &'a Sequence>) -> Vec<String> {
        let used: BTreeSet<u32> = sequences.filter_map(Sequence::adapter).collect();
        used.into_iter().filter_map(|id| self.adapters.name_of(id)).map(str::to_owned).collect()
    }

    /// Lets `drafter` guess tokens from now on, as many as [`EngineConfig::draft_tokens`] allows.
    pub fn set_drafter(&mut self, drafter: Box<dyn Drafter>) {
        self.drafter = Some(drafter);
    }

    /// Gives the next steps about `rows` rows, within [`EngineConfig::step_tokens`]: at least one for each sequence that decodes,
    /// and 16 for prompts. No result depends on it.
    pub fn limit_rows(&mut self, rows: usize) {
        self.scheduler.limit_rows(rows);
    }

    /// Queues a request under a new id.
    ///
    /// # Errors
    /// A request that cannot be served, or a full queue.
    #[expect(clippy::needless_pass_by_value, reason = "the usual case, and the one with the plainest call")]
    pub fn add(&mut self, request: Request) -> Result<RequestId, RequestError> {
        Ok(self.add_group(&request, 1)?.remove(0))
    }

    /// Queues `n` answers to one prompt, which is computed once as far as there is room to run them beside each other and
    /// prefixes are shared ([`EngineConfig::prefix_cache`]). Answer `i` is that of the same request with `i` added to
    /// [`crate::SamplingParams::stream`].
    ///
    /// # Errors
    /// As [`Self::add`]; all or nothing.
    pub fn add_group(&mut self, request: &Request, n: usize) -> Result<Vec<RequestId>, RequestError> {
        let ids: Vec<RequestId> = (self.next_request..).map(RequestId).take(n).collect();
        self.add_as(&ids, request)?;
        Ok(ids)
    }

    /// As [`Self::add_group`], under ids of the caller's that were never used before.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_as(&mut self, ids: &[RequestId], request: &Request) -> Result<(), RequestError> {
        let limits = self.limits();
        request.validate(&limits)?;
        let adapter = match &request.adapter {
            Some(name) => Some(self.adapters.find(name)?),
            None => None,
        };
        if self.scheduler.len() + ids.len() > self.queued_requests {
            return Err(RequestError::QueueFull { queued: self.queued_requests });
        }
        let allowance = request.token_allowance(&limits);
        for (i, &id) in ids.iter().enumerate() {
            self.next_request = self.next_request.max(id.0 + 1);
            self.counted.prompt_tokens += request.prompt.len() as u64;
            let mut answer = request.clone();
            answer.sampling.stream = answer.sampling.stream.wrapping_add(i as u64);
            let mut sequence = Sequence::new(id, answer, allowance);
            sequence.set_adapter(adapter);
            sequence.index_under(&self.model, self.version);
            sequence.start_speculating(self.draft_tokens);
            if i > 0 {
                sequence.follow(ids[0]);
            }
            self.scheduler.add(sequence);
        }
        Ok(())
    }

    /// Ends a request early; its pages are free at once. `None` when there is no such request. Not between `plan` and
    /// `complete`.
    pub fn abort(&mut self, id: RequestId) -> Option<RequestEvent> {
        let sequence = self.scheduler.remove(id)?;
        self.cache.release(id);
        Some(self.finished(&sequence, FinishReason::Aborted, None))
    }

    /// Ends all requests early.
    pub fn abort_all(&mut self) -> Vec<RequestEvent> {
        self.end_all(FinishReason::Aborted, None)
    }

    /// The runner has new weights under the same pages. What becomes of cached keys and values of the old ones is
    /// [`EngineConfig::on_swap`].
    pub fn set_version(&mut self, version: PolicyVersion) {
        self.set_version_as(version, self.on_swap);
    }

    /// As [`Self::set_version`], with what becomes of them this time. [`OnSwap::Finish`] and [`OnSwap::Abort`] are the
    /// caller's to see to before; what is left is computed again.
    pub fn set_version_as(&mut self, version: PolicyVersion, on_swap: OnSwap) {
        self.version = version;
        if on_swap == OnSwap::Keep {
            let running: Vec<RequestId> = self.scheduler.running().iter().map(Sequence::id).collect();
            for sequence in self.scheduler.all_mut() {
                if running.contains(&sequence.id()) {
                    sequence.leave_index();
                } else {
                    sequence.index_under(&self.model, version);
                }
            }
        } else {
            self.scheduler.requeue_all(&mut self.cache);
            for sequence in self.scheduler.all_mut() {
                sequence.index_under(&self.model, version);
                sequence.forget_prompt_logprobs();
            }
        }
        // A version may come again with other weights: what is cached under it must not answer then.
        self.cache.forget();
    }

    /// The content of all pages is gone (another runner, or layers that moved): what is cached is computed again.
    pub fn lose_pages(&mut self) {
        self.scheduler.requeue_all(&mut self.cache);
        self.cache.forget();
    }

    /// A planned batch was lost with a stage that others replace: all is computed again, and the requests go on with the same
    /// tokens. One that was in [`MAX_LOSSES`] such batches before ends with the error: perhaps it is what stages die of.
    pub fn postpone(&mut self, batch: &Batch, error: &StageError) -> Vec<RequestEvent> {
        let mut hopeless = Vec::new();
        for planned in &batch.sequences {
            let sequence = self.scheduler.running_mut(planned.request);
            if sequence.is_some_and(|sequence| sequence.count_loss() > MAX_LOSSES) {
                hopeless.push(planned.request);
            }
        }
        self.lose_pages();
        let ended = hopeless.into_iter().filter_map(|id| self.scheduler.remove(id)).collect::<Vec<_>>();
        let failure = || Some(error.clone().into());
        ended.iter().map(|sequence| self.finished(sequence, FinishReason::Error, failure())).collect()
    }

    /// Adapters that requests can name.
    pub fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// Makes all adapters resident in `runner`, which is about to take the place of the one that has them.
    ///
    /// # Errors
    /// The first that does not fit, by name; `runner` is of no use then.
    pub fn hand_adapters_to(&self, runner: &mut dyn StageRunner) -> Result<(), StageError> {
        for (id, adapter) in self.adapters.all() {
            runner.add_adapter(id, adapter).map_err(|error| {
                let name = self.adapters.name_of(id).unwrap_or("of a request in flight");
                StageError::Unfit {
                    reason: format!(
                        "adapter {name:?} does not go with the new weights, unload it first: {error}"
                    ),
                }
            })?;
        }
        Ok(())
    }

    /// Makes an adapter resident; one of the same name is replaced, and its requests finish on the old one.
    ///
    /// # Errors
    /// An adapter that does not fit, or a runner that holds one at a time.
    pub fn add_adapter(
        &mut self,
        runner: &mut dyn StageRunner,
        name: &str,
        adapter: AdapterFile,
    ) -> Result<(), StageError> {
        let id = self.adapters.next_id();
        runner.add_adapter(id, &adapter)?;
        self.adapters.insert(name, id, adapter);
        Ok(())
    }

    /// As [`Self::add_adapter`], with what becomes of the requests on a replaced one: [`OnSwap::Recompute`] computes them
    /// again on the new one, [`OnSwap::Abort`] ends them, which the events tell; else they finish on the old one.
    ///
    /// # Errors
    /// As [`Self::add_adapter`]; then nothing becomes of them.
    pub fn add_adapter_as(
        &mut self,
        runner: &mut dyn StageRunner,
        name: &str,
        adapter: AdapterFile,
        on_swap: OnSwap,
    ) -> Result<Vec<RequestEvent>, StageError> {
        let replaced = self.adapters.find(name).ok();
        self.add_adapter(runner, name, adapter)?;
        let Some(replaced) = replaced else { return Ok(Vec::new()) };
        let is_on_it = |s: &&mut Sequence| s.adapter() == Some(replaced.id);
        match on_swap {
            OnSwap::Recompute => {
                // All give up their pages, so that none loses its place; the others find theirs in the prefix index.
                self.scheduler.requeue_all(&mut self.cache);
                let adapter = self.adapters.find(name).ok();
                for sequence in self.scheduler.all_mut().filter(is_on_it) {
                    sequence.set_adapter(adapter);
                    sequence.index_under(&self.model, self.version);
                    sequence.forget_prompt_logprobs();
                }
                Ok(Vec::new())
            }
            OnSwap::Abort => {
                let ids: Vec<RequestId> = self.scheduler.all_mut().filter(is_on_it).map(|s| s.id()).collect();
                Ok(ids.into_iter().filter_map(|id| self.abort(id)).collect())
            }
            OnSwap::Keep | OnSwap::Finish => Ok(Vec::new()),
        }
    }

    /// Requests can no longer name an adapter; those that did finish on it. False when there is none of that name.
    pub fn remove_adapter(&mut self, name: &str) -> bool {
        self.adapters.remove(name)
    }

    /// Tells `runner` which requests it need not remember and which adapters nobody uses any more, and notices when it
    /// lost its pages. Call it before every `plan`.
    pub fn housekeep(&mut self, runner: &mut dyn StageRunner) {
        let generation = runner.generation();
        if self.generation != generation {
            self.generation = generation;
            self.lose_pages();
        }
        for id in self.scheduler.take_preempted() {
            runner.close(id);
        }
        if self.adapters.has_retired() {
            let used: BTreeSet<u32> = self.scheduler.all_mut().filter_map(|s| s.adapter()).collect();
            for id in self.adapters.take_unused(&used) {
                runner.remove_adapter(id);
            }
        }
    }

    /// One forward pass. Empty when there is nothing to do.
    pub fn step(&mut self, runner: &mut dyn StageRunner) -> Vec<RequestEvent> {
        self.housekeep(runner);
        let Some((batch, input)) = self.plan() else { return Vec::new() };
        let result = runner.forward(&batch, input);
        let events = self.complete(&batch, result);
        for event in events.iter().filter(|e| matches!(e.event, Event::Finished { .. })) {
            runner.close(event.request);
        }
        events
    }

    /// The next batch and its token ids `[T]`.
    pub fn plan(&mut self) -> Option<(Batch, Tensor)> {
        let drafter = self.drafter.as_deref_mut().filter(|_| self.draft_tokens > 0);
        let batch = self.scheduler.plan(&mut self.cache, drafter)?;
        let mut ids = Vec::with_capacity(batch.n_rows());
        let running: BTreeMap<RequestId, &Sequence> =
            self.scheduler.running().iter().map(|s| (s.id(), s)).collect();
        for planned in &batch.sequences {
            ids.extend(running[&planned.request].due_tokens(planned.rows as usize));
        }
        Some((batch, Tensor::from_ids(&ids)))
    }

    /// What became of a planned batch. A failure ends every request, waiting ones too: they would meet the same runner,
    /// and their callers can decide sooner. Nothing that was cached before it is used again.
    pub fn complete(&mut self, batch: &Batch, result: Result<StageOutput, StageError>) -> Vec<RequestEvent> {
        self.counted.steps += 1;
        self.counted.rows += batch.n_rows() as u64;
        match result.and_then(|output| self.sample(batch, &output)) {
            Ok(events) => events,
            Err(error) => self.fail(&error),
        }
    }

    /// Pages and sequences agree.
    ///
    /// # Panics
    /// When they do not, which is a bug of this crate.
    pub fn check_integrity(&self) {
        self.cache.check_integrity();
        for sequence in self.scheduler.running() {
            let pages = self.cache.pages(sequence.id()).len();
            assert!(pages >= self.cache.pages_for(sequence.cached()), "cached positions have pages");
        }
        for sequence in self.scheduler.waiting().iter() {
            assert!(self.cache.pages(sequence.id()).is_empty(), "waiting sequences hold no pages");
        }
    }
}
