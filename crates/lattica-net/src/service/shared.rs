//! What every task of a node shares: the peer table, the handlers, the clock and the ways to the swarm and to the
//! application.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use libp2p::StreamProtocol;
use rand::RngExt as _;
use swarm_wire::PeerId;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::counters::{self, Counters};
use super::credit::Credit;
use super::driver::Command;
use super::news::News;
use super::quic::Adopted;
use super::served::Served;
use super::stream::Stream;
use super::tcp::AdoptedTcp;
use crate::config::NodeConfig;
use crate::error::DialError;
use crate::event::NetEvent;
use crate::links::PeerLinks;
use crate::peers::PeerTable;
use crate::punch::guess::{Tries, Way};
use crate::rpc::hedge::Latencies;
use crate::rpc::once::Outgoing;
use crate::rpc::{Admission, Refusal};
use crate::status::Status;
use crate::wire::Hello;

/// What a handler returns.
pub(crate) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
/// Answers calls of one method.
pub(crate) type Method = Arc<dyn Fn(PeerId, Bytes) -> BoxFuture<Result<Bytes, Status>> + Send + Sync>;
/// Takes incoming streams of one protocol.
pub(crate) type StreamHandler = Arc<dyn Fn(PeerId, Stream) -> BoxFuture<()> + Send + Sync>;

/// Who gets an incoming stream.
#[derive(Clone)]
pub(crate) enum Acceptor {
    /// The RPC server.
    Rpc,
    /// Direct connections instead of relayed ones.
    Punch,
    /// Ports of NATs that have to be guessed.
    Guess(Way),
    /// The link probes.
    Link,
    /// The application.
    Application(StreamHandler),
}

/// The protocols that this node accepts. Replaced as a whole, so that readers hold no lock.
#[derive(Clone, Default)]
pub(crate) struct Acceptors {
    pub(crate) protocols: Vec<StreamProtocol>,
    by_name: HashMap<StreamProtocol, Acceptor>,
}

impl Acceptors {
    pub(crate) fn get(&self, protocol: &StreamProtocol) -> Option<&Acceptor> {
        self.by_name.get(protocol)
    }
}

/// What is kept for each peer beside its addresses.
#[derive(Default)]
pub(crate) struct PeerState {
    links: Mutex<PeerLinks>,
    admission: OnceLock<Mutex<Admission>>,
    credit: OnceLock<Credit>,
    served: Served,
    outgoing: Mutex<Outgoing>,
    /// How long calls take whose caller would ask another peer after a while, by method.
    latencies: Mutex<HashMap<String, Latencies>>,
    /// The peer's incarnation when it last said hello; 0 before.
    incarnation: AtomicU64,
    /// The peer's question for news that is being answered.
    asking: OneAtATime,
    /// The peer's question to this node as a rendezvous point.
    meeting: OneAtATime,
    /// When ports were guessed together with the peer, for each way.
    guesses: Mutex<[Tries; Way::ALL.len()]>,
}

/// One permit.
struct OneAtATime(Semaphore);

impl Default for OneAtATime {
    fn default() -> Self {
        Self(Semaphore::new(1))
    }
}

/// Methods of one peer whose durations are kept; there are few that are asked of several peers.
const TIMED_METHODS_MAX: usize = 16;

/// A number for a call, given up on drop.
pub(crate) struct CallNumber<'a> {
    outgoing: &'a Mutex<Outgoing>,
    pub(crate) call_id: u64,
}

impl CallNumber<'_> {
    /// Every call to the peer with a smaller number is over.
    pub(crate) fn done_below(&self) -> u64 {
        lock(self.outgoing).done_below()
    }
}

impl Drop for CallNumber<'_> {
    fn drop(&mut self) {
        lock(self.outgoing).end(self.call_id);
    }
}

