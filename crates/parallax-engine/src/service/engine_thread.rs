//! The loop of the engine thread: take commands, drop what nobody waits for, run a step, hand out events.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, PoisonError, atomic::Ordering};
use std::time::{Duration, Instant};

use swarm_wire::RequestId;
use tokio::sync::mpsc;

use super::{Command, Shared, Swap, Weights};
use crate::config::OnSwap;
use crate::engine::Engine;
use crate::error::StageError;
use crate::metrics::Latencies;
use crate::pace::Pace;
use crate::request::{Event, FinishReason, RequestEvent, Usage};
use crate::stage::{Recovery, StageRunner};

/// Between two attempts while a lost stage is being replaced.
const RETRY: Duration = Duration::from_millis(20);

/// A request whose stream is being fed.
struct Listener {
    events: mpsc::Sender<Event>,
    submitted: Instant,
    /// When its first row ran.
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

pub(super) struct EngineThread {
    engine: Engine,
    runner: Box<dyn StageRunner>,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    listeners: BTreeMap<RequestId, Listener>,
    latencies: Latencies,
    pace: Pace,
    /// Longest wait for a replacement.
    patience: Duration,
    /// Since when a stage is missing, and how that was noticed.
    interrupted: Option<(Instant, StageError)>,
    /// Waits until every request that came before it is finished; so do the commands behind it.
    pending: Option<Swap>,
    /// False once every handle is gone.
    accepting: bool,
}

impl EngineThread {
    pub(super) fn new(
        engine: Engine,
        runner: Box<dyn StageRunner>,
        commands: Receiver<Command>,
        shared: Arc<Shared>,
        pace: Pace,
        patience: Duration,
    ) -> Self {
        Self {
            engine,
            runner,
            commands,
            shared,
            listeners: BTreeMap::new(),
            latencies: Latencies::default(),
            pace,
            patience,
            interrupted: None,
            pending: None,
            accepting: true,
        }
    }

    pub(super) fn run(mut self) {
        while self.accepting || self.engine.is_busy() || self.pending.is_some() {
            self.take_commands();
            self.abort_unwanted();
            if self.engine.is_busy() {
                self.step();
            } else {
                self.publish();
            }
        }
    }

