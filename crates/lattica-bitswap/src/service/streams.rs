//! Bitswap on streams: one for each direction between two peers, as most implementations do it. Some (py-libp2p) answer on the
//! stream on which they were asked, so what comes back on ours is read too.

use std::sync::{Arc, Weak};
use std::time::Duration;

use lattica_net::{FrameError, Node, Stream, read_bytes, read_length};
use swarm_wire::PeerId;
use swarm_wire::limits::BITSWAP_MESSAGE_MAX_BYTES;
use tokio::io::{AsyncRead, AsyncWriteExt, BufReader, WriteHalf};
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit, mpsc};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::exchange::{Exchange, Outgoing};
use crate::serve::Batch;
use crate::wire::{Message, PROTOCOL};

/// A stream without anything to send is closed after this time.
const IDLE: Duration = Duration::from_secs(60);
/// A peer that does not take one message in this time is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
const READ_BUFFER_BYTES: usize = 64 * 1024;
/// Shorter messages are decoded at once.
const DECODE_INLINE_BYTES: usize = 16 * 1024;
/// Messages of one peer that are being taken in, on all its streams: two of the largest.
const ROOM_BYTES: usize = 2 * BITSWAP_MESSAGE_MAX_BYTES;
/// Longer messages of a peer that has lied are not taken in: no list of wants is that long, and blocks it would have to be
/// asked for.
const OF_LIARS_MAX_BYTES: usize = 256 * 1024;
/// Room is counted in these.
const ROOM_STEP_BYTES: usize = 1024;

/// Room for the messages of one peer.
pub(super) struct Room(Semaphore);

impl Default for Room {
    fn default() -> Self {
        Self(Semaphore::new(ROOM_BYTES / ROOM_STEP_BYTES))
    }
}

impl Room {
    /// Waits until there is room for a message.
    async fn take(&self, n_bytes: usize) -> Result<SemaphorePermit<'_>, AcquireError> {
        self.0.acquire_many(n_bytes.div_ceil(ROOM_STEP_BYTES) as u32).await
    }
}

/// A stream that we opened.
struct Open {
    half: WriteHalf<Stream>,
    /// Reads what comes back on it.
    answers: AbortHandle,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.answers.abort();
    }
}

/// Takes in what a peer sends, until its stream or the exchange ends.
pub(super) async fn read(exchange: Weak<Exchange>, peer: PeerId, stream: impl AsyncRead + Unpin) {
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, stream);
    let Some(room) = exchange.upgrade().map(|exchange| exchange.room(&peer)) else { return };
    loop {
        let length = read_length(&mut reader, "bitswap message", BITSWAP_MESSAGE_MAX_BYTES).await;
        let shuns = |exchange: Arc<Exchange>| exchange.lock().ledger.is_shunned(&peer);
        let (message, _place) = match length {
            Ok(Some(n_bytes)) => {
                if n_bytes > OF_LIARS_MAX_BYTES && exchange.upgrade().is_none_or(shuns) {
                    return;
                }
                let Ok(place) = room.take(n_bytes).await else { return };
                let Ok(bytes) = read_bytes(&mut reader, n_bytes).await else { return };
                let message = match n_bytes {
                    ..=DECODE_INLINE_BYTES => Message::decode(bytes),
                    // Blocks are hashed to learn what they are: not on a thread that others wait for.
                    _ => match tokio::task::spawn_blocking(move || Message::decode(bytes)).await {
                        Ok(message) => message,
                        Err(_) => return,
                    },
                };
                (message, Some(place))
            }
            Err(FrameError::Malformed(error)) => (Err(error), None),
            Ok(None) | Err(_) => return,
        };
        let Some(exchange) = exchange.upgrade() else { return };
        let honest = match message {
            Ok(message) => exchange.handle_message(&peer, message).await,
            Err(error) => {
                exchange.peer_lied(&peer, &error.to_string());
                false
            }
        };
        if !honest {
            return;
        }
    }
}

/// Sends what is queued for `peer`. Ends when there is nothing for long, or the peer cannot be reached.
pub(super) async fn write(
    exchange: Weak<Exchange>,
    node: Node,
    peer: PeerId,
    mut queue: mpsc::Receiver<Outgoing>,
) {
    let mut stream: Option<Open> = None;
    loop {
        let outgoing = match timeout(IDLE, queue.recv()).await {
            Ok(Some(outgoing)) => outgoing,
            Ok(None) => break,
            Err(_) => match exchange.upgrade() {
                Some(exchange) if !exchange.release_writer(&peer, &queue) => continue,
                _ => break,
            },
        };
        let sent = match &outgoing {
            Outgoing::Message(message) => send(&exchange, &node, &peer, &mut stream, message.clone()).await,
            Outgoing::Served(batch) => match load(&exchange, batch).await {
                Some(message) => send(&exchange, &node, &peer, &mut stream, message).await,
                None => Err(()),
            },
        };
        let Some(exchange) = exchange.upgrade() else { break };
        if let Outgoing::Served(batch) = &outgoing {
            exchange.batch_done(batch, sent.is_ok());
        }
        if sent.is_err() {
            exchange.peer_gone(&peer);
            queue.close();
            while let Some(left) = queue.recv().await {
                if let Outgoing::Served(batch) = left {
                    exchange.batch_done(&batch, false);
                }
            }
            return;
        }
    }
    if let Some(mut stream) = stream {
        let _ = stream.half.shutdown().await;
    }
}

/// The batch as a message. A block that went missing meanwhile is denied.
async fn load(exchange: &Weak<Exchange>, batch: &Batch) -> Option<Message> {
    let exchange = exchange.upgrade()?;
    let Batch { blocks, presences, pending_bytes, .. } = batch.clone();
    exchange
        .blocking(move |store| {
            let mut message = Message { presences, pending_bytes, ..Message::default() };
            for cid in blocks {
                match store.get(&cid) {
                    Ok(Some(block)) => message.blocks.push(block),
                    Ok(None) => message.presences.push((cid, false)),
                    Err(error) => {
                        tracing::warn!(%cid, %error, "block is not served");
                        message.presences.push((cid, false));
                    }
                }
            }
            message
        })
        .await
        .ok()
}

/// Sends a message in parts of the usual size. A stream that broke while it was idle is opened anew once.
async fn send(
    exchange: &Weak<Exchange>,
    node: &Node,
    peer: &PeerId,
    stream: &mut Option<Open>,
    message: Message,
) -> Result<(), ()> {
    for part in message.split() {
        let bytes = part.encode();
        let mut fresh = stream.is_none();
        loop {
            if stream.is_none() {
                let opened = node.open_stream(peer, PROTOCOL).await;
                let opened =
                    opened.map_err(|error| tracing::debug!(peer = %peer.short(), %error, "no stream"))?;
                let (other_half, half) = tokio::io::split(opened);
                let answers = tokio::spawn(read(exchange.clone(), peer.clone(), other_half));
                *stream = Some(Open { half, answers: answers.abort_handle() });
            }
            let open = &mut stream.as_mut().expect("opened above").half;
            let written = timeout(WRITE_TIMEOUT, async {
                open.write_all(&bytes).await?;
                open.flush().await
            })
            .await;
            match written {
                Ok(Ok(())) => break,
                Ok(Err(_)) if !fresh => {
                    *stream = None;
                    fresh = true;
                }
                _ => return Err(()),
            }
        }
    }
    Ok(())
}
