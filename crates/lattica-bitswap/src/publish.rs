//! Bytes to stored blocks and the root that names them, and back. Publishing one thing twice gives one root and stores
//! nothing new.

use std::collections::HashSet;

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

/// Unpins `root` and drops what it names, its delta included, except for what one of `kept` names too. Stores that cannot remove keep it.
///
/// # Errors
/// When the store cannot be read or refuses.
pub fn unpublish(store: &dyn BlockStore, root: &Cid, kept: &[Cid]) -> Result<(), StoreError> {
    let mut spared = HashSet::new();
    for root in kept {
        spared.extend(named(store, root)?);
    }
    let mut gone = named(store, root)?;
    gone.retain(|cid| !spared.contains(cid));
    store.unpin(root)?;
    if store.remove(&gone)? {
        store.reclaim()?;
    }
    Ok(())
}

/// The root itself, the blocks of its artefact, and those of its delta, as far as the manifests are stored.
pub(crate) fn named(store: &dyn BlockStore, root: &Cid) -> Result<Vec<Cid>, StoreError> {
    let mut cids = vec![*root];
    let Some(manifest) = stored(store, root)? else { return Ok(cids) };
    cids.extend(manifest.blocks().iter().map(|block| block.cid));
    if let Some(update) = manifest.update() {
        cids.push(update.delta);
        let delta = stored(store, &update.delta)?;
        cids.extend(delta.iter().flat_map(Manifest::blocks).map(|block| block.cid));
    }
    Ok(cids)
}

/// The manifest of `root`, if it is stored and one.
pub(crate) fn stored(store: &dyn BlockStore, root: &Cid) -> Result<Option<Manifest>, StoreError> {
    Ok(store.get(root)?.and_then(|block| Manifest::decode(block.bytes()).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStore;
    use crate::update::publish_update;

    #[test]
    fn what_only_an_old_version_names_goes_with_it() {
        let store = MemoryStore::new();
        let mut bytes: Vec<u8> = (0..40_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        let mut versions = Vec::new();
        for step in 0..5 {
            // Of forty blocks the first changes a little and the second becomes another.
            bytes[step] ^= 1;
            bytes[1000..2000]
                .iter_mut()
                .enumerate()
                .for_each(|(i, b)| *b = b.wrapping_mul(167).wrapping_add(i as u8));
            let content = Bytes::copy_from_slice(&bytes);
            let (name, hash) = ("weights", HashKind::Blake3);
            let root = match versions.last() {
                Some((parent, _)) => publish_update(&store, name, name, hash, 1000, &content, parent),
                None => publish_bytes(&store, name, name, hash, 1000, &content),
            };
            versions.push((root.unwrap(), content));
        }
        let newest = stored(&store, &versions[4].0).unwrap().unwrap();
        assert!(newest.update().is_some());
        let kept = [versions[3].0, versions[4].0];
        for (root, _) in &versions[..3] {
            unpublish(&store, root, &kept).unwrap();
            assert!(store.get(root).unwrap().is_none());
        }
        // Two versions of 40 blocks share 38 and the index of their deltas; each has a root, a delta's root and one patch.
        assert_eq!(store.n_blocks(), 38 + 2 * 2 + 1 + 2 * 3);
        for (root, content) in &versions[3..] {
            let manifest = stored(&store, root).unwrap().unwrap();
            let blocks = manifest.blocks().iter().map(|b| store.get(&b.cid).unwrap().unwrap());
            assert_eq!(blocks.flat_map(|b| b.bytes().to_vec()).collect::<Vec<_>>(), content[..]);
        }
        unpublish(&store, &kept[1], &kept).unwrap();
        assert!(store.get(&kept[1]).unwrap().is_some(), "a kept root is kept");
        let unknown = swarm_wire::cid::raw(swarm_wire::cid::HASH_BLAKE3, &[7; 32]);
        unpublish(&store, &unknown, &kept).unwrap();
    }
}
