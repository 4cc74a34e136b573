//! Log-probabilities against the reference, along both routes, and their gradient.

use super::*;
use crate::testing::{assert_close, assert_gradient, bits, noise, same_at_every_level, with_threads};
use crate::{PackedWeight, WeightKind, linear, reference};

fn scaled(n: usize, seed: u64) -> Vec<f32> {
    noise(n, seed).iter().map(|v| v * 12.0).collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; logits.len()];
    log_softmax_row(logits, &mut out).expect("same length");
    out
}

#[test]
fn rows_agree_with_the_reference() {
    for vocab in [1, 7, 16, 1000, 1024, 1025, 5000] {
        let logits = scaled(vocab, vocab as u64);
        let out = same_at_every_level(|| log_softmax(&logits));
        assert_close(&out, &reference::rows::log_softmax(&logits), 1e-6);
        let total: f64 = out.iter().map(|&v| f64::from(v).exp()).sum();
        assert!((total - 1.0).abs() < 1e-5, "probabilities of {vocab} sum to {total}");
    }
}

proptest::proptest! {
    #[test]
    fn random_rows_agree_with_the_reference_along_both_routes(
        vocab in 1usize..2200, seed in 0u64..1000, masked in proptest::prelude::any::<proptest::sample::Index>(),
        target in proptest::prelude::any::<proptest::sample::Index>(),
    ) {
        let mut logits = scaled(vocab, seed);
        if vocab > 1 {
            logits[masked.index(vocab)] = f32::NEG_INFINITY;
        }
        let out = same_at_every_level(|| log_softmax(&logits));
        for (got, expected) in out.iter().zip(reference::rows::log_softmax(&logits)) {
            let near = (f64::from(*got) - expected).abs() <= 1e-6 * expected.abs().max(1.0);
            proptest::prop_assert!(near || f64::from(*got) == expected, "{got} against {expected}");
        }
        let mut picked = [0.0];
        token_logprobs(&logits, vocab, &[target.index(vocab) as u32], &mut picked).unwrap();
        proptest::prop_assert_eq!(picked[0].to_bits(), out[target.index(vocab)].to_bits());
    }
}

#[test]
fn masked_logits_have_no_probability() {
    let mut logits = vec![f32::NEG_INFINITY; 3000];
    logits[2500] = 3.0;
    logits[10] = 3.0;
    let out = log_softmax(&logits);
    assert_eq!((out[0], out[1500]), (f32::NEG_INFINITY, f32::NEG_INFINITY));
    assert!((out[10] - 0.5f32.ln()).abs() < 1e-6 && out[10] == out[2500]);
    logits[1200] = f32::NAN;
    assert!(log_softmax(&logits)[10].is_nan(), "a NaN must not go unnoticed");
}

#[test]
fn token_and_row_routes_agree_bit_for_bit() {
    let vocab = 2100;
    let logits = scaled(5 * vocab, 1);
    let targets = [0, 2099, 1024, 1023, 17];
    let mut out = [0.0; 5];
    with_threads(2, || token_logprobs(&logits, vocab, &targets, &mut out)).unwrap();
    for (row, &target) in targets.iter().enumerate() {
        let whole = log_softmax(&logits[row * vocab..(row + 1) * vocab]);
        assert_eq!(out[row].to_bits(), whole[target as usize].to_bits());
    }
}

#[test]
fn the_head_route_has_the_bits_of_the_logits_route() {
    for kind in [WeightKind::F32, WeightKind::Bf16, WeightKind::Q8_0, WeightKind::Q4_0, WeightKind::Q4_1] {
        for (vocab, width, rows) in [(40, 32, 3), (2500, 64, 101)] {
            let head = PackedWeight::pack_f32(kind, &noise(vocab * width, 2), vocab, width).unwrap();
            let x = noise(rows * width, 3);
            let targets: Vec<u32> = (0..rows as u32).map(|t| t * 31 % vocab as u32).collect();
            let mut logits = vec![0.0; rows * vocab];
            linear::linear(&x, &head, &mut logits).unwrap();
            let mut expected = vec![0.0; rows];
            token_logprobs(&logits, vocab, &targets, &mut expected).unwrap();
            let both = same_at_every_level(|| {
                let (mut out, mut lse) = (vec![0.0; rows], vec![0.0; rows]);
                head_logprob(&x, &head, &targets, &mut out, &mut lse).unwrap();
                [out, lse].concat()
            });
            assert_eq!(bits(&both[..rows]), bits(&expected), "{kind:?} {vocab} {width} {rows}");
        }
    }
}

