//! The async shell: [`Node`], its streams and its tensors. Sockets, clocks, files and threads live below here.
//!
//! A node has threads of its own for the network. What the application does in its handlers, however long it blocks, never
//! delays a keep-alive, so peers do not believe that a busy node has died.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use libp2p::PeerId as LibPeerId;
use libp2p::StreamProtocol;
use swarm_wire::{DecodeError, PeerId};
use tokio::sync::{broadcast, oneshot};

use self::connection::OpenError;
use self::driver::Command;
use self::shared::{Acceptor, Shared};
use crate::addr::{is_plausible, without_peer};
use crate::config::NodeConfig;
use crate::error::{CallError, DhtError, DialError, StartError, StreamError};
use crate::event::NetEvent;
use crate::links::LinkEstimate;
use crate::links::map::PairEstimate;
use crate::peers::{PathInfo, PeerInfo};
use crate::punch::reach::Reachability;
use crate::status::Status;
use crate::wire::method_is_valid;

mod behaviour;
mod boxed;
mod connection;
mod counters;
mod credit;
mod dht_store;
mod driver;
mod early;
mod frames;
mod gate;
mod gossip;
mod guess;
mod identity;
mod link_probe;
mod muxer;
mod news;
mod peers_file;
mod private_file;
mod punch;
mod quic;
mod records;
mod rendezvous;
mod rpc_client;
mod rpc_server;
mod served;
mod shared;
mod start;
mod stream;
mod streams;
mod swarm_key_file;
mod tcp;
mod tensor;
#[cfg(feature = "v1-compat")]
mod v1;

pub use counters::NetCounters;
pub use gossip::Subscription;
pub use identity::Identity;
pub use link_probe::LINK_PROTOCOL;
pub use rpc_client::{CallOptions, RPC_PROTOCOL};
pub use stream::{Stream, read_bytes, read_frame, read_length};
pub use swarm_key_file::{create_swarm_key, load_swarm_key};
pub use tensor::{Tensor, TensorReceiver, TensorSender};
#[cfg(feature = "v1-compat")]
pub use v1::V1;

/// multistream-select refuses longer names.
const PROTOCOL_NAME_MAX_BYTES: usize = 140;
/// Tries when a connection turns out to be gone before a stream was opened on it.
const OPEN_TRIES: usize = 3;

/// A node of the network. A cheap handle: clones speak for the same node, which stops when [`Node::shutdown`] is called or
/// the last clone is dropped. A handler that holds a clone keeps the node alive until `shutdown`.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    identity: Identity,
    /// Closed when the network threads have ended.
    ended: tokio::sync::watch::Receiver<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.stopped.cancel();
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({})", self.peer_id())
    }
}

impl Node {
    /// Starts a node and waits until it listens everywhere it should. Call it inside the tokio runtime on which the
    /// handlers are to run.
    ///
    /// Cancel safe: a start that is dropped leaves no node behind.
    ///
    /// # Errors
    /// When the configuration is out of range or an address cannot be listened on; a taken port is named.
    pub async fn start(identity: Identity, config: NodeConfig) -> Result<Self, StartError> {
        let (shared, ended) = start::start(&identity, config).await?;
        Ok(Self { inner: Arc::new(Inner { shared, identity, ended }) })
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }

    /// Who this node is.
    pub fn peer_id(&self) -> PeerId {
        self.shared().local.clone()
    }

    /// The key of this node, for signing statements.
    pub fn identity(&self) -> &Identity {
        &self.inner.identity
    }

    /// What the node was started with.
    pub fn config(&self) -> &NodeConfig {
        &self.shared().config
    }

    /// Addresses with `/p2p/` part under which this node listens, relayed ones included, the nearest first. Empty after
    /// a shutdown. Cancel safe.
    pub async fn listen_addrs(&self) -> Vec<String> {
        let (reply, answer) = oneshot::channel();
        if self.shared().command(Command::ListenAddrs { reply }).await.is_err() {
            return Vec::new();
        }
        answer.await.unwrap_or_default().iter().map(ToString::to_string).collect()
    }

