//! Rotation against the reference, its inverse, and bad positions.

use super::*;
use crate::reference;
use crate::testing::{assert_close, bits, noise, same_at_every_level};

#[test]
fn rotation_agrees_with_the_reference() {
    for dim in [2, 16, 24, 64, 128] {
        let (heads, theta) = (3, 10_000.0);
        let table = RopeTable::new(dim, theta, None, 5000).unwrap();
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

#[test]
fn factors_divide_the_frequencies() {
    let slow = RopeTable::new(4, 100.0, Some(&[2.0, 2.0]), 9).unwrap();
    let plain = RopeTable::new(4, 100.0, None, 9).unwrap();
    let x = noise(4, 2);
    let (mut a, mut b) = (x.clone(), x);
    rope_apply(&mut a, 1, &[8], &slow).unwrap();
    rope_apply(&mut b, 1, &[4], &plain).unwrap();
    assert_eq!(bits(&a), bits(&b));
}

#[test]
fn bad_shapes_and_positions_are_refused() {
    let table = RopeTable::new(4, 100.0, None, 9).unwrap();
    assert_eq!(
        rope_apply(&mut [0.0; 4], 1, &[9], &table),
        Err(KernelError::OutOfRange { op: "rope", what: "position", limit: 9, got: 9 })
    );
    assert!(rope_apply(&mut [0.0; 5], 1, &[0], &table).is_err());
    assert!(rope_apply(&mut [0.0; 8], 1, &[0], &table).is_err());
    assert!(RopeTable::new(5, 100.0, None, 9).is_err());
    assert!(RopeTable::new(4, 100.0, Some(&[1.0]), 9).is_err());
}
