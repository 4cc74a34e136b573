//! One append-only file of blocks. A record is: magic, CID length, data length, CID, data.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use swarm_wire::limits::BLOCK_MAX_BYTES;
use swarm_wire::{Cid, cid};

use super::Place;
use crate::{Block, StoreError};

const MAGIC: [u8; 4] = *b"BLK1";
/// Magic, CID length (u16), data length (u32).
const HEADER_BYTES: usize = 10;
/// Longest CID that is stored; longer ones do not pass `cid::decode`.
const CID_MAX_BYTES: usize = 64;

/// The segment that is written to.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u32,
    /// Where the next record goes.
    pub(super) end: u64,
    path: PathBuf,
    file: File,
}

impl Segment {
    /// Opens segment `number` for appending, or creates it.
    pub(super) fn open(dir: &Path, number: u32) -> Result<Self, StoreError> {
        let path = segment_path(dir, number);
        let failed = |e| StoreError::io("opening", &path, 4096, e);
        let new = !path.exists();
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        let end = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if new {
            // The file's name must survive a power cut as well.
            File::open(dir).and_then(|d| d.sync_all()).map_err(failed)?;
        }
        Ok(Self { number, end, path, file })
    }

    /// Appends a block and returns where its data starts. When that fails the segment is as before.
    pub(super) fn append(&mut self, block: &Block) -> Result<u64, StoreError> {
        let name = block.cid().to_bytes();
        let mut header = Vec::with_capacity(HEADER_BYTES + name.len());
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&(name.len() as u16).to_le_bytes());
        header.extend_from_slice(&(block.len() as u32).to_le_bytes());
        header.extend_from_slice(&name);
        let written = self
            .file
            .seek(SeekFrom::Start(self.end))
            .and_then(|_| self.file.write_all(&header))
            .and_then(|()| self.file.write_all(block.bytes()));
        if let Err(error) = written {
            // A torn record at the end would be cut off at the next open; do it now, the disk may be full.
            let _ = self.file.set_len(self.end);
            return Err(StoreError::io("writing", &self.path, record_bytes(block), error));
        }
        let offset = self.end + header.len() as u64;
        self.end = offset + block.len() as u64;
        Ok(offset)
    }

    /// Waits until the data is on the disk.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(|e| StoreError::io("syncing", &self.path, 0, e))
    }
}

/// What a block takes in a segment.
pub(super) fn record_bytes(block: &Block) -> u64 {
    (HEADER_BYTES + block.cid().to_bytes().len() + block.len()) as u64
}

/// The file of a segment.
pub(super) fn segment_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("segment-{number:06}.blocks"))
}

/// The segments that exist, in order.
pub(super) fn list(dir: &Path) -> Result<Vec<u32>, StoreError> {
    let failed = |e| StoreError::io("listing", dir, 0, e);
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix("segment-")?.strip_suffix(".blocks"));
        numbers.extend(number.and_then(|n| n.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// What was found in a segment beyond what the index knows.
pub(super) struct Recovered {
    pub(super) blocks: Vec<(Cid, Place)>,
    pub(super) end: u64,
}

/// Finds the complete records from `indexed_end` on and cuts off what follows them: the torn end of a write.
pub(super) fn recover(dir: &Path, number: u32, indexed_end: u64) -> Result<Recovered, StoreError> {
    let path = segment_path(dir, number);
    let failed = |e| StoreError::io("recovering", &path, 0, e);
    let mut file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
    let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let mut end = indexed_end.min(length);
    file.seek(SeekFrom::Start(end)).map_err(failed)?;
    let mut reader = BufReader::new(&mut file);
    let mut blocks = Vec::new();
    while let Some((block, header_bytes)) = read_record(&mut reader) {
        let offset = end + header_bytes as u64;
        let place = Place { by_reference: false, file: number, offset, length: block.len() as u32 };
        end = offset + block.len() as u64;
        blocks.push((*block.cid(), place));
    }
    if end < length {
        tracing::info!(segment = %path.display(), torn_bytes = length - end, "cut off an unfinished write");
        file.set_len(end).map_err(failed)?;
    }
    Ok(Recovered { blocks, end })
}

fn read_record(reader: &mut impl Read) -> Option<(Block, usize)> {
    let mut header = [0; HEADER_BYTES];
    reader.read_exact(&mut header).ok()?;
    let [m0, m1, m2, m3, n0, n1, l0, l1, l2, l3] = header;
    let name_bytes = usize::from(u16::from_le_bytes([n0, n1]));
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if [m0, m1, m2, m3] != MAGIC || name_bytes > CID_MAX_BYTES || length > BLOCK_MAX_BYTES {
        return None;
    }
    let mut name = vec![0; name_bytes];
    reader.read_exact(&mut name).ok()?;
    let mut data = vec![0; length];
    reader.read_exact(&mut data).ok()?;
    let block = Block::verify(cid::decode(&name).ok()?, Bytes::from(data)).ok()?;
    Some((block, HEADER_BYTES + name_bytes))
}
