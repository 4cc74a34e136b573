//! Where blocks are kept. A store never hands out bytes that do not match their CID; [`conformance`] checks that and the
//! rest of the contract for every implementation.

pub mod conformance;
mod memory;

use std::fmt;
use std::path::Path;

pub use memory::MemoryStore;
use swarm_wire::Cid;

use crate::{Block, StoreError};

/// Blocks by CID. Calls may block on a disk, so async code makes them from a blocking thread. All methods may be called
/// from several threads.
pub trait BlockStore: Send + Sync + fmt::Debug {
    /// The block, checked against its CID; `None` when it is not here.
    ///
    /// # Errors
    /// When the bytes cannot be read or no longer match.
    fn get(&self, cid: &Cid) -> Result<Option<Block>, StoreError>;

    /// How many bytes the block has; `None` when it is not here. Reads no block bytes.
    ///
    /// # Errors
    /// When the index cannot be read.
    fn length_of(&self, cid: &Cid) -> Result<Option<usize>, StoreError>;

    /// Keeps a block. Returns whether it is new. A block that was put may be lost in a power cut until
    /// [`BlockStore::flush`], but is never damaged.
    ///
    /// # Errors
    /// When there is no room or the disk refuses; the store is then as before.
    fn put(&self, block: &Block) -> Result<bool, StoreError>;

    /// Keeps a part of a file under its CID without copying it. Returns `false` when this kind of store cannot do that;
    /// the caller then puts a copy. The block is served while the file stays as it is.
    ///
    /// # Errors
    /// When the file cannot be looked at or the index refuses.
    fn put_reference(&self, _block: &Block, _file: &Path, _offset: u64) -> Result<bool, StoreError> {
        Ok(false)
    }

    /// Keeps a second name of a block that is stored as `of`; `alias` is that block under its second name. The bytes are
    /// stored no second time; when the block goes, so may its second name. Of a block that is not here it is a plain
    /// [`BlockStore::put`].
    ///
    /// # Errors
    /// As [`BlockStore::put`].
    fn put_alias(&self, alias: &Block, of: &Cid) -> Result<(), StoreError>;

    /// Drops blocks, as far as they are here. Returns `false` when this kind of store keeps what it has; they are then there as
    /// before. Their room may be given back later ([`BlockStore::reclaim`]).
    ///
    /// # Errors
    /// When the index refuses.
    fn remove(&self, _cids: &[Cid]) -> Result<bool, StoreError> {
        Ok(false)
    }

    /// The names of all blocks, in no particular order.
    ///
    /// # Errors
    /// When the index cannot be read.
    fn cids(&self) -> Result<Vec<Cid>, StoreError>;

    /// Gives the room of removed blocks back, as far as that pays. Returns how many bytes.
    ///
    /// # Errors
    /// When the disk or the index refuses; no block is lost by that.
    fn reclaim(&self) -> Result<u64, StoreError> {
        Ok(0)
    }

    /// Remembers a root that [`crate::garbage::collect`] spares, with all that it names. It need not be here.
    ///
    /// # Errors
    /// When the index refuses.
    fn pin(&self, root: &Cid) -> Result<(), StoreError>;

    /// Forgets a pin. Returns whether there was one.
    ///
    /// # Errors
    /// When the index refuses.
    fn unpin(&self, root: &Cid) -> Result<bool, StoreError>;

    /// The pinned roots.
    ///
    /// # Errors
    /// When the index cannot be read.
    fn pins(&self) -> Result<Vec<Cid>, StoreError>;

    /// Makes everything that was put survive a power cut.
    ///
    /// # Errors
    /// When the disk refuses.
    fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }
}
