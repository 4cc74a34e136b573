//! The loop of the engine thread: take commands, drop what nobody waits for, run a step, hand out events.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, PoisonError, atomic::Ordering};
use std::time::Instant;

use swarm_wire::{PolicyVersion, RequestId};
use tokio::sync::mpsc;

use super::{Command, Shared};
use crate::engine::Engine;
use crate::error::StageError;
use crate::metrics::Latencies;
use crate::request::{Event, FinishReason, RequestEvent};
use crate::stage::StageRunner;

/// A request whose stream is being fed.
struct Listener {
    events: mpsc::Sender<Event>,
    submitted: Instant,
    last_token: Option<Instant>,
}

pub(super) struct EngineThread {
    engine: Engine,
    runner: Box<dyn StageRunner>,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    /// By the engine's own ids; the second map leads there from the ids that callers hold.
    listeners: BTreeMap<RequestId, Listener>,
    latencies: Latencies,
    /// False once every handle is gone.
    accepting: bool,
}

impl EngineThread {
    pub(super) fn new(
        engine: Engine,
        runner: Box<dyn StageRunner>,
        commands: Receiver<Command>,
        shared: Arc<Shared>,
    ) -> Self {
        let (listeners, latencies) = (BTreeMap::new(), Latencies::default());
        Self { engine, runner, commands, shared, listeners, latencies, accepting: true }
    }

    pub(super) fn run(mut self) {
        while self.accepting || self.engine.is_busy() {
            self.take_commands();
            self.abort_unwanted();
            if self.engine.is_busy() {
                self.step();
            }
            self.publish();
        }
    }

    /// Takes everything that waits; waits itself when there is nothing else to do.
    fn take_commands(&mut self) {
        while self.accepting {
            let command = if self.engine.is_busy() {
                match self.commands.try_recv() {
                    Err(TryRecvError::Empty) => return,
                    received => received.ok(),
                }
            } else {
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
            Command::Submit { id, request, events, submitted } => {
                let listener = Listener { events, submitted, last_token: None };
                self.listeners.insert(id, listener);
                if let Err(refused) = self.engine.add_as(id, request) {
                    let error = Some(refused.to_string());
                    self.deliver(RequestEvent {
                        request: id,
                        event: Event::Finished { reason: FinishReason::Error, error },
                    });
                }
            }
            Command::Swap { version, adapter, reply } => {
                // A caller that no longer waits does not undo the swap.
                let _ = reply.send(self.swap(version, adapter.as_deref()));
            }
        }
    }

    fn swap(&mut self, version: PolicyVersion, adapter: Option<&[u8]>) -> Result<(), StageError> {
        self.runner.set_adapter(version, adapter)?;
        self.engine.set_version(version);
        self.shared.version.store(version.0, Ordering::Release);
        tracing::info!(%version, adapter_bytes = adapter.map_or(0, <[u8]>::len), "weights swapped");
        Ok(())
    }

    fn abort_unwanted(&mut self) {
        let mut aborted =
            std::mem::take(&mut *self.shared.aborted.lock().unwrap_or_else(PoisonError::into_inner));
        aborted.extend(self.listeners.iter().filter(|(_, l)| l.events.is_closed()).map(|(id, _)| *id));
        for id in aborted {
            if let Some(event) = self.engine.abort(id) {
                self.runner.close(id);
                self.deliver(event);
            }
        }
    }

    fn step(&mut self) {
        let started = Instant::now();
        let planned = self.engine.plan();
        let Some((batch, input)) = planned else { return };
        let forward_started = Instant::now();
        let result = self.runner.forward(&batch, input);
        let forward = forward_started.elapsed();
        if let Err(error) = &result {
            tracing::warn!(%error, step = batch.step, "stage failed, every request in flight ends");
        }
        for event in self.engine.complete(&batch, result) {
            if matches!(event.event, Event::Finished { .. }) {
                self.runner.close(event.request);
            }
            self.deliver(event);
        }
        self.latencies.forward_seconds += forward.as_secs_f64();
        self.latencies.step_seconds += started.elapsed().as_secs_f64();
    }

    fn deliver(&mut self, event: RequestEvent) {
        let Some(listener) = self.listeners.get_mut(&event.request) else { return };
        let now = Instant::now();
        match &event.event {
            Event::Token(_) => {
                match listener.last_token {
                    None => {
                        self.latencies.time_to_first_token.observe((now - listener.submitted).as_secs_f64())
                    }
                    Some(last) => self.latencies.inter_token.observe((now - last).as_secs_f64()),
                }
                listener.last_token = Some(now);
                // Fails only when the reader is gone, which the next `abort_unwanted` sees.
                let _ = listener.events.try_send(event.event);
            }
            Event::Finished { .. } => {
                self.latencies.end_to_end.observe((now - listener.submitted).as_secs_f64());
                // Free for the next request before the caller hears of the end.
                self.shared.in_flight.fetch_sub(1, Ordering::AcqRel);
                if let Some(listener) = self.listeners.remove(&event.request) {
                    let _ = listener.events.try_send(event.event);
                }
            }
        }
    }

    fn publish(&self) {
        let mut metrics = self.engine.metrics();
        metrics.latencies = self.latencies.clone();
        *self.shared.metrics.lock().unwrap_or_else(PoisonError::into_inner) = metrics;
    }
}
