//! The exact search for few nodes: the best throughput among all plans whose pipelines share no node.
//!
//! First, for every set of nodes, the smallest bottleneck of a chain of exactly these nodes, by dynamic programming
//! over (set, layers covered): position in the chain decides who pays for embedding and head, and a pinned node fits in
//! one place only. Then sets are combined into pipelines. Last, for each chosen set, the order and split with the least
//! latency at that bottleneck. 2^n * L * n * L steps.

use swarm_wire::LayerRange;

use super::Search;
use crate::{Pipeline, StagePlan};

/// Accepts the same bottleneck computed in another order of additions.
const SAME: f64 = 1.0 + 1e-9;

pub(super) fn search(search: &Search<'_>) -> Vec<Pipeline> {
    let bottlenecks = bottlenecks(search);
    let sets = if search.options.max_pipelines == 1 {
        one_set(search, &bottlenecks).into_iter().collect()
    } else {
        disjoint_sets(search, &bottlenecks)
    };
    sets.into_iter().map(|set| fastest_chain(search, set, bottlenecks[set])).collect()
}

/// Milliseconds of node `i` for layers `from..to`, or `None` where it cannot hold them.
fn stage_ms(search: &Search<'_>, i: usize, from: u32, to: u32) -> Option<f64> {
    let node = &search.nodes[i];
    let (first, last) = (from == 0, to == search.model.n_layers);
    if !first && search.must_be_first(node) {
        return None;
    }
    if node.pinned.is_some_and(|pin| (pin.start(), pin.end()) != (from, to)) {
        return None;
    }
    (to - from <= search.capacity(node, first, last)).then(|| node.stage_ms(to - from, last))
}

/// For every set of nodes (bit i = node i): milliseconds of the slowest stage of its best chain, infinite if none.
fn bottlenecks(search: &Search<'_>) -> Vec<f64> {
    let n = search.nodes.len();
    let n_layers = search.model.n_layers;
    let width = n_layers as usize + 1;
    let mut best = vec![f64::INFINITY; (1 << n) * width];
    best[0] = 0.0;
    for set in 0..1usize << n {
        for from in 0..n_layers {
            let so_far = best[set * width + from as usize];
            if !so_far.is_finite() {
                continue;
            }
            for i in (0..n).filter(|i| set & (1 << i) == 0) {
                let most = search.capacity(&search.nodes[i], from == 0, false);
                // One more than fits in the middle: a tied head makes the stage that is first and last no bigger.
                for to in from + 1..=n_layers {
                    if to - from > most && to != n_layers {
                        continue;
                    }
                    if let Some(ms) = stage_ms(search, i, from, to) {
                        let cell = &mut best[(set | 1 << i) * width + to as usize];
                        *cell = cell.min(so_far.max(ms));
                    }
                }
            }
        }
    }
    (0..1 << n).map(|set| best[set * width + n_layers as usize]).collect()
}

/// The set for a single pipeline: the largest whose bottleneck is within the slack of the best; then the fastest.
fn one_set(search: &Search<'_>, bottlenecks: &[f64]) -> Option<usize> {
    let best = bottlenecks.iter().copied().fold(f64::INFINITY, f64::min);
    let limit = best * search.options.more_nodes_slack.max(1.0) * SAME;
    // The head has the tokens: where it can take part, it does.
    let head = search.nodes.iter().position(|n| search.must_be_first(n)).map_or(0, |i| 1 << i);
    let prefer = |set: usize| {
        let slack = search.options.more_nodes_slack > 1.0;
        (if slack { set.count_ones() } else { 0 }, set & head != 0)
    };
    (0..bottlenecks.len()).filter(|&set| bottlenecks[set].is_finite() && bottlenecks[set] <= limit).max_by(
        |&a, &b| prefer(a).cmp(&prefer(b)).then(bottlenecks[b].total_cmp(&bottlenecks[a])).then(b.cmp(&a)),
    )
}

