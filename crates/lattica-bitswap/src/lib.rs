//! Content-addressed artefacts: a file, a set of weights or an adapter becomes a manifest and blocks, named by their
//! hashes; peers fetch them from each other over Bitswap 1.2.0, check every byte, and resume after a kill.
//!
//! ```
//! use bytes::Bytes;
//! use lattica_bitswap::{BlockStore, HashKind, Manifest, MemoryStore, publish};
//!
//! let store = MemoryStore::new();
//! let weights = Bytes::from(vec![7u8; 3_000_000]);
//! let root = publish::publish_bytes(&store, "tiny", "weights", HashKind::Blake3, 1 << 20, &weights)?;
//! let manifest = Manifest::decode(store.get(&root)?.expect("just put").bytes())?;
//! assert_eq!((manifest.total_bytes(), manifest.blocks().len()), (3_000_000, 3));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Map: [`block`] (bytes that match their CID), [`chunker`], [`manifest`] (what an artefact is), [`publish`] (bytes to
//! stored blocks and a root), [`delta`] and [`update`] (from one version to the next with few bytes), [`unixfs`] (the same leaves as a file or
//! directory of IPFS, and reading those), [`wire`] (Bitswap messages), [`session`] (one fetch: whom to ask for what), [`serve`] (which
//! wanted block goes to whom next), [`ledger`] (who can be relied on), [`spread`] (one artefact to a whole fleet), [`store`] (where blocks are kept, with a
//! conformance suite), [`garbage`] (what no pinned root names); `service` (feature `service`): `FsStore` on disk, `Blocks` on a lattica-net node.

pub mod block;
pub mod chunker;
pub mod config;
pub mod delta;
pub mod error;
pub mod garbage;
pub mod ledger;
pub mod manifest;
pub mod publish;
pub mod serve;
#[cfg(feature = "service")]
pub mod service;
pub mod session;
pub mod spread;
pub mod store;
pub mod unixfs;
pub mod update;
mod varint;
pub mod wire;

pub use block::{Block, HashKind};
pub use config::{ExchangeConfig, ServeConfig, SessionConfig};
pub use error::{BlockError, FetchError, ManifestError, PublishError, StoreError, UnixfsError};
pub use ledger::Ledger;
pub use manifest::{BlockRef, Entry, Manifest, Update};
pub use serve::Server;
#[cfg(feature = "service")]
pub use service::{Blocks, FsStore, FsStoreConfig, Progress, Scrubbed, Spreading};
pub use session::Session;
pub use spread::{Spread, SpreadConfig};
pub use store::{BlockStore, MemoryStore};
