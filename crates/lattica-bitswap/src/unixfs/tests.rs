//! UnixFS against what Helia's importer made (tests/golden/unixfs), and against graphs that lie.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use proptest::prelude::*;
use swarm_wire::{Cid, cid};

use super::fields::{put_bytes, put_number};
use super::*;
use crate::publish::put;
use crate::{Block, BlockStore, Entry, HashKind, Manifest, MemoryStore, UnixfsError, chunker};

const GOLDEN: &str = include_str!("../../../../tests/golden/unixfs/unixfs.json");

/// As make.mjs fills files.
fn file_bytes(n: usize) -> Bytes {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn golden() -> serde_json::Value {
    serde_json::from_str(GOLDEN).unwrap()
}

fn number(value: &serde_json::Value) -> usize {
    value.as_u64().unwrap() as usize
}

/// An artefact whose entries each begin a block, as published files have it.
fn artefact(store: &MemoryStore, entries: &[(&str, Bytes)], hash: HashKind, leaf_bytes: usize) -> Manifest {
    let (mut blocks, mut named, mut offset) = (Vec::new(), Vec::new(), 0);
    for (name, bytes) in entries {
        let length = bytes.len() as u64;
        named.push(Entry { name: (*name).to_owned(), offset, length });
        offset += length;
        for leaf in chunker::chunk(hash, bytes, leaf_bytes) {
            blocks.push(put(store, &leaf).unwrap());
        }
    }
    Manifest::new("root", "files", hash, named, blocks).unwrap()
}

fn walk(root: Cid, limits: Limits, blocks: impl Fn(&Cid) -> Option<Block>) -> Result<Tree, UnixfsError> {
    let mut walk = Walk::new(root, limits);
    while !walk.wanted().is_empty() {
        walk.advance(|cid| blocks(cid).ok_or(UnixfsError::NotAFile { cid: *cid }))?;
    }
    Ok(walk.finish())
}

/// Every file of the tree with its bytes.
fn contents(tree: &Tree, blocks: impl Fn(&Cid) -> Option<Block>) -> BTreeMap<String, Vec<u8>> {
    let file = |file: &File| {
        let mut bytes = Vec::new();
        for part in &file.parts {
            let piece = content(&blocks(&part.cid).unwrap()).unwrap();
            assert_eq!(piece.len(), part.bytes as usize);
            bytes.extend_from_slice(&piece);
        }
        assert_eq!(bytes.len() as u64, file.bytes);
        (file.path.clone(), bytes)
    };
    tree.files.iter().map(file).collect()
}

#[test]
fn files_have_the_names_that_ipfs_gives_them() {
    for case in golden()["files"].as_array().unwrap() {
        let bytes = file_bytes(number(&case["bytes"]));
        for hash in [HashKind::Blake3, HashKind::Sha2] {
            let store = MemoryStore::new();
            let manifest = artefact(&store, &[("file", bytes.clone())], hash, number(&case["leaf_bytes"]));
            let leaves = store.n_blocks();
            let root = publish(&store, &manifest).unwrap();
            assert_eq!(root.to_string(), case["cid"].as_str().unwrap(), "{case}");
            // Only what lies above the leaves is stored besides them.
            let most = manifest.blocks().len() / LINKS_PER_NODE + 4;
            assert!(store.n_blocks() - leaves <= most, "{case}");
            walk(root, Limits::default(), |cid| store.get(cid).unwrap()).unwrap();
        }
    }
}

#[test]
fn directories_have_the_names_that_ipfs_gives_them() {
    for case in golden()["directories"].as_array().unwrap() {
        let entries: Vec<(&str, Bytes)> = case["entries"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, n)| (name.as_str(), file_bytes(number(n))))
            .collect();
        let store = MemoryStore::new();
        let manifest = artefact(&store, &entries, HashKind::Blake3, number(&case["leaf_bytes"]));
        let root = publish(&store, &manifest).unwrap();
        assert_eq!(root.to_string(), case["cid"].as_str().unwrap());
    }
}

