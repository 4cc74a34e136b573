//! The heuristic for many nodes: cover the layers with one chain after another, each of nodes of like speed, then let
//! the nodes that are left over help where they help most.
//!
//! A chain wastes least when all its stages take equally long, and a node that holds the whole model wastes nothing:
//! so nodes are taken in order (several orders are tried) until their memory holds the model. Rounding to whole layers
//! is the remaining loss.

use swarm_wire::LayerRange;

use super::Search;
use crate::order::{EXACT_ORDER_MAX, cheapest_cycle};
use crate::split::{StageCost, split};
use crate::{NodeId, NodeProfile, Pipeline, StagePlan};

/// Insertions of left-over nodes that are tried; each costs one split.
const MAX_INSERTIONS: usize = 256;

pub(super) fn search(search: &Search<'_>) -> Vec<Pipeline> {
    let mut pipelines = Vec::new();
    let mut free: Vec<&NodeProfile> = search.nodes.iter().filter(|n| n.pinned.is_none()).collect();
    while pipelines.len() < search.options.max_pipelines
        && let Some(pipeline) = pinned_chain(search, &free, &pipelines)
    {
        free.retain(|n| pipeline.stage_of(&n.id).is_none());
        pipelines.push(pipeline);
    }
    let room = |n: &&NodeProfile| search.capacity(n, false, false) > 0;
    free.retain(|n| room(n));
    let most = search.options.max_pipelines - pipelines.len();
    let rate = |set: &[Pipeline]| set.iter().map(|p| 1.0 / p.bottleneck_ms).sum::<f64>();
    let keys: [fn(&Search<'_>, &NodeProfile) -> f64; 3] = [
        |_, n| n.decode_ms_per_layer,
        |s, n| -f64::from(s.capacity(n, false, false)),
        |s, n| f64::from(s.capacity(n, false, false)) * n.decode_ms_per_layer,
    ];
    let mut best: Vec<Pipeline> = Vec::new();
    for key in keys {
        let mut ordered = free.clone();
        ordered.sort_by(|a, b| key(search, a).total_cmp(&key(search, b)).then(a.id.cmp(&b.id)));
        // The head goes into the first chain.
        ordered.sort_by_key(|n| !search.must_be_first(n));
        let found = chains(search, &ordered, most);
        if rate(&found) > rate(&best) {
            best = found;
        }
    }
    pipelines.extend(best);
    pipelines
}

/// Chains of nodes in this order, each as short as memory allows; what is left over is inserted where it helps.
fn chains(search: &Search<'_>, ordered: &[&NodeProfile], most: usize) -> Vec<Pipeline> {
    let mut found: Vec<Pipeline> = Vec::new();
    let mut members: Vec<&NodeProfile> = Vec::new();
    let mut left_over = Vec::new();
    let mut room = 0u64;
    for &node in ordered {
        if found.len() == most {
            left_over.push(node);
            continue;
        }
        members.push(node);
        room += u64::from(search.capacity(node, false, false));
        if room >= u64::from(search.model.n_layers)
            && let Some(pipeline) = chain(search, &members)
        {
            found.push(pipeline);
            members.clear();
            room = 0;
        }
    }
    left_over.extend(members);
    for node in left_over.into_iter().take(MAX_INSERTIONS) {
        insert(search, node, &mut found);
    }
    found
}

/// Puts `node` into the pipeline whose rate rises most, if any does (or, where more nodes are preferred, falls least
/// within the slack).
fn insert(search: &Search<'_>, node: &NodeProfile, pipelines: &mut [Pipeline]) {
    let mut best: Option<(f64, usize, Pipeline)> = None;
    // The slowest pipelines gain most; looking at a few of them bounds the work.
    let mut order: Vec<usize> = (0..pipelines.len()).collect();
    order.sort_by(|&a, &b| pipelines[b].bottleneck_ms.total_cmp(&pipelines[a].bottleneck_ms));
    for &p in order.iter().take(8) {
        let mut members: Vec<&NodeProfile> =
            search.nodes.iter().filter(|n| pipelines[p].stage_of(&n.id).is_some()).collect();
        if members.iter().any(|n| n.pinned.is_some()) {
            continue;
        }
        members.push(node);
        if let Some(pipeline) = chain(search, &members) {
            let slack = search.options.more_nodes_slack.max(1.0);
            let gain = 1.0 / pipeline.bottleneck_ms - 1.0 / (pipelines[p].bottleneck_ms * slack);
            if gain > 0.0 && best.as_ref().is_none_or(|b| gain > b.0) {
                best = Some((gain, p, pipeline));
            }
        }
    }
    if let Some((_, p, pipeline)) = best {
        pipelines[p] = pipeline;
    }
}

/// One pipeline of exactly these nodes, in the order of their round-trip times.
fn chain(search: &Search<'_>, members: &[&NodeProfile]) -> Option<Pipeline> {
    let ids: Vec<NodeId> = members.iter().map(|n| n.id.clone()).collect();
    let head = members.iter().find(|n| search.must_be_first(n)).map(|n| &n.id);
    let order = cheapest_cycle(&ids, search.rtt, head);
    // A cycle may begin anywhere unless the head is in it: who is first and last decides who holds embedding and head.
    let turns = if head.is_some() { 1 } else { order.len().min(EXACT_ORDER_MAX) };
    (0..turns)
        .filter_map(|turn| {
            let mut ids = order.clone();
            ids.rotate_left(turn);
            let nodes: Vec<&NodeProfile> =
                ids.iter().filter_map(|id| members.iter().copied().find(|n| n.id == *id)).collect();
            let stages = fill(search, &nodes, 0, search.model.n_layers)?;
            Some(Pipeline::price(stages, search.nodes, search.rtt))
        })
        .min_by(|a, b| {
            a.bottleneck_ms.total_cmp(&b.bottleneck_ms).then(a.latency_ms.total_cmp(&b.latency_ms))
        })
}

/// Splits layers `from..to` over these nodes in this order.
fn fill(search: &Search<'_>, nodes: &[&NodeProfile], from: u32, to: u32) -> Option<Vec<StagePlan>> {
    let costs: Vec<StageCost> = nodes
        .iter()
        .enumerate()
        .map(|(i, node)| {
            let (first, last) = (from == 0 && i == 0, to == search.model.n_layers && i + 1 == nodes.len());
            StageCost {
                overhead_ms: node.stage_ms(0, last),
                layer_ms: node.decode_ms_per_layer,
                capacity: search.capacity(node, first, last),
            }
        })
        .collect();
    let counts = split(&costs, to - from)?;
    let mut next = from;
    let mut stages = Vec::with_capacity(nodes.len());
    for (node, count) in nodes.iter().zip(counts) {
        stages.push(StagePlan { node: node.id.clone(), layers: LayerRange::new(next, next + count).ok()? });
        next += count;
    }
    Some(stages)
}

/// A pipeline around pinned nodes: their ranges in order, the gaps between them filled with free nodes, each node going
/// where room is missing or else where the slowest stage is. `None` when no pin is left or a gap stays open.
fn pinned_chain(search: &Search<'_>, free: &[&NodeProfile], others: &[Pipeline]) -> Option<Pipeline> {
    let n_layers = search.model.n_layers;
    let mut pins: Vec<(LayerRange, &NodeProfile)> = search
        .nodes
        .iter()
        .filter(|n| others.iter().all(|p| p.stage_of(&n.id).is_none()))
        .filter_map(|n| Some((n.pinned?, n)))
        .filter(|(pin, n)| pin.len() <= search.capacity(n, pin.start() == 0, pin.end() == n_layers))
        .collect();
    pins.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.id.cmp(&b.1.id)));
    let mut taken: Vec<(LayerRange, &NodeProfile)> = Vec::new();
    for pin in pins {
        if taken.last().is_none_or(|last| last.0.end() <= pin.0.start()) {
            taken.push(pin);
        }
    }
    if taken.is_empty() {
        return None;
    }
    let mut gaps: Vec<(u32, u32, Vec<&NodeProfile>)> = Vec::new();
    let mut next = 0;
    for (range, _) in &taken {
        if range.start() > next {
            gaps.push((next, range.start(), Vec::new()));
        }
        next = range.end();
    }
    if next < n_layers {
        gaps.push((next, n_layers, Vec::new()));
    }
    give_to_gaps(search, free, &mut gaps);
    let mut stages: Vec<StagePlan> =
        taken.iter().map(|(layers, n)| StagePlan { node: n.id.clone(), layers: *layers }).collect();
    for (from, to, nodes) in &gaps {
        stages.extend(fill(search, nodes, *from, *to)?);
    }
    stages.sort_by_key(|s| s.layers);
    Some(Pipeline::price(stages, search.nodes, search.rtt))
}

