//! What can go wrong, one enum for each family of operations. A peer's fault is an error here, never a panic.

use std::io;
use std::path::PathBuf;

use swarm_wire::{Cid, DecodeError};

/// Why bytes did not become a [`Block`](crate::Block).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The bytes hash to something else than the CID says.
    #[error("bytes do not match {cid}")]
    HashMismatch {
        /// The CID that was expected.
        cid: Cid,
    },
    /// More bytes than one block may have.
    #[error(
        "a block of {got_bytes} bytes is over the limit of {limit_bytes} bytes; cut it into smaller blocks"
    )]
    TooLarge {
        /// The length of the bytes.
        got_bytes: usize,
        /// [`swarm_wire::limits::BLOCK_MAX_BYTES`].
        limit_bytes: usize,
    },
    /// A hash function that is not checked here.
    #[error("hash function {code:#x} is not supported; use BLAKE3 (0x1e) or SHA2-256 (0x12)")]
    UnknownHash {
        /// The multihash code.
        code: u64,
    },
}

/// Why a manifest was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// The bytes are no manifest at all, or one of its fields is out of range.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The blocks' lengths do not add up to the artefact's length.
    #[error("manifest {name} has {total_bytes} bytes but its blocks have {sum_bytes}")]
    LengthSum {
        /// The artefact's name.
        name: String,
        /// The length that it claims.
        total_bytes: u64,
        /// The sum of its blocks' lengths.
        sum_bytes: u64,
    },
    /// An entry reaches beyond the artefact's end.
    #[error(
        "manifest {name}: entry {entry} at {offset} with {length} bytes ends beyond its {total_bytes} bytes"
    )]
    EntryOutside {
        /// The artefact's name.
        name: String,
        /// The entry's name.
        entry: String,
        /// Where the entry starts.
        offset: u64,
        /// How long it is.
        length: u64,
        /// The artefact's length.
        total_bytes: u64,
    },
    /// Two entries with one name.
    #[error("manifest {name} names entry {entry} twice")]
    DuplicateEntry {
        /// The artefact's name.
        name: String,
        /// The name that occurs twice.
        entry: String,
    },
    /// The encoded manifest does not fit one block.
    #[error(
        "manifest {name} takes {got_bytes} bytes, over the {limit_bytes} bytes of one block; publish the artefact in parts"
    )]
    TooLarge {
        /// The artefact's name.
        name: String,
        /// The encoded length.
        got_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
}

/// Why a graph of UnixFS nodes was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnixfsError {
    /// A block is malformed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Something that exists in IPFS and is not read here.
    #[error("{what} {code:#x} of IPFS is not read here; files and directories are")]
    Unsupported {
        /// What kind of thing.
        what: &'static str,
        /// Its number.
        code: u64,
    },
    /// A directory where a piece of a file belongs.
    #[error("{cid} is no part of a file")]
    NotAFile {
        /// The block.
        cid: Cid,
    },
    /// A node does not hold as much as the node above it says.
    #[error("{cid} should hold {expected_bytes} bytes of a file but holds {got_bytes}")]
    WrongLength {
        /// The block.
        cid: Cid,
        /// What the node above says.
        expected_bytes: u64,
        /// What it says itself.
        got_bytes: u64,
    },
    /// A part of a large directory is no such part.
    #[error("{cid} is no part of a directory")]
    BadShard {
        /// The block.
        cid: Cid,
    },
    /// A name that no file can have, or that is there twice.
    #[error("the directory has an entry named {name:?}, which is no file name, too long, or there twice")]
    BadName {
        /// The name.
        name: String,
    },
    /// More than was allowed.
    #[error("it has more than {limit} {what}; allow more if you expect that")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
}

/// Why a store did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No room: a full disk or the store's own quota.
    #[error("no room at {path} for {needed_bytes} more bytes; free space there or choose another store directory", path = path.display())]
    Full {
        /// Where the bytes should have gone.
        path: PathBuf,
        /// How many bytes were still needed at least.
        needed_bytes: u64,
    },
    /// A file that was published by reference is not what it was.
    #[error("{path} changed since it was published; publish it again", path = path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
    },
    /// Stored bytes that no longer match their CID.
    #[error("stored block {cid} in {path} is damaged; fetch it again", path = path.display())]
    Damaged {
        /// The block.
        cid: Box<Cid>,
        /// The file that holds its bytes.
        path: PathBuf,
    },
    /// Another process has the store open.
    #[error("block store {path} is in use by another process; give this one its own directory", path = path.display())]
    InUse {
        /// The store's directory.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The index database refused.
    #[error("block index {path}: {reason}", path = path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// The database's reason.
        reason: String,
    },
}

