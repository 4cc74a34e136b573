//! Files and directories as IPFS names them (UnixFS over dag-pb), so that stock peers read what we publish and we read
//! what they have.
//!
//! An artefact has two roots over the same leaves: our manifest's, which names them by BLAKE3, and this one, which names them
//! by SHA2-256. The bytes are stored once; the second name is an alias ([`crate::BlockStore::put_alias`]).

mod build;
mod fields;
mod node;
mod walk;

pub use build::{LINKS_PER_NODE, publish};
pub use node::{CODEC_DAG_PB, Link, Node, content};
pub use walk::{File, Limits, Part, Tree, Walk};

#[cfg(test)]
mod tests;
