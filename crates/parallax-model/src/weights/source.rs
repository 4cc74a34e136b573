//! Bytes of one file, read by position; or of a file that is embedded in the program.

use std::{
    borrow::Cow,
    fs::File,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::error::OpenError;

#[derive(Debug)]
enum Bytes {
    File(File),
    Memory(Cow<'static, [u8]>),
}

/// One file of a checkpoint.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    bytes: Bytes,
    len: u64,
    read: AtomicU64,
}

/// Fills `out` from `offset` without moving a shared position, so that threads do not wait for each other.
#[cfg(unix)]
fn read_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

/// Fills `out` from `offset`; Windows moves the position too, which nobody here relies on.
#[cfg(windows)]
fn read_at(file: &File, mut out: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !out.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, out, offset)?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        out = &mut out[n..];
        offset += n as u64;
    }
    Ok(())
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        Ok(Self { path: path.to_owned(), bytes: Bytes::File(file), len, read: AtomicU64::new(0) })
    }

    /// `path` is only a name for messages.
    pub(crate) fn memory(path: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Self {
        let bytes = bytes.into();
        let len = bytes.len() as u64;
        Self { path: PathBuf::from(path), len, bytes: Bytes::Memory(bytes), read: AtomicU64::new(0) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes read so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
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
        self.read.fetch_add(len, Ordering::Relaxed);
        match &self.bytes {
            Bytes::Memory(bytes) => Ok(bytes[offset as usize..end as usize].to_vec()),
            Bytes::File(file) => {
                let mut out = vec![0; len as usize];
                read_at(file, &mut out, offset)
                    .map_err(|source| OpenError::Io { path: self.path.clone(), source })?;
                Ok(out)
            }
        }
    }
}
