//! Bytes to stored blocks and the root that names them. Publishing one thing twice gives one root and stores nothing new.

use bytes::Bytes;
use swarm_wire::Cid;

use crate::{BlockRef, BlockStore, Entry, HashKind, Manifest, PublishError, chunker};

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
    let blocks = put_leaves(store, hash, bytes, leaf_bytes)?;
    let entries = vec![Entry { name: name.to_owned(), offset: 0, length: bytes.len() as u64 }];
    publish_manifest(store, &Manifest::new(name, kind, hash, entries, blocks)?)
}

/// Cuts `bytes` into leaves and stores them.
pub(crate) fn put_leaves(
    store: &dyn BlockStore,
    hash: HashKind,
    bytes: &Bytes,
    leaf_bytes: usize,
) -> Result<Vec<BlockRef>, PublishError> {
    let leaf = |block: crate::Block| {
        store.put(&block)?;
        Ok(BlockRef { cid: *block.cid(), length: block.len() as u32 })
    };
    chunker::chunk(hash, bytes, leaf_bytes).map(leaf).collect()
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