impl PeerState {
    pub(crate) fn links(&self) -> MutexGuard<'_, PeerLinks> {
        lock(&self.links)
    }

    /// The permit for a question for news of the peer.
    pub(crate) fn asking(&self) -> &Semaphore {
        &self.asking.0
    }

    /// The permit for a question of the peer to this node as a rendezvous point.
    pub(crate) fn meeting(&self) -> &Semaphore {
        &self.meeting.0
    }

    /// Whether ports may be guessed together with the peer now; it counts then.
    pub(crate) fn may_guess(&self, way: Way, now: Duration) -> bool {
        lock(&self.guesses)[way as usize].begin(now)
    }

    /// Asks for a place for a call of the peer with a body of `body_bytes`; it is given back on drop.
    pub(crate) fn admit(self: &Arc<Self>, shared: &Arc<Shared>, body_bytes: usize) -> Result<Held, Refusal> {
        let limits = &shared.config.limits;
        let admission = self
            .admission
            .get_or_init(|| Mutex::new(Admission::new(limits.calls_per_peer, limits.call_bytes_per_peer)));
        lock(admission).admit(body_bytes)?;
        shared.calls_served.send_modify(|n| *n += 1);
        counters::add(&shared.counters.calls_admitted);
        Ok(Held { state: Arc::clone(self), shared: Arc::clone(shared), n_bytes: body_bytes })
    }

    /// What the peer lets us have under way there.
    pub(crate) fn credit(&self, config: &NodeConfig) -> &Credit {
        self.credit.get_or_init(|| Credit::new(config.limits.outgoing_calls_per_peer))
    }

    /// The peer said who it is and what it grants.
    pub(crate) fn handle_hello(&self, config: &NodeConfig, hello: &Hello) {
        self.incarnation.store(hello.incarnation, Ordering::Relaxed);
        self.credit(config).handle_hello(hello);
    }

    /// The peer's incarnation; 0 when it is not known.
    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Relaxed)
    }

    /// A number for a call to the peer, out of those of the whole node.
    pub(crate) fn call_number(&self, shared: &Shared) -> CallNumber<'_> {
        // Under the lock: a smaller number must not begin after a larger one has told the peer what is over.
        let mut outgoing = lock(&self.outgoing);
        let call_id = shared.next_call.fetch_add(1, Ordering::Relaxed);
        outgoing.begin(call_id);
        CallNumber { outgoing: &self.outgoing, call_id }
    }

    /// The peer's calls here.
    pub(crate) fn served(&self) -> &Served {
        &self.served
    }

    /// A call of `method` that might have been asked of another peer took `duration`.
    pub(crate) fn handle_duration(&self, method: &str, duration: Duration) {
        let mut latencies = lock(&self.latencies);
        if let Some(known) = latencies.get_mut(method) {
            known.handle_call(duration);
        } else if latencies.len() < TIMED_METHODS_MAX {
            latencies.entry(method.to_owned()).or_default().handle_call(duration);
        }
    }

    /// What 95 % of the calls of `method` to the peer take, once that is known.
    pub(crate) fn usual_duration(&self, method: &str) -> Option<Duration> {
        lock(&self.latencies).get(method).and_then(Latencies::p95)
    }

    /// Whether somebody uses the state, or it holds answers that the peer may come back for.
    pub(crate) fn is_in_use(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1 || self.served.keeps_answers()
    }
}

/// A call of a peer and the bytes that it holds, until its answer has left. A node that is about to stop waits for it.
pub(crate) struct Held {
    state: Arc<PeerState>,
    shared: Arc<Shared>,
    n_bytes: usize,
}

impl Held {
    /// The body is used up; the answer takes `n_bytes`.
    pub(crate) fn resize(&mut self, n_bytes: usize) {
        if let Some(admission) = self.state.admission.get() {
            lock(admission).resize(self.n_bytes, n_bytes);
        }
        self.n_bytes = n_bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(admission) = self.state.admission.get() {
            lock(admission).finish(self.n_bytes);
        }
        self.shared.calls_served.send_modify(|n| *n -= 1);
    }
}

/// See the module.
pub(crate) struct Shared {
    pub(crate) local: PeerId,
    pub(crate) config: NodeConfig,
    /// The application's runtime: handlers run there.
    pub(crate) application: Handle,
    /// The node's own runtime: bytes move there.
    pub(crate) network: Handle,
    pub(crate) events: broadcast::Sender<NetEvent>,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) stopped: CancellationToken,
    /// Set when no further calls are taken.
    pub(crate) draining: AtomicBool,
    /// Tells this start of the node from others with the same key.
    pub(crate) incarnation: u64,
    /// Counts RPC streams that peers opened.
    pub(crate) streams_served: AtomicU64,
    /// The number of this node's next call, whoever it is for.
    pub(crate) next_call: AtomicU64,
    /// Calls of peers that are not answered yet.
    pub(crate) calls_served: watch::Sender<usize>,
    /// For those who watch over the node.
    pub(crate) counters: Counters,
    /// What was heard of the network.
    pub(crate) news: News,
    /// Addresses at which peers see this node, the most promising first.
    pub(crate) seen_at: watch::Sender<Vec<String>>,
    /// Sockets that were made elsewhere and lead to peers.
    pub(crate) adopted: Arc<Adopted>,
    /// The same for TCP.
    pub(crate) adopted_tcp: Arc<AdoptedTcp>,
    /// Ports are guessed with one peer at a time.
    pub(crate) guessing: Semaphore,
    started: Instant,
    table: Mutex<PeerTable<Arc<Connection>, Arc<PeerState>>>,
    acceptors: RwLock<Arc<Acceptors>>,
    methods: RwLock<HashMap<String, Method>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({})", self.local)
    }
}

