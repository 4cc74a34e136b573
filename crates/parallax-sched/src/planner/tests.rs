//! The planner against brute force, and its invariants on random clusters.

use proptest::prelude::*;
use swarm_wire::LayerRange;

use super::*;
use crate::{NodeId, Pipeline, StagePlan};

fn options(algorithm: Algorithm, max_pipelines: usize) -> PlanOptions {
    PlanOptions { algorithm, max_pipelines, context_tokens: 0, ..PlanOptions::default() }
}

fn node(i: usize, layers: u64, ms: f64) -> NodeProfile {
    NodeProfile::new(&format!("n{i}"), layers * 10, ms)
}

/// Every chain of distinct nodes that covers the layers, by recursion.
fn all_chains(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    from: u32,
    used: usize,
    out: &mut Vec<(usize, f64)>,
    worst: f64,
) {
    if from == model.n_layers {
        out.push((used, worst));
        return;
    }
    for (i, node) in nodes.iter().enumerate().filter(|(i, _)| used & (1 << i) == 0) {
        for to in from + 1..=model.n_layers {
            let room = model.capacity(node.memory_bytes, 0, from == 0, to == model.n_layers);
            let pinned_elsewhere = node.pinned.is_some_and(|p| (p.start(), p.end()) != (from, to));
            if to - from <= room && !pinned_elsewhere {
                let ms = node.stage_ms(to - from, to == model.n_layers);
                all_chains(model, nodes, to, used | 1 << i, out, worst.max(ms));
            }
        }
    }
}

/// The highest rate of any set of chains that share no node.
fn brute_rate(chains: &[(usize, f64)], used: usize, most: usize) -> f64 {
    if most == 0 {
        return 0.0;
    }
    chains
        .iter()
        .filter(|(set, _)| set & used == 0)
        .map(|(set, ms)| 1000.0 / ms + brute_rate(chains, used | set, most - 1))
        .fold(0.0, f64::max)
}

/// Keeps the best chain of every set: the brute force over sets stays small.
fn best_per_set(chains: Vec<(usize, f64)>) -> Vec<(usize, f64)> {
    let mut best = std::collections::BTreeMap::new();
    for (set, ms) in chains {
        let cell = best.entry(set).or_insert(f64::INFINITY);
        *cell = ms.min(*cell);
    }
    best.into_iter().collect()
}

fn clusters() -> impl Strategy<Value = (ModelProfile, Vec<NodeProfile>)> {
    let nodes = proptest::collection::vec((0u64..8, 1u32..10, 0u32..3), 1..5);
    (nodes, 1u32..7, 0u64..25, 0u64..25, any::<bool>()).prop_map(
        |(nodes, n_layers, embedding, head, tied)| {
            let mut model = ModelProfile::uniform("m", n_layers, 10);
            (model.embedding_bytes, model.head_bytes, model.tied) =
                (embedding, if tied { embedding } else { head }, tied);
            let nodes = nodes
                .into_iter()
                .enumerate()
                .map(|(i, (layers, ms, head_ms))| NodeProfile {
                    head_ms: f64::from(head_ms),
                    overhead_ms: 0.25,
                    ..node(i, layers, f64::from(ms) * 0.5)
                })
                .collect();
            (model, nodes)
        },
    )
}