impl StoreError {
    /// Wraps an operating system error; a full disk or quota becomes [`StoreError::Full`].
    pub fn io(action: &'static str, path: impl Into<PathBuf>, needed_bytes: u64, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path, needed_bytes },
            _ => Self::Io { action, path, source },
        }
    }
}

/// Why an artefact could not be published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The artefact cannot be described by one manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A block of what is published is not stored here.
    #[error("block {cid} is not stored here; publish the artefact again")]
    NotHere {
        /// The block.
        cid: Box<Cid>,
    },
    /// An entry's name is no path of a file, or the path of another entry or of a directory.
    #[error("entry {entry} cannot be a file's path in a directory; rename it")]
    EntryPath {
        /// The name.
        entry: String,
    },
    /// A directory that does not fit one block.
    #[error(
        "directory {directory} takes {got_bytes} bytes, over the {limit_bytes} bytes of one block; use subdirectories"
    )]
    DirectoryTooLarge {
        /// The directory's name.
        directory: String,
        /// The encoded length.
        got_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// A file to publish could not be read.
    #[error("reading {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Why an artefact, or a part of it, did not arrive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Nobody to ask.
    #[error("no peer is known to have {root}; connect to one that has it or pass its id")]
    NoPeers {
        /// The artefact.
        root: Cid,
    },
    /// Peers were asked, and none of them delivers what is still missing.
    #[error(
        "{missing_blocks} blocks of {root} are missing: {reason} (asked {asked_peers} peers); what arrived is kept, try again"
    )]
    Incomplete {
        /// The artefact.
        root: Box<Cid>,
        /// How many blocks are missing.
        missing_blocks: usize,
        /// How many peers were asked.
        asked_peers: usize,
        /// What happened to them.
        reason: &'static str,
    },
    /// The root block is no valid manifest.
    #[error("{root} is not an artefact: {source}")]
    BadManifest {
        /// The artefact.
        root: Box<Cid>,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// The root is no file or directory of IPFS.
    #[error("{root} cannot be read: {source}")]
    Unixfs {
        /// The root.
        root: Box<Cid>,
        /// What is wrong with it.
        source: UnixfsError,
    },
    /// A name that this machine's file system does not take, or something that is there already.
    #[error("{path} cannot be written: {reason}", path = path.display())]
    Target {
        /// Where it should go.
        path: PathBuf,
        /// Why it cannot.
        reason: &'static str,
    },
    /// A block is not as long as the manifest says.
    #[error("manifest {root} gives block {cid} {expected_bytes} bytes but it has {got_bytes}")]
    WrongLength {
        /// The artefact.
        root: Box<Cid>,
        /// The block.
        cid: Box<Cid>,
        /// The manifest's length.
        expected_bytes: usize,
        /// The block's length.
        got_bytes: usize,
    },
    /// A span that the artefact does not have.
    #[error("bytes {offset} + {length} are outside of {root}, which has {total_bytes} bytes")]
    SpanOutside {
        /// The artefact.
        root: Box<Cid>,
        /// Where the span starts.
        offset: u64,
        /// How long it is.
        length: u64,
        /// The artefact's length.
        total_bytes: u64,
    },
    /// The artefact has no entry of that name.
    #[error("{root} has no entry named {entry}")]
    NoEntry {
        /// The artefact.
        root: Box<Cid>,
        /// The name that was asked for.
        entry: String,
    },
    /// A block that should be here already is not; fetch it first.
    #[error("block {cid} of {root} is not stored here; fetch it first")]
    NotHere {
        /// The artefact.
        root: Box<Cid>,
        /// The block.
        cid: Box<Cid>,
    },
    /// The store refused, for example because the disk is full.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The block exchange was stopped.
    #[error("the block exchange was shut down")]
    Closed,
}
