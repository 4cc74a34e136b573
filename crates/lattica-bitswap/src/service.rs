//! The async shell: [`FsStore`] keeps blocks on disk, [`Blocks`] exchanges them over a lattica-net node.

mod exchange;
mod fetch;
mod files;
mod fs_store;
mod spreading;
mod streams;
mod unixfs;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use exchange::Exchange;
use fetch::Order;
pub use fs_store::{FsStore, FsStoreConfig, Scrubbed};
use lattica_net::Node;
pub use spreading::Spreading;
use swarm_wire::{Cid, PeerId};
use tokio::runtime::Handle;

use crate::ledger::Account;
use crate::session::Wanted;
use crate::wire::PROTOCOL;
use crate::{
    BlockStore, ExchangeConfig, FetchError, HashKind, Manifest, PublishError, Update, publish, update,
};

/// The length that a manifest is thought to have until it comes.
const MANIFEST_GUESS_BYTES: u32 = 64 * 1024;

/// How far a fetch is. What was stored before counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are here.
    pub done_bytes: u64,
    /// Bytes that the fetch wants to have here.
    pub total_bytes: u64,
}

/// Publishes artefacts, fetches them from peers, and serves every block that is stored. A cheap handle: clones speak for
/// the same exchange, which ends with the last of them or with its node.
#[derive(Clone)]
pub struct Blocks {
    exchange: Arc<Exchange>,
}

impl std::fmt::Debug for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blocks({}, {:?})", self.exchange.node.peer_id().short(), self.exchange.store)
    }
}

impl Blocks {
    /// Starts serving the blocks of `store` to the peers of `node`. Call it inside a tokio runtime; one exchange per node.
    pub fn start(node: Node, store: Arc<dyn BlockStore>) -> Self {
        Self::start_with(node, store, ExchangeConfig::default())
    }

