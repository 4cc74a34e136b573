//! The index of a store on disk: CID to place, in redb. Also which files are served by reference, how far each segment is
//! indexed, and which roots are pinned.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use swarm_wire::{Cid, cid};

use super::{Place, ReferencedFile};
use crate::StoreError;

const BLOCKS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("blocks");
/// Number to (length, modified ns, path).
const FILES: TableDefinition<'_, u32, (u64, u128, &str)> = TableDefinition::new("files");
const SEGMENT_ENDS: TableDefinition<'_, u32, u64> = TableDefinition::new("segment_ends");
const PINS: TableDefinition<'_, &[u8], ()> = TableDefinition::new("pins");
const PLACE_BYTES: usize = 17;
/// redb keeps little in memory: the blocks are what memory is for.
const CACHE_BYTES: usize = 16 << 20;
/// What a commit may need when the disk is full: named in the error.
const COMMIT_BYTES: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Index {
    database: Database,
    path: PathBuf,
}

impl Index {
    pub(super) fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("index.redb");
        let database = match Database::builder().set_cache_size(CACHE_BYTES).create(&path) {
            Ok(database) => database,
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
                return Err(StoreError::InUse { path: dir.to_owned() });
            }
            Err(error) => return Err(refused(&path, error.into())),
        };
        let index = Self { database, path };
        index.with_write(|transaction| {
            transaction.open_table(BLOCKS)?;
            transaction.open_table(FILES)?;
            transaction.open_table(SEGMENT_ENDS)?;
            transaction.open_table(PINS)?;
            Ok(())
        })?;
        Ok(index)
    }

    /// All blocks with their places.
    pub(super) fn blocks(&self) -> Result<Vec<(Cid, Place)>, StoreError> {
        let read = || -> Result<Vec<(Cid, Place)>, redb::Error> {
            let table = self.database.begin_read()?.open_table(BLOCKS)?;
            let mut blocks = Vec::new();
            for row in table.iter()? {
                let (name, value) = row?;
                blocks.extend(cid::decode(name.value()).ok().zip(decode(value.value())));
            }
            Ok(blocks)
        };
        read().map_err(|e| refused(&self.path, e))
    }

    pub(super) fn remove(&self, cids: &[Cid]) -> Result<(), StoreError> {
        self.with_write(|transaction| {
            let mut table = transaction.open_table(BLOCKS)?;
            for cid in cids {
                table.remove(&cid.to_bytes()[..])?;
            }
            Ok(())
        })
    }

    /// Knows nothing more of segments other than these.
    pub(super) fn keep_segments(&self, numbers: &[u32]) -> Result<(), StoreError> {
        self.with_write(|transaction| {
            let mut table = transaction.open_table(SEGMENT_ENDS)?;
            table.retain(|number, _| numbers.contains(&number))?;
            Ok(())
        })
    }

    /// Knows nothing more of the files with these numbers.
    pub(super) fn remove_files(&self, numbers: &[u32]) -> Result<(), StoreError> {
        self.with_write(|transaction| {
            let mut table = transaction.open_table(FILES)?;
            for number in numbers {
                table.remove(number)?;
            }
            Ok(())
        })
    }

    pub(super) fn pin(&self, root: &Cid) -> Result<(), StoreError> {
        self.with_write(|transaction| {
            transaction.open_table(PINS)?.insert(&root.to_bytes()[..], ())?;
            Ok(())
        })
    }

    pub(super) fn unpin(&self, root: &Cid) -> Result<bool, StoreError> {
        let mut was_pinned = false;
        self.with_write(|transaction| {
            was_pinned = transaction.open_table(PINS)?.remove(&root.to_bytes()[..])?.is_some();
            Ok(())
        })?;
        Ok(was_pinned)
    }

    pub(super) fn pins(&self) -> Result<Vec<Cid>, StoreError> {
        let read = || -> Result<Vec<Cid>, redb::Error> {
            let table = self.database.begin_read()?.open_table(PINS)?;
            let mut pins = Vec::new();
            for row in table.iter()? {
                pins.extend(cid::decode(row?.0.value()).ok());
            }
            Ok(pins)
        };
        read().map_err(|e| refused(&self.path, e))
    }

    pub(super) fn get(&self, cid: &Cid) -> Result<Option<Place>, StoreError> {
        let read = || -> Result<Option<Place>, redb::Error> {
            let table = self.database.begin_read()?.open_table(BLOCKS)?;
            let found = table.get(&cid.to_bytes()[..])?;
            Ok(found.and_then(|value| decode(value.value())))
        };
        read().map_err(|e| refused(&self.path, e))
    }

    pub(super) fn files(&self) -> Result<HashMap<u32, ReferencedFile>, StoreError> {
        let read = || -> Result<HashMap<u32, ReferencedFile>, redb::Error> {
            let table = self.database.begin_read()?.open_table(FILES)?;
            let mut files = HashMap::new();
            for row in table.iter()? {
                let (number, value) = row?;
                let (length, modified_ns, path) = value.value();
                files.insert(number.value(), ReferencedFile { path: path.into(), length, modified_ns });
            }
            Ok(files)
        };
        read().map_err(|e| refused(&self.path, e))
    }

    /// Up to where segment `number` is indexed.
    pub(super) fn segment_end(&self, number: u32) -> Result<u64, StoreError> {
        let read = || -> Result<u64, redb::Error> {
            let table = self.database.begin_read()?.open_table(SEGMENT_ENDS)?;
            Ok(table.get(number)?.map_or(0, |v| v.value()))
        };
        read().map_err(|e| refused(&self.path, e))
    }

    pub(super) fn commit<'a>(
        &self,
        places: &HashMap<Cid, Place>,
        files: impl Iterator<Item = (u32, &'a ReferencedFile)>,
        (segment, end): (u32, u64),
    ) -> Result<(), StoreError> {
        self.with_write(|transaction| {
            let mut table = transaction.open_table(BLOCKS)?;
            for (cid, place) in places {
                table.insert(&cid.to_bytes()[..], &encode(*place)[..])?;
            }
            let mut table = transaction.open_table(FILES)?;
            for (number, file) in files {
                let path = file.path.to_str().expect("only paths in UTF-8 are referenced");
                table.insert(number, (file.length, file.modified_ns, path))?;
            }
            let mut table = transaction.open_table(SEGMENT_ENDS)?;
            for (number, reached) in places.values().filter(|p| !p.by_reference).map(|p| (p.file, end_of(*p)))
            {
                let known = table.get(number)?.map_or(0, |v| v.value());
                table.insert(number, known.max(reached))?;
            }
            let known = table.get(segment)?.map_or(0, |v| v.value());
            table.insert(segment, known.max(end))?;
            Ok(())
        })
    }

    fn with_write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        let write = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            change(&transaction)?;
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|e| refused(&self.path, e))
    }
}

