//! Blocks in memory: for tests, and for nodes that only publish small things.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use swarm_wire::Cid;

use crate::{Block, BlockStore, StoreError};

/// Blocks in a map, with an optional limit on their bytes.
#[derive(Debug, Default)]
pub struct MemoryStore {
    blocks: Mutex<HashMap<Cid, Block>>,
    quota_bytes: Option<u64>,
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

    /// How many blocks there are.
    pub fn n_blocks(&self) -> usize {
        self.lock().len()
    }

    /// Drops a block, for tests of what happens then.
    pub fn remove(&self, cid: &Cid) {
        self.lock().remove(cid);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Cid, Block>> {
        // The map is never left half changed, so a panic elsewhere does not spoil it.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockStore for MemoryStore {
    fn get(&self, cid: &Cid) -> Result<Option<Block>, StoreError> {
        Ok(self.lock().get(cid).cloned())
    }

    fn length_of(&self, cid: &Cid) -> Result<Option<usize>, StoreError> {
        Ok(self.lock().get(cid).map(Block::len))
    }

    fn put(&self, block: &Block) -> Result<bool, StoreError> {
        let mut blocks = self.lock();
        if blocks.contains_key(block.cid()) {
            return Ok(false);
        }
        if let Some(quota) = self.quota_bytes {
            let used: u64 = blocks.values().map(|b| b.len() as u64).sum();
            let over = (used + block.len() as u64).saturating_sub(quota);
            if over > 0 {
                return Err(StoreError::Full { path: PathBuf::from("(memory)"), needed_bytes: over });
            }
        }
        blocks.insert(*block.cid(), block.clone());
        Ok(true)
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
