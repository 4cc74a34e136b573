//! One block of a UnixFS graph: a piece of a file, or names in a directory.
//!
//! Formats: dag-pb (<https://ipld.io/specs/codecs/dag-pb/spec/>) and UnixFS (<https://specs.ipfs.tech/unixfs/>).

use bytes::Bytes;
use swarm_wire::{Cid, DecodeError, cid};

use super::fields::{Value, next, put_bytes, put_number};
use crate::{Block, UnixfsError, varint};

/// Multicodec of dag-pb nodes.
pub const CODEC_DAG_PB: u64 = 0x70;

/// UnixFS types of nodes.
const RAW: u64 = 0;
const DIRECTORY: u64 = 1;
const FILE: u64 = 2;
const SHARD: u64 = 5;

/// A child of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The child.
    pub cid: Cid,
    /// Its name in a directory; empty in a file.
    pub name: String,
    /// How many bytes of the file it holds; 0 in a directory.
    pub bytes: u64,
}

/// What a block says. A peer's block has at most 2 MiB and a link at least 34 bytes, which bounds the links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A file, or a part of one: first its own data, then its children's.
    File {
        /// Bytes in this block.
        data: Bytes,
        /// Blocks with what follows.
        children: Vec<Link>,
    },
    /// A directory's entries.
    Directory {
        /// Each with its name.
        entries: Vec<Link>,
    },
    /// A part of a directory that is too large for one block. A link whose name is the prefix alone is a further part.
    Shard {
        /// Characters in front of each name.
        prefix_chars: usize,
        /// Entries and further parts.
        links: Vec<Link>,
    },
}

impl Node {
    /// Reads a block, whose codec says what it is.
    ///
    /// # Errors
    /// When it is neither raw nor dag-pb, malformed, or a kind of node that is not read here (symbolic links).
    pub fn decode(block: &Block) -> Result<Self, UnixfsError> {
        match block.cid().codec() {
            cid::CODEC_RAW => Ok(Self::File { data: block.bytes().clone(), children: Vec::new() }),
            CODEC_DAG_PB => decode_dag_pb(block.bytes()),
            codec => Err(UnixfsError::Unsupported { what: "codec", code: codec }),
        }
    }

    /// Bytes of the file in this block and below it.
    pub fn file_bytes(&self) -> u64 {
        match self {
            Self::File { data, children } => {
                children.iter().fold(data.len() as u64, |sum, child| sum.saturating_add(child.bytes))
            }
            Self::Directory { .. } | Self::Shard { .. } => 0,
        }
    }
}

/// The file's bytes in one block of it.
///
/// # Errors
/// As [`Node::decode`]; also when it is no part of a file.
pub fn content(block: &Block) -> Result<Bytes, UnixfsError> {
    match Node::decode(block)? {
        Node::File { data, .. } => Ok(data),
        Node::Directory { .. } | Node::Shard { .. } => Err(UnixfsError::NotAFile { cid: *block.cid() }),
    }
}

