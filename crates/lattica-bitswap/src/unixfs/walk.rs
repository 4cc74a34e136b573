//! Reading a UnixFS graph that comes from peers: which blocks are needed next, and what they make. Depth, names, blocks and
//! bytes are bounded before anything is kept: a few blocks that name each other many times over stand for any number.

use std::collections::HashSet;

use swarm_wire::limits::{BLOCK_MAX_BYTES, NAME_MAX_BYTES};
use swarm_wire::{Cid, cid};

use super::node::{Link, Node};
use crate::{Block, UnixfsError};

/// One path: what file systems take.
const PATH_MAX_BYTES: usize = 4096;
/// All paths of a graph.
const PATHS_MAX_BYTES: usize = 16 << 20;

/// What a graph may be at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files. Default: 1 TiB.
    pub bytes: u64,
    /// Blocks of files, parts of directories and names together, each as often as it is named. Default: 2^18, which is 64 GiB in
    /// leaves of 256 KiB; each takes about 100 bytes of memory.
    pub blocks: usize,
    /// Nodes above each other. Default: 64.
    pub depth: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 1 << 40, blocks: 1 << 18, depth: 64 }
    }
}

/// A block that holds a piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The block.
    pub cid: Cid,
    /// How many bytes of the file it holds.
    pub bytes: u32,
}

/// A file in a graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Where it is in the directory, with `/` between names; empty when the root is the file.
    pub path: String,
    /// How many bytes it has.
    pub bytes: u64,
    /// Its pieces, in order.
    pub parts: Vec<Part>,
}

/// What a root names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The files, in no particular order.
    pub files: Vec<File>,
    /// Paths of the directories below the root. `None`: the root is a file.
    pub directories: Option<Vec<String>>,
}

impl Tree {
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// Something whose block has not been looked at.
#[derive(Debug)]
struct Open {
    cid: Cid,
    path: String,
    depth: u32,
    /// A further part of the directory at `path`.
    in_shard: bool,
}

#[derive(Debug)]
enum Slot {
    Part(Part),
    /// A node of which only its length is known.
    Node {
        cid: Cid,
        bytes: u64,
        depth: u32,
    },
}

#[derive(Debug)]
struct OpenFile {
    path: String,
    bytes: u64,
    slots: Vec<Slot>,
}

/// Follows a graph from its root, level by level: get what is [`Walk::wanted`], then [`Walk::advance`], until nothing is.
#[derive(Debug)]
pub struct Walk {
    limits: Limits,
    names: Vec<Open>,
    files: Vec<OpenFile>,
    directories: Option<Vec<String>>,
    paths: HashSet<String>,
    path_bytes: usize,
    bytes: u64,
    blocks: usize,
}

impl Walk {
    /// Begins at `root`.
    pub fn new(root: Cid, limits: Limits) -> Self {
        let root = Open { cid: root, path: String::new(), depth: 0, in_shard: false };
        Self {
            limits,
            names: vec![root],
            files: Vec::new(),
            directories: None,
            paths: HashSet::new(),
            path_bytes: 0,
            bytes: 0,
            blocks: 1,
        }
    }

    /// Blocks that are needed to go on, each once. None: the graph is known.
    pub fn wanted(&self) -> Vec<Cid> {
        let mut seen = HashSet::new();
        let nodes = self.files.iter().flat_map(|file| &file.slots).filter_map(|slot| match slot {
            Slot::Node { cid, .. } => Some(*cid),
            Slot::Part(_) => None,
        });
        self.names.iter().map(|open| open.cid).chain(nodes).filter(|cid| seen.insert(*cid)).collect()
    }

    /// Looks at every block that was wanted. `load` is asked for each of them, perhaps more than once.
    ///
    /// # Errors
    /// When `load` fails, a block is malformed, contradicts the one above it or is not read here, a name cannot be one of a
    /// file, or a limit is passed.
    pub fn advance<E: From<UnixfsError>>(
        &mut self,
        mut load: impl FnMut(&Cid) -> Result<Block, E>,
    ) -> Result<(), E> {
        // Files of the levels above first: those that are found now have their own blocks still to come.
        for at in 0..self.files.len() {
            let slots = std::mem::take(&mut self.files[at].slots);
            let mut known = Vec::with_capacity(slots.len());
            for slot in slots {
                match slot {
                    Slot::Node { cid, bytes, depth } => {
                        let node = Node::decode(&load(&cid)?)?;
                        if node.file_bytes() != bytes {
                            return Err(UnixfsError::WrongLength {
                                cid,
                                expected_bytes: bytes,
                                got_bytes: node.file_bytes(),
                            }
                            .into());
                        }
                        self.expand(cid, node, depth, &mut known)?;
                    }
                    part => known.push(part),
                }
            }
            self.files[at].slots = known;
        }
        for open in std::mem::take(&mut self.names) {
            let node = Node::decode(&load(&open.cid)?)?;
            self.name(open, node)?;
        }
        Ok(())
    }

