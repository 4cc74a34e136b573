//! The engine on a thread of its own, behind a handle that any number of tasks and threads may share.
//!
//! What bounds it: at most `queued_requests` requests in flight, one channel per request that holds its whole answer,
//! and a command queue as long as both together. A stream that is dropped aborts its request before the next step.

mod engine_thread;
#[cfg(feature = "swarm")]
pub mod head;
#[cfg(feature = "hub")]
pub mod hub;
#[cfg(all(feature = "local", feature = "swarm"))]
pub mod membership;
#[cfg(feature = "swarm")]
pub mod stage_server;
#[cfg(all(feature = "local", feature = "swarm"))]
pub mod weights;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use swarm_wire::{PolicyVersion, RequestId};
use tokio::sync::{mpsc, oneshot};

use crate::adapter_file::{AdapterFile, AdapterParser};
use crate::config::{EngineConfig, OnSwap};
use crate::engine::Engine;
use crate::error::{ConfigError, Failure, RequestError, StageError};
use crate::metrics::EngineMetrics;
use crate::pace::Pace;
use crate::request::{Completion, Event, FinishReason, Request, RequestLimits, Usage};
use crate::speculate::Drafter;
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
    on_swap: OnSwap,
    in_flight: AtomicUsize,
    next_request: AtomicU64,
    version: AtomicU64,
    aborted: Mutex<BTreeSet<RequestId>>,
    metrics: Mutex<EngineMetrics>,
    adapters: Mutex<BTreeSet<String>>,
    adapter_parser: Option<AdapterParser>,
    /// One adapter is read at a time, whoever brings how many.
    reading: tokio::sync::Mutex<()>,
}

type Reply = oneshot::Sender<Result<(), StageError>>;

enum Command {
    /// Answers to one prompt, with as many channels.
    Submit {
        ids: Vec<RequestId>,
        request: Box<Request>,
        events: Vec<mpsc::Sender<Event>>,
        submitted: Instant,
    },
    Swap(Swap),
    AddAdapter {
        name: String,
        adapter: AdapterFile,
        on_swap: OnSwap,
        reply: Reply,
    },
    RemoveAdapter {
        name: String,
        reply: Reply,
    },
}

/// A change of weights between two steps.
struct Swap {
    version: PolicyVersion,
    weights: Weights,
    on_swap: OnSwap,
    reply: Reply,
}

