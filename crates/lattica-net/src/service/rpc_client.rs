//! Calls to peers. Small calls share a few long-lived streams per connection, which saves a negotiation per call; large
//! bodies have streams of their own, so that nothing small waits behind them.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt as _};
use futures::{AsyncReadExt, io::ReadHalf};
use libp2p::StreamProtocol;
use swarm_wire::PeerId;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};

use super::connection::{Connection, OpenError};
use super::credit::{LARGE_BODY_BYTES, LARGE_CALLS};
use super::frames::{FrameReader, OutFrame, STALL_TIMEOUT, write_frames};
use super::rpc_server;
use super::shared::{CallNumber, Shared, lock};
use crate::error::CallError;
use crate::rpc::CallTable;
use crate::status::{Status, StatusCode};
use crate::wire::{Header, Hello, method_is_valid};

/// The protocol of calls.
pub const RPC_PROTOCOL: StreamProtocol = StreamProtocol::new("/lattica/rpc/2.0.0");
/// Streams that small calls of one connection share.
const SMALL_LANES: usize = 2;
/// Streams for calls with large bodies, each for one call at a time.
const LARGE_LANES: usize = LARGE_CALLS;
/// Frames that wait for a stream's writer; further callers wait.
const FRAME_QUEUE: usize = 256;
/// Tries when a connection turns out to be gone before anything was sent on it, or stands and the peer, of which nothing is
/// known, ends the stream.
const TRIES: u32 = 3;
/// Times that one call is sent again because its path broke.
const RESENDS: u32 = 16;
/// How long a stream may be broken before its connection is taken for broken as well.
const BREAK_TIME: Duration = Duration::from_millis(200);

/// A second peer is asked after this long when it is not known how long calls to the first one take.
const HEDGE_AFTER: Duration = Duration::from_millis(100);

/// How a call is made.
#[derive(Debug, Clone)]
pub struct CallOptions {
    /// How long the caller waits.
    pub timeout: Duration,
    /// Doing the work twice does no harm: the call is repeated even when the peer may have restarted meanwhile.
    pub idempotent: bool,
    /// When the last connection to the peer is lost, try for this long to get one back. Zero: the call fails at once.
    pub reconnect_within: Duration,
}

impl CallOptions {
    /// A call that is made once and fails as soon as the peer is lost.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, idempotent: false, reconnect_within: Duration::ZERO }
    }
}

/// How a call ended.
enum Outcome {
    Answer(Option<Status>, Bytes),
    /// The stream ended.
    Lost,
    /// The peer sent what it must not send.
    Broken,
    /// The peer does not speak the protocol.
    Unsupported,
}

/// The RPC streams of one connection, opened when first needed.
pub(crate) struct Lanes {
    small: [Lane; SMALL_LANES],
    large: [Lane; LARGE_LANES],
    turn: AtomicUsize,
    /// Which large lanes are free.
    free: Mutex<Vec<usize>>,
    n_free: Semaphore,
}

impl Default for Lanes {
    fn default() -> Self {
        Self {
            small: Default::default(),
            large: Default::default(),
            turn: AtomicUsize::new(0),
            free: Mutex::new((0..LARGE_LANES).collect()),
            n_free: Semaphore::new(LARGE_LANES),
        }
    }
}

/// A large lane in use, given back on drop.
struct LargeLane<'a> {
    lanes: &'a Lanes,
    index: usize,
    _place: SemaphorePermit<'a>,
}

impl Drop for LargeLane<'_> {
    fn drop(&mut self) {
        lock(&self.lanes.free).push(self.index);
    }
}

#[derive(Default)]
struct Lane {
    current: Mutex<Option<Arc<LaneStream>>>,
    opening: tokio::sync::Mutex<()>,
}

/// One RPC stream that we opened.
struct LaneStream {
    frames: mpsc::Sender<OutFrame>,
    calls: Mutex<CallTable<oneshot::Sender<Outcome>>>,
    /// The incarnation of the peer, once it has said hello; 0 before.
    incarnation: watch::Sender<u64>,
    /// The peer has said that it does not speak the protocol.
    unsupported: AtomicBool,
}

