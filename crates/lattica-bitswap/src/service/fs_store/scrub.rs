//! Reads everything that is stored and drops what no longer matches its name.

use swarm_wire::Cid;

use super::FsStore;
use crate::{BlockStore, StoreError};

/// What a scrub found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scrubbed {
    /// Blocks that were read and are whole.
    pub intact: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks that were damaged, or whose file is not what it was. They are gone from the store and can be fetched again.
    pub dropped: Vec<Cid>,
}

impl FsStore {
    /// Reads every block and checks it against its name; tells `progress` how many of how many are done. Others may use the
    /// store meanwhile.
    ///
    /// # Errors
    /// When the index or a file cannot be read for another reason than damage.
    pub fn scrub(&self, mut progress: impl FnMut(u64, u64)) -> Result<Scrubbed, StoreError> {
        let cids = self.cids()?;
        let mut found = Scrubbed::default();
        for (done, cid) in (0u64..).zip(&cids) {
            progress(done, cids.len() as u64);
            // Removed meanwhile: none of our business.
            let Some(whole) = self.whole(cid)? else { continue };
            match whole {
                Ok(length) => {
                    found.intact += 1;
                    found.bytes += length;
                }
                Err(()) => found.dropped.push(*cid),
            }
        }
        progress(cids.len() as u64, cids.len() as u64);
        self.remove(&found.dropped)?;
        Ok(found)
    }

    /// The length of a block that is whole; `Err` for one that is not.
    fn whole(&self, cid: &Cid) -> Result<Option<Result<u64, ()>>, StoreError> {
        let (place, opened) = {
            let state = self.lock();
            // Not by `place`, which hides what was found damaged before.
            let pending = state.pending.get(cid).copied();
            let Some(place) = pending.map_or_else(|| self.index.get(cid), |place| Ok(Some(place)))? else {
                return Ok(None);
            };
            (place, self.open_at(&state, place))
        };
        match opened.and_then(|opened| Self::read(cid, place, opened)) {
            Ok(block) => Ok(Some(Ok(block.len() as u64))),
            Err(StoreError::Damaged { .. } | StoreError::FileChanged { .. }) => Ok(Some(Err(()))),
            Err(error) => Err(error),
        }
    }
}