impl Shared {
    pub(crate) fn new(
        local: PeerId,
        config: NodeConfig,
        application: Handle,
        network: Handle,
        commands: mpsc::Sender<Command>,
    ) -> Self {
        let table =
            PeerTable::new(config.limits.peers, config.limits.addresses_per_peer, PeerState::is_in_use);
        Self {
            news: News::new(local.clone()),
            local,
            config,
            application,
            network,
            events: broadcast::channel(1024).0,
            commands,
            stopped: CancellationToken::new(),
            draining: AtomicBool::new(false),
            incarnation: rand::rng().random_range(1..=u64::MAX),
            streams_served: AtomicU64::new(0),
            next_call: AtomicU64::new(1),
            calls_served: watch::channel(0).0,
            counters: Counters::default(),
            seen_at: watch::channel(Vec::new()).0,
            adopted: Arc::default(),
            adopted_tcp: Arc::default(),
            guessing: Semaphore::new(1),
            started: Instant::now(),
            table: Mutex::new(table),
            acceptors: RwLock::default(),
            methods: RwLock::default(),
        }
    }

    /// Time since the node was made: the clock of everything pure.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(crate) fn table(&self) -> MutexGuard<'_, PeerTable<Arc<Connection>, Arc<PeerState>>> {
        lock(&self.table)
    }

    /// Tells everybody who listens. Nobody listening is fine.
    pub(crate) fn emit(&self, event: NetEvent) {
        tracing::debug!(node = %self.local.short(), ?event, "network event");
        let _ = self.events.send(event);
    }

    pub(crate) fn acceptors(&self) -> Arc<Acceptors> {
        Arc::clone(&self.acceptors.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_acceptor(&self, protocol: StreamProtocol, acceptor: Option<Acceptor>) {
        let mut guard = self.acceptors.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Acceptors::clone(&guard);
        next.protocols.retain(|p| *p != protocol);
        match acceptor {
            Some(acceptor) => {
                next.protocols.push(protocol.clone());
                next.by_name.insert(protocol, acceptor);
            }
            None => {
                next.by_name.remove(&protocol);
            }
        }
        *guard = Arc::new(next);
    }

    pub(crate) fn method(&self, name: &str) -> Option<Method> {
        self.methods.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    pub(crate) fn set_method(&self, name: &str, method: Option<Method>) {
        let mut methods = self.methods.write().unwrap_or_else(PoisonError::into_inner);
        match method {
            Some(method) => methods.insert(name.to_owned(), method),
            None => methods.remove(name),
        };
    }

    /// Forgets every handler: they may hold handles of this node, which would keep it alive in a circle.
    pub(crate) fn forget_handlers(&self) {
        self.methods.write().unwrap_or_else(PoisonError::into_inner).clear();
        *self.acceptors.write().unwrap_or_else(PoisonError::into_inner) = Arc::default();
    }

    /// The best connection to `peer`; dials known addresses when none stands.
    pub(crate) async fn connection(&self, peer: &PeerId) -> Result<Arc<Connection>, DialError> {
        if let Some(connection) = self.table().best(peer) {
            return Ok(connection);
        }
        let (reply, answer) = oneshot::channel();
        self.command(Command::Connect { peer: peer.clone(), reply }).await?;
        let timeout = self.config.liveness.dial_timeout;
        match tokio::time::timeout(timeout, answer).await {
            Ok(Ok(result)) => result?,
            Ok(Err(_)) => return Err(DialError::ShutDown),
            Err(_) => return Err(DialError::Timeout { target: format!("peer {peer}"), timeout }),
        };
        self.table().best(peer).ok_or_else(|| DialError::Unreachable {
            target: format!("peer {peer}"),
            reason: "the connection was lost again at once".to_owned(),
        })
    }

    pub(crate) async fn command(&self, command: Command) -> Result<(), DialError> {
        self.commands.send(command).await.map_err(|_| DialError::ShutDown)
    }
}

/// Locks without minding that another holder panicked: every holder leaves the value usable at each step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