#[test]
fn what_ipfs_makes_is_read() {
    for case in golden()["read"].as_array().unwrap() {
        let by_digest: HashMap<[u8; 32], Bytes> = case["blocks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|block| {
                let hex = block.as_str().unwrap().as_bytes();
                let digit = |c: u8| (c as char).to_digit(16).unwrap() as u8;
                let bytes: Bytes = hex.chunks_exact(2).map(|c| digit(c[0]) << 4 | digit(c[1])).collect();
                (HashKind::Sha2.digest(&bytes), bytes)
            })
            .collect();
        let blocks = |cid: &Cid| {
            let bytes = by_digest.get(cid.hash().digest())?;
            Some(Block::verify(*cid, bytes.clone()).unwrap())
        };
        let root: Cid = case["cid"].as_str().unwrap().parse().unwrap();
        let tree = walk(root, Limits::default(), blocks).unwrap();
        let expected: BTreeMap<String, Vec<u8>> = case["lengths"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(path, n)| (path.clone(), file_bytes(number(n)).to_vec()))
            .collect();
        assert_eq!(contents(&tree, blocks), expected, "{}", case["name"]);
        assert_eq!(tree.directories.is_none(), expected.contains_key(""), "{}", case["name"]);
        assert_eq!(tree.bytes(), expected.values().map(|b| b.len() as u64).sum::<u64>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_published_is_read_back(
        lengths in proptest::collection::btree_map("[a-c]{1,3}(/[a-c]{1,3}){0,2}", 0usize..400, 1..8),
        leaf in 1usize..60,
    ) {
        let entries: Vec<(&str, Bytes)> = lengths.iter().map(|(n, l)| (n.as_str(), file_bytes(*l))).collect();
        let store = MemoryStore::new();
        let manifest = artefact(&store, &entries, HashKind::Blake3, leaf);
        let clash = lengths.keys().any(|a| lengths.keys().any(|b| b.starts_with(&format!("{a}/"))));
        let root = publish(&store, &manifest);
        prop_assert_eq!(root.is_err(), clash);
        if let Ok(root) = root {
            let blocks = |cid: &Cid| store.get(cid).unwrap();
            let read = contents(&walk(root, Limits::default(), blocks).unwrap(), blocks);
            let name = |name: &str| if entries.len() == 1 { String::new() } else { name.to_owned() };
            let expected: BTreeMap<String, Vec<u8>> = entries.iter().map(|(n, b)| (name(n), b.to_vec())).collect();
            prop_assert_eq!(read, expected);
        }
    }

    #[test]
    fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Node::decode(&node(&bytes));
    }
}

#[test]
fn entries_that_share_blocks_are_one_file() {
    let store = MemoryStore::new();
    let bytes = file_bytes(100);
    let blocks: Vec<_> =
        chunker::chunk(HashKind::Blake3, &bytes, 30).map(|leaf| put(&store, &leaf).unwrap()).collect();
    let entries = ["a", "b"].map(|n| Entry { name: n.into(), offset: u64::from(n == "b") * 50, length: 50 });
    let manifest = Manifest::new("tensors", "weights", HashKind::Blake3, entries.to_vec(), blocks).unwrap();
    let root = publish(&store, &manifest).unwrap();
    let blocks = |cid: &Cid| store.get(cid).unwrap();
    let tree = walk(root, Limits::default(), blocks).unwrap();
    assert_eq!(contents(&tree, blocks), BTreeMap::from([(String::new(), bytes.to_vec())]));
    for path in ["", "/a", "a//b", "../a", "a/.", "a/"] {
        let clash = [("x", file_bytes(3)), (path, file_bytes(3))];
        let Ok(manifest) = std::panic::catch_unwind(|| artefact(&store, &clash, HashKind::Blake3, 30)) else {
            assert_eq!(path, "", "a manifest refuses only an empty name");
            continue;
        };
        assert!(publish(&store, &manifest).is_err(), "{path:?}");
    }
}

