//! Policy versions on their way out: bytes become blocks, with patches for whoever has the version before, a manifest that
//! names them is signed, and what is large for the links is spread, so that workers get it from each other.

use std::collections::VecDeque;
use std::path::Path;

use echo_rollout::snapshot::{Artefact, Payload, SignedSnapshot, SnapshotManifest, Weights};
use lattica_bitswap::spread::Fleet;
use lattica_bitswap::{Blocks, PublishError, SpreadConfig, Spreading};
use lattica_net::{LinkEstimate, Node};
use parallax_model::train::TrainModel;
use swarm_wire::{Cid, PeerId, PolicyVersion, RunId};
use tokio::sync::Mutex;

use crate::error::StepError;
use crate::policy::Policy;

/// A policy that is sent out after its steps.
pub trait Update: Policy {
    /// Its present weights as workers install them: an adapter over the base checkpoint as PEFT writes it, or all weights.
    ///
    /// # Errors
    /// When they cannot be encoded.
    fn weights(&self) -> Result<Weights, StepError>;

    /// Writes what all weights need beside them to be a model directory, tokenizer and settings.
    ///
    /// # Errors
    /// When the disk refuses.
    fn save_companions(&self, dir: &Path) -> Result<(), StepError>;
}

impl Update for TrainModel {
    fn weights(&self) -> Result<Weights, StepError> {
        match self.adapter() {
            Some(adapter) => Ok(Weights::Lora(adapter.to_bytes().map_err(StepError::model)?.into())),
            None => Ok(Weights::Full(self.to_safetensors().map_err(StepError::model)?.into())),
        }
    }

    fn save_companions(&self, dir: &Path) -> Result<(), StepError> {
        Self::save_companions(self, dir).map_err(StepError::model)
    }
}

/// What a link is taken for before it has been measured: 100 Mbit/s, and 50 ms from a chunk asked for to its first byte.
const BYTES_PER_S: f64 = 12.5e6;
const HOP_S: f64 = 0.05;
/// Workers whose links with each other are looked at.
const PAIRED_MAX: usize = 32;
/// Versions that are spread at a time: the newest, and the one that slower workers may still be at.
const SPREAD: usize = 2;

/// Publishes and signs the versions of one run.
#[derive(Debug)]
pub struct Publisher {
    run: RunId,
    base_model_id: String,
    node: Node,
    blocks: Blocks,
    /// Versions whose blocks are kept.
    kept: usize,
    /// The newest last.
    published: Mutex<VecDeque<Published>>,
}

#[derive(Debug)]
struct Published {
    version: PolicyVersion,
    artefact: Artefact,
    /// Our part in its spread.
    part: Option<Spreading>,
}

impl Publisher {
    /// Signs with the node's key; the blocks of the newest `kept` versions, at least one, are served by `blocks`.
    pub fn new(
        run: RunId,
        base_model_id: impl Into<String>,
        node: &Node,
        blocks: Blocks,
        kept: usize,
    ) -> Self {
        let (node, base_model_id) = (node.clone(), base_model_id.into());
        Self { run, base_model_id, node, blocks, kept: kept.max(1), published: Mutex::default() }
    }

    /// Publishes weights as `version` for `workers`, and spreads them, in chunks of the size that suits the links, when that is
    /// faster than a copy for each of them. What is not spread is published as an update of the version before: block by block,
    /// whichever of block and patch is smaller. One that was published already is signed again as it was. Dropping the future
    /// leaves stored blocks stored.
    ///
    /// # Errors
    /// When the blocks cannot be stored.
    pub async fn weights(
        &self,
        version: PolicyVersion,
        weights: &Weights,
        workers: &[PeerId],
    ) -> Result<SignedSnapshot, PublishError> {
        let (bytes, payload) = match weights {
            Weights::Base => return Ok(self.sign(version, Payload::Base)),
            Weights::Lora(bytes) => (bytes.clone(), Payload::Lora as fn(Artefact) -> Payload),
            Weights::Full(bytes) => (bytes.clone(), Payload::Full as fn(Artefact) -> Payload),
        };
        let kind = weights.kind();
        let hash = *blake3::hash(&bytes).as_bytes();
        let mut published = self.published.lock().await;
        let known = published.iter().find(|known| known.version == version && known.artefact.hash == hash);
        if let Some(known) = known {
            return Ok(self.sign(version, payload(known.artefact.clone())));
        }
        let length = bytes.len() as u64;
        let plan = fleet(length, &self.links(workers)).plan();
        let chunk_bytes = plan.spread_in_chunks();
        tracing::debug!(%version, bytes = length, spread_in = ?chunk_bytes, plan = ?plan.predictions(), "an update is planned");
        let name = format!("{kind}-{version}.safetensors");
        let root = match (chunk_bytes, published.back()) {
            (Some(chunk_bytes), _) => self.blocks.publish_in_chunks(&name, kind, bytes, chunk_bytes).await?,
            (None, Some(last)) => self.blocks.publish_update(&name, kind, bytes, &last.artefact.root).await?,
            (None, None) => self.blocks.publish_bytes(&name, kind, bytes).await?,
        };
        let part = if chunk_bytes.is_some() { self.spread(&root).await } else { None };
        let artefact = Artefact { root, hash, bytes: length, spread: part.is_some() };
        published.push_back(Published { version, artefact: artefact.clone(), part });
        self.retire(&mut published).await;
        Ok(self.sign(version, payload(artefact)))
    }