fn end_of(place: Place) -> u64 {
    place.offset + u64::from(place.length)
}

fn refused(path: &Path, error: redb::Error) -> StoreError {
    match error {
        redb::Error::Io(source) if is_full(&source) => StoreError::io("writing", path, COMMIT_BYTES, source),
        error => StoreError::Index { path: path.to_owned(), reason: error.to_string() },
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn encode(place: Place) -> [u8; PLACE_BYTES] {
    let mut bytes = [0; PLACE_BYTES];
    bytes[0] = u8::from(place.by_reference);
    bytes[1..5].copy_from_slice(&place.file.to_le_bytes());
    bytes[5..13].copy_from_slice(&place.offset.to_le_bytes());
    bytes[13..].copy_from_slice(&place.length.to_le_bytes());
    bytes
}

/// `None` for a value of another length: such a block counts as absent and is stored again.
fn decode(bytes: &[u8]) -> Option<Place> {
    let bytes: &[u8; PLACE_BYTES] = bytes.try_into().ok()?;
    Some(Place {
        by_reference: bytes[0] != 0,
        file: u32::from_le_bytes(bytes[1..5].try_into().ok()?),
        offset: u64::from_le_bytes(bytes[5..13].try_into().ok()?),
        length: u32::from_le_bytes(bytes[13..].try_into().ok()?),
    })
}
