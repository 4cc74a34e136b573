//! Versions of an artefact: the publisher's side, which makes a delta, and the receiver's, which applies it.
//!
//! A delta is help and nothing more: a block that a patch does not bring is fetched like any other.

use bytes::Bytes;
use swarm_wire::Cid;

use crate::delta::{self, DeltaIndex};
use crate::manifest::Update;
use crate::publish::{publish_manifest, put, put_leaves, stored};
use crate::{Block, BlockStore, HashKind, Manifest, PublishError, StoreError};

/// Stores `bytes` as [`crate::publish::publish_bytes`] does, and what whoever has `parent` needs to make them of it. When the
/// parent is not stored here or has little in common with them, the new version stands for itself.
///
/// # Errors
/// When the store refuses or the artefact is too large for one manifest.
///
/// # Panics
/// When `leaf_bytes` is 0 or more than a block may have.
pub fn publish_update(
    store: &dyn BlockStore,
    name: &str,
    kind: &str,
    hash: HashKind,
    leaf_bytes: usize,
    bytes: &Bytes,
    parent: &Cid,
) -> Result<Cid, PublishError> {
    let manifest = put_leaves(store, name, kind, hash, leaf_bytes, bytes)?;
    let update = match stored(store, parent)? {
        Some(old) => publish_delta(store, (parent, &old), &manifest, bytes)?,
        None => None,
    };
    publish_manifest(store, &manifest.with_update(update))
}

/// Stores the patches that pay, and names them; `None` when there are none.
fn publish_delta(
    store: &dyn BlockStore,
    (root, old): (&Cid, &Manifest),
    new: &Manifest,
    bytes: &Bytes,
) -> Result<Option<Update>, PublishError> {
    let (mut index, mut patches) = (DeltaIndex::default(), Vec::new());
    for chunk in 0..new.blocks().len() {
        let Some(before) = delta::patchable(old, new, chunk) else { continue };
        let Some(before) = store.get(&before.cid)? else { continue };
        let start = new.block_start(chunk) as usize;
        let after = &bytes[start..start + new.blocks()[chunk].length as usize];
        if let Some(patch) = delta::diff(before.bytes(), after) {
            patches.push(put(store, &block(patch))?);
            index.patched.push(chunk as u32);
        }
    }
    if patches.is_empty() {
        return Ok(None);
    }
    let index = put(store, &block(index.encode()))?;
    let blocks = std::iter::once(index).chain(patches).collect();
    let delta = Manifest::new(new.name(), delta::KIND, HashKind::Blake3, Vec::new(), blocks)?;
    Ok(Some(Update { parent: *root, delta: publish_manifest(store, &delta)? }))
}

fn block(bytes: Bytes) -> Block {
    Block::new(HashKind::Blake3, bytes).expect("a patch is shorter than its block, an index than a manifest")
}

/// The bytes of `manifest` that are not stored but may come out of patches: 0 when its parent is not here, or has nothing in
/// common with it.
///
/// # Errors
/// When the store cannot be read.
pub fn patchable_bytes(store: &dyn BlockStore, manifest: &Manifest) -> Result<u64, StoreError> {
    let Some(update) = manifest.update() else { return Ok(0) };
    let Some(parent) = stored(store, &update.parent)? else { return Ok(0) };
    let mut bytes = 0;
    for (chunk, block) in manifest.blocks().iter().enumerate() {
        let Some(before) = delta::patchable(&parent, manifest, chunk) else { continue };
        if store.length_of(&block.cid)?.is_none() && store.length_of(&before.cid)?.is_some() {
            bytes += u64::from(block.length);
        }
    }
    Ok(bytes)
}

