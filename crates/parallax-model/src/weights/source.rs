//! Bytes of one file, read by position; or of a file that is embedded in the program.

use std::{
    borrow::Cow,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use crate::error::OpenError;

#[derive(Debug)]
enum Bytes {
    File(Mutex<File>),
    Memory(Cow<'static, [u8]>),
}

/// One file of a checkpoint.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    bytes: Bytes,
    len: u64,
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        Ok(Self { path: path.to_owned(), bytes: Bytes::File(Mutex::new(file)), len })
    }

    /// `path` is only a name for messages.
    pub(crate) fn memory(path: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Self {
        let bytes = bytes.into();
        Self { path: PathBuf::from(path), len: bytes.len() as u64, bytes: Bytes::Memory(bytes) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// An error about this file's content.
    pub(crate) fn corrupt(&self, reason: impl Into<String>) -> OpenError {
        OpenError::Corrupt { path: self.path.clone(), reason: reason.into() }
    }

    /// `len` bytes from `offset`. The range is checked against the file's length before memory is taken.
    pub(crate) fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, OpenError> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len).ok_or_else(|| {
            self.corrupt(format!("{len} bytes at offset {offset} reach past the end of {} bytes", self.len))
        })?;
        match &self.bytes {
            Bytes::Memory(bytes) => Ok(bytes[offset as usize..end as usize].to_vec()),
            Bytes::File(file) => {
                let io = |source| OpenError::Io { path: self.path.clone(), source };
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                let mut out = vec![0; len as usize];
                file.seek(SeekFrom::Start(offset)).map_err(io)?;
                file.read_exact(&mut out).map_err(io)?;
                Ok(out)
            }
        }
    }
}