    /// How this node can be reached: addresses that were tested, and what its NAT does to its ports, as far as peers tell where
    /// they see it. Empty after a shutdown.
    ///
    /// Cancel safe.
    pub async fn reachability(&self) -> Reachability {
        let (reply, answer) = oneshot::channel();
        if self.shared().command(Command::Reachability { reply }).await.is_err() {
            return Reachability::default();
        }
        answer.await.unwrap_or_default()
    }

    /// Connects to `addr`, with or without a `/p2p/` part. A peer that is connected already is returned at once.
    ///
    /// Cancel safe: a dial that has begun goes on.
    ///
    /// # Errors
    /// When the address is malformed, nobody answers, or somebody else does.
    pub async fn dial(&self, addr: &str) -> Result<PeerId, DialError> {
        let address = addr.parse().map_err(|error: libp2p::multiaddr::Error| DialError::Address {
            address: addr.to_owned(),
            reason: error.to_string(),
        })?;
        self.dialled(addr, |reply| Command::Dial { address, reply }).await
    }

    /// Connects to a peer wherever it can be found: at known addresses, then through the DHT.
    ///
    /// Cancel safe: a search that has begun goes on.
    ///
    /// # Errors
    /// When no address is known or none leads to the peer.
    pub async fn connect(&self, peer: &PeerId) -> Result<(), DialError> {
        self.shared().connection(peer).await.map(|_| ())
    }

    async fn dialled(
        &self,
        target: &str,
        command: impl FnOnce(driver::Reply<PeerId, DialError>) -> Command,
    ) -> Result<PeerId, DialError> {
        let (reply, answer) = oneshot::channel();
        self.shared().command(command(reply)).await?;
        let timeout = self.shared().config.liveness.dial_timeout;
        match tokio::time::timeout(timeout, answer).await {
            Ok(result) => result.unwrap_or(Err(DialError::ShutDown)),
            Err(_) => Err(DialError::Timeout { target: target.to_owned(), timeout }),
        }
    }

    /// Remembers an address of a peer without dialling it, for [`Node::call`] and [`Node::open_stream`].
    ///
    /// # Errors
    /// When the address is malformed.
    pub fn add_address(&self, peer: &PeerId, addr: &str) -> Result<(), DialError> {
        let bad = |reason: String| DialError::Address { address: addr.to_owned(), reason };
        let address: libp2p::Multiaddr =
            addr.parse().map_err(|error: libp2p::multiaddr::Error| bad(error.to_string()))?;
        let text = without_peer(&address).to_string();
        self.shared().table().handle_address(self.shared().now(), peer, &text);
        Ok(())
    }

    /// As [`Node::add_address`] for an address that another peer named. It is kept only when it is no nearer than where
    /// `told_by` was met: a peer on the internet cannot point this node at its own machine or network.
    ///
    /// # Errors
    /// When the address is malformed, implausible, or `told_by` is not connected.
    pub fn learn_address(&self, peer: &PeerId, addr: &str, told_by: &PeerId) -> Result<(), DialError> {
        let bad = |reason: &str| DialError::Address { address: addr.to_owned(), reason: reason.to_owned() };
        let Some(connection) = self.shared().table().best(told_by) else {
            return Err(bad("who named it is not connected"));
        };
        if !is_plausible(addr, &connection.address) {
            return Err(bad("it is nearer than the peer that named it"));
        }
        self.add_address(peer, addr)
    }

    /// Addresses of a peer that are known, the most promising first.
    pub fn addresses(&self, peer: &PeerId) -> Vec<String> {
        self.shared().table().addresses(peer)
    }

    /// Closes every connection to `peer`. Bootstrap peers are dialled again.
    ///
    /// Cancel safe: all are closed or none.
    pub async fn disconnect(&self, peer: &PeerId) {
        let _ = self.shared().command(Command::Disconnect { peer: peer.clone() }).await;
    }

    /// Calls `method` of `peer` and waits for the answer. A peer that is not connected is dialled first. When the path of the
    /// call breaks and another one stands, the call goes on there; the peer runs it once.
    ///
    /// Cancel safe: dropping the future cancels the call at the peer.
    ///
    /// # Errors
    /// See [`CallError`]; a peer whose last connection breaks during the call is [`CallError::ConnectionLost`] as soon as
    /// that is noticed: it may have done the work.
    pub async fn call(
        &self,
        peer: &PeerId,
        method: &str,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        rpc_client::call(self.shared(), peer, method, body, &CallOptions::new(timeout)).await
    }

