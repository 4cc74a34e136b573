//! Exchange between real nodes on loopback: fetches, liars, resuming, spans, files, full stores.
#![cfg(feature = "service")]
#![expect(clippy::unwrap_used, reason = "helpers of tests sit outside of test functions")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use lattica_bitswap::wire::{Message, PROTOCOL, WantEntry, WantKind};
use lattica_bitswap::{
    Block, BlockStore, Blocks, ExchangeConfig, FetchError, FsStore, HashKind, Manifest, MemoryStore,
    Progress, SessionConfig, StoreError,
};
use lattica_net::{Identity, Node, NodeConfig};
use swarm_wire::{Cid, PeerId, frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MIB: usize = 1 << 20;

async fn node() -> Node {
    Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.1", "bitswap-test")).await.unwrap()
}

async fn connect(from: &Node, to: &Node) {
    from.dial(&to.listen_addrs().await[0]).await.unwrap();
}

fn impatient() -> ExchangeConfig {
    ExchangeConfig { dont_have_grace: Duration::from_millis(100), ..ExchangeConfig::default() }
}

async fn memory_peer() -> (Node, Arc<MemoryStore>, Blocks) {
    let node = node().await;
    let store = Arc::new(MemoryStore::new());
    let blocks = Blocks::start_with(node.clone(), store.clone(), impatient());
    (node, store, blocks)
}

fn content(length: usize, seed: u32) -> Bytes {
    let mut state = seed;
    let bytes = (0..length).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    Bytes::from(bytes.collect::<Vec<u8>>())
}

/// Wants for blocks, and nothing else, that `peer` served so far.
fn served_bytes(blocks: &Blocks, to: &PeerId) -> u64 {
    blocks.account(to).bytes_out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_exchange_an_artefact_and_report_progress() {
    let (a, _, publisher) = memory_peer().await;
    let (b, _, receiver) = memory_peer().await;
    connect(&b, &a).await;
    let bytes = content(5 * MIB + 123, 1);
    let root = publisher.publish_bytes("weights", "weights", bytes.clone()).await.unwrap();
    let mut seen: Vec<Progress> = Vec::new();
    let manifest = receiver.fetch(&root, &[a.peer_id()], |p| seen.push(p)).await.unwrap();
    assert_eq!((manifest.name(), manifest.total_bytes()), ("weights", bytes.len() as u64));
    assert_eq!(receiver.read(&root).await.unwrap(), bytes);
    assert_eq!(seen.first().unwrap().done_bytes, 0);
    assert!(seen.is_sorted_by_key(|p| p.done_bytes) && seen.len() > 2, "{seen:?}");
    let last = seen.last().unwrap();
    assert_eq!((last.done_bytes, last.total_bytes), (bytes.len() as u64, bytes.len() as u64));
    // Nothing came twice.
    assert!(served_bytes(&publisher, &b.peer_id()) < bytes.len() as u64 + 4096);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_hints_connected_peers_are_asked_and_absence_is_told_soon() {
    let (a, _, publisher) = memory_peer().await;
    let (b, _, receiver) = memory_peer().await;
    let (c, _, _idle) = memory_peer().await;
    connect(&b, &c).await;
    connect(&b, &a).await;
    let bytes = content(2 * MIB, 2);
    let root = publisher.publish_bytes("x", "test", bytes.clone()).await.unwrap();
    receiver.fetch(&root, &[], |_| ()).await.unwrap();
    assert_eq!(receiver.read(&root).await.unwrap(), bytes);

    let nowhere = *Block::new(HashKind::Blake3, Bytes::from_static(b"nobody has this")).unwrap().cid();
    let error = receiver.fetch(&nowhere, &[], |_| ()).await.unwrap_err();
    assert!(matches!(error, FetchError::Incomplete { missing_blocks: 1, .. }), "{error}");

    let (_lonely, _, alone) = memory_peer().await;
    let error = alone.fetch(&nowhere, &[], |_| ()).await.unwrap_err();
    assert!(matches!(error, FetchError::NoPeers { .. }), "{error}");
}

/// Answers every want with a block of garbage.
fn lie(node: &Node) -> Arc<AtomicUsize> {
    let lies = Arc::new(AtomicUsize::new(0));
    let (counter, own) = (lies.clone(), node.clone());
    node.handle_stream(PROTOCOL, move |peer, mut stream| {
        let (counter, own) = (counter.clone(), own.clone());
        async move {
            let mut back = own.open_stream(&peer, PROTOCOL).await.unwrap();
            let mut buffer = Vec::new();
            let mut chunk = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut chunk).await {
                buffer.extend_from_slice(&chunk[..n]);
                while let Ok(Some((payload, rest))) = frame::decode("test", &buffer, 1 << 22) {
                    let message = Message::decode(Bytes::copy_from_slice(payload)).unwrap();
                    let rest = rest.to_vec();
                    for entry in message.entries {
                        if matches!(entry, WantEntry::Want { kind: WantKind::Block, .. }) {
                            let n = counter.fetch_add(1, Ordering::Relaxed);
                            let garbage = Block::new(HashKind::Blake3, content(1000, n as u32)).unwrap();
                            let message = Message { blocks: vec![garbage], ..Message::default() };
                            let _ = back.write_all(&message.encode()).await;
                        }
                    }
                    let _ = back.flush().await;
                    buffer = rest;
                }
            }
        }
    })
    .unwrap();
    lies
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_liar_is_shunned_and_none_of_its_bytes_are_stored() {
    let (a, _, publisher) = memory_peer().await;
    let (b, store, receiver) = memory_peer().await;
    let liar = node().await;
    let lies = lie(&liar);
    connect(&b, &a).await;
    connect(&b, &liar).await;
    let bytes = content(12 * MIB, 3);
    let root = publisher.publish_bytes("x", "test", bytes.clone()).await.unwrap();
    receiver.fetch(&root, &[liar.peer_id(), a.peer_id()], |_| ()).await.unwrap();
    assert_eq!(receiver.read(&root).await.unwrap(), bytes);
    assert!(lies.load(Ordering::Relaxed) > 0, "the liar was asked");
    assert!(receiver.account(&liar.peer_id()).wrong_blocks > 0);
    assert_eq!(store.n_blocks(), 13, "twelve blocks and the manifest, nothing else");
    // From the liar alone nothing comes, and the fetch says so.
    let other = publisher.publish_bytes("y", "test", content(1000, 4)).await.unwrap();
    a.shutdown().await;
    let error = receiver.fetch(&other, &[liar.peer_id()], |_| ()).await.unwrap_err();
    assert!(matches!(error, FetchError::NoPeers { .. } | FetchError::Incomplete { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_that_nobody_asked_for_end_their_stream_and_large_ones_are_not_taken_in_again() {
    let (a, store, victim) = memory_peer().await;
    let hostile = node().await;
    connect(&hostile, &a).await;
    let unasked = |n_bytes| {
        let block = Block::new(HashKind::Sha2, content(n_bytes, 7)).unwrap();
        Message { blocks: vec![block], ..Message::default() }.encode()
    };
    for (n_bytes, wrong) in [(1000, 1), (1000, 2), (MIB, 2)] {
        let mut stream = hostile.open_stream(&a.peer_id(), PROTOCOL).await.unwrap();
        // The other side may have seen enough before all of it has left.
        let _ = stream.write_all(&unasked(n_bytes)).await;
        let _ = stream.flush().await;
        let ended = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut [0; 8])).await;
        assert!(!matches!(ended.expect("the stream is closed"), Ok(n) if n > 0));
        assert_eq!(victim.account(&hostile.peer_id()).wrong_blocks, wrong, "{n_bytes}");
    }
    assert_eq!(store.n_blocks(), 0);
    // It may still be served: what it wants costs no more than what others want.
    let root = victim.publish_bytes("x", "test", content(1000, 1)).await.unwrap();
    let wants = Blocks::start_with(hostile.clone(), Arc::new(MemoryStore::new()), impatient());
    wants.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_pass_blocks_on() {
    let (a, _, publisher) = memory_peer().await;
    let (b, _, first) = memory_peer().await;
    // c is in another network, so that the DHT cannot tell it of a.
    let c = Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.1", "elsewhere")).await.unwrap();
    let second = Blocks::start_with(c.clone(), Arc::new(MemoryStore::new()), impatient());
    connect(&b, &a).await;
    connect(&c, &b).await;
    let bytes = content(3 * MIB, 5);
    let root = publisher.publish_bytes("x", "test", bytes.clone()).await.unwrap();
    // c knows only b, which has nothing yet: it waits, and is served as soon as b gets the blocks.
    let late = second.clone();
    let waiting = tokio::spawn(async move {
        loop {
            match late.fetch(&root, &[], |_| ()).await {
                Ok(manifest) => return manifest,
                Err(FetchError::Incomplete { .. } | FetchError::NoPeers { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
    });
    first.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap();
    waiting.await.unwrap();
    assert_eq!(second.read(&root).await.unwrap(), bytes);
    assert_eq!(second.account(&a.peer_id()).bytes_in, 0);
    assert!(second.account(&b.peer_id()).bytes_in >= bytes.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_fetch_resumes_with_only_the_missing_blocks() {
    let (a, _, publisher) = memory_peer().await;
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(24 * MIB, 6);
    let root = publisher.publish_bytes("x", "test", bytes.clone()).await.unwrap();

    let b = node().await;
    let blocks = Blocks::start(b.clone(), Arc::new(FsStore::open(dir.path()).unwrap()));
    connect(&b, &a).await;
    let (sender, mut halfway) = tokio::sync::mpsc::channel(1);
    let from = [a.peer_id()];
    let fetch = blocks.fetch(&root, &from, |p| {
        if p.done_bytes >= p.total_bytes / 3 {
            let _ = sender.try_send(p.done_bytes);
        }
    });
    tokio::select! {
        result = fetch => panic!("the fetch was to be aborted: {result:?}"),
        _ = halfway.recv() => {}
    }
    b.shutdown().await;
    drop((blocks, b));

    // The files may be held a moment longer by a block that is just being stored.
    let store = loop {
        match FsStore::open(dir.path()) {
            Ok(store) => break Arc::new(store),
            Err(StoreError::InUse { .. }) => tokio::task::yield_now().await,
            Err(other) => panic!("{other}"),
        }
    };
    let manifest = Manifest::decode(store.get(&root).unwrap().unwrap().bytes()).unwrap();
    let stored = |b: &&lattica_bitswap::BlockRef| store.length_of(&b.cid).unwrap().is_some();
    let stored_bytes: u64 = manifest.blocks().iter().filter(stored).map(|b| u64::from(b.length)).sum();
    assert!(stored_bytes >= bytes.len() as u64 / 3 && stored_bytes < bytes.len() as u64, "{stored_bytes}");

    let c = node().await;
    let blocks = Blocks::start(c.clone(), store);
    connect(&c, &a).await;
    let mut first = None;
    blocks.fetch(&root, &[a.peer_id()], |p| _ = first.get_or_insert(p.done_bytes)).await.unwrap();
    assert_eq!(first, Some(stored_bytes));
    assert_eq!(blocks.read(&root).await.unwrap(), bytes);
    assert_eq!(blocks.account(&a.peer_id()).bytes_in, bytes.len() as u64 - stored_bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_served_by_reference_in_spans_and_written_whole() {
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("model");
    std::fs::create_dir(&files).unwrap();
    let (config, weights) = (content(700, 7), content(6 * MIB + 5, 8));
    std::fs::write(files.join("config.json"), &config).unwrap();
    std::fs::write(files.join("weights.bin"), &weights).unwrap();
    let a = node().await;
    let publisher = Blocks::start(a.clone(), Arc::new(FsStore::open(dir.path().join("store")).unwrap()));
    let root = publisher.publish_files(&files, &["config.json".into(), "weights.bin".into()]).await.unwrap();

    let (b, store, receiver) = memory_peer().await;
    connect(&b, &a).await;
    let manifest = receiver.fetch_manifest(&root, &[a.peer_id()]).await.unwrap();
    let start = manifest.entry("weights.bin").unwrap().offset;
    let span = (start + 3 * MIB as u64 - 5, 10);
    receiver.fetch_spans(&root, &[span], &[a.peer_id()], |_| ()).await.unwrap();
    assert_eq!(store.n_blocks(), 3, "the manifest and the two blocks that hold the span");
    let at = 3 * MIB - 5;
    assert_eq!(receiver.read_span(&root, span.0, span.1).await.unwrap(), weights.slice(at..at + 10));
    let target = dir.path().join("out/weights.bin");
    let error = receiver.write_entry_to(&root, "weights.bin", &target).await.unwrap_err();
    assert!(matches!(error, FetchError::NotHere { .. }) && !target.exists(), "no partial file: {error}");

    receiver.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap();
    receiver.write_entry_to(&root, "weights.bin", &target).await.unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), weights);
    assert_eq!(std::fs::read_dir(target.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
    let outside = receiver.fetch_spans(&root, &[(manifest.total_bytes(), 1)], &[a.peer_id()], |_| ()).await;
    assert!(matches!(outside, Err(FetchError::SpanOutside { .. })));

    // A file that changed is not served any more. The receiver, which has it all by now, is not there to help.
    b.shutdown().await;
    std::fs::write(files.join("weights.bin"), content(100, 9)).unwrap();
    let (c, _, late) = memory_peer().await;
    connect(&c, &a).await;
    let error = late.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap_err();
    assert!(matches!(error, FetchError::Incomplete { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_ends_the_fetch_with_its_reason() {
    let (a, _, publisher) = memory_peer().await;
    let root = publisher.publish_bytes("x", "test", content(8 * MIB, 10)).await.unwrap();
    let b = node().await;
    let receiver = Blocks::start(b.clone(), Arc::new(MemoryStore::with_quota(3 * MIB as u64)));
    connect(&b, &a).await;
    let error = receiver.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap_err();
    assert!(matches!(error, FetchError::Store(StoreError::Full { .. })), "{error}");
    assert!(
        matches!(receiver.read(&root).await, Err(FetchError::NotHere { .. })),
        "nothing partial is whole"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_that_is_no_manifest_is_refused() {
    let (a, store, _publisher) = memory_peer().await;
    let block = Block::new(HashKind::Blake3, Bytes::from(vec![0xff; 5000])).unwrap();
    store.put(&block).unwrap();
    let (b, _, receiver) = memory_peer().await;
    connect(&b, &a).await;
    let error = receiver.fetch(block.cid(), &[a.peer_id()], |_| ()).await.unwrap_err();
    assert!(matches!(error, FetchError::BadManifest { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_oversized_frames_do_no_harm() {
    let (a, _, publisher) = memory_peer().await;
    let (b, _, receiver) = memory_peer().await;
    connect(&b, &a).await;
    let attacker = node().await;
    connect(&attacker, &a).await;
    for bytes in
        [vec![0xff; 64], vec![0xff, 0xff, 0xff, 0x7f, 1, 2, 3], vec![3, 0xff, 0xff, 0xff], vec![200, 1, 9]]
    {
        let mut stream = attacker.open_stream(&a.peer_id(), PROTOCOL).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.unwrap();
    }
    let bytes = content(MIB, 11);
    let root: Cid = publisher.publish_bytes("x", "test", bytes.clone()).await.unwrap();
    receiver.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap();
    assert_eq!(receiver.read(&root).await.unwrap(), bytes);
}

/// `bytes` with about one in a hundred of its 16-bit words changed a little, as weights are by a step of training.
fn stepped(bytes: &[u8]) -> Bytes {
    let random = content(bytes.len() / 2, 77);
    let word = |(word, random): (&[u8], &u8)| {
        let value = u16::from_le_bytes([word[0], word[1]]);
        let changed = match random {
            0 | 1 => value.wrapping_add(1),
            2 => value.wrapping_sub(2),
            _ => value,
        };
        changed.to_le_bytes()
    };
    bytes.chunks_exact(2).zip(&random).flat_map(word).collect::<Vec<u8>>().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_the_version_before_gets_the_next_one_with_few_bytes() {
    let (a, _, publisher) = memory_peer().await;
    let (b, _, receiver) = memory_peer().await;
    let (c, _, newcomer) = memory_peer().await;
    connect(&b, &a).await;
    connect(&c, &a).await;
    let old = content(6 * MIB, 5);
    let new = stepped(&old);
    let n_changed = old.chunks(2).zip(new.chunks(2)).filter(|(a, b)| a != b).count();
    assert!((0.009..0.015).contains(&(n_changed as f64 / (3 * MIB) as f64)), "{n_changed}");
    let parent = publisher.publish_bytes("weights", "weights", old).await.unwrap();
    receiver.fetch(&parent, &[a.peer_id()], |_| ()).await.unwrap();
    let before = served_bytes(&publisher, &b.peer_id());
    let root = publisher.publish_update("weights", "weights", new.clone(), &parent).await.unwrap();
    receiver.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap();
    assert_eq!(receiver.read(&root).await.unwrap(), new);
    let share = (served_bytes(&publisher, &b.peer_id()) - before) as f64 / new.len() as f64;
    assert!(share < 0.03, "{share} of the bytes");
    // Who does not have the old version gets the new one whole.
    newcomer.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap();
    assert_eq!(newcomer.read(&root).await.unwrap(), new);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delta_that_does_not_come_costs_nothing_but_its_bytes() {
    let (a, store, publisher) = memory_peer().await;
    let (b, _, receiver) = memory_peer().await;
    connect(&b, &a).await;
    let old = content(2 * MIB, 6);
    let new = stepped(&old);
    let parent = publisher.publish_bytes("weights", "weights", old).await.unwrap();
    receiver.fetch(&parent, &[a.peer_id()], |_| ()).await.unwrap();
    let root = publisher.publish_update("weights", "weights", new.clone(), &parent).await.unwrap();
    let manifest = Manifest::decode(store.get(&root).unwrap().unwrap().bytes()).unwrap();
    store.remove(&[manifest.update().unwrap().delta]).unwrap();
    receiver.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap();
    assert_eq!(receiver.read(&root).await.unwrap(), new);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delta_is_looked_for_where_its_artefact_is_held() {
    let (a, _, publisher) = memory_peer().await;
    let (b, _, holder) = memory_peer().await;
    // Who happens to be connected is not asked: only whom it is told of, and whom the DHT names.
    let session = SessionConfig { max_candidates: 0, max_presences: 0, ..SessionConfig::default() };
    let c = node().await;
    let config = ExchangeConfig { session, ..impatient() };
    let receiver = Blocks::start_with(c.clone(), Arc::new(MemoryStore::new()), config);
    connect(&b, &a).await;
    connect(&c, &b).await;
    let old = content(2 * MIB, 8);
    let new = stepped(&old);
    let parent = publisher.publish_bytes("weights", "weights", old.clone()).await.unwrap();
    let root = publisher.publish_update("weights", "weights", new.clone(), &parent).await.unwrap();
    // Without the version before no delta is asked for, so that this holder has none to give.
    holder.fetch(&root, &[a.peer_id()], |_| ()).await.unwrap();
    assert_eq!(receiver.publish_bytes("weights", "weights", old).await.unwrap(), parent);
    let announced = async {
        while !c.providers(&root.hash().to_bytes()).await.is_ok_and(|found| found.contains(&a.peer_id())) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), announced).await.unwrap();
    receiver.fetch(&root, &[b.peer_id()], |_| ()).await.unwrap();
    assert_eq!(receiver.read(&root).await.unwrap(), new);
    let [whole, patches] = [b, a].map(|from| receiver.account(&from.peer_id()).bytes_in);
    assert!(whole < 10_000 && patches > 0, "{whole} bytes and {patches} of patches");
}