enum Weights {
    /// The runner's own adapter; `None` is the base model.
    Adapter(Option<AdapterFile>),
    /// All of them: another runner, loaded while the old one served.
    Runner(Box<dyn StageRunner>),
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
        Self::start_speculating(runner, config, None)
    }

    /// As [`Self::start`], with somebody who guesses tokens ([`crate::PromptLookup`], [`crate::DraftModel`]).
    ///
    /// # Errors
    /// As [`Self::start`].
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn start_speculating(
        runner: Box<dyn StageRunner>,
        config: EngineConfig,
        drafter: Option<Box<dyn Drafter>>,
    ) -> Result<Self, ConfigError> {
        let (handle, thread) = Self::assemble(runner, config, drafter)?;
        std::thread::Builder::new()
            .name("parallax-engine".into())
            .spawn(move || thread.run())
            .expect("the system gives one thread per engine");
        Ok(handle)
    }

    fn assemble(
        runner: Box<dyn StageRunner>,
        config: EngineConfig,
        drafter: Option<Box<dyn Drafter>>,
    ) -> Result<(Self, EngineThread), ConfigError> {
        let shape = runner.shape();
        let queued_requests = config.queued_requests;
        let on_swap = config.on_swap;
        let pace = Pace::new(Duration::from_millis(config.step_ms));
        let patience = Duration::from_millis(config.patience_ms);
        let mut engine = Engine::new(shape, runner.log_softmax(), config)?;
        if let Some(drafter) = drafter {
            engine.set_drafter(drafter);
        }
        let shared = Arc::new(Shared {
            shape,
            limits: engine.limits(),
            queued_requests,
            in_flight: AtomicUsize::new(0),
            next_request: AtomicU64::new(0),
            version: AtomicU64::new(engine.version().0),
            aborted: Mutex::default(),
            metrics: Mutex::new(engine.metrics()),
            adapters: Mutex::default(),
            adapter_parser: runner.adapter_parser(),
            reading: tokio::sync::Mutex::default(),
            on_swap,
        });
        let (commands, queue) = sync_channel(queued_requests + SPARE_COMMANDS);
        let thread = EngineThread::new(engine, runner, queue, Arc::clone(&shared), pace, patience);
        Ok((Self { commands, shared }, thread))
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
        Ok(self.submit_n(request, 1)?.remove(0))
    }

    /// Queues `n` answers to one prompt, which is computed once where it can be ([`Engine::add_group`]). Answer `i` is that of the same request with `i` added to
    /// [`crate::SamplingParams::stream`]. Dropping one of the streams aborts that answer alone.
    ///
    /// # Errors
    /// As [`Self::submit`]; all or nothing.
    pub fn submit_n(&self, request: Request, n: usize) -> Result<Vec<TokenStream>, RequestError> {
        request.validate(&self.shared.limits)?;
        if let Some(name) = &request.adapter {
            let adapters = self.adapters();
            if !adapters.contains(name) {
                return Err(RequestError::unknown_adapter(name, adapters.iter().map(String::as_str)));
            }
        }
        let limit = self.shared.queued_requests;
        self.shared
            .in_flight
            .try_update(Ordering::AcqRel, Ordering::Acquire, |now| (now + n <= limit).then_some(now + n))
            .map_err(|_| RequestError::QueueFull { queued: limit })?;
        let first = self.shared.next_request.fetch_add(n as u64, Ordering::Relaxed);
        let ids: Vec<RequestId> = (first..).map(RequestId).take(n).collect();
        // The news of the prompt, answer and ending fit into the channel: the engine never waits for a slow reader.
        let room = request.token_allowance(&self.shared.limits) + 2;
        let (events, streams): (Vec<_>, Vec<_>) = ids
            .iter()
            .map(|&id| {
                let (events, stream) = mpsc::channel(room);
                (events, TokenStream { id, events: stream, finished: false })
            })
            .unzip();
        let command = Command::Submit { ids, request: Box::new(request), events, submitted: Instant::now() };
        match self.commands.try_send(command) {
            Ok(()) => Ok(streams),
            Err(refused) => {
                self.shared.in_flight.fetch_sub(n, Ordering::AcqRel);
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

    /// Replaces the adapter between two steps (`None`: the base model); tokens from then on carry `version`. What becomes of
    /// requests in flight is [`EngineConfig::on_swap`]. Dropping the future does not undo the swap.
    ///
    /// # Errors
    /// An adapter that does not fit (the old one stays), or an engine that has stopped.
    pub async fn swap_adapter(
        &self,
        version: PolicyVersion,
        adapter: Option<Vec<u8>>,
    ) -> Result<(), StageError> {
        self.swap_adapter_as(version, adapter, self.shared.on_swap).await
    }

    /// As [`Self::swap_adapter`], with what becomes of requests in flight this time.
    ///
    /// # Errors
    /// As [`Self::swap_adapter`].
    pub async fn swap_adapter_as(
        &self,
        version: PolicyVersion,
        adapter: Option<Vec<u8>>,
        on_swap: OnSwap,
    ) -> Result<(), StageError> {
        let adapter = match adapter {
            Some(bytes) => {
                Some(self.read(bytes).await.map_err(|reason| StageError::Adapter { version, reason })?)
            }
            None => None,
        };
        self.swap(version, Weights::Adapter(adapter), on_swap)?.await.unwrap_or_else(|_| Err(stopped()))
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
        let adapter = adapter.map(|bytes| self.read_here(bytes)).transpose();
        let adapter = adapter.map_err(|reason| StageError::Adapter { version, reason })?;
        self.swap(version, Weights::Adapter(adapter), self.shared.on_swap)?
            .blocking_recv()
            .unwrap_or_else(|_| Err(stopped()))
    }

    /// Replaces all weights between two steps by a runner that was loaded while the old one served; it must have the same
    /// shape. Requests in flight are computed again on it, or finish on the old one first ([`OnSwap::Finish`]). Resident
    /// adapters become resident in the new one.
    ///
    /// # Errors
    /// Another shape, a resident adapter that does not fit it (the old runner stays), or an engine that has stopped.
    pub async fn swap_weights(
        &self,
        version: PolicyVersion,
        runner: Box<dyn StageRunner>,
    ) -> Result<(), StageError> {
        self.swap_weights_as(version, runner, self.shared.on_swap).await
    }

    /// As [`Self::swap_weights`], with what becomes of requests in flight this time.
    ///
    /// # Errors
    /// As [`Self::swap_weights`].
    pub async fn swap_weights_as(
        &self,
        version: PolicyVersion,
        runner: Box<dyn StageRunner>,
        on_swap: OnSwap,
    ) -> Result<(), StageError> {
        self.swap(version, Weights::Runner(runner), on_swap)?.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// As [`Self::swap_weights`], waiting on the calling thread, which must not belong to an async runtime.
    ///
    /// # Errors
    /// As [`Self::swap_weights`].
    pub fn swap_weights_blocking(
        &self,
        version: PolicyVersion,
        runner: Box<dyn StageRunner>,
    ) -> Result<(), StageError> {
        self.swap(version, Weights::Runner(runner), self.shared.on_swap)?
            .blocking_recv()
            .unwrap_or_else(|_| Err(stopped()))
    }

    /// Makes an adapter resident, for requests that name it ([`Request::adapter`]). One of the same name is replaced, and
    /// its requests finish on the old one. Bytes are a PEFT safetensors file.
    ///
    /// # Errors
    /// An adapter that does not fit, a runner that holds one at a time, or an engine that has stopped.
    pub async fn add_adapter(&self, name: &str, adapter: Vec<u8>) -> Result<(), StageError> {
        self.add_adapter_as(name, adapter, OnSwap::Finish).await
    }

    /// As [`Self::add_adapter`], with what becomes of the requests on a replaced one: [`OnSwap::Recompute`] computes them
    /// again on the new one, [`OnSwap::Abort`] ends them; else they finish on the old one.
    ///
    /// # Errors
    /// As [`Self::add_adapter`].
    pub async fn add_adapter_as(
        &self,
        name: &str,
        adapter: Vec<u8>,
        on_swap: OnSwap,
    ) -> Result<(), StageError> {
        let adapter = self.read(adapter).await.map_err(|reason| misfit(&reason))?;
        self.send_adapter(name, adapter, on_swap)?.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// As [`Self::add_adapter`], waiting on the calling thread, which must not belong to an async runtime.
    ///
    /// # Errors
    /// As [`Self::add_adapter`].
    pub fn add_adapter_blocking(&self, name: &str, adapter: Vec<u8>) -> Result<(), StageError> {
        let adapter = self.read_here(adapter).map_err(|reason| misfit(&reason))?;
        self.send_adapter(name, adapter, OnSwap::Finish)?.blocking_recv().unwrap_or_else(|_| Err(stopped()))
    }

    /// From the next step on no request can name this adapter; those that did finish on it.
    ///
    /// # Errors
    /// An engine that has stopped or has too many commands to obey.
    pub fn remove_adapter(&self, name: &str) -> Result<(), StageError> {
        self.send_removal(name).map(|_| ())
    }

    /// As [`Self::remove_adapter`]; returns when no request can name it any more.
    ///
    /// # Errors
    /// As [`Self::remove_adapter`].
    pub async fn unload_adapter(&self, name: &str) -> Result<(), StageError> {
        self.send_removal(name)?.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Names of the resident adapters.
    pub fn adapters(&self) -> BTreeSet<String> {
        self.shared.adapters.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads an adapter on a thread of its own: neither the engine nor the caller's runtime waits.
    async fn read(&self, bytes: Vec<u8>) -> Result<AdapterFile, String> {
        let _turn = self.shared.reading.lock().await;
        let (reply, read) = oneshot::channel();
        let handle = self.clone();
        let thread = std::thread::Builder::new().name("adapter-reader".into());
        thread.spawn(move || reply.send(handle.read_here(bytes))).map_err(|e| e.to_string())?;
        read.await.unwrap_or_else(|_| Err("its reader has stopped".to_owned()))
    }

    fn read_here(&self, bytes: Vec<u8>) -> Result<AdapterFile, String> {
        match self.shared.adapter_parser {
            Some(parser) => AdapterFile::parsed_by(bytes, parser),
            None => Ok(AdapterFile::new(bytes)),
        }
    }

    fn send_adapter(
        &self,
        name: &str,
        adapter: AdapterFile,
        on_swap: OnSwap,
    ) -> Result<oneshot::Receiver<Result<(), StageError>>, StageError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::AddAdapter { name: name.to_owned(), adapter, on_swap, reply })?;
        Ok(answer)
    }

    fn send_removal(&self, name: &str) -> Result<oneshot::Receiver<Result<(), StageError>>, StageError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::RemoveAdapter { name: name.to_owned(), reply })?;
        Ok(answer)
    }

    fn swap(
        &self,
        version: PolicyVersion,
        weights: Weights,
        on_swap: OnSwap,
    ) -> Result<oneshot::Receiver<Result<(), StageError>>, StageError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Swap(Swap { version, weights, on_swap, reply }))?;
        Ok(answer)
    }

    fn send(&self, command: Command) -> Result<(), StageError> {
        self.commands.try_send(command).map_err(|refused| match refused {
            TrySendError::Full(_) => {
                StageError::NotReady { reason: "too many commands are waiting for the end of a step".into() }
            }
            TrySendError::Disconnected(_) => stopped(),
        })
    }
}

fn misfit(reason: &str) -> StageError {
    StageError::Unfit { reason: format!("the adapter does not fit: {reason}") }
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
            error: Some(Failure::Stopped),
            usage: Usage::default(),
        });
        self.finished = matches!(event, Event::Finished { .. });
        event
    }
}
