//! One neighbour's stream: the handshake, what comes in, what goes out.

use std::sync::{Arc, Weak};
use std::time::Duration;

use lattica_net::Stream;
use swarm_wire::PeerId;
use tokio::io::{AsyncRead, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Link, Member, OUTGOING_MAX, Outgoing};
use crate::Block;
use crate::service::exchange::Exchange;
use crate::service::streams::{ReadError, read_frame};
use crate::session::Arrival;
use crate::spread::wire::{FRAME_MAX_BYTES, Frame, PROTOCOL};

/// The opener has this long to name the artefact.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A neighbour that does not take one frame in this time is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
const READ_BUFFER_BYTES: usize = 64 * 1024;

type Reader = BufReader<ReadHalf<Stream>>;

/// Opens a stream to `peer` and takes part with it.
pub(super) async fn open(member: Weak<Member>, peer: PeerId) {
    let Some(strong) = member.upgrade() else { return };
    let (node, root) = (strong.node().clone(), strong.root);
    drop(strong);
    let mut stream = match node.open_stream(&peer, PROTOCOL).await {
        Ok(stream) => stream,
        Err(error) => return tracing::debug!(peer = %peer.short(), %error, "member cannot be reached"),
    };
    let hello = timeout(WRITE_TIMEOUT, async {
        stream.write_all(&Frame::Hello(root).encode()).await?;
        stream.flush().await
    });
    if let Ok(Ok(())) = hello.await {
        let own = node.peer_id();
        join(member, peer, own, stream, None).await;
    }
}

/// Takes a stream that `peer` opened to the spread that it names.
pub(super) async fn accept(exchange: Weak<Exchange>, peer: PeerId, stream: Stream) {
    let (reader, writer) = tokio::io::split(stream);
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, reader);
    let Ok(Ok(Some(frame))) = timeout(HELLO_TIMEOUT, read(&mut reader, 0)).await else { return };
    let Frame::Hello(root) = frame else { return };
    let member = exchange.upgrade().and_then(|exchange| exchange.spread_of(&root));
    let Some(member) = member else {
        return tracing::debug!(peer = %peer.short(), %root, "asked for a spread that does not run here");
    };
    let contacts = member.sample(&peer);
    let member = Arc::downgrade(&member);
    run(member, peer.clone(), peer, reader, writer, Some(Frame::Peers(contacts))).await;
}

async fn join(member: Weak<Member>, peer: PeerId, opener: PeerId, stream: Stream, first: Option<Frame>) {
    let (reader, writer) = tokio::io::split(stream);
    run(member, peer, opener, BufReader::with_capacity(READ_BUFFER_BYTES, reader), writer, first).await;
}

async fn run(
    member: Weak<Member>,
    peer: PeerId,
    opener: PeerId,
    reader: Reader,
    writer: WriteHalf<Stream>,
    first: Option<Frame>,
) {
    let (queue, outgoing) = mpsc::channel(OUTGOING_MAX);
    if let Some(frame) = first {
        let _ = queue.try_send(Outgoing::Frame(frame));
    }
    let Some(generation) = member.upgrade().and_then(|m| m.take(&peer, opener, queue)) else {
        // Not taken: the opener still hears of other members.
        return write(member, peer, outgoing, writer).await;
    };
    tokio::select! {
        () = take_in(&member, &peer, generation, reader) => {}
        () = write(member.clone(), peer.clone(), outgoing, writer) => {}
    }
    if let Some(member) = member.upgrade() {
        member.lost(&peer, generation);
    }
}

impl Member {
    /// Makes `peer` a neighbour over a stream with this queue; `None` when it is one already, shunned, or there are enough.
    fn take(&self, peer: &PeerId, opener: PeerId, queue: mpsc::Sender<Outgoing>) -> Option<u64> {
        let now = self.now();
        let mut state = self.lock();
        if state.shunned.contains(peer) || *peer == self.node().peer_id() {
            return None;
        }
        if let Some(link) = state.links.get(peer) {
            if link.opener <= opener {
                return None;
            }
            state.spread.remove_neighbour(peer, now);
            state.links.remove(peer);
        }
        state.spread.add_neighbour(peer, now);
        if !state.spread.is_neighbour(peer) {
            return None;
        }
        state.generations += 1;
        let generation = state.generations;
        state.links.insert(peer.clone(), Link { opener, queue, generation });
        drop(state);
        self.wake.notify_one();
        Some(generation)
    }

    /// The stream of that generation has ended.
    fn lost(&self, peer: &PeerId, generation: u64) {
        let now = self.now();
        let mut state = self.lock();
        if state.links.get(peer).is_some_and(|link| link.generation == generation) {
            state.links.remove(peer);
            state.spread.remove_neighbour(peer, now);
        }
        drop(state);
        self.wake.notify_one();
    }