proptest! {
    #[test]
    fn exact_equals_brute_force_and_cover_never_beats_it((model, nodes) in clusters(), most in 1usize..4) {
        let mut chains = Vec::new();
        all_chains(&model, &nodes, 0, 0, &mut chains, 0.0);
        let brute = brute_rate(&best_per_set(chains), 0, most);
        let rtt = RttMatrix::default();
        match plan(&model, &nodes, &rtt, &options(Algorithm::Exact, most)) {
            Ok(exact) => {
                prop_assert_eq!(exact.defect(&model, &nodes, 0), None);
                prop_assert!((exact.throughput_tokens_per_s - brute).abs() < 1e-6 * brute, "{exact:?} {brute}");
                prop_assert!(exact.throughput_tokens_per_s <= exact.upper_bound_tokens_per_s * (1.0 + 1e-9));
                if let Ok(cover) = plan(&model, &nodes, &rtt, &options(Algorithm::Cover, most)) {
                    prop_assert_eq!(cover.defect(&model, &nodes, 0), None);
                    prop_assert!(cover.throughput_tokens_per_s <= brute * (1.0 + 1e-9));
                }
            }
            Err(PlanError::NotEnoughMemory { missing_layers, .. }) => {
                prop_assert_eq!(brute, 0.0);
                prop_assert!(missing_layers >= 1);
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    #[test]
    fn pins_are_honoured_or_refused_with_a_reason((model, mut nodes) in clusters(), cut in 1u32..6) {
        let Ok(pin) = LayerRange::new(cut.min(model.n_layers) - 1, cut.min(model.n_layers)) else { unreachable!() };
        nodes[0].pinned = Some(pin);
        let mut chains = Vec::new();
        all_chains(&model, &nodes, 0, 0, &mut chains, 0.0);
        let brute = brute_rate(&best_per_set(chains), 0, 1);
        let found = plan(&model, &nodes, &RttMatrix::default(), &options(Algorithm::Exact, 1));
        prop_assert_eq!(found.is_ok(), brute > 0.0);
        for found in [found, plan(&model, &nodes, &RttMatrix::default(), &options(Algorithm::Cover, 1))].into_iter().flatten() {
            prop_assert_eq!(found.defect(&model, &nodes, 0), None);
        }
    }

    #[test]
    fn large_clusters_are_covered_within_the_bound(
        nodes in proptest::collection::vec((4u64..40, 1u32..20), 9..60), n_layers in 8u32..40,
    ) {
        let nodes: Vec<NodeProfile> =
            nodes.into_iter().enumerate().map(|(i, (layers, ms))| node(i, layers, f64::from(ms))).collect();
        let model = ModelProfile::uniform("m", n_layers, 10);
        let found = plan(&model, &nodes, &RttMatrix::default(), &options(Algorithm::Auto, usize::MAX)).unwrap();
        prop_assert_eq!(found.defect(&model, &nodes, 0), None);
        prop_assert!(found.throughput_tokens_per_s <= found.upper_bound_tokens_per_s * (1.0 + 1e-9));
    }
}

#[test]
fn the_head_stays_first_and_everybody_takes_part_when_asked() {
    let nodes: Vec<NodeProfile> = vec![node(0, 9, 1.0), node(1, 9, 2.0), node(2, 9, 3.0)];
    let model = ModelProfile::uniform("m", 4, 10);
    for algorithm in [Algorithm::Exact, Algorithm::Cover] {
        let options = PlanOptions {
            first_stage: Some(NodeId::new("n2")),
            more_nodes_slack: 4.0,
            ..options(algorithm, 1)
        };
        let found = plan(&model, &nodes, &RttMatrix::default(), &options).unwrap();
        assert_eq!(found.pipelines[0].stages.len(), 3, "{algorithm:?}");
        assert_eq!(found.pipelines[0].stages[0].node, NodeId::new("n2"), "{algorithm:?}");
    }
}

#[test]
fn stages_follow_the_shortest_round_trips() {
    let nodes: Vec<NodeProfile> = (0..4).map(|i| node(i, 2, 1.0)).collect();
    let mut rtt = RttMatrix::with_default(50.0);
    for (a, b) in [(0, 2), (2, 1), (1, 3), (3, 0)] {
        rtt.set(&nodes[a].id, &nodes[b].id, 1.0);
    }
    let model = ModelProfile::uniform("m", 8, 10);
    for algorithm in [Algorithm::Exact, Algorithm::Cover] {
        let found = plan(&model, &nodes, &rtt, &options(algorithm, 1)).unwrap();
        assert!((found.pipelines[0].latency_ms - (8.0 + 4.0 * 0.5)).abs() < 1e-9, "{algorithm:?} {found:?}");
    }
}

#[test]
fn what_is_missing_is_said() {
    let model = ModelProfile::uniform("m", 20, 10);
    let nodes = [node(0, 8, 1.0), node(1, 6, 1.0)];
    let error = plan(&model, &nodes, &RttMatrix::default(), &options(Algorithm::Auto, 1)).unwrap_err();
    assert!(error.to_string().contains("6 more of 20 layers"), "{error}");
    assert_eq!(
        plan(&model, &[], &RttMatrix::default(), &options(Algorithm::Auto, 1)),
        Err(PlanError::NoNodes)
    );
    let twice = [node(0, 30, 1.0), node(0, 30, 1.0)];
    assert!(matches!(
        plan(&model, &twice, &RttMatrix::default(), &options(Algorithm::Auto, 1)),
        Err(PlanError::DuplicateNode { .. })
    ));
}

#[test]
fn a_wrong_plan_is_found_out() {
    let model = ModelProfile::uniform("m", 4, 10);
    let nodes = [node(0, 2, 1.0), node(1, 4, 1.0)];
    let stage =
        |i: usize, a, b| StagePlan { node: nodes[i].id.clone(), layers: LayerRange::new(a, b).unwrap() };
    let defect = |stages: Vec<StagePlan>| {
        let pipeline = Pipeline::price(stages, &nodes, &RttMatrix::default());
        Plan::from_pipelines(&model, vec![pipeline], &nodes).defect(&model, &nodes, 0)
    };
    assert_eq!(defect(vec![stage(0, 0, 2), stage(1, 2, 4)]), None);
    assert!(defect(vec![stage(0, 0, 3), stage(1, 3, 4)]).unwrap().contains("room"));
    assert!(defect(vec![stage(0, 0, 2)]).unwrap().contains("cover"));
    assert!(defect(vec![stage(1, 0, 2), stage(1, 2, 4)]).unwrap().contains("twice"));
}
