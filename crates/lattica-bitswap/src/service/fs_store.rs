//! Blocks on disk: append-only segment files and a redb index from CID to place; files can be served by reference.
//!
//! A block is written with a header, then synced, then indexed, so the index never points at bytes that may vanish. What a
//! kill leaves unindexed at a segment's end is found again at the next open: each record carries its CID and is checked.
//! What is removed goes from the index; `compact.rs` gives its room back.

mod compact;
mod index;
mod scrub;
mod segment;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use index::Index;
pub use scrub::Scrubbed;
use segment::{Segment, segment_path};
use swarm_wire::Cid;

use crate::{Block, BlockStore, StoreError};

/// How a store on disk behaves.
#[derive(Debug, Clone)]
pub struct FsStoreConfig {
    /// Bytes that segments may take; `None` for as many as the disk has.
    pub quota_bytes: Option<u64>,
    /// A segment is closed when it reaches this length.
    pub segment_bytes: u64,
    /// After this many new bytes the store flushes by itself.
    pub flush_bytes: u64,
}

impl Default for FsStoreConfig {
    fn default() -> Self {
        Self { quota_bytes: None, segment_bytes: 1 << 30, flush_bytes: 64 << 20 }
    }
}

/// Where a block's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// In a referenced file rather than a segment.
    by_reference: bool,
    /// Number of the segment or of the referenced file.
    file: u32,
    offset: u64,
    length: u32,
}

/// A file that is served by reference, as it was then.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ReferencedFile {
    path: PathBuf,
    length: u64,
    modified_ns: u128,
}

#[derive(Debug)]
struct State {
    segment: Segment,
    /// Stored but not indexed yet.
    pending: HashMap<Cid, Place>,
    pending_bytes: u64,
    /// Bytes of all segments.
    used_bytes: u64,
    files: HashMap<u32, ReferencedFile>,
    numbers: HashMap<ReferencedFile, u32>,
    new_files: Vec<u32>,
    /// Found damaged: treated as absent, so that they are fetched again.
    damaged: HashSet<Cid>,
    /// How often a place got a second name.
    second_names: u64,
}

/// Blocks in a directory. One process at a time.
#[derive(Debug)]
pub struct FsStore {
    dir: PathBuf,
    config: FsStoreConfig,
    index: Index,
    state: Mutex<State>,
}