    /// As [`Blocks::start`] with other limits.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start_with(node: Node, store: Arc<dyn BlockStore>, config: ExchangeConfig) -> Self {
        let runtime = Handle::current();
        let events = node.events();
        let exchange = Exchange::new(node, store, config, runtime.clone());
        let served = Arc::downgrade(&exchange);
        let node = &exchange.node;
        node.handle_stream(PROTOCOL, move |peer, stream| streams::read(served.clone(), peer, stream))
            .expect("the protocol's name is valid");
        let served = Arc::downgrade(&exchange);
        exchange
            .node
            .handle_stream(crate::spread::wire::PROTOCOL, move |peer, stream| {
                spreading::accept(served.clone(), peer, stream)
            })
            .expect("the protocol's name is valid");
        runtime.spawn(exchange::follow(Arc::downgrade(&exchange), events));
        Self { exchange }
    }

    /// The store that is served.
    pub fn store(&self) -> &Arc<dyn BlockStore> {
        &self.exchange.store
    }

    /// What is known of `peer` as a partner.
    pub fn account(&self, peer: &PeerId) -> Account {
        self.exchange.lock().ledger.account(peer)
    }

    /// Publishes bytes as an artefact with one entry named `name`.
    ///
    /// Cancel safe: a publication that has begun ends in the store, pinned, but is not announced.
    ///
    /// # Errors
    /// When the store refuses or the artefact is too large.
    pub async fn publish_bytes(&self, name: &str, kind: &str, bytes: Bytes) -> Result<Cid, PublishError> {
        let (name, kind) = (name.to_owned(), kind.to_owned());
        self.publishing(move |store, leaf_bytes| {
            publish::publish_bytes(store, &name, &kind, HashKind::Blake3, leaf_bytes, &bytes)
        })
        .await
    }

    /// As [`Blocks::publish_bytes`], in chunks of another length than [`ExchangeConfig::leaf_bytes`]: a spread is done sooner in the
    /// length that [`crate::spread::plan`] says. At most a block's length is taken, at least 1.
    ///
    /// Cancel safe: a publication that has begun ends in the store, pinned, but is not announced.
    ///
    /// # Errors
    /// When the store refuses or the artefact is too large.
    pub async fn publish_in_chunks(
        &self,
        name: &str,
        kind: &str,
        bytes: Bytes,
        chunk_bytes: u64,
    ) -> Result<Cid, PublishError> {
        let (name, kind) = (name.to_owned(), kind.to_owned());
        let leaf_bytes = chunk_bytes.clamp(1, swarm_wire::limits::BLOCK_MAX_BYTES as u64) as usize;
        self.publishing(move |store, _| {
            publish::publish_bytes(store, &name, &kind, HashKind::Blake3, leaf_bytes, &bytes)
        })
        .await
    }

    /// As [`Blocks::publish_bytes`], as the version after `parent`: whoever has that one fetches only what differs. With a
    /// delta the root is another than that of the same bytes without a parent; there is none when it would not pay, or the
    /// parent is not stored.
    ///
    /// Cancel safe: a publication that has begun ends in the store, pinned, but is not announced.
    ///
    /// # Errors
    /// When the store refuses or the artefact is too large.
    pub async fn publish_update(
        &self,
        name: &str,
        kind: &str,
        bytes: Bytes,
        parent: &Cid,
    ) -> Result<Cid, PublishError> {
        let (name, kind, parent) = (name.to_owned(), kind.to_owned(), *parent);
        self.publishing(move |store, leaf_bytes| {
            update::publish_update(store, &name, &kind, HashKind::Blake3, leaf_bytes, &bytes, &parent)
        })
        .await
    }

    /// Publishes one file as an artefact, without copying it when the store can refer to files.
    ///
    /// Cancel safe: a publication that has begun ends in the store, pinned, but is not announced.
    ///
    /// # Errors
    /// When the file cannot be read or the store refuses.
    pub async fn publish_file(&self, path: &Path) -> Result<Cid, PublishError> {
        let dir = path.parent().unwrap_or_else(|| Path::new("")).to_owned();
        let file = path.file_name().map_or_else(|| path.to_owned(), PathBuf::from);
        self.publish_files(&dir, &[file]).await
    }

    /// Publishes files as one artefact with an entry for each, named by its path within `dir`, without copying them when
    /// the store can refer to files. Relative paths are looked up in `dir`. The files must stay as they are: a block of a
    /// file that changed is not served any more.
    ///
    /// Cancel safe: a publication that has begun ends in the store, pinned, but is not announced.
    ///
    /// # Errors
    /// When a file cannot be read, two have one name, or the store refuses.
    pub async fn publish_files(&self, dir: &Path, paths: &[PathBuf]) -> Result<Cid, PublishError> {
        let (dir, paths) = (dir.to_owned(), paths.to_vec());
        self.publishing(move |store, leaf_bytes| files::publish(store, &dir, &paths, leaf_bytes)).await
    }

    /// Stops announcing an artefact, unpins it and drops it from the store, except for the blocks that one of the `kept` artefacts has
    /// too. A store that cannot remove ([`BlockStore::remove`]) keeps and serves it.
    ///
    /// Cancel safe: a removal that has begun goes on; before it, the artefact is at most announced no longer.
    ///
    /// # Errors
    /// When the store cannot be read or refuses.
    pub async fn unpublish(&self, root: &Cid, kept: &[Cid]) -> Result<(), FetchError> {
        if kept.contains(root) {
            return Ok(());
        }
        self.exchange.node.stop_providing(&fetch::provider_key(root)).await;
        let (root, kept) = (*root, kept.to_vec());
        Ok(self.exchange.blocking(move |store| publish::unpublish(store, &root, &kept)).await??)
    }

    /// The manifest of `root`: from the store, else from `from`, else from whoever has it.
    ///
    /// Cancel safe: dropping the future stops the fetch and keeps what came.
    ///
    /// # Errors
    /// When no peer delivers it or it is no manifest.
    pub async fn fetch_manifest(&self, root: &Cid, from: &[PeerId]) -> Result<Manifest, FetchError> {
        self.manifest_among(root, root, from).await
    }

    /// The manifest of `cid` from those who announce that they hold `root`.
    async fn manifest_among(&self, cid: &Cid, root: &Cid, from: &[PeerId]) -> Result<Manifest, FetchError> {
        let (cid, root) = (*cid, *root);
        if let Some(manifest) =
            self.exchange.blocking(move |store| files::stored_manifest(store, &cid)).await??
        {
            return Ok(manifest);
        }
        let wanted = vec![Wanted { cid, length: MANIFEST_GUESS_BYTES, priority: 1 }];
        let order = Order { root, wanted, lengths: HashMap::new(), from: from.to_vec() };
        fetch::run(&self.exchange, order, |_| ()).await?;
        let stored = self.exchange.blocking(move |store| files::stored_manifest(store, &cid)).await??;
        stored.ok_or_else(|| files::not_here(&cid, cid))
    }

    /// Gets a whole artefact into the store. `from` are peers that have it; without any, the DHT and the connected peers
    /// are asked. What is stored already is not fetched again, and what can be made from the version before is, when that is
    /// stored.
    ///
    /// Cancel safe: dropping the future stops the fetch and keeps what came.
    ///
    /// # Errors
    /// When it is no artefact, no peer delivers what is missing, or the store refuses, for example because the disk is full.
    pub async fn fetch(
        &self,
        root: &Cid,
        from: &[PeerId],
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Manifest, FetchError> {
        let manifest = self.fetch_manifest(root, from).await?;
        self.fetch_update(root, &manifest, from).await?;
        let all = [(0, manifest.total_bytes())];
        self.fetch_blocks(root, &manifest, &all, from, progress).await?;
        self.exchange.announce(*root);
        Ok(manifest)
    }

    /// Gets the blocks that hold these spans (offset, length) of an artefact into the store, earlier spans first; as
    /// [`Blocks::fetch`] otherwise.
    ///
    /// Cancel safe: dropping the future stops the fetch and keeps what came.
    ///
    /// # Errors
    /// As [`Blocks::fetch`]; also when a span ends beyond the artefact.
    pub async fn fetch_spans(
        &self,
        root: &Cid,
        spans: &[(u64, u64)],
        from: &[PeerId],
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Manifest, FetchError> {
        let manifest = self.fetch_manifest(root, from).await?;
        self.fetch_blocks(root, &manifest, spans, from, progress).await?;
        Ok(manifest)
    }

    /// All bytes of a stored artefact, checked.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When a block is not stored or damaged.
    pub async fn read(&self, root: &Cid) -> Result<Bytes, FetchError> {
        let root = *root;
        self.exchange.blocking(move |store| files::read_bytes(store, &root, None)).await?
    }

    /// The bytes `offset .. offset + length` of a stored artefact, checked. Only their blocks must be stored.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When a block is not stored or damaged, or the span ends beyond the artefact.
    pub async fn read_span(&self, root: &Cid, offset: u64, length: u64) -> Result<Bytes, FetchError> {
        let root = *root;
        self.exchange.blocking(move |store| files::read_bytes(store, &root, Some((offset, length)))).await?
    }

    /// Writes a stored artefact to a file: completely, or not at all.
    ///
    /// Cancel safe: a file that has been begun is written to its end all the same.
    ///
    /// # Errors
    /// When a block is not stored or damaged, or the disk refuses; a full disk is named with the bytes that are missing.
    pub async fn write_to(&self, root: &Cid, path: &Path) -> Result<(), FetchError> {
        let (root, path) = (*root, path.to_owned());
        self.exchange.blocking(move |store| files::write_file(store, &root, None, &path)).await?
    }

    /// As [`Blocks::write_to`], only the entry of that name.
    ///
    /// Cancel safe: a file that has been begun is written to its end all the same.
    ///
    /// # Errors
    /// As [`Blocks::write_to`]; also when there is no such entry.
    pub async fn write_entry_to(&self, root: &Cid, entry: &str, path: &Path) -> Result<(), FetchError> {
        let (root, entry, path) = (*root, entry.to_owned(), path.to_owned());
        self.exchange.blocking(move |store| files::write_file(store, &root, Some(&entry), &path)).await?
    }

    /// Makes what can be made from the version before. A delta that does not come or does not fit costs time only.
    async fn fetch_update(&self, root: &Cid, manifest: &Manifest, from: &[PeerId]) -> Result<(), FetchError> {
        let Some(Update { delta, .. }) = manifest.update() else { return Ok(()) };
        let whole = Arc::new(manifest.clone());
        let next = Arc::clone(&whole);
        let saved = self.exchange.blocking(move |store| update::patchable_bytes(store, &next)).await??;
        if saved == 0 {
            return Ok(());
        }
        if let Err(error) = self.fetch_delta(&delta, root, saved, from).await {
            tracing::info!(%root, %error, "no delta; the blocks are fetched whole");
        }
        let made = self.exchange.blocking(move |store| update::apply_update(store, &whole)).await??;
        tracing::debug!(%root, made, saved, "blocks made from the version before");
        Ok(())
    }

    /// Gets a delta that may save `saved` bytes of the artefact `root`, from whoever holds that one: a delta itself is not
    /// announced.
    async fn fetch_delta(
        &self,
        delta: &Cid,
        root: &Cid,
        saved: u64,
        from: &[PeerId],
    ) -> Result<(), FetchError> {
        let delta = self.manifest_among(delta, root, from).await?;
        // Patches longer than what they replace are none.
        if delta.total_bytes() < saved {
            self.fetch_blocks(root, &delta, &[(0, delta.total_bytes())], from, |_| ()).await?;
        }
        Ok(())
    }

    async fn fetch_blocks(
        &self,
        root: &Cid,
        manifest: &Manifest,
        spans: &[(u64, u64)],
        from: &[PeerId],
        progress: impl FnMut(Progress) + Send,
    ) -> Result<(), FetchError> {
        let wanted = wanted_blocks(root, manifest, spans)?;
        self.fetch_listed(root, wanted, from, progress).await
    }

    /// Gets blocks of known lengths.
    async fn fetch_listed(
        &self,
        root: &Cid,
        wanted: Vec<Wanted>,
        from: &[PeerId],
        mut progress: impl FnMut(Progress) + Send,
    ) -> Result<(), FetchError> {
        let root = *root;
        let total_bytes = wanted.iter().map(|w| u64::from(w.length)).sum();
        let missing = self.exchange.blocking(move |store| missing_blocks(store, &root, wanted)).await??;
        let missing_bytes: u64 = missing.iter().map(|w| u64::from(w.length)).sum();
        let stored_bytes = total_bytes - missing_bytes;
        progress(Progress { done_bytes: stored_bytes, total_bytes });
        let lengths = missing.iter().map(|w| (w.cid, w.length)).collect();
        let order = Order { root, wanted: missing, lengths, from: from.to_vec() };
        let told = fetch::run(&self.exchange, order, |arrived_bytes| {
            progress(Progress { done_bytes: stored_bytes + arrived_bytes, total_bytes });
        })
        .await;
        // Also after a failure: what arrived must not be fetched again.
        let flushed = self.exchange.blocking(|store| store.flush()).await?;
        told?;
        flushed?;
        progress(Progress { done_bytes: total_bytes, total_bytes });
        Ok(())
    }

    /// Runs `work` on the store, with the length of the leaves that are published; pins and announces the root that it returns.
    async fn publishing(
        &self,
        work: impl FnOnce(&dyn BlockStore, usize) -> Result<Cid, PublishError> + Send + 'static,
    ) -> Result<Cid, PublishError> {
        let store = Arc::clone(&self.exchange.store);
        let leaf_bytes = self.exchange.config.leaf_bytes;
        let pinned = move || {
            let root = work(&*store, leaf_bytes)?;
            store.pin(&root)?;
            Ok::<_, PublishError>(root)
        };
        let root = match self.exchange.runtime.spawn_blocking(pinned).await {
            Ok(result) => result?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        self.exchange.announce(root);
        Ok(root)
    }
}

/// The blocks of the spans, each once, those of earlier spans with higher priority.
fn wanted_blocks(root: &Cid, manifest: &Manifest, spans: &[(u64, u64)]) -> Result<Vec<Wanted>, FetchError> {
    let mut wanted: Vec<Wanted> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for (rank, &(offset, length)) in spans.iter().enumerate() {
        let range = manifest.blocks_of_span(offset, length).ok_or_else(|| FetchError::SpanOutside {
            root: Box::new(*root),
            offset,
            length,
            total_bytes: manifest.total_bytes(),
        })?;
        let priority = -i32::try_from(rank).unwrap_or(i32::MAX);
        let blocks = manifest.blocks()[range].iter().filter(|b| seen.insert(b.cid));
        wanted.extend(blocks.map(|b| Wanted { cid: b.cid, length: b.length, priority }));
    }
    Ok(wanted)
}

/// Those that are not stored yet. A stored block of another length shows that the manifest lies.
fn missing_blocks(
    store: &dyn BlockStore,
    root: &Cid,
    wanted: Vec<Wanted>,
) -> Result<Vec<Wanted>, FetchError> {
    let mut missing = Vec::new();
    for want in wanted {
        match store.length_of(&want.cid)? {
            None => missing.push(want),
            Some(length) if length == want.length as usize => {}
            Some(got_bytes) => {
                let (root, cid) = (Box::new(*root), Box::new(want.cid));
                let expected_bytes = want.length as usize;
                return Err(FetchError::WrongLength { root, cid, expected_bytes, got_bytes });
            }
        }
    }
    Ok(missing)
}
