//! Gives back the room of removed blocks: what is left of a segment moves to the open one, then its file goes.
//!
//! The copies are synced and indexed before the file goes, so a kill at any point loses nothing; others put and get
//! meanwhile, block by block.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;

use swarm_wire::Cid;

use super::segment::{self, segment_path};
use super::{FsStore, Place, State};
use crate::StoreError;

impl FsStore {
    /// Empties every segment of which less than half is still named. Returns the bytes that this freed.
    pub(super) fn compact(&self) -> Result<u64, StoreError> {
        let (sparse, before, mut second_names) = {
            let mut state = self.lock();
            self.flush_locked(&mut state)?;
            let before = state.used_bytes;
            let sparse = self.sparse(&mut state)?;
            (sparse, before, state.second_names)
        };
        for (number, mut blocks) in sparse {
            let mut moved = HashMap::new();
            loop {
                for (cid, place) in &blocks {
                    self.move_block(cid, *place, &mut moved)?;
                }
                let mut state = self.lock();
                self.flush_locked(&mut state)?;
                if std::mem::replace(&mut second_names, state.second_names) == state.second_names {
                    self.drop_segment(&mut state, number)?;
                    break;
                }
                // Some of them perhaps here.
                blocks = self.index.blocks()?;
                blocks.retain(|(_, place)| !place.by_reference && place.file == number);
            }
        }
        let used_bytes = self.lock().used_bytes;
        Ok(before.saturating_sub(used_bytes))
    }

    /// Nothing is in it any more.
    fn drop_segment(&self, state: &mut State, number: u32) -> Result<(), StoreError> {
        let path = segment_path(&self.dir, number);
        let failed = |e| StoreError::io("removing", &path, 0, e);
        let freed = fs::metadata(&path).map_err(failed)?.len();
        fs::remove_file(&path).map_err(failed)?;
        self.index.keep_segments(&segment::list(&self.dir)?)?;
        state.used_bytes = state.used_bytes.saturating_sub(freed);
        Ok(())
    }

    /// The segments that are worth it, with what is left of them. The open one is closed if it is among them.
    fn sparse(&self, state: &mut State) -> Result<BTreeMap<u32, Vec<(Cid, Place)>>, StoreError> {
        let mut named: BTreeMap<u32, Vec<(Cid, Place)>> = BTreeMap::new();
        let mut unused = state.files.keys().copied().collect::<HashSet<_>>();
        for (cid, place) in self.index.blocks()? {
            if place.by_reference {
                unused.remove(&place.file);
            } else {
                named.entry(place.file).or_default().push((cid, place));
            }
        }
        let mut sparse = BTreeMap::new();
        for number in segment::list(&self.dir)? {
            let blocks = named.remove(&number).unwrap_or_default();
            // A block with two names is there once.
            let mut seen = HashSet::new();
            let once = blocks.iter().filter(|(_, place)| seen.insert(place.offset));
            let live: u64 = once.map(|(_, place)| u64::from(place.length)).sum();
            let path = segment_path(&self.dir, number);
            let length = fs::metadata(&path).map_err(|e| StoreError::io("looking at", &path, 0, e))?.len();
            if length > 0 && live * 2 < length {
                sparse.insert(number, blocks);
            }
        }
        if sparse.contains_key(&state.segment.number) {
            self.roll_over(state)?;
        }
        let unused: Vec<u32> = unused.into_iter().collect();
        self.index.remove_files(&unused)?;
        for number in unused {
            state.files.remove(&number).map(|file| state.numbers.remove(&file));
        }
        Ok(sparse)
    }

    /// To the open segment, unless it has moved or gone; a second name follows the bytes, which `moved` finds by where they were.
    fn move_block(&self, cid: &Cid, from: Place, moved: &mut HashMap<u64, Place>) -> Result<(), StoreError> {
        let mut state = self.lock();
        if self.place(&state, cid)? != Some(from) {
            return Ok(());
        }
        let to = match moved.get(&from.offset) {
            Some(to) => *to,
            None => match self.open_at(&state, from).and_then(|opened| Self::read(cid, from, opened)) {
                Ok(block) => self.append(&mut state, &block)?,
                Err(StoreError::Damaged { path, .. }) => {
                    // Nothing is left of it.
                    tracing::warn!(%cid, path = %path.display(), "a stored block was damaged; fetch it again");
                    return self.index.remove(&[*cid]);
                }
                Err(error) => return Err(error),
            },
        };
        moved.insert(from.offset, to);
        state.pending.insert(*cid, to);
        if state.pending_bytes >= self.config.flush_bytes {
            self.flush_locked(&mut state)?;
        }
        Ok(())
    }
}
