//! The engine on a thread of its own, behind a handle that any number of tasks and threads may share.
//!
//! What bounds it: at most `queued_requests` requests in flight, one channel per request that holds its whole answer,
//! and a command queue as long as both together. A stream that is dropped aborts its request before the next step.

mod engine_thread;
pub mod head;
#[cfg(feature = "local")]
pub mod membership;
pub mod stage_server;
#[cfg(feature = "local")]
pub mod weights;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use swarm_wire::{PolicyVersion, RequestId};
use tokio::sync::{mpsc, oneshot};

use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::error::{ConfigError, RequestError, StageError};
use crate::metrics::EngineMetrics;
use crate::request::{Completion, Event, FinishReason, Request, RequestLimits};
use crate::stage::{StageRunner, StageShape};
use engine_thread::EngineThread;

/// Commands beside submissions that may wait for the end of a step.
const SPARE_COMMANDS: usize = 64;

/// A running engine. Clones share it; it ends when the last handle is gone and every answer is finished.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    shared: Arc<Shared>,
}

/// What handle and thread both see.
#[derive(Debug)]
struct Shared {
    shape: StageShape,
    limits: RequestLimits,
    queued_requests: usize,
    in_flight: AtomicUsize,
    next_request: AtomicU64,
    version: AtomicU64,
    aborted: Mutex<BTreeSet<RequestId>>,
    metrics: Mutex<EngineMetrics>,
}

enum Command {
    Submit { id: RequestId, request: Request, events: mpsc::Sender<Event>, submitted: Instant },
    Swap { version: PolicyVersion, adapter: Option<Vec<u8>>, reply: oneshot::Sender<Result<(), StageError>> },
}

impl EngineHandle {
    /// Starts an engine over `runner`.
    ///
    /// # Errors
    /// A configuration outside its ranges.
    ///
    /// # Panics
    /// When the operating system gives no thread.
    pub fn start(runner: Box<dyn StageRunner>, config: EngineConfig) -> Result<Self, ConfigError> {
        let shape = runner.shape();
        let queued_requests = config.queued_requests;
        let engine = Engine::new(shape, runner.log_softmax(), config)?;
        let shared = Arc::new(Shared {
            shape,
            limits: engine.limits(),
            queued_requests,
            in_flight: AtomicUsize::new(0),
            next_request: AtomicU64::new(0),
            version: AtomicU64::new(engine.version().0),
            aborted: Mutex::default(),
            metrics: Mutex::new(engine.metrics()),
        });
        let (commands, queue) = sync_channel(queued_requests + SPARE_COMMANDS);
        let thread = EngineThread::new(engine, runner, queue, Arc::clone(&shared));
        std::thread::Builder::new()
            .name("parallax-engine".into())
            .spawn(move || thread.run())
            .expect("the system gives one thread per engine");
        Ok(Self { commands, shared })
    }

    /// What the runner runs.
    pub fn shape(&self) -> StageShape {
        self.shared.shape
    }

    /// What requests must keep to.
    pub fn limits(&self) -> RequestLimits {
        self.shared.limits
    }

    /// Weights that the next step uses.
    pub fn version(&self) -> PolicyVersion {
        PolicyVersion(self.shared.version.load(Ordering::Acquire))
    }

