//! What a hostile peer does, over a connection like anybody's: each attack goes on until it is stopped, and begins anew
//! wherever it is thrown out.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clap::ValueEnum;
use lattica_bitswap::spread::wire::Frame;
use lattica_bitswap::spread::{Bitmap, SpreadMessage};
use lattica_bitswap::wire::Message;
use lattica_bitswap::{Block, HashKind, spread, wire};
use lattica_net::wire::Header;
use lattica_net::{Node, Stream};
use swarm_wire::limits::{BITSWAP_MESSAGE_MAX_BYTES, RPC_BODY_MAX_BYTES};
use swarm_wire::{Cid, PeerId, frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, WriteHalf};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Chunks of what the attacked nodes spread, each of 1 MiB.
pub(super) const SPREAD_CHUNKS: u32 = 64;
/// Calls between our nodes.
const RPC: &str = "/lattica/rpc/2.0.0";
/// What is tried with garbage.
const PROTOCOLS: [&str; 6] = [
    RPC,
    "/lattica/link/1.0.0",
    "/lattica/news/1.0.0/bench",
    "/lattica/kad/2.0.0/bench",
    wire::PROTOCOL,
    spread::wire::PROTOCOL,
];
/// Between two beginnings.
const PAUSE: Duration = Duration::from_millis(2);

/// A way to be hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Attack {
    /// Calls without end, as fast as they are taken; the answers are thrown away.
    Flood,
    /// Noise on streams of every protocol.
    Garbage,
    /// Hundreds of streams on which one byte follows the other.
    SlowLoris,
    /// The largest messages, of which the last byte never comes.
    HugeFrames,
    /// Blocks that nobody asked for.
    WrongBlocks,
    /// A member of a spread that claims to have everything, asks for everything, and sends nothing.
    LyingBitmaps,
}

impl Attack {
    /// All of them.
    pub(super) const ALL: [Self; 6] = [
        Self::Flood,
        Self::Garbage,
        Self::SlowLoris,
        Self::HugeFrames,
        Self::WrongBlocks,
        Self::LyingBitmaps,
    ];

    /// As it is given on the command line.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Attacks `target`, which spreads `root`, until what is returned is dropped.
    pub(super) fn begin(self, node: &Node, target: &PeerId, root: Cid) -> JoinSet<()> {
        let n_streams = match self {
            Self::Flood | Self::Garbage | Self::WrongBlocks => 8,
            Self::SlowLoris => 300,
            Self::HugeFrames => 64,
            // A peer can be a neighbour once.
            Self::LyingBitmaps => 1,
        };
        let mut tasks = JoinSet::new();
        for i in 0..n_streams {
            let (node, target) = (node.clone(), target.clone());
            tasks.spawn(async move {
                loop {
                    // Thrown out, or never let in: that is the other side's right.
                    let _ = self.once(&node, &target, root, i).await;
                    sleep(PAUSE).await;
                }
            });
        }
        tasks
    }

    /// One stream, until it is of no more use.
    async fn once(self, node: &Node, target: &PeerId, root: Cid, i: usize) -> io::Result<()> {
        let open = |protocol| open(node, target, protocol);
        match self {
            Self::Flood => flood(open(RPC).await?).await,
            Self::Garbage => {
                static NEXT: AtomicU64 = AtomicU64::new(0);
                let n = NEXT.fetch_add(1, Ordering::Relaxed);
                let mut stream = open(PROTOCOLS[n as usize % PROTOCOLS.len()]).await?;
                stream.write_all(&noise(n)).await?;
                stream.shutdown().await
            }
            Self::SlowLoris => {
                let (protocol, announced) = announcement(i);
                let mut stream = open(protocol).await?;
                stream.write_all(&announced).await?;
                loop {
                    stream.write_all(&[0]).await?;
                    stream.flush().await?;
                    sleep(Duration::from_millis(200)).await;
                }
            }
            Self::HugeFrames => {
                let (protocol, announced) = announcement(i);
                let mut stream = open(protocol).await?;
                stream.write_all(&announced).await?;
                let n_bytes = if protocol == RPC { RPC_BODY_MAX_BYTES } else { BITSWAP_MESSAGE_MAX_BYTES };
                stream.write_all(&vec![0; n_bytes - 1]).await?;
                stream.flush().await?;
                sleep(Duration::from_secs(60)).await;
                Ok(())
            }
            Self::WrongBlocks => {
                let mut stream = open(wire::PROTOCOL).await?;
                let block = Block::new(HashKind::Sha2, vec![i as u8; 1 << 20].into());
                let blocks = vec![block.map_err(io::Error::other)?];
                let message = Message { blocks, ..Message::default() }.encode();
                loop {
                    stream.write_all(&message).await?;
                }
            }
            Self::LyingBitmaps => lie(open(spread::wire::PROTOCOL).await?, root).await,
        }
    }
}

async fn open(node: &Node, target: &PeerId, protocol: &str) -> io::Result<Stream> {
    node.open_stream(target, protocol).await.map_err(io::Error::other)
}

/// Calls and calls, while somebody throws the answers away.
async fn flood(stream: Stream) -> io::Result<()> {
    let mut writer = discarding(stream);
    for call_id in 1.. {
        let (method, deadline) = ("echo".to_owned(), Duration::from_secs(60));
        let header =
            Header::Request { call_id, method, deadline, body_bytes: 1000, done_below: call_id, attempt: 0 };
        writer.write_all(&[header.encode(), vec![0; 1000]].concat()).await?;
    }
    Ok(())
}

/// Has everything, wants everything, gives nothing.
async fn lie(stream: Stream, root: Cid) -> io::Result<()> {
    let mut writer = discarding(stream);
    writer.write_all(&Frame::Hello(root).encode()).await?;
    let say = |message| Frame::Message(message).encode();
    writer.write_all(&say(SpreadMessage::Holds(Bitmap::full(SPREAD_CHUNKS)))).await?;
    loop {
        for chunk in 0..SPREAD_CHUNKS {
            for message in [
                SpreadMessage::Request(chunk),
                SpreadMessage::Have(vec![chunk; 64]),
                SpreadMessage::Offer(chunk),
                SpreadMessage::Cancel(chunk),
            ] {
                writer.write_all(&say(message)).await?;
            }
        }
        writer.flush().await?;
    }
}

/// What comes in goes nowhere.
fn discarding(stream: Stream) -> WriteHalf<Stream> {
    let (mut reader, writer) = tokio::io::split(stream);
    tokio::spawn(async move {
        let mut buffer = vec![0; 64 * 1024];
        while matches!(reader.read(&mut buffer).await, Ok(n) if n > 0) {}
    });
    writer
}

/// The beginning of the largest message that a protocol takes.
fn announcement(i: usize) -> (&'static str, Vec<u8>) {
    if i.is_multiple_of(2) {
        let (method, deadline, body_bytes) = ("echo".to_owned(), Duration::from_secs(60), RPC_BODY_MAX_BYTES);
        let header = Header::Request { call_id: 1, method, deadline, body_bytes, done_below: 0, attempt: 0 };
        (RPC, header.encode())
    } else {
        let mut length = Vec::new();
        frame::encode_length(BITSWAP_MESSAGE_MAX_BYTES, &mut length);
        (wire::PROTOCOL, length)
    }
}

/// 16 KiB that mean nothing.
fn noise(seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(byte).take(16 * 1024).collect()
}
