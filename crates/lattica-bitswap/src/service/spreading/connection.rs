//! One neighbour's stream: the handshake, what comes in, what goes out.

use std::sync::{Arc, Weak};
use std::time::Duration;

use lattica_net::{FrameError, Stream, read_frame};
use swarm_wire::PeerId;
use tokio::io::{AsyncRead, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Link, Member, OUTGOING_MAX, Outgoing};
use crate::Block;
use crate::service::exchange::Exchange;
use crate::session::Arrival;
use crate::spread::SpreadMessage;
use crate::spread::wire::{FRAME_MAX_BYTES, Frame, PROTOCOL};

/// The opener has this long to name the artefact.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A neighbour that does not take one frame in this time is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
const READ_BUFFER_BYTES: usize = 64 * 1024;
/// A first frame holds a CID and nothing else.
const HELLO_MAX_BYTES: usize = 128;
/// Queued frames that are looked at together.
const BATCH: usize = 64;

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
        let who = Who { peer, opener: node.peer_id(), relayed: stream.is_relayed() };
        let (reader, writer) = tokio::io::split(stream);
        let reader = BufReader::with_capacity(READ_BUFFER_BYTES, reader);
        run(member, who, reader, writer, None).await;
    }
}

/// Takes a stream that `peer` opened to the spread that it names.
pub(super) async fn accept(exchange: Weak<Exchange>, peer: PeerId, stream: Stream) {
    let relayed = stream.is_relayed();
    let (reader, writer) = tokio::io::split(stream);
    let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, reader);
    let Ok(Ok(Some(frame))) = timeout(HELLO_TIMEOUT, read_limited(&mut reader, 0, HELLO_MAX_BYTES)).await
    else {
        return;
    };
    let Frame::Hello(root) = frame else { return };
    let member = exchange.upgrade().and_then(|exchange| exchange.spread_of(&root));
    let Some(member) = member else {
        return tracing::debug!(peer = %peer.short(), %root, "asked for a spread that does not run here");
    };
    let contacts = member.sample(&peer);
    let member = Arc::downgrade(&member);
    let who = Who { opener: peer.clone(), peer, relayed };
    run(member, who, reader, writer, Some(Frame::Peers(contacts))).await;
}

/// Who is at the other end of a stream.
struct Who {
    peer: PeerId,
    /// Which of both ends opened it.
    opener: PeerId,
    /// The stream leads over a relay, and does to its end, whatever other ways to the peer there are by then.
    relayed: bool,
}

