//! The gated activations against the reference and finite differences.

use super::*;
use crate::reference;
use crate::testing::{assert_close, assert_gradient, bits, noise, same_at_every_level};

const BOTH: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

fn apply(activation: Activation, gate_up: &[f32], ffn: usize) -> Vec<f32> {
    let mut y = vec![0.0; gate_up.len() / 2];
    gated_mul(activation, gate_up, ffn, &mut y).expect("shapes fit");
    y
}

fn expected(activation: Activation, gate_up: &[f32], ffn: usize) -> Vec<f64> {
    let one = match activation {
        Activation::Silu => reference::rows::silu_mul,
        Activation::GeluTanh => reference::rows::gelu_tanh_mul,
    };
    gate_up.chunks_exact(2 * ffn).flat_map(|row| (0..ffn).map(move |i| one(row[i], row[ffn + i]))).collect()
}

#[test]
fn forward_agrees_with_the_reference() {
    for (activation, ffn) in BOTH.into_iter().flat_map(|a| [1, 7, 16, 33, 200].map(|ffn| (a, ffn))) {
        let x: Vec<f32> = noise(3 * 2 * ffn, 1).iter().map(|v| v * 30.0).collect();
        let y = same_at_every_level(|| apply(activation, &x, ffn));
        assert_close(&y, &expected(activation, &x, ffn), 1e-6);
        let alone: Vec<f32> = x.chunks_exact(2 * ffn).flat_map(|row| apply(activation, row, ffn)).collect();
        assert_eq!(bits(&alone), bits(&y));
    }
}

proptest::proptest! {
    #[test]
    fn random_widths_agree_with_the_reference(
        rows in 1usize..6, ffn in 1usize..150, gelu: bool, seed in 0u64..1000, scale in 0.1f32..50.0,
    ) {
        let activation = BOTH[usize::from(gelu)];
        let x: Vec<f32> = noise(rows * 2 * ffn, seed).iter().map(|v| v * scale).collect();
        let y = same_at_every_level(|| apply(activation, &x, ffn));
        assert_close(&y, &expected(activation, &x, ffn), 1e-6);
    }
}

#[test]
fn extreme_gates_stay_finite() {
    for activation in BOTH {
        assert_eq!(apply(activation, &[-500.0, 500.0, 2.0, 2.0], 2), [-0.0, 1000.0]);
        assert!(apply(activation, &[f32::NAN, 1.0], 1)[0].is_nan());
    }
    let mut logits = [-1e6, 0.0, 1.0, 1e6];
    softcap(&mut logits, 30.0);
    assert_close(&logits, &[-30.0, 0.0, 30.0 * (1.0f64 / 30.0).tanh(), 30.0], 1e-6);
}

#[test]
fn backward_is_the_derivative() {
    let ffn = 21;
    let (x, dy) = (noise(2 * 2 * ffn, 2), noise(2 * ffn, 3));
    for activation in BOTH {
        let dx = same_at_every_level(|| {
            let mut dx = vec![0.0; x.len()];
            gated_mul_backward(activation, &x, ffn, &dy, &mut dx).unwrap();
            dx
        });
        let loss =
            |x: &[f32]| expected(activation, x, ffn).iter().zip(&dy).map(|(y, &d)| y * f64::from(d)).sum();
        assert_gradient(&x, &dx, 0..x.len(), 1e-3, loss);
    }
}

#[test]
fn sums_are_element_wise() {
    let (a, b) = (noise(1003, 4), noise(1003, 5));
    let mut y = a.clone();
    add_assign(&mut y, &b).unwrap();
    let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
    assert_eq!(y, expected);
    assert!(add_assign(&mut y, &b[1..]).is_err());
}