impl FsStore {
    /// Opens or creates the store in `dir`.
    ///
    /// # Errors
    /// When another process has it open, the disk is full, or a file cannot be read.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        Self::open_with(dir, FsStoreConfig::default())
    }

    /// As [`FsStore::open`] with other limits.
    ///
    /// # Errors
    /// As [`FsStore::open`].
    pub fn open_with(dir: impl Into<PathBuf>, config: FsStoreConfig) -> Result<Self, StoreError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(|e| StoreError::io("creating", &dir, 4096, e))?;
        let index = Index::open(&dir)?;
        let files = index.files()?;
        let numbers = files.iter().map(|(&n, f)| (f.clone(), n)).collect();
        let mut pending = HashMap::new();
        let mut used_bytes = 0;
        let mut last = 0;
        let segments = segment::list(&dir)?;
        index.keep_segments(&segments)?;
        for number in segments {
            let recovered = segment::recover(&dir, number, index.segment_end(number)?)?;
            used_bytes += recovered.end;
            last = last.max(number);
            pending.extend(recovered.blocks);
        }
        let segment = Segment::open(&dir, last)?;
        let state = State {
            segment,
            pending,
            pending_bytes: 0,
            used_bytes,
            files,
            numbers,
            new_files: Vec::new(),
            damaged: HashSet::new(),
            second_names: 0,
        };
        let store = Self { dir, config, index, state: Mutex::new(state) };
        store.flush()?;
        Ok(store)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a block is, if its bytes can still be expected there.
    fn place(&self, state: &State, cid: &Cid) -> Result<Option<Place>, StoreError> {
        if state.damaged.contains(cid) {
            return Ok(None);
        }
        match state.pending.get(cid) {
            Some(place) => Ok(Some(*place)),
            None => self.index.get(cid),
        }
    }

    fn intact(state: &State, place: Place) -> bool {
        !place.by_reference
            || state.files.get(&place.file).is_some_and(|f| look_at(&f.path).is_ok_and(|now| now == *f))
    }

    fn flush_locked(&self, state: &mut State) -> Result<(), StoreError> {
        if state.pending.is_empty() && state.new_files.is_empty() {
            return Ok(());
        }
        state.segment.sync()?;
        let files = state.new_files.iter().map(|n| (*n, &state.files[n]));
        self.index.commit(&state.pending, files, (state.segment.number, state.segment.end))?;
        state.pending.clear();
        state.new_files.clear();
        state.pending_bytes = 0;
        Ok(())
    }

    /// Writes a block into the open segment, or a new one when that is long enough.
    fn append(&self, state: &mut State, block: &Block) -> Result<Place, StoreError> {
        if state.segment.end >= self.config.segment_bytes {
            self.roll_over(state)?;
        }
        let offset = state.segment.append(block)?;
        let record_bytes = segment::record_bytes(block);
        state.used_bytes += record_bytes;
        state.pending_bytes += record_bytes;
        let (file, length) = (state.segment.number, block.len() as u32);
        Ok(Place { by_reference: false, file, offset, length })
    }

    /// Begins a new segment.
    fn roll_over(&self, state: &mut State) -> Result<(), StoreError> {
        self.flush_locked(state)?;
        state.segment = Segment::open(&self.dir, state.segment.number + 1)?;
        Ok(())
    }

    /// Opens the file that a place lies in. While the state is locked: afterwards the block may have moved, and the segment
    /// be gone.
    fn open_at(&self, state: &State, place: Place) -> Result<(PathBuf, File), StoreError> {
        let referenced = state.files.get(&place.file).filter(|_| place.by_reference);
        let path = referenced.map_or_else(|| segment_path(&self.dir, place.file), |file| file.path.clone());
        if !Self::intact(state, place) {
            return Err(StoreError::FileChanged { path });
        }
        let file = File::open(&path).map_err(|e| StoreError::io("reading", &path, 0, e))?;
        Ok((path, file))
    }

    fn read(cid: &Cid, place: Place, (path, mut file): (PathBuf, File)) -> Result<Block, StoreError> {
        let failed = |e| StoreError::io("reading", &path, 0, e);
        file.seek(SeekFrom::Start(place.offset)).map_err(failed)?;
        let mut bytes = vec![0; place.length as usize];
        let damaged = || StoreError::Damaged { cid: Box::new(*cid), path: path.clone() };
        match file.read_exact(&mut bytes) {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Err(damaged()),
            other => other.map_err(failed)?,
        }
        Block::verify(*cid, Bytes::from(bytes)).map_err(|_| damaged())
    }
}

impl BlockStore for FsStore {
    fn get(&self, cid: &Cid) -> Result<Option<Block>, StoreError> {
        let (place, opened) = {
            let state = self.lock();
            let Some(place) = self.place(&state, cid)? else { return Ok(None) };
            (place, self.open_at(&state, place)?)
        };
        match Self::read(cid, place, opened) {
            Err(StoreError::Damaged { path, cid }) => {
                self.lock().damaged.insert(*cid);
                Err(if place.by_reference {
                    StoreError::FileChanged { path }
                } else {
                    StoreError::Damaged { path, cid }
                })
            }
            read => read.map(Some),
        }
    }

    fn length_of(&self, cid: &Cid) -> Result<Option<usize>, StoreError> {
        let state = self.lock();
        let place = self.place(&state, cid)?.filter(|&p| Self::intact(&state, p));
        Ok(place.map(|p| p.length as usize))
    }