impl Lanes {
    fn all(&self) -> impl Iterator<Item = &Lane> {
        self.small.iter().chain(&self.large)
    }

    /// The connection is gone: every call that waits on it ends now.
    pub(crate) fn close(&self) {
        for lane in self.all() {
            if let Some(stream) = lock(&lane.current).take() {
                stream.close(|| Outcome::Lost);
            }
        }
    }

    /// Lets streams without calls go, so that the connection may become idle.
    pub(crate) fn release_idle(&self) {
        for lane in self.all() {
            let mut current = lock(&lane.current);
            if current.as_ref().is_some_and(|stream| lock(&stream.calls).is_empty()) {
                *current = None;
            }
        }
    }

    fn small(&self) -> &Lane {
        &self.small[self.turn.fetch_add(1, Ordering::Relaxed) % SMALL_LANES]
    }

    /// Waits for a lane of its own.
    async fn large(&self) -> Option<LargeLane<'_>> {
        let place = self.n_free.acquire().await.ok()?;
        // The last one given back: its stream is most likely open.
        let index = lock(&self.free).pop()?;
        Some(LargeLane { lanes: self, index, _place: place })
    }
}

impl Lane {
    fn usable(&self) -> Option<Arc<LaneStream>> {
        lock(&self.current).as_ref().filter(|stream| !lock(&stream.calls).is_closed()).cloned()
    }

    async fn stream(
        &self,
        shared: &Arc<Shared>,
        connection: &Arc<Connection>,
    ) -> Result<Arc<LaneStream>, OpenError> {
        if let Some(stream) = self.usable() {
            return Ok(stream);
        }
        let _opening = self.opening.lock().await;
        if let Some(stream) = self.usable() {
            return Ok(stream);
        }
        let (reader, writer) = connection.open(RPC_PROTOCOL).await?.split();
        let (frames, queue) = mpsc::channel(FRAME_QUEUE);
        let hello = Header::Hello(Hello { incarnation: shared.incarnation, calls: 0, body_bytes: 0 });
        // The queue is empty: there is room.
        let _ = frames.try_send(OutFrame { header: hello.encode(), body: Bytes::new(), held: None });
        let stream = Arc::new(LaneStream {
            frames,
            calls: Mutex::default(),
            incarnation: watch::channel(0).0,
            unsupported: AtomicBool::new(false),
        });
        let writing = Arc::downgrade(&stream);
        shared.network.spawn(async move {
            if let Err(error) = write_frames(writer, queue).await {
                tracing::debug!(%error, "rpc stream: writing ended");
                if let Some(stream) = writing.upgrade() {
                    stream.close(|| Outcome::Lost);
                }
            }
        });
        let reading = read_answers(
            Arc::clone(shared),
            Arc::clone(connection),
            Arc::downgrade(&stream),
            FrameReader::new(reader, STALL_TIMEOUT),
        );
        shared.network.spawn(reading);
        *lock(&self.current) = Some(Arc::clone(&stream));
        // The connection may have been lost while the stream was opened.
        if connection.closed.is_cancelled() {
            connection.lanes.close();
            return Err(OpenError::Lost);
        }
        Ok(stream)
    }
}

impl LaneStream {
    fn close(&self, outcome: impl Fn() -> Outcome) {
        for completion in lock(&self.calls).close() {
            let _ = completion.send(outcome());
        }
        // Whoever waits for the peer's hello sees that none will come.
        self.incarnation.send_modify(|_| ());
    }
}

