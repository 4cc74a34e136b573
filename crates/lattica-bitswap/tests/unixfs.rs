//! Files and directories of IPFS between real nodes on loopback: one set of blocks under two roots.
#![cfg(feature = "service")]
#![expect(clippy::unwrap_used, reason = "helpers of tests sit outside of test functions")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lattica_bitswap::unixfs::Limits;
use lattica_bitswap::{
    BlockStore, Blocks, ExchangeConfig, FetchError, FsStore, HashKind, Manifest, MemoryStore, UnixfsError,
};
use lattica_net::{Identity, Node, NodeConfig};

const LEAF_BYTES: usize = 10_000;

async fn peer(store: Arc<dyn BlockStore>) -> (Node, Blocks) {
    let node =
        Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.1", "unixfs-test")).await.unwrap();
    let config = ExchangeConfig { leaf_bytes: LEAF_BYTES, ..ExchangeConfig::default() };
    (node.clone(), Blocks::start_with(node, store, config))
}

/// Files of these lengths below `dir`, and their contents.
fn files(dir: &Path, lengths: &[(&str, usize)]) -> BTreeMap<PathBuf, Vec<u8>> {
    let file = |(name, length): &(&str, usize)| {
        let bytes: Vec<u8> =
            (0..*length as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &bytes).unwrap();
        (PathBuf::from(name), bytes)
    };
    lengths.iter().map(file).collect()
}

fn stored_bytes(dir: &Path) -> u64 {
    let lengths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    lengths
        .filter(|e| e.file_name().to_string_lossy().ends_with(".blocks"))
        .map(|e| e.metadata().unwrap().len())
        .sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_is_fetched_by_its_second_root_and_stored_once() {
    let (dir, store, out) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lengths =
        [("config.json", 300), ("empty", 0), ("weights/a.bin", 2_000_000), ("weights/b.bin", 10_001)];
    let contents = files(dir.path(), &lengths);
    let (a, publisher) = peer(Arc::new(FsStore::open(store.path()).unwrap())).await;
    let (b, receiver) = peer(Arc::new(MemoryStore::new())).await;
    let paths: Vec<PathBuf> = contents.keys().cloned().collect();
    let root = publisher.publish_files(dir.path(), &paths).await.unwrap();
    let before = stored_bytes(store.path());
    let second = publisher.publish_unixfs(&root).await.unwrap();
    // Nodes only: a link is about 50 bytes, a leaf is 10 000.
    assert!(stored_bytes(store.path()) - before < 20_000, "leaves are not stored again");
    assert_eq!(publisher.publish_unixfs(&root).await.unwrap(), second);

    b.dial(&a.listen_addrs().await[0]).await.unwrap();
    let mut last = None;
    let tree =
        receiver.fetch_unixfs(&second, &[a.peer_id()], Limits::default(), |p| last = Some(p)).await.unwrap();
    assert_eq!((tree.files.len(), tree.directories.as_deref()), (4, Some(&["weights".to_owned()][..])));
    assert_eq!(last.unwrap().done_bytes, last.unwrap().total_bytes);
    let target = out.path().join("copy");
    receiver.write_unixfs_to(&second, &tree, &target).await.unwrap();
    for (path, bytes) in &contents {
        assert_eq!(fs::read(target.join(path)).unwrap(), *bytes, "{}", path.display());
    }
    let again = receiver.write_unixfs_to(&second, &tree, &target).await.unwrap_err();
    assert!(matches!(again, FetchError::Target { .. }), "{again}");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "nothing unfinished lies about");

    let small = Limits { bytes: 1_000_000, ..Limits::default() };
    let refused = receiver.fetch_unixfs(&second, &[a.peer_id()], small, |_| ()).await.unwrap_err();
    assert!(
        matches!(&refused, FetchError::Unixfs { source: UnixfsError::TooLarge { what: "bytes", .. }, .. }),
        "{refused}"
    );
    // The publisher restarts: both names are still there.
    drop(publisher);
    a.shutdown().await;
    let store = loop {
        // The exchange's last task lets go of the store after its node has stopped.
        match FsStore::open(store.path()) {
            Ok(store) => break store,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    let manifest = Manifest::decode(store.get(&root).unwrap().unwrap().bytes()).unwrap();
    for block in manifest.blocks() {
        let bytes = store.get(&block.cid).unwrap().unwrap().bytes().clone();
        let second = swarm_wire::cid::raw(HashKind::Sha2.code(), &HashKind::Sha2.digest(&bytes));
        assert_eq!(store.get(&second).unwrap().unwrap().bytes(), &bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_one_leaf_is_its_leaf_and_what_is_no_file_is_refused() {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let contents = files(dir.path(), &[("small", 5)]);
    let (a, publisher) = peer(Arc::new(MemoryStore::new())).await;
    let (b, receiver) = peer(Arc::new(MemoryStore::new())).await;
    b.dial(&a.listen_addrs().await[0]).await.unwrap();
    let root = publisher.publish_file(&dir.path().join("small")).await.unwrap();
    let second = publisher.publish_unixfs(&root).await.unwrap();
    let tree = receiver.fetch_unixfs(&second, &[a.peer_id()], Limits::default(), |_| ()).await.unwrap();
    let target = out.path().join("deep/er/small");
    receiver.write_unixfs_to(&second, &tree, &target).await.unwrap();
    assert_eq!(fs::read(&target).unwrap(), contents[Path::new("small")]);
    // dag-cbor under the same digest.
    let other = swarm_wire::Cid::new_v1(0x71, *second.hash());
    let block = lattica_bitswap::Block::verify(other, contents[Path::new("small")].clone().into()).unwrap();
    publisher.store().put(&block).unwrap();
    let refused = receiver.fetch_unixfs(&other, &[a.peer_id()], Limits::default(), |_| ()).await.unwrap_err();
    assert!(refused.to_string().contains("codec 0x71"), "{refused}");
}
