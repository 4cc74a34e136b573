//! The order of stages by round-trip time: the cheapest cycle, because the last stage answers to the first.

use crate::{NodeId, RttMatrix};

/// Up to this many nodes the order is exact (subset table), above it 2-opt improves a nearest-neighbour tour.
pub const EXACT_ORDER_MAX: usize = 10;

/// Orders `nodes` so that the sum of RTTs along the cycle is least (exact for few, good for many). When `first` is
/// among them it stays first; otherwise the cycle is opened at its longest link into the node listed earliest.
pub fn cheapest_cycle(nodes: &[NodeId], rtt: &RttMatrix, first: Option<&NodeId>) -> Vec<NodeId> {
    let mut order: Vec<NodeId> = nodes.to_vec();
    if let Some(at) = first.and_then(|first| order.iter().position(|n| n == first)) {
        order.swap(0, at);
    }
    if order.len() <= 2 {
        return order;
    }
    let ms: Vec<Vec<f64>> = order.iter().map(|a| order.iter().map(|b| rtt.get(a, b)).collect()).collect();
    let tour = if order.len() <= EXACT_ORDER_MAX { held_karp(&ms) } else { two_opt(&ms) };
    tour.into_iter().map(|i| order[i].clone()).collect()
}

/// Sum of RTTs along the cycle.
pub fn cycle_ms(nodes: &[NodeId], rtt: &RttMatrix) -> f64 {
    (0..nodes.len()).map(|i| rtt.get(&nodes[i], &nodes[(i + 1) % nodes.len()])).sum()
}

/// The best cycle from node 0 by dynamic programming over subsets: n^2 * 2^n steps.
fn held_karp(ms: &[Vec<f64>]) -> Vec<usize> {
    let n = ms.len();
    let full = 1usize << n;
    let mut best = vec![vec![(f64::INFINITY, 0usize); n]; full];
    best[1][0] = (0.0, 0);
    for set in 1..full {
        for last in 0..n {
            let so_far = best[set][last].0;
            if !so_far.is_finite() {
                continue;
            }
            for next in 1..n {
                if set & (1 << next) == 0 && so_far + ms[last][next] < best[set | 1 << next][next].0 {
                    best[set | 1 << next][next] = (so_far + ms[last][next], last);
                }
            }
        }
    }
    let mut set = full - 1;
    let mut last = (1..n).min_by(|&a, &b| {
        let total = |i: usize| best[full - 1][i].0 + ms[i][0];
        total(a).total_cmp(&total(b))
    });
    let mut tour = Vec::with_capacity(n);
    while let Some(i) = last {
        tour.push(i);
        let before = best[set][i].1;
        set &= !(1 << i);
        last = (i != 0).then_some(before);
    }
    tour.reverse();
    tour
}

/// Nearest neighbour from node 0, then 2-opt until nothing improves (bounded passes).
fn two_opt(ms: &[Vec<f64>]) -> Vec<usize> {
    let n = ms.len();
    let mut tour = vec![0];
    let mut left: Vec<usize> = (1..n).collect();
    while !left.is_empty() {
        let at = tour[tour.len() - 1];
        let nearest = (0..left.len())
            .min_by(|&a, &b| ms[at][left[a]].total_cmp(&ms[at][left[b]]))
            .expect("left is not empty");
        tour.push(left.swap_remove(nearest));
    }
    for _ in 0..16 {
        let mut improved = false;
        for i in 1..n - 1 {
            for j in i + 1..n {
                let (a, b, c, d) = (tour[i - 1], tour[i], tour[j], tour[(j + 1) % n]);
                if ms[a][c] + ms[b][d] + 1e-12 < ms[a][b] + ms[c][d] {
                    tour[i..=j].reverse();
                    improved = true;
                }
            }
        }
        if !improved {
            break;
        }
    }
    tour
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn permutations(items: &[NodeId]) -> Vec<Vec<NodeId>> {
        if items.is_empty() {
            return vec![Vec::new()];
        }
        (0..items.len())
            .flat_map(|i| {
                let mut rest = items.to_vec();
                let head = rest.remove(i);
                permutations(&rest).into_iter().map(move |mut p| {
                    p.insert(0, head.clone());
                    p
                })
            })
            .collect()
    }

    proptest! {
        #[test]
        fn few_nodes_are_ordered_as_brute_force_does(links in proptest::collection::vec(1u32..100, 15), n in 3usize..6) {
            let nodes: Vec<NodeId> = (0..n).map(|i| NodeId::new(format!("n{i}"))).collect();
            let mut rtt = RttMatrix::default();
            let mut links = links.into_iter();
            for a in 0..n { for b in 0..a { rtt.set(&nodes[a], &nodes[b], f64::from(links.next().unwrap())); } }
            let order = cheapest_cycle(&nodes, &rtt, Some(&nodes[1]));
            prop_assert_eq!(&order[0], &nodes[1]);
            let best = permutations(&nodes).iter().map(|p| cycle_ms(p, &rtt)).fold(f64::INFINITY, f64::min);
            prop_assert!((cycle_ms(&order, &rtt) - best).abs() < 1e-9);
            let mut sorted = order.clone();
            sorted.sort();
            prop_assert_eq!(sorted, nodes);
        }
    }

    #[test]
    fn many_nodes_on_a_line_are_not_visited_back_and_forth() {
        let nodes: Vec<NodeId> = (0..20).map(|i| NodeId::new(format!("n{:02}", (i * 7) % 20))).collect();
        let mut rtt = RttMatrix::default();
        for a in &nodes {
            for b in &nodes {
                let place = |n: &NodeId| n.as_str()[1..].parse::<f64>().unwrap();
                rtt.set(a, b, (place(a) - place(b)).abs());
            }
        }
        let order = cheapest_cycle(&nodes, &rtt, None);
        assert!(cycle_ms(&order, &rtt) <= 2.0 * 19.0 + 1e-9, "{order:?}");
    }
}