fn give_to_gaps<'n>(
    search: &Search<'_>,
    free: &[&'n NodeProfile],
    gaps: &mut [(u32, u32, Vec<&'n NodeProfile>)],
) {
    let mut free: Vec<&NodeProfile> = free.to_vec();
    free.sort_by(|a, b| a.decode_ms_per_layer.total_cmp(&b.decode_ms_per_layer).then(a.id.cmp(&b.id)));
    free.sort_by_key(|n| !search.must_be_first(n));
    let slowest = |gap: &(u32, u32, Vec<&NodeProfile>)| {
        fill(search, &gap.2, gap.0, gap.1).map_or(f64::INFINITY, |stages| {
            let ms = |s: &StagePlan| {
                let node = search.nodes.iter().find(|n| n.id == s.node).expect("filled with these nodes");
                node.stage_ms(s.layers.len(), s.layers.end() == search.model.n_layers)
            };
            stages.iter().map(ms).fold(0.0, f64::max)
        })
    };
    for node in free {
        let head = search.must_be_first(node);
        let wanting = |gap: &&mut (u32, u32, Vec<&NodeProfile>)| !head || gap.0 == 0;
        let gap = gaps
            .iter_mut()
            .filter(wanting)
            .max_by(|a, b| slowest(a).total_cmp(&slowest(b)).then((a.1 - a.0).cmp(&(b.1 - b.0))));
        let Some(gap) = gap else { continue };
        let before = slowest(gap);
        gap.2.push(node);
        let after = slowest(gap);
        if before.is_finite() && after > before * search.options.more_nodes_slack.max(1.0) {
            gap.2.pop();
        }
    }
}