/// Gives answers to those who wait for them until the stream ends or nobody uses it any more.
async fn read_answers(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    stream: Weak<LaneStream>,
    mut reader: FrameReader<ReadHalf<libp2p::Stream>>,
) {
    let body_limit = shared.config.limits.body_bytes;
    loop {
        let incoming = read_answer(&mut reader, body_limit).await;
        let Some(stream) = stream.upgrade() else { return };
        match incoming {
            Ok(Some(Incoming::Answer(call_id, refusal, body))) => {
                connection.measured(|link| link.handle_received(shared.now(), body.len()));
                // A call that was given up meanwhile is not waiting any more: its answer is dropped.
                if let Some(completion) = lock(&stream.calls).remove(call_id) {
                    let _ = completion.send(Outcome::Answer(refusal, body));
                }
            }
            Ok(Some(Incoming::Hello(hello))) => {
                connection.state.handle_hello(&shared.config, &hello);
                stream.incarnation.send_replace(hello.incarnation);
            }
            Ok(None) => return stream.close(|| Outcome::Lost),
            Err(error) => {
                tracing::debug!(peer = %connection.peer.short(), %error, "rpc stream: reading ended");
                // The stream was opened without waiting for the peer's consent, see `early`.
                let unsupported = error.kind() == ErrorKind::Unsupported;
                stream.unsupported.store(unsupported, Ordering::Relaxed);
                return stream.close(|| match error.kind() {
                    ErrorKind::InvalidData => Outcome::Broken,
                    ErrorKind::Unsupported => Outcome::Unsupported,
                    _ => Outcome::Lost,
                });
            }
        }
    }
}

enum Incoming {
    Answer(u64, Option<Status>, Bytes),
    Hello(Hello),
}

async fn read_answer(
    reader: &mut FrameReader<ReadHalf<libp2p::Stream>>,
    body_limit_bytes: usize,
) -> std::io::Result<Option<Incoming>> {
    match reader.header(|bytes| Header::decode(bytes, body_limit_bytes)).await? {
        Some(Header::Answer { call_id, refusal, body_bytes }) => {
            Ok(Some(Incoming::Answer(call_id, refusal, reader.body(body_bytes).await?)))
        }
        Some(Header::Hello(hello)) => Ok(Some(Incoming::Hello(hello))),
        Some(other) => {
            Err(std::io::Error::new(ErrorKind::InvalidData, format!("expected an answer, got {other:?}")))
        }
        None => Ok(None),
    }
}

/// Tells the peer that nobody waits any more, unless the call ended by itself.
struct CallGuard<'a> {
    stream: &'a LaneStream,
    call_id: u64,
}

impl Drop for CallGuard<'_> {
    fn drop(&mut self) {
        if lock(&self.stream.calls).remove(self.call_id).is_some() {
            let header = Header::Cancel { call_id: self.call_id }.encode();
            // A full queue means that the peer is slow anyway; it will then do the work for nothing.
            let _ = self.stream.frames.try_send(OutFrame { header, body: Bytes::new(), held: None });
        }
    }
}

/// See `Node::call_with`.
pub(crate) async fn call(
    shared: &Arc<Shared>,
    peer: &PeerId,
    method: &str,
    body: Bytes,
    options: &CallOptions,
) -> Result<Bytes, CallError> {
    if !method_is_valid(method) {
        return Err(CallError::BadMethod { method: method.chars().take(300).collect() });
    }
    let limit_bytes = shared.config.limits.body_bytes;
    if body.len() > limit_bytes {
        return Err(CallError::TooLarge { method: method.to_owned(), got_bytes: body.len(), limit_bytes });
    }
    if shared.stopped.is_cancelled() {
        return Err(CallError::ShutDown);
    }
    let timeout = options.timeout;
    let remote = |status| CallError::Remote { peer: peer.clone(), method: method.to_owned(), status };
    if *peer == shared.local {
        return rpc_server::run(shared, peer.clone(), method, body, timeout).await.map_err(remote);
    }
    let started = shared.now();
    let call = OneCall { shared, peer, method, body, deadline: started + timeout, options };
    match tokio::time::timeout(timeout, call.run()).await {
        Ok(Ok((None, answer))) => Ok(answer),
        Ok(Ok((Some(status), _))) => Err(remote(status)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(CallError::Timeout { peer: peer.clone(), method: method.to_owned(), timeout }),
    }
}

/// One call, on whatever paths it takes.
struct OneCall<'a> {
    shared: &'a Arc<Shared>,
    peer: &'a PeerId,
    method: &'a str,
    body: Bytes,
    deadline: Duration,
    options: &'a CallOptions,
}

/// How one sending of a call ended.
enum Sent {
    Answer(Option<Status>, Bytes),
    /// Nothing left this node.
    Nowhere,
    /// The path broke; the incarnation of the peer that may have got the call, 0 when unknown.
    Lost(u64),
}