    fn is_current(&self, peer: &PeerId, generation: u64) -> bool {
        self.lock().links.get(peer).is_some_and(|link| link.generation == generation)
    }
}

async fn read(reader: &mut (impl AsyncRead + Unpin), n_chunks: u32) -> Result<Option<Frame>, ReadError> {
    match read_frame(reader, "spread frame", FRAME_MAX_BYTES).await? {
        Some(payload) => Frame::decode(payload, n_chunks).map(Some).map_err(ReadError::Malformed),
        None => Ok(None),
    }
}

/// Takes in what the neighbour sends until its stream ends or it is replaced. One frame at a time: that is the
/// back-pressure on the sender.
async fn take_in(member: &Weak<Member>, peer: &PeerId, generation: u64, mut reader: Reader) {
    let Some(n_chunks) = member.upgrade().map(|m| m.n_chunks()) else { return };
    loop {
        let frame = match read(&mut reader, n_chunks).await {
            Ok(Some(frame)) => frame,
            Ok(None) | Err(ReadError::Broken) => return,
            Err(ReadError::Malformed(error)) => {
                tracing::warn!(peer = %peer.short(), %error, "neighbour breaks the protocol");
                return;
            }
        };
        let Some(member) = member.upgrade().filter(|m| m.is_current(peer, generation)) else { return };
        match frame {
            Frame::Message(message) => {
                let now = member.now();
                member.lock().spread.handle(peer, message, now);
            }
            Frame::Peers(contacts) => member.learn(contacts),
            Frame::AskPeers => {
                let contacts = member.sample(peer);
                if let Some(link) = member.lock().links.get(peer) {
                    let _ = link.queue.try_send(Outgoing::Frame(Frame::Peers(contacts)));
                }
            }
            Frame::Chunk { index, bytes } => member.take_chunk(peer, index, bytes).await,
            Frame::Hello(_) => return,
        }
        member.wake.notify_one();
    }
}

impl Member {
    /// Checks and stores a chunk that was asked for; one that does not match its hash costs the neighbour its place.
    async fn take_chunk(&self, peer: &PeerId, index: u32, bytes: bytes::Bytes) {
        if !self.lock().spread.is_owed(peer, index) {
            let now = self.now();
            return self.lock().spread.handle_wrong(peer, now);
        }
        let expected = self.manifest.blocks()[index as usize];
        let stored = self
            .exchange
            .blocking(move |store| match Block::verify(expected.cid, bytes) {
                Ok(block) if block.len() == expected.length as usize => store.put(&block).map(|_| true),
                _ => Ok(false),
            })
            .await;
        let now = self.now();
        match stored {
            Ok(Ok(true)) => {
                let arrival = self.lock().spread.handle_chunk(peer, index, now);
                if arrival == Arrival::New {
                    self.exchange.lock().ledger.received(peer, expected.length as usize);
                }
            }
            Ok(Ok(false)) => {
                self.exchange.lock().ledger.wrong(peer);
                self.lock().spread.handle_wrong(peer, now);
            }
            Ok(Err(error)) => self.fail(error.into()),
            Err(error) => self.fail(error),
        }
    }

    async fn load(&self, chunk: u32) -> Option<Frame> {
        let cid = self.manifest.blocks()[chunk as usize].cid;
        match self.exchange.blocking(move |store| store.get(&cid)).await {
            Ok(Ok(Some(block))) => Some(Frame::Chunk { index: chunk, bytes: block.bytes().clone() }),
            Ok(Ok(None)) => None,
            Ok(Err(error)) => {
                tracing::warn!(%cid, %error, "block is not passed on");
                None
            }
            Err(_) => None,
        }
    }
}

/// Sends what is queued until the queue is dropped or the neighbour stops reading.
async fn write(
    member: Weak<Member>,
    peer: PeerId,
    mut queue: mpsc::Receiver<Outgoing>,
    mut writer: WriteHalf<Stream>,
) {
    while let Some(outgoing) = queue.recv().await {
        let (frame, chunk) = match outgoing {
            Outgoing::Frame(frame) => (Some(frame), None),
            Outgoing::Chunk(chunk) => {
                let Some(member) = member.upgrade() else { break };
                (member.load(chunk).await, Some(chunk))
            }
        };
        let sent = match frame {
            Some(frame) => timeout(WRITE_TIMEOUT, async {
                writer.write_all(&frame.encode()).await?;
                writer.flush().await
            })
            .await
            .is_ok_and(|written| written.is_ok()),
            // A block that went missing here is no fault of the stream.
            None => true,
        };
        if let (Some(chunk), Some(member)) = (chunk, member.upgrade()) {
            let now = member.now();
            member.lock().spread.handle_uploaded(&peer, chunk, sent, now);
            member.wake.notify_one();
        }
        if !sent {
            break;
        }
    }
    let _ = writer.shutdown().await;
}
