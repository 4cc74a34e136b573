//! One artefact to several real nodes on loopback: everybody passes on, liars are dropped, what is stored stays.
#![cfg(feature = "service")]
#![expect(clippy::unwrap_used, reason = "helpers of tests sit outside of test functions")]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use lattica_bitswap::spread::wire::{FRAME_MAX_BYTES, Frame, PROTOCOL};
use lattica_bitswap::spread::{Bitmap, SpreadMessage};
use lattica_bitswap::{
    Block, BlockStore, Blocks, ExchangeConfig, FetchError, MemoryStore, SpreadConfig, Spreading, StoreError,
};
use lattica_net::{Identity, Node, NodeConfig, Stream, read_frame};
use swarm_wire::{Cid, frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LEAF: usize = 64 * 1024;

fn loopback() -> NodeConfig {
    NodeConfig::loopback("127.0.0.1", "spread-test")
}

/// A node that spreads nothing by itself.
async fn node() -> Node {
    Node::start(Identity::generate(), loopback()).await.unwrap()
}

struct Peer {
    node: Node,
    blocks: Blocks,
}

async fn peer_with(store: Arc<dyn BlockStore>) -> Peer {
    peer_that_sends(store, None).await
}

async fn peer_that_sends(store: Arc<dyn BlockStore>, spread_bytes_per_s: Option<f64>) -> Peer {
    peer_at(node().await, store, spread_bytes_per_s)
}

fn peer_at(node: Node, store: Arc<dyn BlockStore>, spread_bytes_per_s: Option<f64>) -> Peer {
    // Long enough for tests in which somebody waits for what is still on its way.
    let dont_have_grace = Duration::from_secs(60);
    let config =
        ExchangeConfig { leaf_bytes: LEAF, dont_have_grace, spread_bytes_per_s, ..ExchangeConfig::default() };
    let blocks = Blocks::start_with(node.clone(), store, config);
    Peer { node, blocks }
}

async fn peer() -> Peer {
    peer_with(Arc::new(MemoryStore::new())).await
}

/// Four mebibytes that repeat nowhere.
fn content() -> Bytes {
    let mut state = 7u32;
    let bytes = (0..64 * LEAF).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    Bytes::from(bytes.collect::<Vec<u8>>())
}

async fn publish(source: &Peer) -> (Cid, Spreading) {
    let root = source.blocks.publish_bytes("weights", "weights", content()).await.unwrap();
    let spreading = source.blocks.spread(&root, None, SpreadConfig::default()).await.unwrap();
    (root, spreading)
}

async fn join(member: &Peer, source: &Peer, root: &Cid) -> Spreading {
    member.node.dial(&source.node.listen_addrs().await[0]).await.unwrap();
    member.blocks.spread(root, Some(&source.node.peer_id()), SpreadConfig::default()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_get_everything_mostly_from_each_other() {
    let source = peer().await;
    let (root, feeding) = publish(&source).await;
    let mut members = Vec::new();
    for _ in 0..4 {
        members.push(peer().await);
    }
    let mut parts = Vec::new();
    for member in &members {
        parts.push(join(member, &source, &root).await);
    }
    for (member, part) in members.iter().zip(&parts) {
        let mut seen = Vec::new();
        part.done(|p| seen.push(p.done_bytes)).await.unwrap();
        assert!(seen.is_sorted());
        assert_eq!(member.blocks.read(&root).await.unwrap(), content());
    }
    // Four copies were needed; the source sent little more than one of them.
    let copies = feeding.uploaded() as f64 / 64.0;
    assert!((1.0..2.0).contains(&copies), "the source sent {copies} copies");
    let passed_on: u64 = parts.iter().map(Spreading::uploaded).sum();
    assert!(passed_on + feeding.uploaded() >= 4 * 64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_stored_already_is_not_sent_again() {
    let (source, member) = (peer().await, peer().await);
    let (root, feeding) = publish(&source).await;
    let leaf = |i: usize| content().slice(i * LEAF..(i + 1) * LEAF);
    for i in 0..40 {
        let block = Block::new(lattica_bitswap::HashKind::Blake3, leaf(i)).unwrap();
        member.blocks.store().put(&block).unwrap();
    }
    let part = join(&member, &source, &root).await;
    assert_eq!(part.progress().done_bytes, 40 * LEAF as u64);
    part.done(|_| ()).await.unwrap();
    assert_eq!(feeding.uploaded(), 24);
}

/// A member that shows everything and sends garbage.
fn lie(node: &Node) {
    node.handle_stream(PROTOCOL, |_, stream| async move {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let all = Frame::Message(SpreadMessage::Holds(Bitmap::full(64)));
        let _ = writer.write_all(&all.encode()).await;
        let _ = writer.flush().await;
        let (mut buffer, mut part) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = reader.read(&mut part).await {
            buffer.extend_from_slice(&part[..n]);
            while let Ok(Some((payload, rest))) = frame::decode("test", &buffer, FRAME_MAX_BYTES) {
                let frame = Frame::decode(Bytes::copy_from_slice(payload), 64);
                let rest = rest.to_vec();
                if let Ok(Frame::Message(SpreadMessage::Request(index))) = frame {
                    let garbage = Frame::Chunk { index, bytes: Bytes::from(vec![index as u8; LEAF]) };
                    let _ = writer.write_all(&garbage.encode()).await;
                    let _ = writer.flush().await;
                }
                buffer = rest;
            }
        }
    })
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_liar_is_dropped_and_nothing_wrong_is_stored() {
    let (source, member) = (peer().await, peer().await);
    let (root, _feeding) = publish(&source).await;
    let liar = node().await;
    lie(&liar);
    // The manifest comes from the source, the first neighbour is the liar.
    member.node.dial(&source.node.listen_addrs().await[0]).await.unwrap();
    member.blocks.fetch_manifest(&root, &[source.node.peer_id()]).await.unwrap();
    member.node.dial(&liar.listen_addrs().await[0]).await.unwrap();
    let config = SpreadConfig::default;
    let lied_to = member.blocks.spread(&root, Some(&liar.peer_id()), config()).await.unwrap();
    while member.blocks.account(&liar.peer_id()).wrong_blocks == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(lied_to.progress().done_bytes, 0);
    assert!(!lied_to.neighbours().contains(&liar.peer_id()));
    drop(lied_to);
    let part = member.blocks.spread(&root, Some(&source.node.peer_id()), config()).await.unwrap();
    part.done(|_| ()).await.unwrap();
    assert_eq!(member.blocks.read(&root).await.unwrap(), content());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_ends_it_with_a_clear_error() {
    let source = peer().await;
    let member = peer_with(Arc::new(MemoryStore::with_quota(10 * LEAF as u64))).await;
    let (root, _feeding) = publish(&source).await;
    let part = join(&member, &source, &root).await;
    for _ in 0..2 {
        let error = part.done(|_| ()).await.unwrap_err();
        assert!(matches!(*error, FetchError::Store(StoreError::Full { .. })), "{error}");
    }
    while !part.neighbours().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_must_have_everything() {
    let (source, other) = (peer().await, peer().await);
    let (root, _feeding) = publish(&source).await;
    other.node.dial(&source.node.listen_addrs().await[0]).await.unwrap();
    other.blocks.fetch_manifest(&root, &[source.node.peer_id()]).await.unwrap();
    let error = other.blocks.spread(&root, None, SpreadConfig::default()).await.unwrap_err();
    assert!(matches!(error, FetchError::NotHere { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_a_block_gets_it_when_the_spread_brings_it() {
    let (source, member, waiting) = (peer().await, peer().await, peer().await);
    let (root, _feeding) = publish(&source).await;
    member.node.dial(&source.node.listen_addrs().await[0]).await.unwrap();
    member.blocks.fetch_manifest(&root, &[source.node.peer_id()]).await.unwrap();
    waiting.node.dial(&member.node.listen_addrs().await[0]).await.unwrap();
    // It knows the member only, which has nothing yet.
    let from = [member.node.peer_id()];
    let (told, mut begun) = tokio::sync::mpsc::channel(1);
    let fetch = {
        let blocks = waiting.blocks.clone();
        tokio::spawn(async move {
            let told = |_| {
                let _ = told.try_send(());
            };
            blocks.fetch(&root, &from, told).await
        })
    };
    begun.recv().await.unwrap();
    let part = member.blocks.fetch_via_spread(&root, &source.node.peer_id(), |_| ()).await.unwrap();
    fetch.await.unwrap().unwrap();
    assert_eq!(waiting.blocks.read(&root).await.unwrap(), content());
    assert_eq!(part.progress().done_bytes, content().len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_an_older_spread_leaves_the_newer_one_alone() {
    let (source, member) = (peer().await, peer().await);
    let (root, older) = publish(&source).await;
    let newer = source.blocks.spread(&root, None, SpreadConfig::default()).await.unwrap();
    drop(older);
    join(&member, &source, &root).await.done(|_| ()).await.unwrap();
    assert_eq!(newer.uploaded(), 64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_nobody_asked_for_are_not_remembered() {
    let source = peer().await;
    let (root, feeding) = publish(&source).await;
    let hostile = node().await;
    hostile.dial(&source.node.listen_addrs().await[0]).await.unwrap();
    let mut stream = hostile.open_stream(&source.node.peer_id(), PROTOCOL).await.unwrap();
    let nobody = Identity::from_seed([9; 32]).peer_id();
    let named = Frame::Peers(vec![(nobody.clone(), vec!["/ip4/127.0.0.1/tcp/1".to_owned()])]);
    let frames = [Frame::Hello(root), named, Frame::AskPeers, Frame::AskPeers];
    for frame in frames {
        stream.write_all(&frame.encode()).await.unwrap();
    }
    // A chunk number beyond the last one ends the stream; by then everything before it was looked at.
    stream.write_all(&Frame::Message(SpreadMessage::Request(64)).encode()).await.unwrap();
    stream.flush().await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    while !feeding.neighbours().is_empty() {
        tokio::task::yield_now().await;
    }
    assert!(source.node.addresses(&nobody).is_empty());
    assert!(!source.node.peers().iter().any(|p| p.peer == nobody));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spread_takes_no_more_of_the_uplink_than_it_may() {
    let rate = 8e6;
    let source = peer_that_sends(Arc::new(MemoryStore::new()), Some(rate)).await;
    let member = peer().await;
    let (root, feeding) = publish(&source).await;
    let begin = std::time::Instant::now();
    join(&member, &source, &root).await.done(|_| ()).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_secs_f64(content().len() as f64 / rate));
    assert_eq!(feeding.uploaded(), 64);
}

async fn say(stream: &mut Stream, frame: Frame) {
    stream.write_all(&frame.encode()).await.unwrap();
    stream.flush().await.unwrap();
}

/// The next message of a member to its neighbour.
async fn told(stream: &mut Stream) -> SpreadMessage {
    loop {
        let payload = read_frame(stream, "test", FRAME_MAX_BYTES).await.unwrap().expect("it goes on");
        if let Frame::Message(message) = Frame::decode(payload, 64).unwrap() {
            return message;
        }
    }
}

/// The next chunks that a source shows.
async fn shown(stream: &mut Stream) -> Vec<u32> {
    loop {
        if let SpreadMessage::Have(chunks) = told(stream).await {
            return chunks;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_a_relay_a_source_shows_only_what_a_direct_neighbour_has() {
    let relay = Node::start(Identity::generate(), NodeConfig { relay_server: true, ..loopback() }).await;
    let relay = relay.unwrap();
    let relays = vec![relay.listen_addrs().await.remove(0)];
    // Nobody listens but the relay and the direct neighbour.
    let quiet = || NodeConfig { listen: vec![], hole_punching: false, ..loopback() };
    let leaf = Node::start(Identity::generate(), NodeConfig { relays, ..quiet() }).await.unwrap();
    let circuit = loop {
        match leaf.listen_addrs().await.into_iter().find(|address| address.contains("p2p-circuit")) {
            Some(address) => break address,
            None => tokio::task::yield_now().await,
        }
    };
    let source = Node::start(Identity::generate(), quiet()).await.unwrap();
    let source = peer_at(source, Arc::new(MemoryStore::new()), None);
    let root = source.blocks.publish_bytes("weights", "weights", content()).await.unwrap();
    // However slow this machine is, nobody waits too long.
    let config = SpreadConfig { stuck_after: Duration::from_secs(600), ..SpreadConfig::default() };
    let _feeding = source.blocks.spread(&root, None, config).await.unwrap();
    let direct = node().await;
    let mut streams = Vec::new();
    for (node, address) in [(&direct, &direct.listen_addrs().await[0]), (&leaf, &circuit)] {
        source.node.dial(address).await.unwrap();
        while !node.is_connected(&source.node.peer_id()) {
            tokio::task::yield_now().await;
        }
        streams.push(node.open_stream(&source.node.peer_id(), PROTOCOL).await.unwrap());
    }
    let [direct, leaf] = &mut streams[..] else { unreachable!("two of them") };
    assert!(leaf.is_relayed() && !direct.is_relayed());

    say(direct, Frame::Hello(root)).await;
    let first = shown(direct).await[0];
    say(leaf, Frame::Hello(root)).await;
    say(direct, Frame::Message(SpreadMessage::Have(vec![first]))).await;
    assert_eq!(shown(leaf).await, [first]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_urgent_is_asked_for_first() {
    let (source, member, neighbour) = (peer().await, peer().await, node().await);
    let (root, _feeding) = publish(&source).await;
    let (taken, mut taking) = tokio::sync::mpsc::channel(1);
    let hand_over = move |_, stream: Stream| {
        let taken = taken.clone();
        async move {
            let _ = taken.send(stream).await;
        }
    };
    neighbour.handle_stream(PROTOCOL, hand_over).unwrap();
    // The manifest comes from the source, the first neighbour shows nothing yet.
    member.node.dial(&source.node.listen_addrs().await[0]).await.unwrap();
    member.blocks.fetch_manifest(&root, &[source.node.peer_id()]).await.unwrap();
    member.node.dial(&neighbour.listen_addrs().await[0]).await.unwrap();
    let config = SpreadConfig { min_outstanding: 4, ..SpreadConfig::default() };
    let part = member.blocks.spread(&root, Some(&neighbour.peer_id()), config).await.unwrap();
    // Of the 64 that there are.
    part.set_urgency(60..100, 1);
    let mut stream = taking.recv().await.unwrap();
    say(&mut stream, Frame::Message(SpreadMessage::Holds(Bitmap::full(64)))).await;
    let mut asked = Vec::new();
    while asked.len() < 4 {
        if let SpreadMessage::Request(chunk) = told(&mut stream).await {
            asked.push(chunk);
        }
    }
    asked.sort_unstable();
    assert_eq!(asked, [60, 61, 62, 63]);
}
