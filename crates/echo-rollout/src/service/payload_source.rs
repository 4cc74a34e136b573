//! Where a worker gets a snapshot's bytes: block by block from whoever has them, or, when the trainer says that it spreads
//! them, from the other workers, to whom it passes them on.

use std::collections::VecDeque;
use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use lattica_bitswap::{Blocks, Spreading};
use swarm_wire::{Cid, PeerId};

use super::BoxFuture;
use crate::snapshot::{Artefact, SnapshotManifest};

/// A spread in which nothing came for this long is left for a plain fetch.
const STALL: Duration = Duration::from_secs(5);
/// Versions that are kept and passed on after they have come: the newest, which the next one is made from, and the one that
/// slower workers may still be at.
const KEPT: usize = 2;

/// Where a snapshot's bytes come from. The bytes are checked by the caller.
pub trait PayloadSource: Send + Sync {
    /// Fetches the payload of `manifest`; the trainer has it, others may.
    fn fetch<'a>(
        &'a self,
        manifest: &'a SnapshotManifest,
        trainer: &'a PeerId,
    ) -> BoxFuture<'a, Result<Bytes, String>>;
}

/// Over Bitswap, block by block, from the trainer and from whoever else has been found to have them. Keeps every version.
impl PayloadSource for Blocks {
    fn fetch<'a>(
        &'a self,
        manifest: &'a SnapshotManifest,
        trainer: &'a PeerId,
    ) -> BoxFuture<'a, Result<Bytes, String>> {
        Box::pin(async move {
            let Some(artefact) = manifest.payload.artefact() else { return Ok(Bytes::new()) };
            check_length(self, artefact, trainer).await?;
            let from = std::slice::from_ref(trainer);
            Self::fetch(self, &artefact.root, from, |_| ()).await.map_err(|e| e.to_string())?;
            self.read(&artefact.root).await.map_err(|e| e.to_string())
        })
    }
}

/// Takes part in what the trainer spreads, and fetches the rest as [`Blocks`] does. Keeps the last versions only.
pub struct Spreads {
    blocks: Blocks,
    takes_part: bool,
    /// What was fetched, the newest last, each with our part in its spread.
    kept: Mutex<VecDeque<(Cid, Option<Spreading>)>>,
    stall: Duration,
}

impl fmt::Debug for Spreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Spreads({:?})", self.blocks)
    }
}

impl Spreads {
    /// Takes and passes on through `blocks`.
    pub fn new(blocks: Blocks) -> Self {
        Self { blocks, takes_part: true, kept: Mutex::default(), stall: STALL }
    }

    /// As [`Spreads::new`], but fetches from the trainer what it spreads, too: auditors come when a spread is over.
    pub fn bystander(blocks: Blocks) -> Self {
        Self { takes_part: false, ..Self::new(blocks) }
    }

    /// Keeps what is fetched under `root` from now on, and drops what is older than the last versions.
    async fn begin(&self, root: Cid) {
        let (old, kept) = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let known = kept.iter().position(|(known, _)| *known == root).and_then(|i| kept.remove(i));
            kept.push_back(known.unwrap_or((root, None)));
            let excess = kept.len().saturating_sub(KEPT);
            let old: Vec<Cid> = kept.drain(..excess).map(|(root, _)| root).collect();
            (old, kept.iter().map(|(root, _)| *root).collect::<Vec<_>>())
        };
        for root in old {
            if let Err(error) = self.blocks.unpublish(&root, &kept).await {
                tracing::warn!(%root, %error, "blocks of an old version are kept");
            }
        }
    }

    /// Gets the artefact with the others; what came stays stored when it comes to nothing.
    async fn take_part(&self, artefact: &Artefact, trainer: &PeerId) -> Result<(), String> {
        check_length(&self.blocks, artefact, trainer).await?;
        let arrived = AtomicU64::new(0);
        let progress = |at: lattica_bitswap::Progress| arrived.store(at.done_bytes, Ordering::Relaxed);
        let mut fetch = pin!(self.blocks.fetch_via_spread(&artefact.root, trainer, progress));
        let mut seen = 0;
        let part = loop {
            match tokio::time::timeout(self.stall, &mut fetch).await {
                Ok(part) => break part.map_err(|e| e.to_string())?,
                Err(_) if arrived.load(Ordering::Relaxed) == seen => {
                    return Err(format!("no member delivered anything for {:?}", self.stall));
                }
                Err(_) => seen = arrived.load(Ordering::Relaxed),
            }
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, ours)) = kept.iter_mut().find(|(root, _)| *root == artefact.root) {
            *ours = Some(part);
        }
        Ok(())
    }
}

