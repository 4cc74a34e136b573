//! `Engine`: requests in, batches out to a runner, tokens back.
//!
//! Getters: `limits`, `version`, `metrics`, `is_busy`. Commands: `add`, `abort`, `set_version`. Either call `step`, which
//! does a whole forward pass, or `plan`, run the batch elsewhere, and `complete` it; never plan twice without completing.

use std::collections::BTreeMap;

use swarm_wire::{PolicyVersion, RequestId};

use crate::batch::{Batch, StageOutput, Tensor};
use crate::batching::Scheduler;
use crate::config::{EngineConfig, OnSwap};
use crate::error::{ConfigError, RequestError, StageError};
use crate::kv_cache::KvCache;
use crate::metrics::EngineMetrics;
use crate::request::{Event, FinishReason, Request, RequestEvent, RequestLimits, Token};
use crate::sampler::Sampler;
use crate::sequence::Sequence;
use crate::stage::{LogSoftmax, StageRunner, StageShape};

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
        Ok(Self {
            shape,
            queued_requests: config.queued_requests,
            on_swap: config.on_swap,
            scheduler: Scheduler::new(config),
            cache: KvCache::new(shape.n_pages, shape.page_tokens),
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
        EngineMetrics {
            running: self.scheduler.running().len(),
            waiting: self.scheduler.waiting().count(),
            preemptions: self.scheduler.preemptions(),
            pages: self.cache.n_pages(),
            pages_used: self.cache.n_pages() - self.cache.n_free(),
            ..self.counted.clone()
        }
    }

    /// Queues a request under a new id.
    ///
    /// # Errors
    /// A request that cannot be served, or a full queue.
    pub fn add(&mut self, request: Request) -> Result<RequestId, RequestError> {
        let id = RequestId(self.next_request);
        self.add_as(id, request)?;
        Ok(id)
    }

    /// Queues a request under an id of the caller's, greater than all before.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_as(&mut self, id: RequestId, request: Request) -> Result<(), RequestError> {
        let limits = self.limits();
        request.validate(&limits)?;
        if self.scheduler.len() >= self.queued_requests {
            return Err(RequestError::QueueFull { queued: self.queued_requests });
        }
        self.next_request = self.next_request.max(id.0 + 1);
        self.counted.prompt_tokens += request.prompt.len() as u64;
        let allowance = request.token_allowance(&limits);
        self.scheduler.add(Sequence::new(id, request, allowance));
        Ok(())
    }

    /// Ends a request early; its pages are free at once. `None` when there is no such request. Not between `plan` and
    /// `complete`.
    pub fn abort(&mut self, id: RequestId) -> Option<RequestEvent> {
        self.scheduler.remove(id)?;
        self.cache.release(id);
        Some(self.finished(id, FinishReason::Aborted, None))
    }

    /// The runner has new weights. Cached keys and values of the old ones are dropped, if so configured.
    pub fn set_version(&mut self, version: PolicyVersion) {
        self.version = version;
        if self.on_swap == OnSwap::Recompute {
            self.scheduler.requeue_all(&mut self.cache);
        }
    }

    /// One forward pass. Empty when there is nothing to do.
    pub fn step(&mut self, runner: &mut dyn StageRunner) -> Vec<RequestEvent> {
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
        let batch = self.scheduler.plan(&mut self.cache)?;
        let mut ids = Vec::with_capacity(batch.n_rows());
        let running: BTreeMap<RequestId, &Sequence> =
            self.scheduler.running().iter().map(|s| (s.id(), s)).collect();
        for planned in &batch.sequences {
            ids.extend_from_slice(running[&planned.request].due_tokens(planned.rows as usize));
        }
        Some((batch, Tensor::from_ids(&ids)))
    }

    /// What became of a planned batch. A failure ends every request, waiting ones too: they would meet the same runner,
    /// and their callers can decide sooner.
    pub fn complete(&mut self, batch: &Batch, result: Result<StageOutput, StageError>) -> Vec<RequestEvent> {
        self.counted.steps += 1;
        self.counted.rows += batch.n_rows() as u64;
        match result.and_then(|output| self.sample(batch, &output)) {
            Ok(events) => events,
            Err(error) => self.fail(&error),
        }
    }

    fn sample(&mut self, batch: &Batch, output: &StageOutput) -> Result<Vec<RequestEvent>, StageError> {
        let (wanted, vocab) = (batch.n_wanted(), self.shape.vocab);
        let missing = |what: &str| StageError::Tensor {
            expected: format!("{what} of {wanted} rows"),
            got: "none".into(),
        };
        let logits = match &output.logits {
            Some(logits) => logits.to_f32_rows(wanted, vocab)?,
            None if wanted == 0 => Vec::new(),
            None => return Err(missing("logits")),
        };
        let hidden = match &output.hidden {
            Some(hidden) if batch.want_hidden => hidden.to_f32_rows(wanted, self.shape.hidden)?,
            None if batch.want_hidden => return Err(missing("hidden states")),
            _ => Vec::new(),
        };
        let mut events = Vec::with_capacity(wanted);
        let mut row = 0;
        for planned in &batch.sequences {
            let sequence =
                self.scheduler.running_mut(planned.request).expect("planned sequences are running");
            if !sequence.advance(planned.rows as usize) {
                continue;
            }
            let sampled = self.sampler.sample(
                &logits[row * vocab..(row + 1) * vocab],
                sequence.sampling(),
                sequence.tokens().len() as u64,
            );
            let rows = row * self.shape.hidden..(row + 1) * self.shape.hidden;
            let token = Token {
                id: sampled.id,
                logprob: sampled.logprob,
                sampled_logprob: sampled.sampled_logprob,
                version: self.version,
                hidden: sequence.capture_hidden().then(|| hidden[rows].to_vec()),
            };
            row += 1;
            sequence.push(token.id);
            let reason = if sequence.sampling().stop_ids.contains(&token.id) {
                Some(FinishReason::Stop)
            } else {
                sequence.is_full().then_some(FinishReason::Length)
            };
            self.counted.generated_tokens += 1;
            events.push(RequestEvent { request: planned.request, event: Event::Token(token) });
            if let Some(reason) = reason {
                self.scheduler.remove(planned.request);
                self.cache.release(planned.request);
                events.push(self.finished(planned.request, reason, None));
            }
        }
        Ok(events)
    }

    fn fail(&mut self, error: &StageError) -> Vec<RequestEvent> {
        let ended = self.scheduler.drain();
        ended
            .iter()
            .map(|sequence| {
                self.cache.release(sequence.id());
                self.finished(sequence.id(), FinishReason::Error, Some(error.to_string()))
            })
            .collect()
    }

    fn finished(&mut self, request: RequestId, reason: FinishReason, error: Option<String>) -> RequestEvent {
        self.counted.count_finished(reason);
        RequestEvent { request, event: Event::Finished { reason, error } }
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
        for sequence in self.scheduler.waiting() {
            assert!(self.cache.pages(sequence.id()).is_empty(), "waiting sequences hold no pages");
        }
    }
}
