//! Commands on disk, in order. An entry that was appended durably is there after a power cut, with all entries before it.

use std::path::{Path, PathBuf};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use swarm_wire::DecodeError;

use crate::dispatcher::Command;
use crate::wire::{decode_entry, encode_entry};

const ENTRIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("entries");

/// The journal of one run.
#[derive(Debug)]
pub struct Journal {
    database: Database,
    path: PathBuf,
    next: u64,
}

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The database or the disk refused.
    #[error("journal {path}: {reason}; free space or choose another path, nothing was acknowledged", path = path.display())]
    Storage {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// The run has ended.
    #[error("the run has ended; nothing was acknowledged")]
    Closed,
    /// An entry that no version of this program wrote.
    #[error("journal {path}, entry {index}: {source}; restore the file from a copy", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which entry.
        index: u64,
        /// What is wrong with it.
        source: DecodeError,
    },
}

impl Journal {
    /// Opens or creates the journal at `path` and reads what is in it.
    ///
    /// # Errors
    /// When the file is damaged, or another process has it open.
    pub fn open(path: &Path) -> Result<(Self, Vec<(u64, Command)>), JournalError> {
        let storage = |e: redb::Error| storage(path, &e);
        let database = Database::create(path).map_err(|e| storage(e.into()))?;
        let write = database.begin_write().map_err(|e| storage(e.into()))?;
        write.open_table(ENTRIES).map_err(|e| storage(e.into()))?;
        write.commit().map_err(|e| storage(e.into()))?;
        let read = database.begin_read().map_err(|e| storage(e.into()))?;
        let table = read.open_table(ENTRIES).map_err(|e| storage(e.into()))?;
        let mut commands = Vec::new();
        let mut next = 0;
        for entry in table.iter().map_err(|e| storage(e.into()))? {
            let (index, bytes) = entry.map_err(|e| storage(e.into()))?;
            let damaged =
                |source| JournalError::Damaged { path: path.to_owned(), index: index.value(), source };
            commands.push(decode_entry(bytes.value()).map_err(damaged)?);
            next = index.value() + 1;
        }
        drop(table);
        Ok((Self { database, path: path.to_owned(), next }, commands))
    }

    /// Appends commands in one piece; with `durable`, they and all before them are on disk when this returns.
    ///
    /// # Errors
    /// When the disk refuses; then nothing was appended.
    pub fn append(&mut self, now_ms: u64, commands: &[Command], durable: bool) -> Result<(), JournalError> {
        let storage = |e: redb::Error| storage(&self.path, &e);
        let mut write = self.database.begin_write().map_err(|e| storage(e.into()))?;
        if !durable {
            write.set_durability(Durability::None).map_err(|e| storage(e.into()))?;
        }
        {
            let mut table = write.open_table(ENTRIES).map_err(|e| storage(e.into()))?;
            for (index, command) in (self.next..).zip(commands) {
                let bytes = encode_entry(now_ms, command);
                table.insert(index, &bytes[..]).map_err(|e| storage(e.into()))?;
            }
        }
        write.commit().map_err(|e| storage(e.into()))?;
        self.next += commands.len() as u64;
        Ok(())
    }
}

fn storage(path: &Path, error: &redb::Error) -> JournalError {
    JournalError::Storage { path: path.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use swarm_wire::PolicyVersion;

    use super::*;

    #[test]
    fn what_was_appended_is_read_again_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.redb");
        let (mut journal, empty) = Journal::open(&path).unwrap();
        assert!(empty.is_empty());
        let commands: Vec<Command> = (1..5).map(|v| Command::SetVersion(PolicyVersion(v))).collect();
        journal.append(7, &commands[..3], false).unwrap();
        journal.append(8, &commands[3..], true).unwrap();
        drop(journal);
        let (mut journal, read) = Journal::open(&path).unwrap();
        assert_eq!(read.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [7, 7, 7, 8]);
        assert_eq!(read.into_iter().map(|(_, c)| c).collect::<Vec<_>>(), commands);
        journal.append(9, &commands[..1], true).unwrap();
        assert!(Journal::open(&path).is_err(), "one process at a time");
    }

    #[test]
    fn a_file_that_is_no_journal_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.redb");
        std::fs::write(&path, b"not a database, just text that somebody put here").unwrap();
        assert!(matches!(Journal::open(&path), Err(JournalError::Storage { .. })));
    }
}
