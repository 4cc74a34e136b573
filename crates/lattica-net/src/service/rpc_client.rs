//! Calls to peers. Small calls share a few long-lived streams per connection, which saves a negotiation per call; large
//! bodies have streams of their own, so that nothing small waits behind them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::{AsyncReadExt, io::ReadHalf};
use libp2p::StreamProtocol;
use swarm_wire::PeerId;
use tokio::sync::{mpsc, oneshot};

use super::connection::{Connection, OpenError};
use super::frames::{FrameReader, OutFrame, STALL_TIMEOUT, write_frames};
use super::rpc_server;
use super::shared::{Shared, lock};
use crate::error::CallError;
use crate::rpc::{CallTable, InsertError};
use crate::status::Status;
use crate::wire::{Header, method_is_valid};

/// The protocol of calls.
pub const RPC_PROTOCOL: StreamProtocol = StreamProtocol::new("/lattica/rpc/2.0.0");
/// Streams that small calls of one connection share.
const SMALL_LANES: usize = 2;
/// Streams for calls with large bodies.
const LARGE_LANES: usize = 2;
/// From here on a body is large.
const LARGE_BODY_BYTES: usize = 64 * 1024;
/// Frames that wait for a stream's writer; further callers wait.
const FRAME_QUEUE: usize = 256;
/// Tries when a connection turns out to be gone before anything was sent on it.
const TRIES: usize = 3;

/// How a call ended.
enum Outcome {
    Answer(Option<Status>, Bytes),
    Lost,
}

/// The RPC streams of one connection, opened when first needed.
#[derive(Default)]
pub(crate) struct Lanes {
    lanes: [Lane; SMALL_LANES + LARGE_LANES],
    turn: AtomicUsize,
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
}

impl Lanes {
    /// The connection is gone: every call that waits on it ends now.
    pub(crate) fn close(&self) {
        for lane in &self.lanes {
            if let Some(stream) = lock(&lane.current).take() {
                stream.close();
            }
        }
    }

    /// Lets streams without calls go, so that the connection may become idle.
    pub(crate) fn release_idle(&self) {
        for lane in &self.lanes {
            let mut current = lock(&lane.current);
            if current.as_ref().is_some_and(|stream| lock(&stream.calls).is_empty()) {
                *current = None;
            }
        }
    }

    fn pick(&self, body_bytes: usize) -> &Lane {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        if body_bytes < LARGE_BODY_BYTES {
            &self.lanes[turn % SMALL_LANES]
        } else {
            &self.lanes[SMALL_LANES + turn % LARGE_LANES]
        }
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
        let calls = Mutex::new(CallTable::new(shared.config.limits.outgoing_calls_per_peer));
        let stream = Arc::new(LaneStream { frames, calls });
        let reading = Arc::downgrade(&stream);
        let body_limit = shared.config.limits.body_bytes;
        shared.network.spawn(async move {
            if let Err(error) = write_frames(writer, queue).await {
                tracing::debug!(%error, "rpc stream: writing ended");
                if let Some(stream) = reading.upgrade() {
                    stream.close();
                }
            }
        });
        let answers = Arc::downgrade(&stream);
        let link = Arc::clone(&connection.state);
        let (clock, peer) = (Arc::clone(shared), connection.peer.short());
        shared.network.spawn(async move {
            let mut reader = FrameReader::new(reader, STALL_TIMEOUT);
            loop {
                let outcome = read_answer(&mut reader, body_limit).await;
                let Some(stream) = answers.upgrade() else { return };
                match outcome {
                    Ok(Some((call_id, refusal, body))) => {
                        link.link().handle_received(clock.now(), body.len());
                        // A call that was given up meanwhile is not waiting any more: its answer is dropped.
                        if let Some(completion) = lock(&stream.calls).remove(call_id) {
                            let _ = completion.send(Outcome::Answer(refusal, body));
                        }
                    }
                    Ok(None) => return stream.close(),
                    Err(error) => {
                        tracing::debug!(%peer, %error, "rpc stream: reading ended");
                        return stream.close();
                    }
                }
            }
        });
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
    fn close(&self) {
        for completion in lock(&self.calls).close() {
            let _ = completion.send(Outcome::Lost);
        }
    }
}

type Answer = (u64, Option<Status>, Bytes);

async fn read_answer(
    reader: &mut FrameReader<ReadHalf<libp2p::Stream>>,
    body_limit_bytes: usize,
) -> std::io::Result<Option<Answer>> {
    match reader.header(|bytes| Header::decode(bytes, body_limit_bytes)).await? {
        Some(Header::Answer { call_id, refusal, body_bytes }) => {
            Ok(Some((call_id, refusal, reader.body(body_bytes).await?)))
        }
        Some(other) => Err(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            format!("expected an answer, got {other:?}"),
        )),
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

/// See `Node::call`.
pub(crate) async fn call(
    shared: &Arc<Shared>,
    peer: &PeerId,
    method: &str,
    body: Bytes,
    timeout: Duration,
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
    let remote = |status| CallError::Remote { peer: peer.clone(), method: method.to_owned(), status };
    if *peer == shared.local {
        return rpc_server::run(shared, peer.clone(), method, body, timeout).await.map_err(remote);
    }
    let deadline = shared.now() + timeout;
    match tokio::time::timeout(timeout, exchange(shared, peer, method, body, deadline)).await {
        Ok(Ok((None, answer))) => Ok(answer),
        Ok(Ok((Some(status), _))) => Err(remote(status)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(CallError::Timeout { peer: peer.clone(), method: method.to_owned(), timeout }),
    }
}

async fn exchange(
    shared: &Arc<Shared>,
    peer: &PeerId,
    method: &str,
    body: Bytes,
    deadline: Duration,
) -> Result<(Option<Status>, Bytes), CallError> {
    let lost = || CallError::ConnectionLost { peer: peer.clone(), method: method.to_owned() };
    let unreachable = |reason: String| CallError::Unreachable { peer: peer.clone(), reason };
    for _ in 0..TRIES {
        let connection = shared.connection(peer).await.map_err(|error| unreachable(error.to_string()))?;
        let _place =
            connection.state.outgoing(&shared.config).acquire().await.map_err(|_| CallError::ShutDown)?;
        let stream = match connection.lanes.pick(body.len()).stream(shared, &connection).await {
            Ok(stream) => stream,
            Err(OpenError::Lost) => continue,
            Err(OpenError::Unsupported) => {
                return Err(unreachable(format!("it does not speak {RPC_PROTOCOL}")));
            }
            Err(OpenError::Timeout) => return Err(unreachable(format!("it did not open {RPC_PROTOCOL}"))),
            Err(OpenError::Io(error)) => {
                tracing::debug!(peer = %peer.short(), %error, "rpc stream could not be opened");
                continue;
            }
        };
        let now = shared.now();
        connection.touch(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        let (completion, outcome) = oneshot::channel();
        let call_id = match lock(&stream.calls).insert(deadline, completion) {
            Ok(call_id) => call_id,
            Err((InsertError::Closed | InsertError::Full, _)) => continue,
        };
        let _guard = CallGuard { stream: &stream, call_id };
        let header = Header::Request {
            call_id,
            method: method.to_owned(),
            deadline: deadline.saturating_sub(now),
            body_bytes: body.len(),
        };
        let frame = OutFrame { header: header.encode(), body, held: None };
        if stream.frames.send(frame).await.is_err() {
            return Err(lost());
        }
        return match outcome.await {
            Ok(Outcome::Answer(refusal, answer)) => Ok((refusal, answer)),
            Ok(Outcome::Lost) | Err(_) => Err(lost()),
        };
    }
    Err(lost())
}