#[test]
fn the_head_gradient_is_the_derivative() {
    let (vocab, width, rows) = (1100, 20, 4);
    let (w, x) = (noise(vocab * width, 4), noise(rows * width, 5));
    let targets = [3u32, 1099, 1024, 500];
    let dout = noise(rows, 6);
    let gradients = same_at_every_level(|| {
        let head = PackedWeight::pack_f32(WeightKind::F32, &w, vocab, width).unwrap();
        let (mut out, mut lse) = (vec![0.0; rows], vec![0.0; rows]);
        head_logprob(&x, &head, &targets, &mut out, &mut lse).unwrap();
        let (mut dx, mut dw) = (vec![1.0; x.len()], vec![0.0; w.len()]);
        head_logprob_backward(&x, &head, &targets, &lse, &dout, &mut dx, Some(&mut dw)).unwrap();
        [dx, dw].concat()
    });
    let (dx, dw) = gradients.split_at(x.len());
    let loss = |x: &[f32], w: &[f32]| -> f64 {
        let logits = reference::linear::dense(x, w, width);
        logits
            .chunks_exact(vocab)
            .zip(targets)
            .zip(&dout)
            .map(|((row, t), &d)| reference::rows::log_softmax(row)[t as usize] * f64::from(d))
            .sum()
    };
    assert_gradient(&x, dx, 0..x.len(), 2e-3, |x| loss(x, &w));
    let near_targets = targets.iter().flat_map(|&t| t as usize * width..t as usize * width + 5);
    assert_gradient(&w, dw, near_targets.chain([40 * width + 1]), 2e-3, |w| loss(&x, w));
}

#[test]
fn log_probability_and_gradient_come_of_one_walk_over_the_head() {
    for (vocab, width, rows) in [(1100, 20, 4), (3000, 48, 37)] {
        let head = PackedWeight::pack_f32(WeightKind::F32, &noise(vocab * width, 4), vocab, width).unwrap();
        // Later blocks hold larger logits, so that the sum is rescaled on the way.
        let x: Vec<f32> = noise(rows * width, 5).iter().map(|v| v * 4.0).collect();
        let targets: Vec<u32> = (0..rows as u32).map(|t| t * 997 % vocab as u32).collect();
        let (mut out, mut lse) = (vec![0.0; rows], vec![0.0; rows]);
        head_logprob(&x, &head, &targets, &mut out, &mut lse).unwrap();
        let mut expected = vec![0.0; x.len()];
        let ones = vec![1.0; rows];
        head_logprob_backward(&x, &head, &targets, &lse, &ones, &mut expected, None).unwrap();
        let both = same_at_every_level(|| {
            let (mut out, mut dx) = (vec![0.0; rows], vec![1.0; x.len()]);
            head_logprob_gradient(&x, &head, &targets, &mut out, &mut dx).unwrap();
            [out, dx].concat()
        });
        assert_eq!(bits(&both[..rows]), bits(&out));
        for (got, want) in both[rows..].iter().zip(&expected) {
            assert!((got - want).abs() < 2e-5, "{got} {want}");
        }
    }
}

#[test]
fn argmax_takes_the_first_of_equals() {
    assert_eq!(argmax(&[1.0, 3.0, f32::NAN, 3.0]), 1);
    assert_eq!(argmax(&[]), 0);
    assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), 0);
    let mut v = noise(1000, 7);
    v[777] = 2.0;
    assert_eq!(argmax(&v), 777);
}

#[test]
fn bad_targets_are_refused() {
    let mut out = [0.0];
    assert_eq!(
        token_logprobs(&[0.0; 4], 4, &[4], &mut out),
        Err(KernelError::OutOfRange { op: "token_logprobs", what: "target", limit: 4, got: 4 })
    );
    let head = PackedWeight::pack_f32(WeightKind::F32, &[0.0; 8], 4, 2).unwrap();
    let mut lse = [0.0];
    assert!(head_logprob(&[0.0; 2], &head, &[4], &mut out, &mut lse).is_err());
    assert!(head_logprob(&[0.0; 2], &head, &[0, 1], &mut out, &mut lse).is_err());
}
