//! One connection to a peer, as the tasks outside the swarm see it: open a stream, call over it, learn that it is gone.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use libp2p::StreamProtocol;
use libp2p::swarm::ConnectionId;
use swarm_wire::PeerId;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::rpc_client::Lanes;
use super::shared::{PeerState, Shared};
use crate::config::Limits;
use crate::links::{LinkEstimator, PathKind};

/// Stream requests that wait for the connection's task to take them; further callers wait.
const OPEN_QUEUE: usize = 64;

/// Why a connection gave no stream.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// The connection is gone.
    Lost,
    /// The peer does not speak the protocol.
    Unsupported,
    /// The peer did not answer in time.
    Timeout,
    /// The stream broke while it was opened.
    Io(std::io::Error),
}

/// Asks the connection's handler for a stream. It is sent boxed: a queue has room for 32 from the beginning.
#[derive(Debug)]
pub(crate) struct OpenRequest {
    pub(crate) protocol: StreamProtocol,
    pub(crate) reply: oneshot::Sender<Result<libp2p::Stream, OpenError>>,
}

/// See the module.
pub(crate) struct Connection {
    /// Older connections have smaller keys.
    pub(crate) key: u64,
    pub(crate) id: ConnectionId,
    pub(crate) peer: PeerId,
    pub(crate) path: PathKind,
    /// Whether this end dialled.
    pub(crate) dialled: bool,
    /// When it was made.
    pub(crate) made: Duration,
    /// Where the connection leads.
    pub(crate) address: String,
    pub(crate) state: Arc<PeerState>,
    pub(crate) lanes: Lanes,
    /// Cancelled when the connection is gone.
    pub(crate) closed: CancellationToken,
    /// Places for incoming streams of the application that run.
    pub(crate) running: Arc<Semaphore>,
    /// A try for a direct connection that the peer asked for.
    pub(crate) punching: Semaphore,
    opens: mpsc::Sender<Box<OpenRequest>>,
    redundant: AtomicBool,
    blurs: AtomicBool,
    incoming: AtomicUsize,
    incoming_limit: usize,
    last_use_ms: AtomicU64,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({} {}{})", self.peer, self.key, if self.is_relayed() { " relayed" } else { "" })
    }
}

impl Connection {
    pub(crate) fn new(
        key: u64,
        id: ConnectionId,
        peer: PeerId,
        made: Duration,
        (dialled, address): (bool, String),
        state: Arc<PeerState>,
        limits: &Limits,
    ) -> (Arc<Self>, mpsc::Receiver<Box<OpenRequest>>) {
        let (opens, requests) = mpsc::channel(OPEN_QUEUE);
        let connection = Arc::new(Self {
            key,
            id,
            peer,
            path: PathKind::of(&address),
            dialled,
            made,
            address,
            state,
            lanes: Lanes::default(),
            closed: CancellationToken::new(),
            running: Arc::new(Semaphore::new(limits.streams_per_connection)),
            punching: Semaphore::new(1),
            opens,
            redundant: AtomicBool::new(false),
            blurs: AtomicBool::new(false),
            incoming: AtomicUsize::new(0),
            incoming_limit: limits.streams_per_connection + limits.waiting_streams_per_connection,
            last_use_ms: AtomicU64::new(0),
        });
        (connection, requests)
    }

    /// Whether it goes through a relay.
    pub(crate) fn is_relayed(&self) -> bool {
        self.path.is_relayed()
    }

    /// Tells or asks what is measured of the connection's path.
    pub(crate) fn measured<T>(&self, tell: impl FnOnce(&mut LinkEstimator) -> T) -> T {
        tell(self.state.links().path(self.path))
    }

    /// Opens a stream. Dropping the future is safe: a stream that comes too late is closed.
    pub(crate) async fn open(&self, protocol: StreamProtocol) -> Result<libp2p::Stream, OpenError> {
        let (reply, answer) = oneshot::channel();
        let opened = async {
            let request = Box::new(OpenRequest { protocol, reply });
            self.opens.send(request).await.map_err(|_| OpenError::Lost)?;
            answer.await.unwrap_or(Err(OpenError::Lost))
        };
        tokio::select! {
            result = opened => result,
            () = self.closed.cancelled() => Err(OpenError::Lost),
        }
    }

    /// Does `work` as long as the connection and its node stand; `None` when one of them ended first.
    pub(crate) fn until_closed<T>(
        &self,
        shared: &Shared,
        work: impl Future<Output = T> + Send,
    ) -> impl Future<Output = Option<T>> {
        // An async function would have room for it twice, as long as it is waited for.
        let work = Box::pin(work);
        async move {
            tokio::select! {
                done = work => Some(done),
                () = self.closed.cancelled() => None,
                () = shared.stopped.cancelled() => None,
            }
        }
    }

    /// Everything that waits on this connection ends now.
    pub(crate) fn fail(&self) {
        self.closed.cancel();
        self.lanes.close();
    }

    /// Whether a better connection to the same peer stands.
    pub(crate) fn is_redundant(&self) -> bool {
        self.redundant.load(Ordering::Relaxed)
    }

    /// Whether what its probes find would be mixed into the estimate of a better connection of the same kind.
    pub(crate) fn blurs(&self) -> bool {
        self.blurs.load(Ordering::Relaxed)
    }

    /// Compares it to the connection that is used.
    pub(crate) fn set_beside(&self, best: Option<&Self>) {
        let redundant = best.is_none_or(|best| best.key != self.key);
        self.redundant.store(redundant, Ordering::Relaxed);
        self.blurs.store(redundant && best.is_some_and(|best| best.path == self.path), Ordering::Relaxed);
    }

    /// Takes a place for one more incoming stream; `None` when all are taken, waiting ones included.
    pub(crate) fn admit_incoming(self: &Arc<Self>) -> Option<Incoming> {
        let before = self.incoming.fetch_add(1, Ordering::Relaxed);
        let place = Incoming(Arc::clone(self));
        (before < self.incoming_limit).then_some(place)
    }

    /// Notes that a call used the connection at `now_ms`.
    pub(crate) fn touch(&self, now_ms: u64) {
        self.last_use_ms.store(now_ms, Ordering::Relaxed);
    }

    /// When a call last used the connection.
    pub(crate) fn last_use_ms(&self) -> u64 {
        self.last_use_ms.load(Ordering::Relaxed)
    }
}

/// A place of an incoming stream, given back on drop.
pub(crate) struct Incoming(Arc<Connection>);

impl Drop for Incoming {
    fn drop(&mut self) {
        self.0.incoming.fetch_sub(1, Ordering::Relaxed);
    }
}
