//! Files in and out of a store: publishing by reference, and writing an artefact's bytes to a file that is whole or absent.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use swarm_wire::Cid;

use crate::publish::publish_manifest;
use crate::{Block, BlockRef, BlockStore, Entry, FetchError, HashKind, Manifest, PublishError, StoreError};

/// Registers `paths` (relative ones are looked up in `dir`) as one artefact with an entry for each file, named by its path
/// within `dir`. Each file starts a block of its own, so that a file that did not change keeps its blocks.
pub(super) fn publish(
    store: &dyn BlockStore,
    dir: &Path,
    paths: &[PathBuf],
    leaf_bytes: usize,
) -> Result<Cid, PublishError> {
    let mut entries = Vec::new();
    let mut blocks = Vec::new();
    let mut offset = 0;
    for path in paths {
        let full = dir.join(path);
        let first = blocks.len();
        publish_file(store, &full, leaf_bytes, &mut blocks)?;
        let length = blocks[first..].iter().map(|b: &BlockRef| u64::from(b.length)).sum();
        entries.push(Entry { name: entry_name(dir, &full), offset, length });
        offset += length;
    }
    let name = dir.file_name().map_or_else(|| "files".to_owned(), |n| n.to_string_lossy().into_owned());
    publish_manifest(store, &Manifest::new(&name, "files", HashKind::Blake3, entries, blocks)?)
}

/// Path within `dir` with forward slashes, or the last part of a path elsewhere.
fn entry_name(dir: &Path, path: &Path) -> String {
    let within = path.strip_prefix(dir).ok().or_else(|| path.file_name().map(Path::new)).unwrap_or(path);
    let parts: Vec<_> = within.components().map(|c| c.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}

fn publish_file(
    store: &dyn BlockStore,
    path: &Path,
    leaf_bytes: usize,
    blocks: &mut Vec<BlockRef>,
) -> Result<(), PublishError> {
    let failed = |source| PublishError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut offset = 0;
    loop {
        let mut bytes = BytesMut::zeroed(leaf_bytes);
        let mut filled = 0;
        while filled < leaf_bytes {
            match file.read(&mut bytes[filled..]).map_err(failed)? {
                0 => break,
                n => filled += n,
            }
        }
        if filled == 0 {
            return Ok(());
        }
        bytes.truncate(filled);
        let block = Block::new(HashKind::Blake3, bytes.freeze()).expect("a leaf is within the block limit");
        if !store.put_reference(&block, path, offset)? {
            store.put(&block)?;
        }
        offset += filled as u64;
        blocks.push(BlockRef { cid: *block.cid(), length: filled as u32 });
    }
}

/// The manifest of `root`, if it is stored.
pub(super) fn stored_manifest(store: &dyn BlockStore, root: &Cid) -> Result<Option<Manifest>, FetchError> {
    let Some(block) = store.get(root)? else { return Ok(None) };
    let manifest = Manifest::decode(block.bytes());
    manifest.map(Some).map_err(|source| FetchError::BadManifest { root: Box::new(*root), source })
}

/// Hands the bytes of a span to `take`, block by block.
pub(super) fn read_span(
    store: &dyn BlockStore,
    root: &Cid,
    manifest: &Manifest,
    (offset, length): (u64, u64),
    mut take: impl FnMut(&[u8]) -> Result<(), FetchError>,
) -> Result<(), FetchError> {
    let Some(range) = manifest.blocks_of_span(offset, length) else {
        let (root, total_bytes) = (Box::new(*root), manifest.total_bytes());
        return Err(FetchError::SpanOutside { root, offset, length, total_bytes });
    };
    for index in range {
        let BlockRef { cid, length: block_bytes } = manifest.blocks()[index];
        let block = store.get(&cid)?.ok_or_else(|| not_here(root, cid))?;
        if block.len() != block_bytes as usize {
            let (expected_bytes, got_bytes) = (block_bytes as usize, block.len());
            let (root, cid) = (Box::new(*root), Box::new(cid));
            return Err(FetchError::WrongLength { root, cid, expected_bytes, got_bytes });
        }
        let start = manifest.block_start(index);
        let from = offset.saturating_sub(start) as usize;
        let to = (offset + length - start).min(u64::from(block_bytes)) as usize;
        take(&block.bytes()[from..to])?;
    }
    Ok(())
}

/// A block that the caller takes for stored is not.
pub(super) fn not_here(root: &Cid, cid: Cid) -> FetchError {
    FetchError::NotHere { root: Box::new(*root), cid: Box::new(cid) }
}

/// The bytes of a span in memory.
pub(super) fn read_bytes(
    store: &dyn BlockStore,
    root: &Cid,
    span: Option<(u64, u64)>,
) -> Result<Bytes, FetchError> {
    let manifest = stored_manifest(store, root)?.ok_or_else(|| not_here(root, *root))?;
    let span = span.unwrap_or_else(|| (0, manifest.total_bytes()));
    // A manifest may promise more than there is: memory grows with what is really read.
    let mut bytes = BytesMut::new();
    read_span(store, root, &manifest, span, |part| {
        bytes.extend_from_slice(part);
        Ok(())
    })?;
    Ok(bytes.freeze())
}

/// Writes an artefact, or one entry of it, to `path`: completely or not at all.
pub(super) fn write_file(
    store: &dyn BlockStore,
    root: &Cid,
    entry: Option<&str>,
    path: &Path,
) -> Result<(), FetchError> {
    let manifest = stored_manifest(store, root)?.ok_or_else(|| not_here(root, *root))?;
    let span = match entry {
        None => (0, manifest.total_bytes()),
        Some(name) => manifest
            .entry(name)
            .map(|e| (e.offset, e.length))
            .ok_or_else(|| FetchError::NoEntry { root: Box::new(*root), entry: name.to_owned() })?,
    };
    whole_file(path, span.1, |file, left| {
        read_span(store, root, &manifest, span, |part| {
            file.write_all(part).map_err(|e| StoreError::io("writing", path, *left, e))?;
            *left -= part.len() as u64;
            Ok(())
        })
    })
}

/// Makes a file of `bytes` bytes at `path` as `fill` writes it, which also counts down the bytes that are still to come: into
/// a temporary file beside it, synced, then renamed.
pub(super) fn whole_file(
    path: &Path,
    bytes: u64,
    fill: impl FnOnce(&mut File, &mut u64) -> Result<(), FetchError>,
) -> Result<(), FetchError> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let mut left = bytes;
    let failed = |action, needed, source| FetchError::from(StoreError::io(action, path, needed, source));
    std::fs::create_dir_all(dir).map_err(|e| failed("creating the directory of", left, e))?;
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(|e| failed("creating", left, e))?;
    fill(file.as_file_mut(), &mut left)?;
    file.as_file().sync_all().map_err(|e| failed("syncing", left, e))?;
    file.persist(path).map_err(|e| failed("renaming to", 0, e.error))?;
    #[cfg(unix)]
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| failed("syncing the directory of", 0, e))?;
    Ok(())
}