    /// Ends old spreads and drops the blocks of versions that are older still.
    async fn retire(&self, published: &mut VecDeque<Published>) {
        let n_over = published.len().saturating_sub(SPREAD);
        published.iter_mut().take(n_over).for_each(|old| old.part = None);
        let n_over = published.len().saturating_sub(self.kept);
        let old: Vec<Cid> = published.drain(..n_over).map(|old| old.artefact.root).collect();
        let kept: Vec<Cid> = published.iter().map(|kept| kept.artefact.root).collect();
        for root in old {
            if let Err(error) = self.blocks.unpublish(&root, &kept).await {
                tracing::warn!(%root, %error, "blocks of an old version are kept");
            }
        }
    }

    /// What is known of the workers' links, to here and among each other.
    fn links(&self, workers: &[PeerId]) -> Vec<WorkerLinks> {
        let others = &workers[..workers.len().min(PAIRED_MAX)];
        let links = |worker| {
            let mut known = WorkerLinks { own: self.node.link(worker), ..WorkerLinks::default() };
            for pair in others.iter().filter_map(|other| self.node.link_between(worker, other)) {
                known.hops_s.push(pair.rtt_ms / 1e3);
                known.uplink = known.uplink.into_iter().chain(pair.bytes_per_s).max_by(f64::total_cmp);
            }
            known
        };
        workers.iter().map(links).collect()
    }

    /// Begins to spread; workers fetch block by block when that cannot be.
    async fn spread(&self, root: &Cid) -> Option<Spreading> {
        let part = self.blocks.spread(root, None, SpreadConfig::default()).await;
        part.inspect_err(|error| tracing::warn!(%root, %error, "the snapshot is not spread")).ok()
    }

    fn sign(&self, version: PolicyVersion, payload: Payload) -> SignedSnapshot {
        let manifest = SnapshotManifest {
            run: self.run,
            version,
            parent: version.0.checked_sub(1).map(PolicyVersion),
            payload,
            base_model_id: self.base_model_id.clone(),
            created_by: self.node.peer_id(),
        };
        manifest.sign(self.node.identity())
    }
}

/// What is known of one worker's links.
#[derive(Debug, Clone, Default)]
struct WorkerLinks {
    /// To here, as measured.
    own: Option<LinkEstimate>,
    /// The best rate that it reached towards another worker, by what both say.
    uplink: Option<f64>,
    /// Round trips to other workers, told or predicted.
    hops_s: Vec<f64>,
}

