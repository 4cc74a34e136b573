//! The formulas against published figures, and against spreads in virtual time.

use super::super::tests::trial::{PLAIN, Trial, spread};
use super::*;

fn fleet(n: usize, bytes: u64, rate: f64, hop_s: f64) -> Fleet {
    Fleet {
        bytes,
        chunk_bytes: 1 << 20,
        source_uplink: rate,
        uplinks: vec![rate; n],
        downlinks: vec![rate; n],
        leaves: 0,
        hop_s,
    }
}

fn seconds(plan: &Plan, is: fn(&Shape) -> bool) -> Prediction {
    *plan.predictions().iter().find(|p| is(&p.shape)).unwrap()
}

#[test]
fn an_adapter_for_a_few_is_a_star_and_weights_for_many_are_none() {
    // 269 kB for three workers at 100 Mbit/s, and for the one that there is.
    assert!(!fleet(3, 269_000, 12.5e6, 0.001).pays_to_spread());
    assert!(!fleet(1, 16_000_000_000, 12.5e6, 0.05).pays_to_spread());
    assert!(!fleet(0, 1 << 30, 12.5e6, 0.05).pays_to_spread());
    // The same adapter for 200 of them, 5 MB for eight, 16 GB for two.
    assert!(fleet(200, 269_000, 12.5e6, 0.05).pays_to_spread());
    assert!(fleet(8, 5_000_000, 12.5e6, 0.05).pays_to_spread());
    assert!(fleet(2, 16_000_000_000, 37.5e6, 0.05).pays_to_spread());
    // 4.9 MB for eight at 1 Gbit/s.
    assert_eq!(fleet(8, 4_900_000, 125e6, 0.05).plan().predictions()[0].shape, Shape::Star);
}

#[test]
fn a_star_is_compared_with_the_mesh_that_is_executed_and_with_nothing_else() {
    let far = fleet(500, 65_536, 12.5e6, 0.5).plan();
    let shapes = far.predictions().map(|prediction| prediction.shape);
    assert!(matches!(shapes, [Shape::Tree { .. }, Shape::Star, Shape::Mesh, Shape::Chain]), "{far:?}");
    assert_eq!(far.spread_in_chunks(), None);
}

#[test]
fn formulas_give_the_published_figures() {
    // 8 receivers, 50 ms a hop; bytes, bytes per second, then seconds of star, chain, binary tree and the floor. Chain and tree with the
    // best of all sizes of chunks, which is found at m = sqrt((stages - 1) k M / (b a)).
    let published = [
        (16_000_000_000, 37.5e6, [3413.0, 453.0, 875.0, 426.7]),
        (140_000_000, 37.5e6, [29.9, 6.4, 9.4, 3.73]),
        (4_900_000, 2.5e6, [15.7, 4.0, 5.4, 1.96]),
    ];
    for (bytes, rate, expected) in published {
        let fleet = fleet(8, bytes, rate, 0.05);
        let chunk =
            |stages: f64, k: f64| bytes as f64 / ((stages - 1.0) * k * bytes as f64 / (rate * 0.05)).sqrt();
        let got = [
            fleet.star_s(),
            fleet.chain_s(chunk(8.0, 1.0)),
            fleet.tree_s(2, chunk(3.0, 2.0)),
            fleet.bound_s(),
        ];
        for (got, expected) in got.into_iter().zip(expected) {
            assert!((got / expected - 1.0).abs() < 0.035, "{got} instead of {expected}");
        }
    }
}

#[test]
fn slow_uplinks_pass_nothing_on_and_leaves_neither() {
    let even = fleet(7, 140_000_000, 12.5e6, 0.05);
    let chunk = f64::from(1 << 20);
    // The last of a chain and the lower four of a tree of seven pass nothing on.
    let mut slow = even.clone();
    slow.uplinks[2] = 1e3;
    assert_eq!(slow.chain_s(chunk), even.chain_s(chunk));
    slow.uplinks[4] = 1e3;
    assert!(slow.chain_s(chunk) > 1000.0 * even.chain_s(chunk));
    assert_eq!(slow.tree_s(2, chunk), even.tree_s(2, chunk));
    let leaves = Fleet { leaves: 4, ..even.clone() };
    assert!(leaves.chain_s(chunk).is_infinite() && leaves.tree_s(2, chunk) == even.tree_s(2, chunk));
    assert!(Fleet { leaves: 5, ..even }.tree_s(2, chunk).is_infinite());
}

#[test]
fn chunks_are_small_where_that_fills_the_pipeline_and_large_where_hops_are_long() {
    let chunks = |fleet: Fleet| fleet.plan().spread_in_chunks().unwrap() >> 10;
    assert_eq!(chunks(fleet(8, 4_900_000, 2.5e6, 0.05)), 64);
    assert_eq!(chunks(fleet(8, 4_900_000, 12.5e6, 0.05)), 128);
    assert_eq!(chunks(fleet(8, 140_000_000, 37.5e6, 0.15)), 1024);
    // As many as a manifest holds well.
    assert!(chunks(fleet(8, 16_000_000_000, 2.5e6, 0.05)) >= 512);
}

/// A mesh in virtual time, in the chunks that the plan says: what was predicted, less the search for members, which begins
/// with everybody known, and what it took.
fn simulated(n: usize, bytes: u64, uplink: u64, hop_us: u64) -> (Plan, f64, f64) {
    let plan = fleet(n, bytes, uplink as f64, hop_us as f64 / 1e6).plan();
    let mesh = seconds(&plan, |shape| *shape == Shape::Mesh);
    let (chunk_bytes, n_chunks) = (mesh.chunk_bytes, bytes.div_ceil(mesh.chunk_bytes) as u32);
    let trial = Trial { n, n_chunks, chunk_bytes, uplink, latency_us: hop_us / 2, seed: 3, ..PLAIN };
    let outcome = spread(&trial);
    assert_eq!(outcome.unfinished, 0, "{outcome:?}");
    let took = outcome.ratio * f64::from(n_chunks) * chunk_bytes as f64 / uplink as f64;
    (plan, mesh.seconds - SETUP_S, took)
}

#[test]
fn a_mesh_takes_what_is_predicted_and_no_chain_or_tree_would_take_less() {
    let updates = [
        (4_900_000, 2_500_000, &[2, 3, 4, 8, 16, 64][..]),
        (4_900_000, 12_500_000, &[2, 3, 4, 8, 16, 64]),
        (140_000_000, 37_500_000, &[2, 3, 4, 8, 16]),
    ];
    let mut rows = Vec::new();
    for (bytes, uplink, ns) in updates {
        for (&n, hop_us) in ns.iter().flat_map(|n| [10_000, 50_000, 150_000].map(|hop| (n, hop))) {
            let (plan, predicted, took) = simulated(n, bytes, uplink, hop_us);
            let passed_on = |shape| matches!(shape, Shape::Chain | Shape::Tree { .. });
            let others = plan.predictions().iter().filter(|p| passed_on(p.shape));
            let others: Vec<(Shape, f64)> = others.map(|p| (p.shape, p.seconds - SETUP_S)).collect();
            let row = (n, bytes, uplink, hop_us, predicted, took, others);
            assert!(!passed_on(plan.predictions()[0].shape), "{row:?}");
            rows.push(row);
        }
    }
    for row in rows {
        let (.., predicted, took, others) = &row;
        assert!((0.8..1.15).contains(&(took / predicted)), "{row:?}");
        assert!(others.iter().all(|(_, seconds)| took < seconds), "{row:?}");
    }
}