    /// What the root names, once nothing is wanted any more.
    ///
    /// # Panics
    /// When something is.
    pub fn finish(self) -> Tree {
        assert!(self.names.is_empty(), "a block is still wanted");
        let file = |open: OpenFile| {
            let part = |slot: &Slot| match slot {
                Slot::Part(part) => *part,
                Slot::Node { .. } => panic!("a block is still wanted"),
            };
            File { path: open.path, bytes: open.bytes, parts: open.slots.iter().map(part).collect() }
        };
        Tree { files: self.files.into_iter().map(file).collect(), directories: self.directories }
    }

    /// Takes in what a name turned out to be.
    fn name(&mut self, open: Open, node: Node) -> Result<(), UnixfsError> {
        if open.in_shard && !matches!(node, Node::Shard { .. }) {
            return Err(UnixfsError::BadShard { cid: open.cid });
        }
        match node {
            Node::File { .. } => {
                let bytes = node.file_bytes();
                self.bytes = self.bytes.saturating_add(bytes);
                if self.bytes > self.limits.bytes {
                    return Err(UnixfsError::TooLarge { what: "bytes", limit: self.limits.bytes });
                }
                let mut slots = Vec::new();
                self.expand(open.cid, node, open.depth, &mut slots)?;
                self.files.push(OpenFile { path: open.path, bytes, slots });
            }
            Node::Directory { entries } => {
                self.directory(&open);
                for link in entries {
                    self.entry(&open, link.cid, &link.name)?;
                }
            }
            Node::Shard { prefix_chars, links } => {
                if !open.in_shard {
                    self.directory(&open);
                }
                for link in links {
                    match link.name.split_at_checked(prefix_chars) {
                        Some((_, "")) => {
                            let depth = self.deeper(open.depth)?;
                            self.count()?;
                            let path = open.path.clone();
                            self.names.push(Open { cid: link.cid, path, depth, in_shard: true });
                        }
                        Some((_, name)) => self.entry(&open, link.cid, name)?,
                        None => return Err(UnixfsError::BadShard { cid: open.cid }),
                    }
                }
            }
        }
        Ok(())
    }

    fn directory(&mut self, open: &Open) {
        let directories = self.directories.get_or_insert_default();
        if !open.path.is_empty() {
            directories.push(open.path.clone());
        }
    }

    /// A name in a directory.
    fn entry(&mut self, directory: &Open, cid: Cid, name: &str) -> Result<(), UnixfsError> {
        let bad = || UnixfsError::BadName { name: name.chars().take(NAME_MAX_BYTES).collect() };
        let plain = !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']);
        if !plain || name.len() > NAME_MAX_BYTES {
            return Err(bad());
        }
        let path =
            if directory.path.is_empty() { name.to_owned() } else { format!("{}/{name}", directory.path) };
        if path.len() > PATH_MAX_BYTES || self.paths.contains(&path) {
            return Err(bad());
        }
        self.path_bytes += path.len();
        if self.path_bytes > PATHS_MAX_BYTES {
            return Err(UnixfsError::TooLarge { what: "bytes of paths", limit: PATHS_MAX_BYTES as u64 });
        }
        self.paths.insert(path.clone());
        let depth = self.deeper(directory.depth)?;
        self.count()?;
        self.names.push(Open { cid, path, depth, in_shard: false });
        Ok(())
    }

    /// A piece of a file, as far as its block says.
    fn expand(&mut self, cid: Cid, node: Node, depth: u32, slots: &mut Vec<Slot>) -> Result<(), UnixfsError> {
        let Node::File { data, children } = node else { return Err(UnixfsError::NotAFile { cid }) };
        if !data.is_empty() {
            self.count()?;
            slots.push(Slot::Part(Part { cid, bytes: data.len() as u32 }));
        }
        let below = if children.is_empty() { depth } else { self.deeper(depth)? };
        for Link { cid, bytes, .. } in children {
            self.count()?;
            slots.push(if cid.codec() != cid::CODEC_RAW {
                Slot::Node { cid, bytes, depth: below }
            } else if bytes <= BLOCK_MAX_BYTES as u64 {
                Slot::Part(Part { cid, bytes: bytes as u32 })
            } else {
                return Err(UnixfsError::TooLarge {
                    what: "bytes of one block",
                    limit: BLOCK_MAX_BYTES as u64,
                });
            });
        }
        Ok(())
    }

    fn deeper(&self, depth: u32) -> Result<u32, UnixfsError> {
        if depth >= self.limits.depth {
            return Err(UnixfsError::TooLarge { what: "levels", limit: u64::from(self.limits.depth) });
        }
        Ok(depth + 1)
    }

    fn count(&mut self) -> Result<(), UnixfsError> {
        self.blocks += 1;
        if self.blocks > self.limits.blocks {
            return Err(UnixfsError::TooLarge { what: "blocks", limit: self.limits.blocks as u64 });
        }
        Ok(())
    }
}
