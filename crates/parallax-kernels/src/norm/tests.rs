//! RMSNorm against the reference, finite differences, and itself.

use super::*;
use crate::reference;
use crate::testing::{assert_close, assert_gradient, bits, noise, same_at_every_level, with_threads};

const EPS: f32 = 1e-5;

fn apply(x: &[f32], w: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    rms_norm(x, w, EPS, &mut y).expect("shapes fit");
    y
}

#[test]
fn forward_agrees_with_the_reference() {
    for width in [1, 5, 16, 31, 64, 576, 1000] {
        let (x, w) = (noise(3 * width, 1), noise(width, 2));
        let y = same_at_every_level(|| apply(&x, &w));
        let expected: Vec<f64> =
            x.chunks_exact(width).flat_map(|x| reference::rows::rms_norm(x, &w, EPS)).collect();
        assert_close(&y, &expected, 1e-6);
    }
}

proptest::proptest! {
    #[test]
    fn random_rows_agree_with_the_reference_and_do_not_notice_each_other(
        rows in 1usize..9, width in 1usize..300, seed in 0u64..1000, scale in 1e-3f32..1e3,
    ) {
        let x: Vec<f32> = noise(rows * width, seed).iter().map(|v| v * scale).collect();
        let w = noise(width, seed + 1);
        let y = same_at_every_level(|| apply(&x, &w));
        let each = |x| reference::rows::rms_norm(x, &w, EPS);
        assert_close(&y, &x.chunks_exact(width).flat_map(each).collect::<Vec<_>>(), 1e-6);
        let alone: Vec<f32> = x.chunks_exact(width).flat_map(|x| apply(x, &w)).collect();
        proptest::prop_assert_eq!(bits(&y), bits(&alone));
    }
}

#[test]
fn a_row_does_not_notice_the_others() {
    let (x, w) = (noise(40 * 70, 3), noise(70, 4));
    let alone: Vec<f32> = x.chunks_exact(70).flat_map(|x| apply(x, &w)).collect();
    assert_eq!(bits(&alone), bits(&with_threads(2, || apply(&x, &w))));
}

#[test]
fn backward_is_the_derivative() {
    let (width, rows) = (37, 3);
    let (x, w, dy) = (noise(rows * width, 5), noise(width, 6), noise(rows * width, 7));
    let run = || {
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; width]);
        rms_norm_backward(&x, &w, EPS, &dy, &mut dx, Some(&mut dw)).unwrap();
        [dx, dw].concat()
    };
    let both = same_at_every_level(run);
    let (dx, dw) = both.split_at(x.len());
    let loss = |x: &[f32], w: &[f32]| -> f64 {
        let y = x.chunks_exact(width).flat_map(|x| reference::rows::rms_norm(x, w, EPS));
        y.zip(&dy).map(|(y, &d)| y * f64::from(d)).sum()
    };
    assert_gradient(&x, dx, 0..x.len(), 2e-3, |x| loss(x, &w));
    assert_gradient(&w, dw, 0..width, 2e-3, |w| loss(&x, w));
}

#[test]
fn weight_gradients_accumulate() {
    let (x, w, dy) = (noise(64, 8), noise(32, 9), noise(64, 10));
    let (mut dx, mut once, mut twice) = (vec![0.0; 64], vec![0.0; 32], vec![0.0; 32]);
    rms_norm_backward(&x, &w, EPS, &dy, &mut dx, Some(&mut once)).unwrap();
    for _ in 0..2 {
        rms_norm_backward(&x, &w, EPS, &dy, &mut dx, Some(&mut twice)).unwrap();
    }
    let doubled: Vec<f64> = once.iter().map(|&v| 2.0 * f64::from(v)).collect();
    assert_close(&twice, &doubled, 1e-6);
}

#[test]
fn wrong_shapes_are_refused() {
    assert!(rms_norm(&[0.0; 5], &[1.0; 4], EPS, &mut [0.0; 5]).is_err());
    assert!(rms_norm(&[0.0; 4], &[], EPS, &mut [0.0; 4]).is_err());
    assert!(rms_norm(&[0.0; 4], &[1.0; 4], EPS, &mut [0.0; 8]).is_err());
}
