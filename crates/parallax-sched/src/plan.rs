//! A plan: which node runs which layers, in how many pipelines, and how far that is from the best imaginable.

use serde::Serialize;
use swarm_wire::LayerRange;

use crate::{ModelProfile, NodeId, NodeProfile, RttMatrix};

/// One node's part of a pipeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StagePlan {
    /// Who.
    pub node: NodeId,
    /// Its layers.
    pub layers: LayerRange,
}

/// A chain of stages that covers every layer once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pipeline {
    /// In the order of the layers.
    pub stages: Vec<StagePlan>,
    /// Milliseconds of the slowest stage for one token: its inverse is the pipeline's rate when it is kept full.
    pub bottleneck_ms: f64,
    /// Milliseconds for one token through all stages and back to the first.
    pub latency_ms: f64,
}

/// What everybody runs.
#[derive(Debug, Clone, PartialEq, Serialize, Default)]
pub struct Plan {
    /// Pipelines that share no node.
    pub pipelines: Vec<Pipeline>,
    /// Nodes without layers.
    pub standby: Vec<NodeId>,
    /// Tokens per second of all pipelines, each kept full at batch 1.
    pub throughput_tokens_per_s: f64,
    /// No plan for these nodes can be faster.
    pub upper_bound_tokens_per_s: f64,
}

impl Pipeline {
    /// Prices a chain.
    pub fn price(stages: Vec<StagePlan>, nodes: &[NodeProfile], rtt: &RttMatrix) -> Self {
        let n = stages.len();
        let mut bottleneck_ms: f64 = 0.0;
        let mut latency_ms = 0.0;
        for (i, stage) in stages.iter().enumerate() {
            let node =
                nodes.iter().find(|node| node.id == stage.node).expect("stages are made from these nodes");
            let ms = node.stage_ms(stage.layers.len(), i + 1 == n);
            bottleneck_ms = bottleneck_ms.max(ms);
            latency_ms += ms + rtt.get(&stage.node, &stages[(i + 1) % n].node) / 2.0;
        }
        Self { stages, bottleneck_ms, latency_ms }
    }

    /// The stage of `node` in this pipeline.
    pub fn stage_of(&self, node: &NodeId) -> Option<(usize, &StagePlan)> {
        self.stages.iter().enumerate().find(|(_, stage)| stage.node == *node)
    }
}

impl Plan {
    /// A plan of these pipelines; nodes in none of them stand by.
    pub fn from_pipelines(model: &ModelProfile, pipelines: Vec<Pipeline>, nodes: &[NodeProfile]) -> Self {
        let busy = |id: &NodeId| pipelines.iter().any(|p| p.stage_of(id).is_some());
        let standby = nodes.iter().filter(|n| !busy(&n.id)).map(|n| n.id.clone()).collect();
        let throughput_tokens_per_s = pipelines.iter().map(|p| 1000.0 / p.bottleneck_ms).sum();
        Self {
            pipelines,
            standby,
            throughput_tokens_per_s,
            upper_bound_tokens_per_s: upper_bound(model, nodes),
        }
    }

    /// The stage of `node`: pipeline index, stage index, layers.
    pub fn stage_of(&self, node: &NodeId) -> Option<(usize, usize, LayerRange)> {
        self.pipelines.iter().enumerate().find_map(|(p, pipeline)| {
            let (i, stage) = pipeline.stage_of(node)?;
            Some((p, i, stage.layers))
        })
    }

    /// What is wrong with the plan, if anything: layers not covered once, a node used twice, too little memory, a pin
    /// not honoured. For tests and for plans that come from elsewhere.
    pub fn defect(&self, model: &ModelProfile, nodes: &[NodeProfile], context_tokens: u64) -> Option<String> {
        let mut used = Vec::new();
        for (p, pipeline) in self.pipelines.iter().enumerate() {
            let ranges: Vec<LayerRange> = pipeline.stages.iter().map(|s| s.layers).collect();
            if !LayerRange::cover(&ranges, model.n_layers) {
                return Some(format!("pipeline {p} does not cover every layer once"));
            }
            for (i, stage) in pipeline.stages.iter().enumerate() {
                let Some(node) = nodes.iter().find(|n| n.id == stage.node) else {
                    return Some(format!("{} is not a node", stage.node));
                };
                if used.contains(&&stage.node) {
                    return Some(format!("{} is used twice", stage.node));
                }
                used.push(&stage.node);
                let last = i + 1 == pipeline.stages.len();
                let room = model.capacity(node.memory_bytes, context_tokens, i == 0, last);
                if stage.layers.len() > room {
                    return Some(format!(
                        "{} has room for {room} layers, not {}",
                        node.id,
                        stage.layers.len()
                    ));
                }
                if node.pinned.is_some_and(|pin| pin != stage.layers) {
                    return Some(format!("{} is pinned to other layers", node.id));
                }
            }
        }
        None
    }
}

/// Tokens per second that no plan for these nodes can exceed: every token needs every layer once, and node i gives
/// 1000 / t_i layer visits per second when nothing is wasted, (1/L) * sum over nodes of max over n of n * mu_i(n).
pub fn upper_bound(model: &ModelProfile, nodes: &[NodeProfile]) -> f64 {
    let layer_visits_per_s: f64 = nodes
        .iter()
        .map(|node| {
            let most = model.capacity(node.memory_bytes, 0, false, false);
            if most == 0 { 0.0 } else { f64::from(most) * 1000.0 / node.stage_ms(most, false) }
        })
        .sum();
    layer_visits_per_s / f64::from(model.n_layers)
}