/// Makes blocks of `manifest` from its parent and the patches that are stored, and returns how many. A patch whose outcome is
/// not the block that the manifest names is passed over.
///
/// # Errors
/// When the store cannot be read or written.
pub fn apply_update(store: &dyn BlockStore, manifest: &Manifest) -> Result<usize, StoreError> {
    let Some(update) = manifest.update() else { return Ok(0) };
    let (Some(parent), Some(delta)) = (stored(store, &update.parent)?, stored(store, &update.delta)?) else {
        return Ok(0);
    };
    let index = match delta.blocks().first() {
        Some(first) => store.get(&first.cid)?,
        None => None,
    };
    let index = index.and_then(|block| DeltaIndex::decode(block.bytes(), manifest.blocks().len()).ok());
    let Some(index) = index else { return Ok(0) };
    let mut made = 0;
    for (&chunk, patch) in index.patched.iter().zip(&delta.blocks()[1..]) {
        let wanted = manifest.blocks()[chunk as usize].cid;
        let Some(before) = delta::patchable(&parent, manifest, chunk as usize) else { continue };
        if store.length_of(&wanted)?.is_some() {
            continue;
        }
        let (Some(before), Some(patch)) = (store.get(&before.cid)?, store.get(&patch.cid)?) else { continue };
        let after = delta::apply(before.bytes(), patch.bytes()).ok();
        if let Some(block) = after.and_then(|bytes| Block::verify(wanted, bytes).ok()) {
            store.put(&block)?;
            made += 1;
        }
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStore;
    use crate::publish::publish_bytes;

    const LEAF: usize = 4096;

    fn bytes(seed: u8) -> Vec<u8> {
        (0..10 * LEAF + 1001)
            .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8)
            .collect()
    }

    fn publish(store: &MemoryStore, content: &[u8], parent: &Cid) -> (Cid, Manifest) {
        let content = Bytes::copy_from_slice(content);
        let hash = HashKind::Blake3;
        let root = publish_update(store, "weights", "weights", hash, LEAF, &content, parent).unwrap();
        (root, stored(store, &root).unwrap().unwrap())
    }

    fn copy(from: &MemoryStore, to: &MemoryStore, cids: impl IntoIterator<Item = Cid>) {
        for cid in cids {
            to.put(&from.get(&cid).unwrap().unwrap()).unwrap();
        }
    }

    /// Everything that `root` names.
    fn all(store: &MemoryStore, root: Cid) -> Vec<Cid> {
        let manifest = stored(store, &root).unwrap().unwrap();
        manifest.blocks().iter().map(|b| b.cid).chain([root]).collect()
    }

    #[test]
    fn who_has_the_version_before_makes_the_next_one_of_it() {
        let (source, sink) = (MemoryStore::new(), MemoryStore::new());
        let old = Bytes::from(bytes(0));
        let parent = publish_bytes(&source, "weights", "weights", HashKind::Blake3, LEAF, &old).unwrap();
        // Blocks 0 and 10 (the short one) change a little, block 4 becomes another, the rest stay.
        let mut new = old.to_vec();
        (new[10], new[11 * LEAF - 3 - 3095]) = (1, 2);
        new[4 * LEAF..5 * LEAF].copy_from_slice(&bytes(99)[..LEAF]);
        let (root, manifest) = publish(&source, &new, &parent);
        let update = manifest.update().unwrap();
        copy(&source, &sink, all(&source, parent));
        copy(&source, &sink, [root]);
        assert_eq!(patchable_bytes(&sink, &manifest).unwrap(), 2 * LEAF as u64 + 1001);
        assert_eq!(apply_update(&sink, &manifest).unwrap(), 0, "the delta has not come");
        copy(&source, &sink, all(&source, update.delta));
        assert_eq!(apply_update(&sink, &manifest).unwrap(), 2);
        assert_eq!(apply_update(&sink, &manifest).unwrap(), 0, "they are there now");
        let missing: Vec<usize> = (0..manifest.blocks().len())
            .filter(|&i| sink.length_of(&manifest.blocks()[i].cid).unwrap().is_none())
            .collect();
        assert_eq!(missing, [4]);
    }

    #[test]
    fn versions_without_anything_in_common_stand_for_themselves() {
        let store = MemoryStore::new();
        let parent =
            publish_bytes(&store, "weights", "weights", HashKind::Blake3, LEAF, &bytes(0).into()).unwrap();
        let noise: Vec<u8> =
            bytes(0).iter().enumerate().map(|(i, b)| b.wrapping_mul(17) ^ ((i * 7919) >> 3) as u8).collect();
        assert_eq!(publish(&store, &noise, &parent).1.update(), None);
        let unknown = swarm_wire::cid::raw(swarm_wire::cid::HASH_BLAKE3, &[7; 32]);
        assert_eq!(publish(&store, &noise, &unknown).1.update(), None);
        let (root, manifest) = publish(&store, &bytes(0), &parent);
        assert_eq!((root, manifest.update()), (parent, None), "the same bytes are the same version");
    }

    #[test]
    fn blocks_of_another_hash_are_no_version_before() {
        let store = MemoryStore::new();
        let old = Bytes::from(bytes(0));
        let parent = publish_bytes(&store, "weights", "weights", HashKind::Sha2, LEAF, &old).unwrap();
        let (_, same) = publish(&store, &old, &parent);
        assert_eq!(same.update(), None);
        let delta = parent;
        let named = same.clone().with_update(Some(Update { parent, delta }));
        for block in same.blocks() {
            store.remove(&[block.cid]).unwrap();
        }
        assert_eq!(patchable_bytes(&store, &named).unwrap(), 0, "the same bytes under another name");
    }

    #[test]
    fn a_lying_delta_brings_nothing() {
        let store = MemoryStore::new();
        let parent =
            publish_bytes(&store, "weights", "weights", HashKind::Blake3, LEAF, &bytes(0).into()).unwrap();
        let mut new = bytes(0);
        new[0] ^= 1;
        let (_, manifest) = publish(&store, &new, &parent);
        store.remove(&[manifest.blocks()[0].cid]).unwrap();
        let lie = |patch: &'static [u8], index: DeltaIndex| {
            let blocks =
                [index.encode(), Bytes::from_static(patch)].map(|b| put(&store, &block(b)).unwrap()).to_vec();
            let delta = Manifest::new("lie", delta::KIND, HashKind::Blake3, Vec::new(), blocks).unwrap();
            let delta = publish_manifest(&store, &delta).unwrap();
            apply_update(&store, &manifest.clone().with_update(Some(Update { parent, delta }))).unwrap()
        };
        let patched = |patched: &[u32]| DeltaIndex { patched: patched.to_vec() };
        let truth = delta::diff(&bytes(0)[..LEAF], &new[..LEAF]).unwrap();
        assert_eq!(lie(&[0, 4], patched(&[0])), 0, "another difference");
        assert_eq!(lie(&[0xff; 9], patched(&[0])), 0, "no patch");
        assert_eq!(lie(&[0, 2], patched(&[3])), 0, "a block that is the same");
        assert_eq!(lie(&[0, 2], patched(&[99])), 0, "a block that there is not");
        assert_eq!(truth[..], [0, 2]);
        assert_eq!(lie(&[0, 2], patched(&[0, 1])), 1, "fewer patches than named");
    }
}