    /// Like [`Node::call`], with more said about how.
    ///
    /// Cancel safe: dropping the future cancels the call at the peer.
    ///
    /// # Errors
    /// As [`Node::call`].
    pub async fn call_with(
        &self,
        peer: &PeerId,
        method: &str,
        body: Bytes,
        options: &CallOptions,
    ) -> Result<Bytes, CallError> {
        rpc_client::call(self.shared(), peer, method, body, options).await
    }

    /// Asks the first of `peers`; asks the next one when there is no answer after `hedge_after` (by default what 95 % of the
    /// calls to that peer took), or as soon as it fails; takes the first answer and cancels the others. For work that may be
    /// done more than once.
    ///
    /// Cancel safe: dropping the future cancels every call.
    ///
    /// # Errors
    /// The last error when all fail, and INVALID_ARGUMENT at once.
    pub async fn call_any(
        &self,
        peers: &[PeerId],
        method: &str,
        body: Bytes,
        hedge_after: Option<Duration>,
        options: &CallOptions,
    ) -> Result<Bytes, CallError> {
        rpc_client::call_any(self.shared(), peers, method, &body, hedge_after, options).await
    }

    /// Opens a stream of `protocol` (begins with '/') to `peer`, which is dialled if need be.
    ///
    /// Cancel safe: a stream that comes too late is closed.
    ///
    /// # Errors
    /// When the peer cannot be reached or does not speak the protocol.
    pub async fn open_stream(&self, peer: &PeerId, protocol: &str) -> Result<Stream, StreamError> {
        let name = protocol_name(protocol)?;
        for _ in 0..OPEN_TRIES {
            let connection = self.shared().connection(peer).await.map_err(|error| match error {
                DialError::ShutDown => StreamError::ShutDown,
                error => StreamError::Unreachable { peer: peer.clone(), reason: error.to_string() },
            })?;
            match connection.open(name.clone()).await {
                Ok(stream) => return Ok(Stream::new(Arc::clone(self.shared()), connection, stream)),
                Err(OpenError::Lost) => {}
                Err(OpenError::Unsupported) => {
                    return Err(StreamError::Unsupported {
                        peer: peer.clone(),
                        protocol: protocol.to_owned(),
                    });
                }
                Err(OpenError::Timeout) => {
                    return Err(StreamError::Timeout { peer: peer.clone(), protocol: protocol.to_owned() });
                }
                Err(OpenError::Io(source)) => return Err(StreamError::Io { peer: peer.clone(), source }),
            }
        }
        Err(StreamError::ConnectionLost { peer: peer.clone() })
    }

    /// Answers calls of `method` with `handler`, which runs on the runtime that started the node, once per call and under
    /// the caller's deadline. Replaces an earlier handler.
    ///
    /// # Panics
    /// When the name is empty or longer than 256 bytes.
    pub fn handle<H, F>(&self, method: &str, handler: H)
    where
        H: Fn(PeerId, Bytes) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Bytes, Status>> + Send + 'static,
    {
        assert!(method_is_valid(method), "method name {method:?} is empty or longer than 256 bytes");
        self.shared().set_method(method, Some(Arc::new(move |peer, body| Box::pin(handler(peer, body)))));
    }

    /// Stops answering calls of `method`.
    pub fn unhandle(&self, method: &str) {
        self.shared().set_method(method, None);
    }