impl OneCall<'_> {
    fn lost(&self) -> CallError {
        CallError::ConnectionLost { peer: self.peer.clone(), method: self.method.to_owned() }
    }

    fn unreachable(&self, reason: String) -> CallError {
        CallError::Unreachable { peer: self.peer.clone(), reason }
    }

    fn unsupported(&self) -> CallError {
        self.unreachable(format!("it does not speak {RPC_PROTOCOL}"))
    }

    /// Sends the call, and again with the same number while its paths break and others stand. The peer runs it once.
    async fn run(&self) -> Result<(Option<Status>, Bytes), CallError> {
        let mut connection = self.connect().await?;
        let state = Arc::clone(&connection.state);
        let credit = state.credit(&self.shared.config);
        let _place = credit.place(self.body.len()).await.map_err(|_| CallError::ShutDown)?;
        let number = state.call_number(self.shared);
        // The incarnation that may have the call already; 0 when it has not said hello yet.
        let mut sent_to: Option<u64> = None;
        let begun = self.shared.now();
        let first = connection.key;
        let mut in_vain = 0;
        for attempt in 0..RESENDS + TRIES {
            // On a connection that stood before the call left and stands now, the peer is the one that may have got it.
            let unknown = sent_to == Some(0) && !self.options.idempotent;
            if unknown && connection.made >= begun {
                break;
            }
            let sent = self.send(&connection, (&number, attempt), sent_to).await?;
            // A stream may break a moment before its connection is known to be gone.
            let gone = tokio::time::timeout(BREAK_TIME, connection.closed.cancelled());
            match sent {
                Sent::Answer(refusal, answer) => return Ok((refusal, answer)),
                Sent::Nowhere => {
                    in_vain += 1;
                    let _ = gone.await;
                }
                Sent::Lost(incarnation) => {
                    sent_to = sent_to.filter(|i| *i != 0).or(Some(incarnation));
                    // A peer of another kind may end the stream, on a connection that stands.
                    let ended_it = gone.await.is_err();
                    in_vain += u32::from(ended_it && incarnation == 0);
                }
            }
            if in_vain >= TRIES {
                // The connection that it began on stands, and who runs calls says hello first.
                if sent_to == Some(0) && connection.key == first && !connection.closed.is_cancelled() {
                    return Err(self.unreachable(format!("it ended every stream of {RPC_PROTOCOL}")));
                }
                break;
            }
            connection = self.another_path(sent_to.is_some()).await?;
        }
        Err(self.lost())
    }

    async fn connect(&self) -> Result<Arc<Connection>, CallError> {
        self.shared.connection(self.peer).await.map_err(|error| self.unreachable(error.to_string()))
    }

    /// A connection for the next try. Once the call has left, only connections that stand count, unless the caller allows
    /// time for a new one.
    async fn another_path(&self, sent: bool) -> Result<Arc<Connection>, CallError> {
        if !sent {
            return self.connect().await;
        }
        if let Some(connection) = self.shared.table().best(self.peer) {
            return Ok(connection);
        }
        let until = self.shared.now() + self.options.reconnect_within;
        while self.shared.now() < until {
            let left = until.saturating_sub(self.shared.now());
            match tokio::time::timeout(left, self.shared.connection(self.peer)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(_)) => tokio::time::sleep(BREAK_TIME.min(left)).await,
                Err(_) => break,
            }
        }
        Err(self.lost())
    }

    async fn send(
        &self,
        connection: &Arc<Connection>,
        (number, attempt): (&CallNumber<'_>, u32),
        sent_to: Option<u64>,
    ) -> Result<Sent, CallError> {
        let (shared, call_id) = (self.shared, number.call_id);
        let large = if self.body.len() < LARGE_BODY_BYTES { None } else { connection.lanes.large().await };
        let lane =
            large.as_ref().map_or_else(|| connection.lanes.small(), |l| &connection.lanes.large[l.index]);
        let stream = match lane.stream(shared, connection).await {
            Ok(stream) => stream,
            Err(OpenError::Lost) => return Ok(Sent::Nowhere),
            Err(OpenError::Unsupported) => return Err(self.unsupported()),
            Err(OpenError::Timeout) => {
                return Err(self.unreachable(format!("it did not open {RPC_PROTOCOL}")));
            }
            Err(OpenError::Io(error)) => {
                tracing::debug!(peer = %self.peer.short(), %error, "rpc stream could not be opened");
                return Ok(Sent::Nowhere);
            }
        };
        if let Some(first) = sent_to.filter(|_| !self.options.idempotent) {
            // A peer that restarted knows nothing of the calls that it may have run before.
            let mut incarnation = stream.incarnation.subscribe();
            let said = tokio::select! {
                said = incarnation.wait_for(|i| *i != 0 || lock(&stream.calls).is_closed()) => said.map_or(0, |i| *i),
                () = connection.closed.cancelled() => return Ok(Sent::Nowhere),
            };
            if said == 0 {
                // The stream ended before the peer said who it is. One that never did has not run the call either.
                let foreign = first == 0 && stream.unsupported.load(Ordering::Relaxed);
                return if foreign { Err(self.unsupported()) } else { Ok(Sent::Nowhere) };
            }
            if first != 0 && said != first {
                return Err(self.lost());
            }
        }
        let now = shared.now();
        connection.touch(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        let (completion, outcome) = oneshot::channel();
        if lock(&stream.calls).insert(call_id, completion).is_err() {
            return Ok(Sent::Nowhere);
        }
        let _guard = CallGuard { stream: &stream, call_id };
        let header = Header::Request {
            call_id,
            method: self.method.to_owned(),
            deadline: self.deadline.saturating_sub(now),
            body_bytes: self.body.len(),
            done_below: number.done_below(),
            attempt,
        };
        let known = connection.state.incarnation();
        let frame = OutFrame { header: header.encode(), body: self.body.clone(), held: None };
        if stream.frames.send(frame).await.is_err() {
            return Ok(Sent::Nowhere);
        }
        match outcome.await {
            Ok(Outcome::Answer(refusal, answer)) => Ok(Sent::Answer(refusal, answer)),
            Ok(Outcome::Broken) => Err(self.lost()),
            Ok(Outcome::Unsupported) => Err(self.unsupported()),
            Ok(Outcome::Lost) | Err(_) => {
                let said = *stream.incarnation.borrow();
                Ok(Sent::Lost(if said == 0 { known } else { said }))
            }
        }
    }
}

/// A call whose duration is remembered, for deciding when the next peer is worth asking.
async fn timed(
    shared: &Arc<Shared>,
    peer: &PeerId,
    method: &str,
    body: &Bytes,
    options: &CallOptions,
) -> Result<Bytes, CallError> {
    let begun = shared.now();
    let result = call(shared, peer, method, body.clone(), options).await;
    let state = shared.table().known_state(peer).filter(|_| result.is_ok());
    if let Some(state) = state {
        state.handle_duration(method, shared.now().saturating_sub(begun));
    }
    result
}

/// See `Node::call_any`.
pub(crate) async fn call_any(
    shared: &Arc<Shared>,
    peers: &[PeerId],
    method: &str,
    body: &Bytes,
    hedge_after: Option<Duration>,
    options: &CallOptions,
) -> Result<Bytes, CallError> {
    let mut calls = FuturesUnordered::new();
    let mut waiting = peers.iter();
    let mut last = CallError::NoPeers { method: method.to_owned() };
    loop {
        let after = match waiting.next() {
            Some(peer) => {
                calls.push(timed(shared, peer, method, body, options));
                hedge_after.unwrap_or_else(|| {
                    let state = shared.table().known_state(peer);
                    state.and_then(|s| s.usual_duration(method)).unwrap_or(HEDGE_AFTER)
                })
            }
            None => options.timeout,
        };
        if calls.is_empty() {
            return Err(last);
        }
        let pause = tokio::time::sleep(after);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                Some(result) = calls.next() => match result {
                    Ok(answer) => return Ok(answer),
                    // Asked the wrong thing: nobody else will answer it.
                    Err(error) if error.remote_code() == Some(StatusCode::InvalidArgument) => return Err(error),
                    Err(error) => {
                        last = error;
                        if calls.is_empty() || waiting.len() > 0 {
                            break;
                        }
                    }
                },
                () = &mut pause => break,
            }
        }
    }
}