/// Disjoint sets with the highest sum of rates; among equals, more and shorter pipelines.
fn disjoint_sets(search: &Search<'_>, bottlenecks: &[f64]) -> Vec<usize> {
    let n_sets = bottlenecks.len();
    let most = search.options.max_pipelines.min(search.nodes.len());
    // best[p][set]: highest rate of at most p pipelines out of `set`, and the pipeline that holds its lowest node.
    let mut best = vec![vec![(0.0f64, 0usize); n_sets]; most + 1];
    for p in 1..=most {
        for set in 1..n_sets {
            let lowest = set & set.wrapping_neg();
            let mut choice = (best[p][set ^ lowest].0, 0);
            let mut part = set;
            while part > 0 {
                if part & lowest != 0 && bottlenecks[part].is_finite() {
                    let rate = 1.0 / bottlenecks[part] + best[p - 1][set ^ part].0;
                    // Subsets come in falling order: a smaller one wins a tie.
                    if rate * SAME >= choice.0 {
                        choice = (rate, part);
                    }
                }
                part = (part - 1) & set;
            }
            best[p][set] = choice;
        }
    }
    let mut sets = Vec::new();
    let (mut p, mut left) = (most, n_sets - 1);
    while left > 0 && p > 0 {
        match best[p][left].1 {
            0 => left &= left - 1,
            part => {
                sets.push(part);
                left ^= part;
                p -= 1;
            }
        }
    }
    sets
}

/// The order and split of `set` with the least latency among those with this bottleneck.
fn fastest_chain(search: &Search<'_>, set: usize, bottleneck_ms: f64) -> Pipeline {
    let members: Vec<usize> = (0..search.nodes.len()).filter(|i| set & (1 << i) != 0).collect();
    members
        .iter()
        .filter_map(|&first| fastest_chain_from(search, &members, first, bottleneck_ms * SAME))
        .min_by(|a, b| a.latency_ms.total_cmp(&b.latency_ms))
        .expect("the bottleneck belongs to a chain of this set")
}

fn fastest_chain_from(
    search: &Search<'_>,
    members: &[usize],
    first: usize,
    limit_ms: f64,
) -> Option<Pipeline> {
    let k = members.len();
    let n_layers = search.model.n_layers;
    let width = n_layers as usize + 1;
    let at = |set: usize, last: usize, boundary: u32| (set * k + last) * width + boundary as usize;
    let hop_ms = |a: usize, b: usize| search.rtt.get(&search.nodes[a].id, &search.nodes[b].id) / 2.0;
    // (latency so far, stage before, where the last stage begins)
    let mut best = vec![(f64::INFINITY, usize::MAX, 0u32); (1 << k) * k * width];
    let within = |i: usize, from: u32, to: u32| stage_ms(search, i, from, to).filter(|&ms| ms <= limit_ms);

    let start = members.iter().position(|&m| m == first)?;
    for to in 1..=n_layers {
        if let Some(ms) = within(first, 0, to) {
            best[at(1 << start, start, to)] = (ms, usize::MAX, 0);
        }
    }
    for used in 1..1usize << k {
        for last in (0..k).filter(|last| used & (1 << last) != 0) {
            for from in 1..n_layers {
                let so_far = best[at(used, last, from)].0;
                if !so_far.is_finite() {
                    continue;
                }
                for next in (0..k).filter(|next| used & (1 << next) == 0) {
                    let hop = hop_ms(members[last], members[next]);
                    for to in from + 1..=n_layers {
                        let Some(ms) = within(members[next], from, to) else { continue };
                        let cell = &mut best[at(used | 1 << next, next, to)];
                        if so_far + hop + ms < cell.0 {
                            *cell = (so_far + hop + ms, last, from);
                        }
                    }
                }
            }
        }
    }
    let full = (1usize << k) - 1;
    let mut last = (0..k).filter(|&last| best[at(full, last, n_layers)].0.is_finite()).min_by(|&a, &b| {
        let total = |i: usize| best[at(full, i, n_layers)].0 + hop_ms(members[i], first);
        total(a).total_cmp(&total(b))
    })?;
    let (mut used, mut boundary, mut stages) = (full, n_layers, Vec::with_capacity(k));
    loop {
        let (_, before, from) = best[at(used, last, boundary)];
        let layers = LayerRange::new(from, boundary).ok()?;
        stages.push(StagePlan { node: search.nodes[members[last]].id.clone(), layers });
        if before == usize::MAX {
            break;
        }
        (used, last, boundary) = (used ^ (1 << last), before, from);
    }
    stages.reverse();
    Some(Pipeline::price(stages, search.nodes, search.rtt))
}