impl PayloadSource for Spreads {
    fn fetch<'a>(
        &'a self,
        manifest: &'a SnapshotManifest,
        trainer: &'a PeerId,
    ) -> BoxFuture<'a, Result<Bytes, String>> {
        Box::pin(async move {
            let Some(artefact) = manifest.payload.artefact() else { return Ok(Bytes::new()) };
            self.begin(artefact.root).await;
            if artefact.spread
                && self.takes_part
                && let Err(reason) = self.take_part(artefact, trainer).await
            {
                tracing::info!(version = %manifest.version, reason, "not spread; fetched block by block");
            }
            // What the spread brought is here already.
            PayloadSource::fetch(&self.blocks, manifest, trainer).await
        })
    }
}

/// Whether the artefact is as long as the trainer signed, before any of it is fetched.
async fn check_length(blocks: &Blocks, artefact: &Artefact, trainer: &PeerId) -> Result<(), String> {
    let manifest = blocks.fetch_manifest(&artefact.root, std::slice::from_ref(trainer)).await;
    let got = manifest.map_err(|e| e.to_string())?.total_bytes();
    let signed = artefact.bytes;
    if got != signed {
        return Err(format!("the artefact has {got} bytes but the trainer signed {signed}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ed25519_dalek::SigningKey;
    use lattica_bitswap::{ExchangeConfig, MemoryStore, SpreadConfig};
    use lattica_net::{Identity, Node, NodeConfig};

    use super::*;
    use crate::snapshot::Payload;
    use crate::snapshot::tests::manifest;

    const LEAF: usize = 32 * 1024;
    const CHUNKS: usize = 64;

    async fn peer() -> (Node, Blocks) {
        let config = NodeConfig::loopback("127.0.0.1", "payload-test");
        let node = Node::start(Identity::generate(), config).await.unwrap();
        let config = ExchangeConfig { leaf_bytes: LEAF, ..ExchangeConfig::default() };
        let blocks = Blocks::start_with(node.clone(), Arc::new(MemoryStore::new()), config);
        (node, blocks)
    }

    /// A trainer that published bytes which repeat nowhere, and says that it spreads them.
    async fn trainer() -> (Node, Blocks, Bytes, SnapshotManifest) {
        let (node, blocks) = peer().await;
        let bytes = (0..CHUNKS * LEAF / 32).flat_map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes());
        let bytes = Bytes::from(bytes.collect::<Vec<u8>>());
        let root = blocks.publish_bytes("adapter", "adapter", bytes.clone()).await.unwrap();
        let signed = manifest(&SigningKey::from_bytes(&[1; 32]), 1, &bytes);
        let hash = *blake3::hash(&bytes).as_bytes();
        let artefact = Artefact { root, hash, bytes: bytes.len() as u64, spread: true };
        (node, blocks, bytes, SnapshotManifest { payload: Payload::Lora(artefact), ..signed })
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn workers_get_a_snapshot_from_each_other() {
        let (node, blocks, bytes, manifest) = trainer().await;
        let root = manifest.payload.artefact().unwrap().root;
        let feeding = blocks.spread(&root, None, SpreadConfig::default()).await.unwrap();
        let address = node.listen_addrs().await.remove(0);
        let mut fetches = tokio::task::JoinSet::new();
        for _ in 0..6 {
            let (worker, blocks) = peer().await;
            worker.dial(&address).await.unwrap();
            let (manifest, trainer, source) = (manifest.clone(), node.peer_id(), Spreads::new(blocks));
            // Who is done passes on until all are.
            fetches.spawn(async move { (source.fetch(&manifest, &trainer).await.unwrap(), source) });
        }
        for (fetched, _) in fetches.join_all().await {
            assert_eq!(fetched, bytes);
        }
        // Six copies were needed.
        let copies = feeding.uploaded() as f64 / CHUNKS as f64;
        assert!((1.0..=1.3).contains(&copies), "the trainer sent {copies} copies");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_spread_that_does_not_run_is_left_for_a_plain_fetch() {
        let (node, _blocks, bytes, manifest) = trainer().await;
        let (worker, blocks) = peer().await;
        worker.dial(&node.listen_addrs().await[0]).await.unwrap();
        let source = Spreads { stall: Duration::from_millis(20), ..Spreads::new(blocks) };
        assert_eq!(source.fetch(&manifest, &node.peer_id()).await.unwrap(), bytes);
    }
}