    /// Takes everything that waits; waits itself when there is nothing else to do.
    fn take_commands(&mut self) {
        while self.accepting || self.pending.is_some() {
            if self.pending.is_some() {
                if self.engine.is_busy() {
                    return;
                }
                self.pending.take().into_iter().for_each(|swap| self.swap(swap));
                continue;
            }
            let command = if self.engine.is_busy() {
                match self.commands.try_recv() {
                    Err(TryRecvError::Empty) => return,
                    received => received.ok(),
                }
            } else {
                self.interrupted = None;
                self.publish();
                self.commands.recv().ok()
            };
            match command {
                Some(command) => self.obey(command),
                None => self.accepting = false,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { ids, request, events, submitted } => {
                for (id, events) in ids.iter().zip(events) {
                    let (started, first_token, last_token) = (None, None, None);
                    let listener = Listener { events, submitted, started, first_token, last_token };
                    self.listeners.insert(*id, listener);
                }
                if let Err(refused) = self.engine.add_as(&ids, &request) {
                    let refusal = |request| {
                        let error = Some(refused.clone().into());
                        let (reason, usage) = (FinishReason::Error, Usage::default());
                        RequestEvent { request, event: Event::Finished { reason, error, usage } }
                    };
                    self.deliver(ids.into_iter().map(refusal).collect());
                }
            }
            Command::Swap(swap) if swap.on_swap == OnSwap::Finish && self.engine.is_busy() => {
                self.pending = Some(swap);
            }
            Command::Swap(swap) => self.swap(swap),
            Command::AddAdapter { name, adapter, on_swap, reply } => {
                let added = self.engine.add_adapter_as(&mut *self.runner, &name, adapter, on_swap);
                self.publish_adapters();
                let _ = reply.send(added.map(|aborted| self.close(aborted)));
            }
            Command::RemoveAdapter { name, reply } => {
                self.engine.remove_adapter(&name);
                self.publish_adapters();
                let _ = reply.send(Ok(()));
            }
        }
    }

    fn publish_adapters(&self) {
        let names = self.engine.adapters().names().map(str::to_owned).collect();
        *self.shared.adapters.lock().unwrap_or_else(PoisonError::into_inner) = names;
    }

    /// Between two steps. A caller that no longer waits does not undo it.
    fn swap(&mut self, swap: Swap) {
        let Swap { version, weights, on_swap, reply } = swap;
        let done = match weights {
            Weights::Adapter(adapter) => self.runner.set_adapter(version, adapter.as_ref()),
            Weights::Runner(runner) => self.replace(runner),
        };
        if done.is_ok() {
            if on_swap == OnSwap::Abort {
                let aborted = self.engine.abort_all();
                self.close(aborted);
            }
            self.engine.set_version_as(version, on_swap);
            self.shared.version.store(version.0, Ordering::Release);
            tracing::info!(%version, "weights swapped");
        }
        let _ = reply.send(done);
    }

    /// Hands out the ends of requests that no step ended.
    fn close(&mut self, events: Vec<RequestEvent>) {
        events.iter().for_each(|event| self.runner.close(event.request));
        self.deliver(events);
    }

    /// Another runner under the same requests: its pages are empty. Resident adapters go along.
    fn replace(&mut self, mut runner: Box<dyn StageRunner>) -> Result<(), StageError> {
        let (has, gets) = (self.runner.shape(), runner.shape());
        if has != gets {
            let reason = format!("the new weights have another shape: {gets:?}, not {has:?}");
            return Err(StageError::Unfit { reason });
        }
        self.engine.housekeep(&mut *self.runner);
        self.engine.hand_adapters_to(&mut *runner)?;
        runner.take_over();
        self.runner = runner;
        self.engine.lose_pages();
        Ok(())
    }

    fn abort_unwanted(&mut self) {
        let mut aborted =
            std::mem::take(&mut *self.shared.aborted.lock().unwrap_or_else(PoisonError::into_inner));
        aborted.extend(self.listeners.iter().filter(|(_, l)| l.events.is_closed()).map(|(id, _)| *id));
        let mut unknown = BTreeSet::new();
        for id in aborted {
            if let Some(event) = self.engine.abort(id) {
                self.runner.close(id);
                self.deliver(vec![event]);
            } else {
                unknown.insert(id);
            }
        }
        // Requests that were submitted but not taken yet are still among the commands; `in_flight` rises before anybody
        // can know their ids.
        if !unknown.is_empty() && self.shared.in_flight.load(Ordering::Acquire) > self.listeners.len() {
            self.shared.aborted.lock().unwrap_or_else(PoisonError::into_inner).append(&mut unknown);
        }
    }

    /// A stage is missing, and there is time left for others to take its place.
    fn must_wait(&self) -> bool {
        self.interrupted.as_ref().is_some_and(|(since, _)| since.elapsed() < self.patience)
    }

    fn step(&mut self) {
        if self.must_wait() && self.runner.recovery() == Recovery::Pending {
            return std::thread::sleep(RETRY);
        }
        let started = Instant::now();
        self.engine.limit_rows(self.pace.rows());
        self.engine.housekeep(&mut *self.runner);
        let Some((batch, input)) = self.engine.plan() else { return self.publish() };
        let forward_started = Instant::now();
        for sequence in &batch.sequences {
            if let Some(listener) = self.listeners.get_mut(&sequence.request) {
                listener.started.get_or_insert(forward_started);
            }
        }
        let mut result = self.runner.forward(&batch, input);
        let forward = forward_started.elapsed();
        if let Err(error @ (StageError::Lost { .. } | StageError::NotReady { .. })) = &result {
            let mut ended = Vec::new();
            let (_, first) = self.interrupted.get_or_insert_with(|| {
                tracing::warn!(%error, step = batch.step, "a stage is lost");
                ended = self.engine.postpone(&batch, error);
                (forward_started, error.clone())
            });
            // What was lost says more than that it has not come back.
            result = Err(first.clone());
            self.deliver(ended);
            if self.must_wait() && self.runner.recovery() != Recovery::None {
                self.engine.lose_pages();
                return std::thread::sleep(RETRY);
            }
        }
        if let Some((since, _)) = self.interrupted.take().filter(|_| result.is_ok()) {
            tracing::info!(waited_ms = since.elapsed().as_millis(), "requests in flight go on");
        }
        if let Err(error) = &result {
            tracing::warn!(%error, step = batch.step, "stage failed, every request in flight ends");
        }
        let events = self.engine.complete(&batch, result);
        for event in &events {
            if matches!(event.event, Event::Finished { .. }) {
                self.runner.close(event.request);
            }
        }
        self.latencies.step_rows.observe(batch.n_rows() as f64);
        self.pace.observe(batch.n_rows(), started.elapsed());
        self.latencies.forward_seconds += forward.as_secs_f64();
        self.latencies.step_seconds += started.elapsed().as_secs_f64();
        self.deliver(events);
    }

    /// Hands out events. Whoever has heard of one finds it counted.
    fn deliver(&mut self, events: Vec<RequestEvent>) {
        let now = Instant::now();
        for event in &events {
            self.observe(event, now);
        }
        self.publish();
        for RequestEvent { request, event } in events {
            let finished = matches!(event, Event::Finished { .. });
            if let Some(listener) = self.listeners.get(&request) {
                // Fails only when the reader is gone, which the next `abort_unwanted` sees.
                let _ = listener.events.try_send(event);
            }
            if finished {
                self.listeners.remove(&request);
            }
        }
    }

    fn observe(&mut self, event: &RequestEvent, now: Instant) {
        let Some(listener) = self.listeners.get_mut(&event.request) else { return };
        match &event.event {
            Event::Token(_) => {
                match listener.last_token {
                    None => {
                        self.latencies.time_to_first_token.observe((now - listener.submitted).as_secs_f64());
                        // Answers that share a prompt have no row of their own before.
                        listener.started.get_or_insert(now);
                        listener.first_token = Some(now);
                    }
                    Some(last) => self.latencies.inter_token.observe((now - last).as_secs_f64()),
                }
                listener.last_token = Some(now);
            }
            Event::Prompt { .. } => {}
            Event::Finished { usage, .. } => {
                if let Some(started) = listener.started {
                    let seconds = |from: Instant, to: Instant| (to - from).as_secs_f64();
                    let last = listener.last_token.unwrap_or(now);
                    self.latencies.queue.observe(seconds(listener.submitted, started));
                    self.latencies.inference.observe(seconds(started, last));
                    if let Some(first) = listener.first_token {
                        self.latencies.prefill.observe(seconds(started, first));
                        let decode = seconds(first, last);
                        self.latencies.decode.observe(decode);
                        if usage.completion_tokens > 1 {
                            let gaps = (usage.completion_tokens - 1) as f64;
                            self.latencies.time_per_token.observe(decode / gaps);
                        }
                    }
                    self.latencies.prompt_tokens.observe(usage.prompt_tokens as f64);
                    self.latencies.generated_tokens.observe(usage.completion_tokens as f64);
                }
                self.latencies.end_to_end.observe((now - listener.submitted).as_secs_f64());
                // Free for the next request before the caller hears of the end.
                self.shared.in_flight.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    fn publish(&self) {
        let mut metrics = self.engine.metrics();
        metrics.latencies = self.latencies.clone();
        *self.shared.metrics.lock().unwrap_or_else(PoisonError::into_inner) = metrics;
    }
}

#[cfg(test)]
#[path = "../../tests/support/toy.rs"]
mod toy;

#[cfg(test)]
mod tests {
    use super::toy::ToyModel;
    use crate::config::EngineConfig;
    use crate::request::{Event, FinishReason, Request};
    use crate::service::EngineHandle;

    #[test]
    fn an_abort_of_what_is_still_a_command_is_kept() {
        let model = Box::new(ToyModel::new(64, 4));
        let (handle, mut thread) = EngineHandle::assemble(model, EngineConfig::default(), None).unwrap();
        // Something to do, so that taking commands does not wait.
        let _other = handle.submit(Request::greedy(vec![9], 50)).unwrap();
        thread.take_commands();
        let mut stream = handle.submit(Request::greedy(vec![1, 2], 50)).unwrap();
        handle.abort(stream.id());
        thread.abort_unwanted();
        thread.take_commands();
        thread.abort_unwanted();
        let event = stream.next_blocking();
        assert!(matches!(event, Some(Event::Finished { reason: FinishReason::Aborted, .. })), "{event:?}");
        assert!(handle.shared.aborted.lock().unwrap().is_empty());
    }
}
