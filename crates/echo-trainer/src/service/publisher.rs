//! Policy versions on their way out: bytes become blocks, a manifest that names them is signed, and what is large for the
//! links is spread, so that workers get it from each other.

use std::collections::VecDeque;

use bytes::Bytes;
use echo_rollout::snapshot::{Artefact, Payload, SignedSnapshot, SnapshotManifest};
use lattica_bitswap::spread::Fleet;
use lattica_bitswap::{Blocks, PublishError, SpreadConfig, Spreading};
use lattica_net::{LinkEstimate, Node};
use parallax_model::train::TrainModel;
use swarm_wire::{Cid, PeerId, PolicyVersion, RunId};
use tokio::sync::Mutex;

use crate::error::StepError;
use crate::policy::Policy;

/// A policy whose update is small enough to be sent after every step.
pub trait Update: Policy {
    /// The update over the base checkpoint, as workers install it: PEFT safetensors.
    ///
    /// # Errors
    /// When the policy trains all weights, or cannot be encoded.
    fn update_bytes(&self) -> Result<Vec<u8>, StepError>;
}

impl Update for TrainModel {
    fn update_bytes(&self) -> Result<Vec<u8>, StepError> {
        let adapter =
            self.adapter().ok_or_else(|| StepError::model("it trains all weights, not an adapter"))?;
        adapter.to_bytes().map_err(StepError::model)
    }
}

/// What a link is taken for before it has been measured: 100 Mbit/s, and 50 ms from a chunk asked for to its first byte.
const BYTES_PER_S: f64 = 12.5e6;
const HOP_S: f64 = 0.05;
/// Workers whose links with each other are looked at.
const PAIRED_MAX: usize = 32;
/// Versions that are spread at a time: the newest, and the one that slower workers may still be at.
const KEPT: usize = 2;

/// Publishes and signs the versions of one run.
#[derive(Debug)]
pub struct Publisher {
    run: RunId,
    base_model_id: String,
    node: Node,
    blocks: Blocks,
    /// The newest last, each with our part in its spread if it is spread.
    published: Mutex<VecDeque<(Cid, Option<Spreading>)>>,
}

impl Publisher {
    /// Signs with the node's key; the blocks are served by `blocks`.
    pub fn new(run: RunId, base_model_id: impl Into<String>, node: &Node, blocks: Blocks) -> Self {
        let (node, base_model_id) = (node.clone(), base_model_id.into());
        Self { run, base_model_id, node, blocks, published: Mutex::default() }
    }

    /// Version 0: the base checkpoint as it is.
    pub fn base(&self) -> SignedSnapshot {
        self.sign(PolicyVersion(0), Payload::Base)
    }

    /// Publishes an adapter as `version` for `workers`, and spreads it when that is faster than a copy for each of them. One
    /// that was published already is signed again as it was. Dropping the future leaves stored blocks stored.
    ///
    /// # Errors
    /// When the blocks cannot be stored.
    pub async fn adapter(
        &self,
        version: PolicyVersion,
        bytes: Bytes,
        workers: &[PeerId],
    ) -> Result<SignedSnapshot, PublishError> {
        let hash = *blake3::hash(&bytes).as_bytes();
        let length = bytes.len() as u64;
        let name = format!("adapter-{version}.safetensors");
        let root = self.blocks.publish_bytes(&name, "adapter", bytes).await?;
        let mut published = self.published.lock().await;
        let known = published.iter().find(|(known, _)| *known == root).map(|(_, part)| part.is_some());
        let spread = if let Some(spread) = known {
            spread
        } else {
            let part = if fleet(length, &self.links(workers)).pays_to_spread() {
                self.spread(&root).await
            } else {
                None
            };
            let spread = part.is_some();
            published.push_back((root, part));
            let excess = published.len().saturating_sub(KEPT);
            published.drain(..excess);
            spread
        };
        Ok(self.sign(version, Payload::Lora(Artefact { root, hash, bytes: length, spread })))
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
        downlinks: each(|l| l.goodput_out_bytes_per_s).map(rate).collect(),
        hop_s: hops_s.iter().sum::<f64>() / n_hops,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

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
            age: Duration::ZERO,
            n_samples: 9,
            relayed: false,
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