async fn run(
    member: Weak<Member>,
    who: Who,
    reader: Reader,
    writer: WriteHalf<Stream>,
    first: Option<Frame>,
) {
    let (queue, outgoing) = mpsc::channel(OUTGOING_MAX);
    if let Some(frame) = first {
        let _ = queue.try_send(Outgoing::Frame(frame));
    }
    let taken = member.upgrade().and_then(|m| m.take(&who, queue));
    let peer = who.peer;
    let Some(generation) = taken else {
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
    /// Makes a peer a neighbour over a stream with this queue; `None` when it is one already, shunned, or there are enough.
    fn take(&self, who: &Who, queue: mpsc::Sender<Outgoing>) -> Option<u64> {
        let (now, Who { peer, opener, relayed }) = (self.now(), who);
        let mut state = self.lock();
        let paused = state.paused.get(peer).is_some_and(|until| now < *until);
        if paused || self.has_failed() || self.is_shunned(peer) || *peer == self.node().peer_id() {
            return None;
        }
        if let Some(link) = state.links.get(peer) {
            if link.opener <= *opener {
                return None;
            }
            state.spread.remove_neighbour(peer, now);
            state.links.remove(peer);
        }
        if *relayed {
            state.spread.add_relayed_neighbour(peer, now);
        } else {
            state.spread.add_neighbour(peer, now);
        }
        if !state.spread.is_neighbour(peer) {
            return None;
        }
        state.generations += 1;
        let generation = state.generations;
        // Who accepts a stream names other members unasked.
        let asked_peers = *opener == self.node().peer_id();
        let link =
            Link { opener: opener.clone(), queue, generation, asked_peers, told_peers_at: Duration::ZERO };
        state.links.insert(peer.clone(), link);
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

async fn read(reader: &mut (impl AsyncRead + Unpin), n_chunks: u32) -> Result<Option<Frame>, FrameError> {
    read_limited(reader, n_chunks, FRAME_MAX_BYTES).await
}

async fn read_limited(
    reader: &mut (impl AsyncRead + Unpin),
    n_chunks: u32,
    limit_bytes: usize,
) -> Result<Option<Frame>, FrameError> {
    match read_frame(reader, "spread frame", limit_bytes).await? {
        Some(payload) => Ok(Some(Frame::decode(payload, n_chunks)?)),
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
            Err(FrameError::Malformed(error)) => {
                tracing::warn!(peer = %peer.short(), %error, "neighbour breaks the protocol");
                return;
            }
            Ok(None) | Err(_) => return,
        };
        let Some(member) = member.upgrade().filter(|m| m.is_current(peer, generation)) else { return };
        match frame {
            Frame::Message(message) => {
                let now = member.now();
                member.lock().spread.handle(peer, message, now);
            }
            Frame::Peers(contacts) => member.learn(peer, contacts),
            Frame::AskPeers => member.tell_peers(peer),
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
                Ok(block) if block.len() == expected.length as usize => {
                    store.put(&block).map(|_| Some(block))
                }
                _ => Ok(None),
            })
            .await;
        let now = self.now();
        match stored {
            Ok(Ok(Some(block))) => {
                let arrival = {
                    let mut state = self.lock();
                    let arrival = state.spread.handle_chunk(peer, index, now);
                    state.done_bytes += if arrival == Arrival::New { u64::from(expected.length) } else { 0 };
                    arrival
                };
                if arrival == Arrival::New {
                    // Fetches here want it no more, and peers that asked for it get it.
                    self.exchange.stored(peer, std::slice::from_ref(&block));
                    self.exchange.pump();
                }
            }
            Ok(Ok(None)) => self.lock().spread.handle_wrong(peer, now),
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
    let mut batch = Vec::with_capacity(BATCH);
    'stream: while queue.recv_many(&mut batch, BATCH).await > 0 {
        for outgoing in merged(batch.drain(..)) {
            let (frame, chunk) = match outgoing {
                Outgoing::Frame(frame) => (Some(frame), None),
                Outgoing::Chunk(chunk) => {
                    let Some(member) = member.upgrade() else { break 'stream };
                    (member.load(chunk).await, Some(chunk))
                }
            };
            let sent = match frame {
                Some(frame) => in_time(writer.write_all(&frame.encode())).await,
                // A block that went missing here is no fault of the stream.
                None => true,
            };
            if let (Some(chunk), Some(member)) = (chunk, member.upgrade()) {
                let sent = sent && in_time(writer.flush()).await;
                let now = member.now();
                member.lock().spread.handle_uploaded(&peer, chunk, sent, now);
                member.wake.notify_one();
            }
            if !sent {
                break 'stream;
            }
        }
        if !in_time(writer.flush()).await {
            break;
        }
    }
    let _ = writer.shutdown().await;
}

async fn in_time(step: impl Future<Output = std::io::Result<()>>) -> bool {
    timeout(WRITE_TIMEOUT, step).await.is_ok_and(|done| done.is_ok())
}

/// What is queued, with announcements that follow each other as one.
fn merged(queued: impl Iterator<Item = Outgoing>) -> Vec<Outgoing> {
    let mut merged: Vec<Outgoing> = Vec::new();
    for outgoing in queued {
        match (merged.last_mut(), outgoing) {
            (
                Some(Outgoing::Frame(Frame::Message(SpreadMessage::Have(before)))),
                Outgoing::Frame(Frame::Message(SpreadMessage::Have(chunks))),
            ) => before.extend(chunks),
            (_, outgoing) => merged.push(outgoing),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_that_follow_each_other_travel_as_one() {
        let message = |m| Outgoing::Frame(Frame::Message(m));
        let have = |chunk| message(SpreadMessage::Have(vec![chunk]));
        let queued =
            vec![have(1), have(2), message(SpreadMessage::Request(9)), have(3), Outgoing::Chunk(4), have(5)];
        let kinds: Vec<Vec<u32>> = merged(queued.into_iter())
            .into_iter()
            .map(|outgoing| match outgoing {
                Outgoing::Frame(Frame::Message(SpreadMessage::Have(chunks))) => chunks,
                _ => Vec::new(),
            })
            .collect();
        assert_eq!(kinds, [vec![1, 2], vec![], vec![3], vec![], vec![5]]);
    }
}
