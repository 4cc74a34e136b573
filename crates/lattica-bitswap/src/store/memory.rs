//! Blocks in memory: for tests, and for nodes that only publish small things.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use swarm_wire::Cid;

use crate::{Block, BlockStore, StoreError};

/// Blocks in a map, with an optional limit on their bytes.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
    quota_bytes: Option<u64>,
}

#[derive(Debug, Default)]
struct State {
    blocks: HashMap<Cid, Block>,
    /// Second names of some of them.
    aliases: HashMap<Cid, Cid>,
    pins: HashSet<Cid>,
    used_bytes: u64,
}

impl State {
    fn get(&self, cid: &Cid) -> Option<&Block> {
        self.blocks.get(self.aliases.get(cid).unwrap_or(cid))
    }
}

impl MemoryStore {
    /// A store without a limit.
    pub fn new() -> Self {
        Self::default()
    }

    /// A store that refuses blocks beyond `quota_bytes`.
    pub fn with_quota(quota_bytes: u64) -> Self {
        Self { quota_bytes: Some(quota_bytes), ..Self::default() }
    }

    /// How many blocks there are, each once whatever it is called.
    pub fn n_blocks(&self) -> usize {
        self.lock().blocks.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The maps are never left half changed, so a panic elsewhere does not spoil them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockStore for MemoryStore {
    fn get(&self, cid: &Cid) -> Result<Option<Block>, StoreError> {
        // Both names were checked against these bytes.
        Ok(self.lock().get(cid).map(|block| Block::from_checked(*cid, block.bytes().clone())))
    }

    fn length_of(&self, cid: &Cid) -> Result<Option<usize>, StoreError> {
        Ok(self.lock().get(cid).map(Block::len))
    }

    fn put(&self, block: &Block) -> Result<bool, StoreError> {
        let mut state = self.lock();
        if state.get(block.cid()).is_some() {
            return Ok(false);
        }
        if let Some(quota) = self.quota_bytes {
            let over = (state.used_bytes + block.len() as u64).saturating_sub(quota);
            if over > 0 {
                return Err(StoreError::Full { path: PathBuf::from("(memory)"), needed_bytes: over });
            }
        }
        state.used_bytes += block.len() as u64;
        // A second name of a block that is gone becomes this one's first.
        state.aliases.remove(block.cid());
        state.blocks.insert(*block.cid(), block.clone());
        Ok(true)
    }

    fn put_alias(&self, alias: &Block, of: &Cid) -> Result<(), StoreError> {
        let mut state = self.lock();
        if state.blocks.contains_key(alias.cid()) {
            return Ok(());
        }
        if state.blocks.contains_key(of) {
            state.aliases.insert(*alias.cid(), *of);
            return Ok(());
        }
        drop(state);
        self.put(alias).map(drop)
    }

    fn remove(&self, cids: &[Cid]) -> Result<bool, StoreError> {
        let mut state = self.lock();
        for cid in cids {
            state.aliases.remove(cid);
            if let Some(block) = state.blocks.remove(cid) {
                state.used_bytes -= block.len() as u64;
            }
        }
        // Names that lead nowhere.
        let State { blocks, aliases, .. } = &mut *state;
        aliases.retain(|_, of| blocks.contains_key(of));
        Ok(true)
    }

    fn cids(&self) -> Result<Vec<Cid>, StoreError> {
        let state = self.lock();
        Ok(state.blocks.keys().chain(state.aliases.keys()).copied().collect())
    }

    fn pin(&self, root: &Cid) -> Result<(), StoreError> {
        self.lock().pins.insert(*root);
        Ok(())
    }

    fn unpin(&self, root: &Cid) -> Result<bool, StoreError> {
        Ok(self.lock().pins.remove(root))
    }

    fn pins(&self) -> Result<Vec<Cid>, StoreError> {
        Ok(self.lock().pins.iter().copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance;

    #[test]
    fn memory_store_conforms() {
        conformance::check(|| Box::new(MemoryStore::new()));
    }

    #[test]
    fn a_full_memory_store_says_so_and_keeps_what_it_has() {
        conformance::check_full(&MemoryStore::with_quota(conformance::SMALL_QUOTA_BYTES));
    }
}