/// A dag-pb block of these bytes.
fn node(bytes: &[u8]) -> Block {
    let raw = cid::raw(HashKind::Sha2.code(), &HashKind::Sha2.digest(bytes));
    Block::verify(Cid::new_v1(CODEC_DAG_PB, *raw.hash()), Bytes::copy_from_slice(bytes)).unwrap()
}

/// A node of UnixFS type `kind` over links (name, child, bytes).
fn made(kind: u64, links: &[(&str, Cid, u64)], file_bytes: u64, fanout: u64) -> Block {
    let mut out = Vec::new();
    for (name, child, _) in links {
        let mut link = Vec::new();
        put_bytes(&mut link, 1, &child.to_bytes());
        put_bytes(&mut link, 2, name.as_bytes());
        put_bytes(&mut out, 2, &link);
    }
    let mut unixfs = Vec::new();
    put_number(&mut unixfs, 1, kind);
    if kind == 2 {
        put_number(&mut unixfs, 3, file_bytes);
        links.iter().for_each(|(_, _, bytes)| put_number(&mut unixfs, 4, *bytes));
    }
    if fanout > 0 {
        put_number(&mut unixfs, 6, fanout);
    }
    put_bytes(&mut out, 1, &unixfs);
    node(&out)
}

/// Walks a graph of these blocks, the last of which is the root.
fn walk_all(blocks: &[Block], limits: Limits) -> Result<Tree, UnixfsError> {
    let find = |cid: &Cid| blocks.iter().find(|b| b.cid() == cid).cloned();
    walk(*blocks.last().unwrap().cid(), limits, find)
}

#[test]
fn graphs_that_multiply_are_cut_off() {
    // Each level names the one below a hundred times: 100^9 leaves, in ten small blocks.
    let leaf = Block::new(HashKind::Sha2, Bytes::from_static(b"x")).unwrap();
    let (mut blocks, mut below, mut bytes) = (vec![leaf.clone()], *leaf.cid(), 1);
    for _ in 0..9 {
        let links = vec![("", below, bytes); 100];
        bytes *= 100;
        blocks.push(made(2, &links, bytes, 0));
        below = *blocks.last().unwrap().cid();
    }
    let limits = Limits { bytes: u64::MAX, ..Limits::default() };
    let refused = walk_all(&blocks, limits);
    assert!(matches!(refused, Err(UnixfsError::TooLarge { what: "blocks", .. })), "{refused:?}");
    let refused = walk_all(&blocks, Limits { bytes: 1 << 40, ..limits });
    assert!(matches!(refused, Err(UnixfsError::TooLarge { what: "bytes", .. })), "{refused:?}");
    // The same with nothing in the leaves, so that no length gives it away.
    let empty = made(2, &[], 0, 0);
    let (mut blocks, mut below) = (vec![empty.clone()], *empty.cid());
    for _ in 0..9 {
        blocks.push(made(2, &vec![("", below, 0); 100], 0, 0));
        below = *blocks.last().unwrap().cid();
    }
    assert!(matches!(walk_all(&blocks, limits), Err(UnixfsError::TooLarge { what: "blocks", .. })));
    // A chain without end.
    let mut chain = vec![empty];
    for _ in 0..80 {
        let below = *chain.last().unwrap().cid();
        chain.push(made(2, &[("", below, 0)], 0, 0));
    }
    assert!(matches!(walk_all(&chain, limits), Err(UnixfsError::TooLarge { what: "levels", .. })));
    let mut directories = vec![made(1, &[], 0, 0)];
    for i in 0..80 {
        let below = *directories.last().unwrap().cid();
        directories.push(made(1, &[(&format!("d{i}"), below, 0)], 0, 0));
    }
    assert!(matches!(walk_all(&directories, limits), Err(UnixfsError::TooLarge { what: "levels", .. })));
    let (long, inner) = ("n".repeat(250), made(1, &[], 0, 0));
    let many: Vec<(String, Cid, u64)> =
        (0..7000).map(|i| (format!("{long}{i:05}"), *inner.cid(), 0)).collect();
    let many: Vec<(&str, Cid, u64)> = many.iter().map(|(n, c, b)| (n.as_str(), *c, *b)).collect();
    let wide = made(1, &many, 0, 0);
    let names: Vec<String> = (0..20).map(|i| format!("d{i}")).collect();
    let twenty: Vec<_> = names.iter().map(|n| (n.as_str(), *wide.cid(), 0)).collect();
    let refused = walk_all(&[inner, wide.clone(), made(1, &twenty, 0, 0)], limits);
    assert!(matches!(refused, Err(UnixfsError::TooLarge { what: "bytes of paths", .. })), "{refused:?}");
}

