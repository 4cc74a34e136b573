//! What a store keeps for nobody: everything that no pinned root names.
//!
//! What is published is pinned; what was only fetched is not, so that a collection leaves it to be fetched again.

use std::collections::HashSet;

use swarm_wire::Cid;

use crate::publish::named;
use crate::unixfs::{self, Node};
use crate::{BlockStore, StoreError};

/// What a collection did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collected {
    /// Names that are still there.
    pub kept: u64,
    /// Names that are gone.
    pub removed: u64,
    /// Bytes that the disk has back.
    pub freed_bytes: u64,
}

/// Removes every block that no pinned root names, and gives their room back. Not beside a publication or a fetch, whose blocks
/// nothing names yet. A store that cannot remove keeps all.
///
/// # Errors
/// When the store cannot be read or refuses.
pub fn collect(store: &dyn BlockStore) -> Result<Collected, StoreError> {
    let mut live = HashSet::new();
    for root in store.pins()? {
        mark(store, &root, &mut live)?;
    }
    let (kept, garbage): (Vec<Cid>, Vec<Cid>) = store.cids()?.into_iter().partition(|cid| live.contains(cid));
    if !store.remove(&garbage)? {
        return Ok(Collected { kept: (kept.len() + garbage.len()) as u64, ..Collected::default() });
    }
    let freed_bytes = store.reclaim()?;
    Ok(Collected { kept: kept.len() as u64, removed: garbage.len() as u64, freed_bytes })
}

/// All names that a root leads to, as far as its blocks are here: of an artefact of ours its blocks and delta, of IPFS the
/// graph below it.
///
/// # Errors
/// When the store cannot be read.
pub fn reachable(store: &dyn BlockStore, root: &Cid) -> Result<HashSet<Cid>, StoreError> {
    let mut found = HashSet::new();
    mark(store, root, &mut found)?;
    Ok(found)
}

fn mark(store: &dyn BlockStore, root: &Cid, live: &mut HashSet<Cid>) -> Result<(), StoreError> {
    if root.codec() != unixfs::CODEC_DAG_PB {
        live.extend(named(store, root)?);
        return Ok(());
    }
    let mut open = vec![*root];
    while let Some(cid) = open.pop() {
        // Each once, so graphs that name a block many times cost no more than their blocks; leaves need not be read.
        if !live.insert(cid) || cid.codec() != unixfs::CODEC_DAG_PB {
            continue;
        }
        let block = match store.get(&cid) {
            // A name that leads nowhere keeps nothing.
            Err(StoreError::Damaged { .. } | StoreError::FileChanged { .. }) => None,
            block => block?,
        };
        match block.map(|block| Node::decode(&block)) {
            Some(Ok(Node::File { children, .. })) => open.extend(children.iter().map(|link| link.cid)),
            Some(Ok(Node::Directory { entries: links } | Node::Shard { links, .. })) => {
                open.extend(links.iter().map(|link| link.cid));
            }
            Some(Err(_)) | None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::update::publish_update;
    use crate::{Block, HashKind, MemoryStore, publish};

    fn artefact(store: &MemoryStore, bytes: &Bytes) -> Cid {
        publish::publish_bytes(store, "a", "bytes", HashKind::Blake3, 1000, bytes).unwrap()
    }

    fn noise(seed: u32, bytes: usize) -> Bytes {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        std::iter::repeat_with(next).take(bytes).collect::<Vec<_>>().into()
    }

    #[test]
    fn what_no_pin_names_goes_and_all_that_one_names_stays() {
        let store = MemoryStore::new();
        let base = noise(1, 8000);
        let mut changed = base.to_vec();
        changed[4000] ^= 1;
        let old = artefact(&store, &base);
        let (hash, changed) = (HashKind::Blake3, Bytes::from(changed));
        let new = publish_update(&store, "a", "bytes", hash, 1000, &changed, &old).unwrap();
        let manifest = publish::stored(&store, &new).unwrap().unwrap();
        let ipfs = unixfs::publish(&store, &manifest).unwrap();
        let other = artefact(&store, &noise(2, 5000));
        let loose = Block::new(HashKind::Blake3, noise(3, 10)).unwrap();
        store.put(&loose).unwrap();
        let all = store.cids().unwrap().len() as u64;

        store.pin(&new).unwrap();
        store.pin(&ipfs).unwrap();
        let wanted: HashSet<Cid> =
            [new, ipfs].iter().flat_map(|root| reachable(&store, root).unwrap()).collect();
        let collected = collect(&store).unwrap();
        assert_eq!((collected.kept, collected.removed), (wanted.len() as u64, all - wanted.len() as u64));
        assert_eq!(store.cids().unwrap().into_iter().collect::<HashSet<_>>(), wanted);
        let delta = manifest.update().unwrap().delta;
        assert!(wanted.contains(&delta) && !wanted.contains(&old) && !wanted.contains(&other));
        for block in manifest.blocks() {
            assert!(store.get(&block.cid).unwrap().is_some());
        }
        store.unpin(&new).unwrap();
        store.unpin(&ipfs).unwrap();
        assert_eq!(collect(&store).unwrap().kept, 0);
    }

    #[test]
    fn pins_of_what_is_not_here_keep_nothing_and_harm_nothing() {
        let store = MemoryStore::new();
        store.pin(&swarm_wire::cid::raw(swarm_wire::cid::HASH_BLAKE3, &[7; 32])).unwrap();
        artefact(&store, &noise(1, 100));
        assert_eq!(collect(&store).unwrap(), Collected { kept: 0, removed: 2, freed_bytes: 0 });
    }
}
