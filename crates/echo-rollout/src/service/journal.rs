//! Commands on disk, in order. An entry that was appended durably is there after a power cut, with all entries before it.

use std::path::{Path, PathBuf};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use swarm_wire::DecodeError;

use crate::dispatcher::Command;
use crate::wire::{Entry, decode_entry, encode_entry, encode_settings};

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
    /// Leases were given out under other settings, so that carrying the entries out again would give another state.
    #[error(
        "journal {path} was written with other settings, another environment, base model or learner's key; restore them, or name another directory",
        path = path.display()
    )]
    OtherSettings {
        /// The file.
        path: PathBuf,
    },
    /// The checkpoint beside it is of another moment, or one of the two is missing.
    #[error(
        "journal {path} has {journal} committed steps but the checkpoint has {checkpoint}; restore the missing one, or name another directory",
        path = path.display()
    )]
    OtherCheckpoint {
        /// The file.
        path: PathBuf,
        /// Steps that the journal says are committed.
        journal: u64,
        /// Steps in the checkpoint.
        checkpoint: u64,
    },
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
    /// Opens or creates the journal at `path` of a run with settings of this hash, and gives what is in it to `apply`, one
    /// by one.
    ///
    /// # Errors
    /// When the file is damaged, was written under other settings, or another process has it open.
    pub fn open(
        path: &Path,
        settings: &[u8; 32],
        mut apply: impl FnMut(u64, Command),
    ) -> Result<Self, JournalError> {
        let storage = |e: redb::Error| storage(path, &e);
        let database = Database::create(path).map_err(|e| storage(e.into()))?;
        let write = database.begin_write().map_err(|e| storage(e.into()))?;
        {
            let mut table = write.open_table(ENTRIES).map_err(|e| storage(e.into()))?;
            if table.is_empty().map_err(|e| storage(e.into()))? {
                table.insert(0, &encode_settings(settings)[..]).map_err(|e| storage(e.into()))?;
            }
        }
        write.commit().map_err(|e| storage(e.into()))?;
        let read = database.begin_read().map_err(|e| storage(e.into()))?;
        let table = read.open_table(ENTRIES).map_err(|e| storage(e.into()))?;
        let mut next = 0;
        for entry in table.iter().map_err(|e| storage(e.into()))? {
            let (index, bytes) = entry.map_err(|e| storage(e.into()))?;
            let damaged =
                |source| JournalError::Damaged { path: path.to_owned(), index: index.value(), source };
            match decode_entry(bytes.value()).map_err(damaged)? {
                Entry::Command(now_ms, command) if index.value() > 0 => apply(now_ms, command),
                Entry::Settings(written) if index.value() == 0 && written == *settings => {}
                _ => return Err(JournalError::OtherSettings { path: path.to_owned() }),
            }
            next = index.value() + 1;
        }
        drop(table);
        Ok(Self { database, path: path.to_owned(), next })
    }

    /// Whether no command was ever appended.
    pub fn is_empty(&self) -> bool {
        self.next <= 1
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
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

    fn read(path: &Path, settings: u8) -> Result<(Journal, Vec<(u64, Command)>), JournalError> {
        let mut commands = Vec::new();
        let journal = Journal::open(path, &[settings; 32], |at, command| commands.push((at, command)))?;
        Ok((journal, commands))
    }

    #[test]
    fn what_was_appended_is_read_again_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.redb");
        let (mut journal, empty) = read(&path, 1).unwrap();
        assert!(empty.is_empty() && journal.is_empty());
        let commands: Vec<Command> = (1..5).map(|v| Command::SetVersion(PolicyVersion(v))).collect();
        journal.append(7, &commands[..3], false).unwrap();
        journal.append(8, &commands[3..], true).unwrap();
        drop(journal);
        let (mut journal, again) = read(&path, 1).unwrap();
        assert_eq!(again.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [7, 7, 7, 8]);
        assert_eq!(again.into_iter().map(|(_, c)| c).collect::<Vec<_>>(), commands);
        journal.append(9, &commands[..1], true).unwrap();
        assert!(!journal.is_empty());
        assert!(read(&path, 1).is_err(), "one process at a time");
    }

    #[test]
    fn a_run_with_other_settings_does_not_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.redb");
        drop(read(&path, 1).unwrap());
        assert!(matches!(read(&path, 2), Err(JournalError::OtherSettings { .. })));
        read(&path, 1).unwrap();
    }

    #[test]
    fn a_file_that_is_no_journal_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.redb");
        std::fs::write(&path, b"not a database, just text that somebody put here").unwrap();
        assert!(matches!(read(&path, 1), Err(JournalError::Storage { .. })));
    }
}