#[test]
fn contradictions_and_bad_names_are_refused() {
    let leaf = Block::new(HashKind::Sha2, Bytes::from_static(b"hello")).unwrap();
    let file = made(2, &[("", *leaf.cid(), 5)], 5, 0);
    let empty = made(1, &[], 0, 0);
    let bad = |root: Block| {
        let blocks = [leaf.clone(), file.clone(), empty.clone(), root];
        walk_all(&blocks, Limits::default())
    };
    assert!(bad(made(2, &[("", *file.cid(), 5)], 5, 0)).is_ok());
    assert!(bad(made(2, &[("", *leaf.cid(), 5)], 6, 0)).is_err(), "lengths do not sum");
    assert!(matches!(bad(made(2, &[("", *file.cid(), 6)], 6, 0)), Err(UnixfsError::WrongLength { .. })));
    assert!(matches!(bad(made(2, &[("", *empty.cid(), 0)], 0, 0)), Err(UnixfsError::NotAFile { .. })));
    assert!(bad(made(2, &[("", *leaf.cid(), 3 << 20)], 3 << 20, 0)).is_err(), "a leaf of 3 MiB");
    assert!(bad(made(4, &[], 0, 0)).is_err(), "a symbolic link");
    for name in ["", ".", "..", "a/b", "\0"] {
        let refused = bad(made(1, &[(name, *leaf.cid(), 0)], 0, 0));
        assert!(matches!(refused, Err(UnixfsError::BadName { .. })), "{name:?}: {refused:?}");
    }
    let twice = bad(made(1, &[("a", *leaf.cid(), 0), ("a", *file.cid(), 0)], 0, 0));
    assert!(matches!(twice, Err(UnixfsError::BadName { .. })));
    for (name, fanout) in [("0", 256), ("FF", 256), ("é", 256)] {
        assert!(bad(made(5, &[(name, *leaf.cid(), 0)], 0, fanout)).is_err(), "{name}");
    }
    for fanout in [0, 1, 100, 1 << 40] {
        assert!(bad(made(5, &[("00a", *leaf.cid(), 0)], 0, fanout)).is_err(), "{fanout}");
    }
    assert!(bad(made(5, &[("00a", *leaf.cid(), 0)], 0, 256)).is_ok());
    let (root, codec) = (*leaf.cid().hash(), 0x71);
    let cbor = Block::verify(Cid::new_v1(codec, root), leaf.bytes().clone()).unwrap();
    assert!(matches!(bad(cbor), Err(UnixfsError::Unsupported { code: 0x71, .. })));
    let mut sizes = Vec::new();
    put_number(&mut sizes, 1, 2);
    put_bytes(&mut sizes, 4, &vec![1; 1 << 20]);
    let mut bytes = Vec::new();
    put_bytes(&mut bytes, 1, &sizes);
    assert!(Node::decode(&node(&bytes)).is_err(), "a million sizes of no links");
}
