//! The UnixFS root of a stored artefact, as `ipfs add --cid-version=1 --raw-leaves --chunker=size-N` makes it: balanced trees
//! of at most 174 links, one directory level for each `/` in an entry's name.

use std::collections::BTreeMap;

use bytes::Bytes;
use swarm_wire::limits::BLOCK_MAX_BYTES;
use swarm_wire::{Cid, cid};

use super::node::{CODEC_DAG_PB, Child, encode_directory, encode_file};
use crate::{Block, BlockRef, BlockStore, HashKind, Manifest, PublishError, StoreError};

/// Kubo's default. Another number gives the same file another name.
pub const LINKS_PER_NODE: usize = 174;

/// Stores the nodes that make a stored artefact a file (one entry) or a directory (several) of IPFS, gives its leaves their
/// SHA2-256 names, and returns the root. Each leaf is read once and stored no second time. Entries that begin within a block
/// (tensors) are not told apart: such an artefact is one file.
///
/// # Errors
/// When a block is missing or damaged, the store refuses, an entry's name is no path, or a directory takes more than one
/// block.
pub fn publish(store: &dyn BlockStore, manifest: &Manifest) -> Result<Cid, PublishError> {
    let leaves =
        manifest.blocks().iter().map(|block| leaf(store, block)).collect::<Result<Vec<_>, PublishError>>()?;
    let files: Option<Vec<(&str, &[Child])>> = manifest
        .entries()
        .iter()
        .map(|entry| {
            let range = manifest.blocks_of_span(entry.offset, entry.length)?;
            let whole = range.is_empty()
                || (manifest.block_start(range.start) == entry.offset
                    && manifest.block_start(range.end) == entry.offset + entry.length);
            whole.then(|| (entry.name.as_str(), &leaves[range]))
        })
        .collect();
    let root = match files {
        Some(files) if files.len() > 1 => {
            let mut top = BTreeMap::new();
            for (name, leaves) in files {
                insert(&mut top, name, file(store, leaves)?)?;
            }
            directory(store, manifest.name(), &top)?
        }
        _ => file(store, &leaves)?,
    };
    store.flush()?;
    Ok(root.cid)
}

/// The leaf under its SHA2-256 name.
fn leaf(store: &dyn BlockStore, block: &BlockRef) -> Result<Child, PublishError> {
    let bytes = u64::from(block.length);
    if block.cid.hash().code() == HashKind::Sha2.code() {
        return Ok(Child { cid: block.cid, bytes, graph_bytes: bytes });
    }
    let stored = store.get(&block.cid)?.ok_or_else(|| PublishError::NotHere { cid: Box::new(block.cid) })?;
    let alias = Block::new(HashKind::Sha2, stored.bytes().clone()).expect("it is a block already");
    store.put_alias(&alias, &block.cid)?;
    Ok(Child { cid: *alias.cid(), bytes, graph_bytes: bytes })
}

fn file(store: &dyn BlockStore, leaves: &[Child]) -> Result<Child, PublishError> {
    let mut level = leaves.to_vec();
    if level.is_empty() {
        let empty = Block::new(HashKind::Sha2, Bytes::new()).expect("nothing fits a block");
        store.put(&empty)?;
        level.push(Child { cid: *empty.cid(), bytes: 0, graph_bytes: 0 });
    }
    while level.len() > 1 {
        level = level
            .chunks(LINKS_PER_NODE)
            .map(|children| {
                let bytes = children.iter().map(|c| c.bytes).sum();
                node(store, encode_file(children), children.iter(), bytes)
            })
            .collect::<Result<_, StoreError>>()?;
    }
    Ok(level[0])
}

/// Stores a node over `children`.
fn node<'a>(
    store: &dyn BlockStore,
    encoded: Vec<u8>,
    children: impl Iterator<Item = &'a Child>,
    bytes: u64,
) -> Result<Child, StoreError> {
    let graph_bytes = encoded.len() as u64 + children.map(|c| c.graph_bytes).sum::<u64>();
    let digest = *cid::raw(HashKind::Sha2.code(), &HashKind::Sha2.digest(&encoded)).hash();
    let block = Block::from_checked(Cid::new_v1(CODEC_DAG_PB, digest), Bytes::from(encoded));
    store.put(&block)?;
    Ok(Child { cid: *block.cid(), bytes, graph_bytes })
}

/// What a directory holds, by name: names in the order of their bytes, which is the order of links.
enum Entry<'a> {
    File(Child),
    Directory(BTreeMap<&'a str, Entry<'a>>),
}

fn insert<'a>(
    into: &mut BTreeMap<&'a str, Entry<'a>>,
    path: &'a str,
    file: Child,
) -> Result<(), PublishError> {
    let refused = || PublishError::EntryPath { entry: path.to_owned() };
    let mut level = into;
    let (parents, name) = path.rsplit_once('/').map_or((None, path), |(p, n)| (Some(p), n));
    for part in parents.into_iter().flat_map(|p| p.split('/')).chain([name]) {
        if part.is_empty() || part == "." || part == ".." {
            return Err(refused());
        }
    }
    for parent in parents.into_iter().flat_map(|p| p.split('/')) {
        match level.entry(parent).or_insert_with(|| Entry::Directory(BTreeMap::new())) {
            Entry::Directory(inner) => level = inner,
            Entry::File(_) => return Err(refused()),
        }
    }
    match level.insert(name, Entry::File(file)) {
        None => Ok(()),
        Some(_) => Err(refused()),
    }
}

fn directory(
    store: &dyn BlockStore,
    name: &str,
    entries: &BTreeMap<&str, Entry<'_>>,
) -> Result<Child, PublishError> {
    let mut children = Vec::with_capacity(entries.len());
    for (&name, entry) in entries {
        let child = match entry {
            Entry::File(child) => *child,
            Entry::Directory(inner) => directory(store, name, inner)?,
        };
        children.push((name, child));
    }
    let encoded = encode_directory(children.iter().map(|(name, child)| (*name, child)));
    if encoded.len() > BLOCK_MAX_BYTES {
        return Err(PublishError::DirectoryTooLarge {
            directory: name.to_owned(),
            got_bytes: encoded.len(),
            limit_bytes: BLOCK_MAX_BYTES,
        });
    }
    Ok(node(store, encoded, children.iter().map(|(_, child)| child), 0)?)
}
