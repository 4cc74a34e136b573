//! Bytes to stored blocks and the root that names them. Publishing one thing twice gives one root and stores nothing new.

use bytes::Bytes;
use swarm_wire::Cid;

use crate::{Block, BlockRef, BlockStore, Entry, HashKind, Manifest, PublishError, StoreError, chunker};

/// Stores `bytes` as an artefact with one entry, and returns its root.
///
/// # Errors
/// When the store refuses or the artefact is too large for one manifest.
///
/// # Panics
/// When `leaf_bytes` is 0 or more than a block may have.
pub fn publish_bytes(
    store: &dyn BlockStore,
    name: &str,
    kind: &str,
    hash: HashKind,
    leaf_bytes: usize,
    bytes: &Bytes,
) -> Result<Cid, PublishError> {
    publish_manifest(store, &put_leaves(store, name, kind, hash, leaf_bytes, bytes)?)
}

/// Cuts `bytes` into leaves, stores them, and describes them as an artefact with one entry, whose manifest is not stored.
pub(crate) fn put_leaves(
    store: &dyn BlockStore,
    name: &str,
    kind: &str,
    hash: HashKind,
    leaf_bytes: usize,
    bytes: &Bytes,
) -> Result<Manifest, PublishError> {
    let leaves = chunker::chunk(hash, bytes, leaf_bytes).map(|block| put(store, &block));
    let entries = vec![Entry { name: name.to_owned(), offset: 0, length: bytes.len() as u64 }];
    Ok(Manifest::new(name, kind, hash, entries, leaves.collect::<Result<_, _>>()?)?)
}

/// Stores a block of an artefact.
pub(crate) fn put(store: &dyn BlockStore, block: &Block) -> Result<BlockRef, StoreError> {
    store.put(block)?;
    Ok(BlockRef { cid: *block.cid(), length: block.len() as u32 })
}

/// Stores the manifest of an artefact whose blocks are stored already, flushes the store, and returns the root.
///
/// # Errors
/// When the store refuses or the manifest is too large for one block.
pub fn publish_manifest(store: &dyn BlockStore, manifest: &Manifest) -> Result<Cid, PublishError> {
    let root = manifest.to_block()?;
    store.put(&root)?;
    store.flush()?;
    Ok(*root.cid())
}