    fn put(&self, block: &Block) -> Result<bool, StoreError> {
        let mut state = self.lock();
        if self.place(&state, block.cid())?.is_some_and(|p| Self::intact(&state, p)) {
            return Ok(false);
        }
        let record_bytes = segment::record_bytes(block);
        if let Some(quota) = self.config.quota_bytes {
            let over = (state.used_bytes + record_bytes).saturating_sub(quota);
            if over > 0 {
                return Err(StoreError::Full { path: self.dir.clone(), needed_bytes: over });
            }
        }
        let place = self.append(&mut state, block)?;
        state.damaged.remove(block.cid());
        state.pending.insert(*block.cid(), place);
        if state.pending_bytes >= self.config.flush_bytes {
            self.flush_locked(&mut state)?;
        }
        Ok(true)
    }

    fn remove(&self, cids: &[Cid]) -> Result<bool, StoreError> {
        let mut state = self.lock();
        // What is indexed is not found again in its segment.
        self.flush_locked(&mut state)?;
        self.index.remove(cids)?;
        for cid in cids {
            state.damaged.remove(cid);
        }
        Ok(true)
    }

    fn cids(&self) -> Result<Vec<Cid>, StoreError> {
        let mut state = self.lock();
        self.flush_locked(&mut state)?;
        Ok(self.index.blocks()?.into_iter().map(|(cid, _)| cid).collect())
    }

    fn reclaim(&self) -> Result<u64, StoreError> {
        self.compact()
    }

    fn pin(&self, root: &Cid) -> Result<(), StoreError> {
        self.index.pin(root)
    }

    fn unpin(&self, root: &Cid) -> Result<bool, StoreError> {
        self.index.unpin(root)
    }

    fn pins(&self) -> Result<Vec<Cid>, StoreError> {
        self.index.pins()
    }

    fn put_reference(&self, block: &Block, file: &Path, offset: u64) -> Result<bool, StoreError> {
        let failed = |e| StoreError::io("looking at", file, 0, e);
        let now = look_at(&fs::canonicalize(file).map_err(failed)?).map_err(failed)?;
        if now.path.to_str().is_none() || offset + block.len() as u64 > now.length {
            return Ok(false);
        }
        let mut state = self.lock();
        if self.place(&state, block.cid())?.is_some_and(|p| Self::intact(&state, p)) {
            return Ok(true);
        }
        let number = match state.numbers.get(&now) {
            Some(&number) => number,
            None => {
                let number = state.files.keys().max().map_or(0, |n| n + 1);
                state.files.insert(number, now.clone());
                state.numbers.insert(now, number);
                state.new_files.push(number);
                number
            }
        };
        let place = Place { by_reference: true, file: number, offset, length: block.len() as u32 };
        state.damaged.remove(block.cid());
        state.pending.insert(*block.cid(), place);
        Ok(true)
    }

    fn put_alias(&self, alias: &Block, of: &Cid) -> Result<(), StoreError> {
        let mut state = self.lock();
        let intact = |state: &State, cid| {
            Ok::<_, StoreError>(self.place(state, cid)?.filter(|&place| Self::intact(state, place)))
        };
        if intact(&state, alias.cid())?.is_some() {
            return Ok(());
        }
        if let Some(place) = intact(&state, of)? {
            state.damaged.remove(alias.cid());
            state.pending.insert(*alias.cid(), place);
            state.second_names += 1;
            return Ok(());
        }
        drop(state);
        self.put(alias).map(drop)
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.flush_locked(&mut self.lock())
    }
}

impl Drop for FsStore {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::warn!(%error, dir = %self.dir.display(), "blocks stay unindexed until the store is opened again");
        }
    }
}

fn look_at(path: &Path) -> std::io::Result<ReferencedFile> {
    let metadata = fs::metadata(path)?;
    let modified_ns = metadata.modified()?.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    Ok(ReferencedFile { path: path.to_owned(), length: metadata.len(), modified_ns })
}

#[cfg(test)]
mod tests;