/// Workers behind these links, who are to get `bytes`. What nobody measured is taken for usual.
fn fleet(bytes: u64, links: &[WorkerLinks]) -> Fleet {
    let rate = |measured: Option<f64>| measured.unwrap_or(BYTES_PER_S);
    let each = |of: fn(&LinkEstimate) -> Option<f64>| links.iter().map(move |l| l.own.as_ref().and_then(of));
    let source_uplink = each(|l| l.goodput_out_bytes_per_s).flatten().max_by(f64::total_cmp);
    let to_here = |link: &WorkerLinks| link.own.as_ref().map_or(HOP_S, |own| own.rtt_ms / 1e3);
    let mut hops_s: Vec<f64> = links.iter().flat_map(|l| l.hops_s.iter().copied()).collect();
    if hops_s.is_empty() {
        hops_s = links.iter().map(to_here).collect();
    }
    let n_hops = hops_s.len().max(1) as f64;
    Fleet {
        bytes,
        chunk_bytes: bytes.min(lattica_bitswap::chunker::LEAF_BYTES as u64),
        source_uplink: rate(source_uplink),
        uplinks: links
            .iter()
            .map(|l| {
                let to_here = l.own.as_ref().and_then(|own| own.goodput_in_bytes_per_s);
                rate(l.uplink.into_iter().chain(to_here).max_by(f64::total_cmp))
            })
            .collect(),
        leaves: links.iter().filter(|l| l.own.as_ref().is_some_and(|own| own.path.is_relayed())).count(),
        downlinks: each(|l| l.goodput_out_bytes_per_s).map(rate).collect(),
        hop_s: hops_s.iter().sum::<f64>() / n_hops,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;
    use echo_rollout::service::{PayloadSource, Spreads};
    use lattica_bitswap::{BlockStore as _, ExchangeConfig, MemoryStore};
    use lattica_net::{Identity, NodeConfig, PathKind};

    use super::*;

    async fn peer() -> (Node, Arc<MemoryStore>, Blocks) {
        let config = NodeConfig::loopback("127.0.0.1", "publisher-test");
        let node = Node::start(Identity::generate(), config).await.unwrap();
        let store = Arc::new(MemoryStore::new());
        let config = ExchangeConfig { leaf_bytes: 32 * 1024, ..ExchangeConfig::default() };
        let blocks = Blocks::start_with(node.clone(), store.clone(), config);
        (node, store, blocks)
    }

    /// Weights that repeat nowhere.
    fn noise(seed: u64) -> Vec<u8> {
        (0..8192u64)
            .flat_map(|i| *blake3::hash(&[i, seed].map(u64::to_le_bytes).concat()).as_bytes())
            .collect()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_version_costs_what_changed_and_old_ones_go() {
        let (trainer, store, blocks) = peer().await;
        let publisher = Publisher::new(RunId(1), "tiny", &trainer, blocks, 3);
        let (worker, workers_store, copy) = peer().await;
        worker.dial(&trainer.listen_addrs().await[0]).await.unwrap();
        let source = Spreads::new(copy.clone());
        let received = || copy.account(&trainer.peer_id()).bytes_in;
        let mut bytes = noise(1);
        let (mut roots, mut costs, mut stored) = (Vec::new(), Vec::new(), Vec::new());
        for version in 1..=8 {
            match version {
                1 => {}
                // Every weight changes.
                3 => bytes = noise(3),
                // One in five hundred does.
                _ => (version..bytes.len()).step_by(1000).for_each(|i| bytes[i] ^= 1),
            }
            let (version, content) = (PolicyVersion(version as u64), Bytes::from(bytes.clone()));
            let weights = Weights::Full(content.clone());
            let snapshot = publisher.weights(version, &weights, &[]).await.unwrap();
            let again = publisher.weights(version, &weights, &[]).await.unwrap();
            assert_eq!(again.manifest(), snapshot.manifest(), "signed again as it was");
            let before = received();
            assert_eq!(source.fetch(snapshot.manifest(), &trainer.peer_id()).await.unwrap(), content);
            costs.push(received() - before);
            stored.push((store.n_blocks(), workers_store.n_blocks()));
            roots.push(snapshot.manifest().payload.artefact().unwrap().root);
        }
        let whole = bytes.len() as u64;
        assert!(costs[0] >= whole && costs[2] >= whole, "{costs:?}");
        let cheap = [1, 3, 4, 5, 6, 7].map(|i| costs[i]);
        assert!(cheap.iter().all(|cost| *cost < whole / 50), "{costs:?} of {whole}");
        for (i, root) in roots.iter().enumerate() {
            assert_eq!(store.get(root).unwrap().is_some(), i >= 5, "version {} at the trainer", i + 1);
            assert_eq!(workers_store.get(root).unwrap().is_some(), i >= 6, "version {} at the worker", i + 1);
        }
        assert_eq!(stored[7], stored[6], "no version leaves anything behind");
    }

    fn link(bytes_per_s: f64) -> WorkerLinks {
        let own = LinkEstimate {
            rtt_ms: 20.0,
            rtt_min_ms: 20.0,
            rtt_p95_ms: 20.0,
            jitter_ms: 0.0,
            loss: 0.0,
            goodput_bytes_per_s: Some(bytes_per_s),
            goodput_in_bytes_per_s: Some(bytes_per_s),
            goodput_out_bytes_per_s: Some(bytes_per_s),
            goodput_age: Some(Duration::ZERO),
            reliability: 1.0,
            age: Duration::ZERO,
            n_samples: 9,
            path: PathKind::Quic,
        };
        WorkerLinks { own: Some(own), ..WorkerLinks::default() }
    }

    #[test]
    fn what_is_large_for_the_links_is_spread() {
        let unknown = vec![WorkerLinks::default(); 8];
        assert!(!fleet(269_000, &unknown).pays_to_spread(), "an adapter of the demo's model");
        assert!(fleet(5_000_000, &unknown).pays_to_spread(), "one of a model of 135 M parameters");
        assert!(!fleet(5_000_000, &[]).pays_to_spread() && !fleet(1 << 34, &unknown[..1]).pays_to_spread());
        let fast: Vec<_> = (0..8).map(|_| link(500e6)).collect();
        assert!(!fleet(5_000_000, &fast).pays_to_spread(), "over before members have found each other");
        assert!(fleet(16_000_000_000, &fast).pays_to_spread());
        let slow: Vec<_> = (0..8).map(|_| link(0.5e6)).collect();
        assert!(fleet(269_000, &slow).pays_to_spread());
    }

    #[test]
    fn what_workers_say_of_each_other_counts_more_than_their_links_to_here() {
        // All of them measured here as slow and near; among each other they are fast and far apart.
        let told = |rate| WorkerLinks { uplink: Some(rate), hops_s: vec![0.2; 7], ..link(0.5e6) };
        let fleet = fleet(1 << 30, &vec![told(50e6); 8]);
        assert_eq!((fleet.uplinks, fleet.downlinks), (vec![50e6; 8], vec![0.5e6; 8]));
        assert!((fleet.hop_s - 0.2).abs() < 1e-9);
    }
}