    /// Gives incoming streams of `protocol` (begins with '/') to `handler`, one task each. Replaces an earlier handler.
    ///
    /// # Errors
    /// When the protocol name cannot be used.
    pub fn handle_stream<H, F>(&self, protocol: &str, handler: H) -> Result<(), StreamError>
    where
        H: Fn(PeerId, Stream) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let handler: shared::StreamHandler = Arc::new(move |peer, stream| Box::pin(handler(peer, stream)));
        self.shared().set_acceptor(protocol_name(protocol)?, Some(Acceptor::Application(handler)));
        Ok(())
    }

    /// Refuses further streams of `protocol`; those that are open stay.
    pub fn unhandle_stream(&self, protocol: &str) {
        if let Ok(name) = protocol_name(protocol) {
            self.shared().set_acceptor(name, None);
        }
    }

    /// Every connection to `peer`, the one that new calls and streams use first.
    pub fn paths(&self, peer: &PeerId) -> Vec<PathInfo> {
        let connections = self.shared().table().connections(peer);
        connections
            .iter()
            .map(|c| PathInfo {
                key: c.key,
                relayed: c.is_relayed(),
                dialled: c.dialled,
                address: c.address.clone(),
            })
            .collect()
    }

    /// Closes one connection to `peer`. Calls go on over the others, streams on it end.
    ///
    /// Cancel safe: the connection is closed or not.
    pub async fn close_path(&self, peer: &PeerId, key: u64) {
        let found = self.shared().table().connections(peer).into_iter().find(|c| c.key == key);
        if let Some(connection) = found {
            let _ = self.shared().command(Command::Close { id: connection.id }).await;
        }
    }

    /// What the node has done since its start.
    pub fn counters(&self) -> NetCounters {
        self.shared().counters.read()
    }

    /// Every peer that is connected or remembered.
    pub fn peers(&self) -> Vec<PeerInfo> {
        let now = self.shared().now();
        self.shared()
            .table()
            .infos(|state, best| state.links().estimate(now, best.map(|c| c.path)).map(|link| link.rtt_ms))
    }

    /// Peers that are connected.
    pub fn connected_peers(&self) -> Vec<PeerId> {
        self.shared().table().connected_peers()
    }

    /// Whether a connection to `peer` stands.
    pub fn is_connected(&self, peer: &PeerId) -> bool {
        self.shared().table().connected(peer).is_some()
    }

    /// What is known about the path to a peer that is in use (until it was measured, about the one that answered last);
    /// `None` before the first measurement, which comes within a round trip of connecting. Look at the age: a peer that left
    /// keeps its last estimate.
    pub fn link(&self, peer: &PeerId) -> Option<LinkEstimate> {
        self.links(peer).into_iter().next()
    }

    /// What is known about every path to a peer that was ever measured, the one in use first. A path that is gone keeps its
    /// last estimate, with its age.
    pub fn links(&self, peer: &PeerId) -> Vec<LinkEstimate> {
        let (state, in_use) = {
            let table = self.shared().table();
            let Some(state) = table.known_state(peer) else { return Vec::new() };
            (state, table.best(peer).map(|connection| connection.path))
        };
        state.links().estimates(self.shared().now(), in_use)
    }

    /// What is known about the path from `a` to `b` that is in use, whoever they are: measured where this node is one of
    /// them, else heard from them, else predicted from where in the network they are. `None` where nothing is known yet.
    pub fn link_between(&self, a: &PeerId, b: &PeerId) -> Option<PairEstimate> {
        self.links_between(a, b).into_iter().next()
    }

    /// As [`Node::link_between`] of every path, the one in use first.
    pub fn links_between(&self, a: &PeerId, b: &PeerId) -> Vec<PairEstimate> {
        let local = &self.shared().local;
        let measured = match (a == local, b == local) {
            (true, false) => self.links(b),
            (false, true) => self.links(a),
            _ => Vec::new(),
        };
        let now = self.shared().now();
        self.shared().news.lock().links.paths(now, a, b, &measured)
    }

    /// Events from now on. A receiver that lags behind by more than 1024 events is told so and loses the oldest.
    pub fn events(&self) -> broadcast::Receiver<NetEvent> {
        self.shared().events.subscribe()
    }

    /// Announces in the DHT that this node has what `key` names, and again every few hours. With nobody there yet the
    /// announcement waits for the first peer.
    ///
    /// Cancel safe: an announcement that has begun goes on, but is not made again where nobody's answer came through.
    ///
    /// # Errors
    /// When the query is not answered in time or too much is announced.
    pub async fn provide(&self, key: &[u8]) -> Result<(), DhtError> {
        self.query(|reply| Command::Provide { key: key.to_vec(), reply }).await
    }

    /// Stops announcing `key`; what others know expires by itself.
    ///
    /// Cancel safe: it is taken back or not.
    pub async fn stop_providing(&self, key: &[u8]) {
        let _ = self.shared().command(Command::StopProviding { key: key.to_vec() }).await;
    }

    /// Peers that announced `key`, at most 64.
    ///
    /// Cancel safe: a question that has been asked is answered to nobody.
    ///
    /// # Errors
    /// When the node was shut down or runs too many queries.
    pub async fn providers(&self, key: &[u8]) -> Result<Vec<PeerId>, DhtError> {
        self.query(|reply| Command::Providers { key: key.to_vec(), reply }).await
    }

    /// Stores a record of at most 64 KiB in the DHT, where anybody may put another one in its place: what nobody else may
    /// change goes to [`Node::publish_record`].
    /// Like the other queries it waits, at most ten seconds, for peers that have just connected to say what they are, and
    /// is made again, at most three times, where nobody's answer came through.
    ///
    /// Cancel safe: the record is stored or not; what has begun goes on, but is not made again.
    ///
    /// # Errors
    /// When no peer stored it.
    pub async fn put_record(&self, key: &[u8], value: Vec<u8>) -> Result<(), DhtError> {
        self.query(|reply| Command::PutRecord { key: key.to_vec(), value, reply }).await
    }

    /// Reads a record from the DHT; `None` when nobody has it. The first answer counts, whoever gave it: what was stored with
    /// [`Node::publish_record`] is read with [`Node::published_record`].
    ///
    /// Cancel safe: a question that has been asked is answered to nobody.
    ///
    /// # Errors
    /// When the query is not answered in time.
    pub async fn get_record(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DhtError> {
        self.query(|reply| Command::GetRecord { key: key.to_vec(), reply }).await
    }

    async fn query<T>(
        &self,
        command: impl FnOnce(driver::Reply<T, DhtError>) -> Command,
    ) -> Result<T, DhtError> {
        let (reply, answer) = oneshot::channel();
        self.shared().command(command(reply)).await.map_err(|_| DhtError::ShutDown)?;
        answer.await.unwrap_or(Err(DhtError::ShutDown))
    }

    /// Takes no further calls (they are answered UNAVAILABLE), waits until those that run have been answered but no longer
    /// than `at_most`, gives the answers half a second to arrive, and shuts down. Returns how many calls were cut off.
    ///
    /// Not cancel safe: a node whose drain was dropped takes no calls and runs on until it is shut down.
    pub async fn drain(&self, at_most: Duration) -> usize {
        let shared = self.shared();
        shared.draining.store(true, std::sync::atomic::Ordering::Relaxed);
        let (until, mut running) = (shared.now() + at_most, shared.calls_served.subscribe());
        let _ = tokio::time::timeout(at_most, running.wait_for(|n| *n == 0)).await;
        let cut_off = *running.borrow();
        // The last answers were handed to the connections, which drop what they still hold when they are closed.
        let linger = until.saturating_sub(shared.now()).min(driver::GOODBYE);
        let mut events = self.events();
        let left =
            async { while !shared.table().connected_peers().is_empty() && events.recv().await.is_ok() {} };
        let _ = tokio::time::timeout(linger, left).await;
        self.shutdown().await;
        cut_off
    }

    /// Says goodbye to every peer, forgets every handler and stops the node; returns when its threads have ended.
    /// Cancel safe: the node stops all the same.
    pub async fn shutdown(&self) {
        self.shared().stopped.cancel();
        self.shared().forget_handlers();
        let mut ended = self.inner.ended.clone();
        while ended.changed().await.is_ok() {}
    }
}

fn protocol_name(protocol: &str) -> Result<StreamProtocol, StreamError> {
    let bad = || StreamError::BadProtocol { protocol: protocol.chars().take(200).collect() };
    if protocol.len() > PROTOCOL_NAME_MAX_BYTES {
        return Err(bad());
    }
    StreamProtocol::try_from_owned(protocol.to_owned()).map_err(|_| bad())
}

fn wire_peer(peer: &LibPeerId) -> Result<PeerId, DecodeError> {
    PeerId::from_bytes(&peer.to_bytes())
}

fn libp2p_peer(peer: &PeerId) -> Result<LibPeerId, DecodeError> {
    LibPeerId::from_bytes(peer.as_bytes()).map_err(|error| DecodeError::invalid("peer id", error))
}