    /// Counters, as of the last step.
    pub fn metrics(&self) -> EngineMetrics {
        self.shared.metrics.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Queues a request; its events come out of the stream. Never waits.
    ///
    /// # Errors
    /// A request that cannot be served, or a full queue.
    pub fn submit(&self, request: Request) -> Result<TokenStream, RequestError> {
        request.validate(&self.shared.limits)?;
        let limit = self.shared.queued_requests;
        self.shared
            .in_flight
            .try_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < limit).then_some(n + 1))
            .map_err(|_| RequestError::QueueFull { queued: limit })?;
        let id = RequestId(self.shared.next_request.fetch_add(1, Ordering::Relaxed));
        // The answer and its ending fit into the channel: the engine never waits for a slow reader.
        let (events, stream) = mpsc::channel(request.token_allowance(&self.shared.limits) + 1);
        let command = Command::Submit { id, request, events, submitted: Instant::now() };
        match self.commands.try_send(command) {
            Ok(()) => Ok(TokenStream { id, events: stream, finished: false }),
            Err(refused) => {
                self.shared.in_flight.fetch_sub(1, Ordering::AcqRel);
                Err(match refused {
                    TrySendError::Full(_) => RequestError::QueueFull { queued: limit },
                    TrySendError::Disconnected(_) => RequestError::Stopped,
                })
            }
        }
    }

    /// Runs one request to its end on the calling thread, which must not belong to an async runtime.
    ///
    /// # Errors
    /// As [`Self::submit`]. A failure during the run is [`FinishReason::Error`] in the completion.
    pub fn generate_blocking(&self, request: Request) -> Result<Completion, RequestError> {
        let mut stream = self.submit(request)?;
        let mut completion = Completion::default();
        while let Some(event) = stream.next_blocking() {
            completion.take(event);
        }
        Ok(completion)
    }

    /// Runs one request to its end. Dropping the future aborts the request.
    ///
    /// # Errors
    /// As [`Self::generate_blocking`].
    pub async fn generate(&self, request: Request) -> Result<Completion, RequestError> {
        let mut stream = self.submit(request)?;
        let mut completion = Completion::default();
        while let Some(event) = stream.next().await {
            completion.take(event);
        }
        Ok(completion)
    }

    /// Ends a request before the next step; its stream gets [`FinishReason::Aborted`]. Unknown ids are ignored.
    pub fn abort(&self, id: RequestId) {
        if self.shared.in_flight.load(Ordering::Acquire) > 0 {
            self.shared.aborted.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        }
    }

    /// Replaces the adapter between two steps (`None`: the base model); tokens from then on carry `version`. Dropping
    /// the future does not undo the swap.
    ///
    /// # Errors
    /// An adapter that does not fit (the old one stays), or an engine that has stopped.
    pub async fn swap_adapter(
        &self,
        version: PolicyVersion,
        adapter: Option<Vec<u8>>,
    ) -> Result<(), StageError> {
        self.send_swap(version, adapter)?.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// As [`Self::swap_adapter`], waiting on the calling thread, which must not belong to an async runtime.
    ///
    /// # Errors
    /// As [`Self::swap_adapter`].
    pub fn swap_adapter_blocking(
        &self,
        version: PolicyVersion,
        adapter: Option<Vec<u8>>,
    ) -> Result<(), StageError> {
        self.send_swap(version, adapter)?.blocking_recv().unwrap_or_else(|_| Err(stopped()))
    }

    fn send_swap(
        &self,
        version: PolicyVersion,
        adapter: Option<Vec<u8>>,
    ) -> Result<oneshot::Receiver<Result<(), StageError>>, StageError> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Command::Swap { version, adapter, reply }).map_err(
            |refused| match refused {
                TrySendError::Full(_) => StageError::NotReady {
                    reason: "too many weight swaps are waiting for the end of a step".into(),
                },
                TrySendError::Disconnected(_) => stopped(),
            },
        )?;
        Ok(answer)
    }
}

fn stopped() -> StageError {
    StageError::NotReady { reason: "the engine has stopped".into() }
}

/// The events of one request. Dropping it aborts the request.
#[derive(Debug)]
pub struct TokenStream {
    id: RequestId,
    events: mpsc::Receiver<Event>,
    finished: bool,
}

impl TokenStream {
    /// The request, for [`EngineHandle::abort`].
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The next event; `None` after [`Event::Finished`]. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        if self.finished {
            return None;
        }
        let event = self.events.recv().await;
        Some(self.take(event))
    }

    /// As [`Self::next`], waiting on the calling thread, which must not belong to an async runtime.
    pub fn next_blocking(&mut self) -> Option<Event> {
        if self.finished {
            return None;
        }
        let event = self.events.blocking_recv();
        Some(self.take(event))
    }

    /// A closed channel without an ending means that the engine thread died: say so instead of ending silently.
    fn take(&mut self, event: Option<Event>) -> Event {
        let event = event.unwrap_or_else(|| Event::Finished {
            reason: FinishReason::Error,
            error: Some("the engine stopped in the middle of this request".into()),
        });
        self.finished = matches!(event, Event::Finished { .. });
        event
    }
}
