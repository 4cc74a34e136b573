//! Rotation against the reference, its inverse, and bad positions.

use super::*;
use crate::reference;
use crate::testing::{assert_close, bits, noise, same_at_every_level};

fn whole(head_dim: usize, theta: f64, max_pos: usize) -> RopeTable {
    let layout = RopeLayout { head_dim, interleaved: false, magnitude: 1.0 };
    RopeTable::new(layout, &frequencies(head_dim, theta), max_pos).unwrap()
}

#[test]
fn rotation_agrees_with_the_reference() {
    for dim in [2, 16, 24, 64, 128] {
        let (heads, theta) = (3, 10_000.0);
        let table = whole(dim, theta, 5000);
        let positions = [0, 1, 17, 4999];
        let x = noise(positions.len() * heads * dim, 1);
        let y = same_at_every_level(|| {
            let mut y = x.clone();
            rope_apply(&mut y, heads, &positions, &table).unwrap();
            y
        });
        let expected: Vec<f64> = x
            .chunks_exact(dim)
            .enumerate()
            .flat_map(|(i, head)| reference::rows::rope(head, positions[i / heads], theta))
            .collect();
        assert_close(&y, &expected, 1e-6);
        let mut back = y.clone();
        rope_apply_inverse(&mut back, heads, &positions, &table).unwrap();
        assert_close(&back, &x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), 1e-6);
    }
}

proptest::proptest! {
    #[test]
    fn random_heads_turn_as_the_reference_and_back(
        half in 1usize..40, heads in 1usize..6, positions in proptest::collection::vec(0u32..2000, 1..7),
        seed in 0u64..1000,
    ) {
        let (dim, theta) = (2 * half, 500_000.0);
        let table = whole(dim, theta, 2000);
        let x = noise(positions.len() * heads * dim, seed);
        let y = same_at_every_level(|| {
            let mut y = x.clone();
            rope_apply(&mut y, heads, &positions, &table).unwrap();
            y
        });
        let each = |(i, head)| reference::rows::rope(head, positions[i / heads], theta);
        assert_close(&y, &x.chunks_exact(dim).enumerate().flat_map(each).collect::<Vec<_>>(), 1e-6);
        let mut back = y;
        rope_apply_inverse(&mut back, heads, &positions, &table).unwrap();
        assert_close(&back, &x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), 1e-6);
    }
}

#[test]
fn the_rest_of_a_head_passes_and_neighbours_are_pairs() {
    let (dim, rotated, heads) = (20, 12, 2);
    let frequencies = frequencies(rotated, 10_000.0);
    let table = |interleaved| {
        let layout = RopeLayout { head_dim: dim, interleaved, magnitude: 1.5 };
        RopeTable::new(layout, &frequencies, 40).unwrap()
    };
    let x = noise(heads * dim, 3);
    let mut halves = x.clone();
    rope_apply(&mut halves, heads, &[39], &table(false)).unwrap();
    let expected: Vec<f64> = x
        .chunks_exact(dim)
        .flat_map(|head| {
            let rotated = reference::rows::rope(&head[..rotated], 39, 10_000.0);
            rotated
                .iter()
                .map(|v| v * 1.5)
                .chain(head[12..].iter().map(|v| f64::from(*v)))
                .collect::<Vec<_>>()
        })
        .collect();
    assert_close(&halves, &expected, 1e-6);

    // The same pairs, side by side.
    let place = |i: usize| if i < rotated { (i % 6) * 2 + i / 6 } else { i };
    let mut pairs = x.clone();
    for (from, to) in x.chunks_exact(dim).zip(pairs.chunks_exact_mut(dim)) {
        (0..dim).for_each(|i| to[place(i)] = from[i]);
    }
    let neighbours = same_at_every_level(|| {
        let mut y = pairs.clone();
        rope_apply(&mut y, heads, &[39], &table(true)).unwrap();
        y
    });
    for (got, halves) in neighbours.chunks_exact(dim).zip(halves.chunks_exact(dim)) {
        let sorted: Vec<f32> = (0..dim).map(|i| got[place(i)]).collect();
        assert_eq!(bits(&sorted), bits(halves));
    }
}

#[test]
fn bad_shapes_and_positions_are_refused() {
    let table = whole(4, 100.0, 9);
    assert_eq!(
        rope_apply(&mut [0.0; 4], 1, &[9], &table),
        Err(KernelError::OutOfRange { op: "rope", what: "position", limit: 9, got: 9 })
    );
    assert!(rope_apply(&mut [0.0; 5], 1, &[0], &table).is_err());
    assert!(rope_apply(&mut [0.0; 8], 1, &[0], &table).is_err());
    let layout = RopeLayout { head_dim: 5, interleaved: false, magnitude: 1.0 };
    assert!(RopeTable::new(layout, &[1.0; 3], 9).is_err());
    assert!(RopeTable::new(layout, &[], 9).is_err());
}