fn decode_dag_pb(bytes: &Bytes) -> Result<Node, UnixfsError> {
    let mut links = Vec::new();
    let mut unixfs = None;
    let mut rest = &bytes[..];
    while let Some((field, value)) = next(&mut rest)? {
        match (field, value) {
            (1, Value::Bytes(data)) => unixfs = Some(data),
            (2, Value::Bytes(link)) => links.push(decode_link(link)?),
            _ => return Err(DecodeError::invalid("field of a dag-pb node", field).into()),
        }
    }
    let unixfs = unixfs.ok_or_else(|| DecodeError::invalid("dag-pb node", "no UnixFS data"))?;
    let (mut kind, mut data, mut file_bytes, mut fanout) = (None, &unixfs[..0], None, 0);
    let mut child_bytes = Vec::new();
    let mut rest = unixfs;
    let mut add_child = |bytes: u64| {
        // Before it is kept: a block has room for millions of numbers.
        if child_bytes.len() >= links.len() {
            return Err(DecodeError::invalid("block sizes of a UnixFS node", "more than links"));
        }
        child_bytes.push(bytes);
        Ok(())
    };
    while let Some((field, value)) = next(&mut rest)? {
        match (field, value) {
            (1, Value::Number(number)) => kind = Some(number),
            (2, Value::Bytes(bytes)) => data = bytes,
            (3, Value::Number(number)) => file_bytes = Some(number),
            (4, Value::Number(number)) => add_child(number)?,
            (4, Value::Bytes(mut packed)) => {
                while !packed.is_empty() {
                    let number = varint::read(&mut packed)
                        .ok_or_else(|| DecodeError::invalid("block sizes of a UnixFS node", "malformed"))?;
                    add_child(number)?;
                }
            }
            (6, Value::Number(number)) => fanout = number,
            // Hash function of shards, mode, time.
            _ => {}
        }
    }
    match kind {
        Some(FILE | RAW) => {
            if child_bytes.len() != links.len() {
                return Err(DecodeError::invalid("block sizes of a UnixFS node", "fewer than links").into());
            }
            let children: Vec<Link> =
                links.into_iter().zip(child_bytes).map(|(link, bytes)| Link { bytes, ..link }).collect();
            let node = Node::File { data: bytes.slice_ref(data), children };
            match file_bytes {
                Some(claimed) if claimed != node.file_bytes() => {
                    Err(DecodeError::invalid("length of a UnixFS file", claimed).into())
                }
                _ => Ok(node),
            }
        }
        Some(DIRECTORY) => Ok(Node::Directory { entries: links }),
        Some(SHARD) => {
            if !(2..=1024).contains(&fanout) || !fanout.is_power_of_two() {
                return Err(DecodeError::invalid("fanout of a UnixFS shard", fanout).into());
            }
            // Hexadecimal digits of the largest slot.
            Ok(Node::Shard { prefix_chars: format!("{:X}", fanout - 1).len(), links })
        }
        other => Err(UnixfsError::Unsupported { what: "type of node", code: other.unwrap_or(RAW) }),
    }
}

fn decode_link(bytes: &[u8]) -> Result<Link, DecodeError> {
    let (mut target, mut name) = (None, "");
    let mut rest = bytes;
    while let Some((field, value)) = next(&mut rest)? {
        match (field, value) {
            (1, Value::Bytes(bytes)) => target = Some(cid::decode(bytes)?),
            (2, Value::Bytes(bytes)) => {
                name = std::str::from_utf8(bytes).map_err(|e| DecodeError::invalid("name of a link", e))?;
            }
            (3, Value::Number(_)) => {}
            _ => return Err(DecodeError::invalid("field of a dag-pb link", field)),
        }
    }
    let cid = target.ok_or_else(|| DecodeError::invalid("dag-pb link", "no target"))?;
    Ok(Link { cid, name: name.to_owned(), bytes: 0 })
}

/// A part of what is published.
#[derive(Debug, Clone, Copy)]
pub(super) struct Child {
    pub(super) cid: Cid,
    /// Bytes of the file in it.
    pub(super) bytes: u64,
    /// Bytes of the blocks in it.
    pub(super) graph_bytes: u64,
}

/// A file's node over its parts.
pub(super) fn encode_file(children: &[Child]) -> Vec<u8> {
    let mut unixfs = Vec::new();
    put_number(&mut unixfs, 1, FILE);
    put_number(&mut unixfs, 3, children.iter().map(|child| child.bytes).sum());
    for child in children {
        put_number(&mut unixfs, 4, child.bytes);
    }
    encode(children.iter().map(|child| ("", child)), &unixfs)
}

/// A directory's node over its entries, which are in the order of their names' bytes.
pub(super) fn encode_directory<'a>(entries: impl Iterator<Item = (&'a str, &'a Child)>) -> Vec<u8> {
    let mut unixfs = Vec::new();
    put_number(&mut unixfs, 1, DIRECTORY);
    encode(entries, &unixfs)
}

fn encode<'a>(links: impl Iterator<Item = (&'a str, &'a Child)>, unixfs: &[u8]) -> Vec<u8> {
    let mut node = Vec::new();
    let mut link = Vec::new();
    for (name, child) in links {
        link.clear();
        put_bytes(&mut link, 1, &child.cid.to_bytes());
        put_bytes(&mut link, 2, name.as_bytes());
        put_number(&mut link, 3, child.graph_bytes);
        put_bytes(&mut node, 2, &link);
    }
    put_bytes(&mut node, 1, unixfs);
    node
}
