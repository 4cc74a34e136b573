//! Linear layers against the reference, and against themselves at other row counts, splits, thread counts and levels.

use super::*;
use crate::dtype;
use crate::reference;
use crate::testing::{bits, noise, same_at_every_level, with_threads};

const KINDS: [WeightKind; 15] = WeightKind::ALL;

/// Stored bytes of `n * k` weights: quantised noise, or noise of which only the scales are kept within reason.
pub(crate) fn stored(kind: WeightKind, n: usize, k: usize, seed: u64) -> Vec<u8> {
    let noise = noise(n * k, seed);
    if kind.has_quantizer() && seed.is_multiple_of(2) {
        return dtype::quantize(kind, &noise).unwrap();
    }
    let (values, bytes) = kind.block();
    if values == 1 {
        return dtype::quantize(kind, &noise).unwrap();
    }
    let mut raw: Vec<u8> =
        noise.iter().cycle().take(n * k / values * bytes).map(|v| (v.to_bits() >> 5) as u8).collect();
    for block in raw.chunks_exact_mut(bytes) {
        let small = |b: &mut u8| *b = *b & 0x83 | 0x24;
        match kind {
            WeightKind::Mxfp4 => block[0] = 118 + block[0] % 12,
            WeightKind::Q2K => [81, 83].into_iter().for_each(|at| small(&mut block[at])),
            WeightKind::Q3K => small(&mut block[109]),
            WeightKind::Q6K => small(&mut block[209]),
            WeightKind::Int4 => {
                small(&mut block[1]);
                block[2] %= 17;
                block[3] = 0;
            }
            WeightKind::Q4_1 | WeightKind::Q5_1 | WeightKind::Q4K | WeightKind::Q5K => {
                [1, 3].into_iter().for_each(|at| small(&mut block[at]));
            }
            _ => small(&mut block[1]),
        }
    }
    raw
}

fn packed(kind: WeightKind, n: usize, k: usize, seed: u64) -> PackedWeight {
    PackedWeight::from_bytes(kind, &stored(kind, n, k, seed), n, k).unwrap()
}

/// `k`, or the next multiple of the kind's blocks.
fn whole(kind: WeightKind, k: usize) -> usize {
    k.next_multiple_of(kind.block().0)
}

fn apply(w: &PackedWeight, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / w.k() * w.n()];
    linear(x, w, &mut y).expect("shapes fit");
    y
}

fn expected(kind: WeightKind, x: &[f32], raw: &[u8], k: usize) -> Vec<f32> {
    if kind.block().0 == 1 {
        return reference::linear::dense(x, &dtype::dequantize(kind, raw).unwrap(), k);
    }
    reference::linear::blocks(kind, x, raw, k)
}

#[test]
fn every_kind_has_the_bits_of_the_reference() {
    for kind in KINDS {
        for (n, k, rows) in [(1, 32, 1), (16, 64, 3), (37, 96, 5), (50, 576, 2), (100, 32, 40), (5, 1536, 7)]
        {
            let k = whole(kind, k);
            for seed in [1, 2] {
                let (raw, x) = (stored(kind, n, k, seed), noise(rows * k, 3));
                let packed = PackedWeight::from_bytes(kind, &raw, n, k).unwrap();
                assert_eq!((packed.n(), packed.k(), packed.kind()), (n, k, kind));
                let y = same_at_every_level(|| apply(&packed, &x));
                assert!(y.iter().all(|y| y.is_finite()), "{kind:?}");
                assert_eq!(
                    bits(&y),
                    bits(&expected(kind, &x, &raw, k)),
                    "{kind:?} [{rows}, {k}] x [{n}, {k}]"
                );
            }
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn random_shapes_and_bytes_have_the_bits_of_the_reference(
        kind in 0..KINDS.len(), n in 1usize..70, width in 1usize..600, rows in 1usize..30, seed in 0u64..1000,
        cut in proptest::prelude::any::<proptest::sample::Index>(),
    ) {
        let kind = KINDS[kind];
        let k = whole(kind, width);
        let (raw, x) = (stored(kind, n, k, seed), noise(rows * k, seed + 1));
        let packed = PackedWeight::from_bytes(kind, &raw, n, k).unwrap();
        let y = same_at_every_level(|| apply(&packed, &x));
        proptest::prop_assert_eq!(bits(&y), bits(&expected(kind, &x, &raw, k)));
        let range = cut.index(n)..n;
        let mut part = vec![f32::NAN; rows * range.len()];
        linear_rows(&x, &packed, range.clone(), &mut part).unwrap();
        let wanted: Vec<f32> = y.chunks_exact(n).flat_map(|row| row[range.clone()].to_vec()).collect();
        proptest::prop_assert_eq!(bits(&part), bits(&wanted));
    }
}

#[test]
fn products_are_near_those_of_the_dequantised_weights() {
    // What is lost is the rounding of the activations: at most half of 1/127 of the largest, in each of K terms.
    for kind in KINDS {
        let (n, k) = (24, whole(kind, 512));
        let (raw, x) = (stored(kind, n, k, 5), noise(3 * k, 6));
        let w = dtype::dequantize(kind, &raw).unwrap();
        let exact = reference::linear::dense(&x, &w, k);
        let y = apply(&PackedWeight::from_bytes(kind, &raw, n, k).unwrap(), &x);
        for (i, (y, exact)) in y.iter().zip(&exact).enumerate() {
            let magnitude: f32 = w[i % n * k..(i % n + 1) * k].iter().map(|w| w.abs()).sum();
            let bound = magnitude * (0.5 / 127.0 + k as f32 * 1e-7);
            assert!((y - exact).abs() <= bound, "{kind:?} output {i}: {y} against {exact}, bound {bound}");
        }
    }
}

#[test]
fn dense_kinds_take_odd_inner_dimensions() {
    for kind in [WeightKind::F32, WeightKind::F16, WeightKind::Bf16] {
        for (n, k, rows) in [(33, 1, 2), (17, 31, 13), (64, 577, 6)] {
            let (w, x) = (noise(n * k, 3), noise(rows * k, 4));
            let packed = PackedWeight::pack_f32(kind, &w, n, k).unwrap();
            let y = same_at_every_level(|| apply(&packed, &x));
            let raw = dtype::quantize(kind, &w).unwrap();
            assert_eq!(bits(&y), bits(&expected(kind, &x, &raw, k)), "{kind:?} {n} {k} {rows}");
        }
    }
}

#[test]
fn a_row_does_not_notice_how_many_rows_there_are() {
    for kind in KINDS {
        let (n, k) = (75, whole(kind, 160));
        let packed = packed(kind, n, k, 5);
        let x = noise(40 * k, 6);
        let alone: Vec<f32> = x.chunks_exact(k).flat_map(|x| apply(&packed, x)).collect();
        for rows in 1..=40 {
            let together = apply(&packed, &x[..rows * k]);
            assert_eq!(bits(&together), bits(&alone[..rows * n]), "{kind:?} with {rows} rows");
        }
    }
}

#[test]
fn many_rows_in_cache_blocks_equal_few() {
    // Large enough that the rows are walked in several blocks.
    let (n, k, rows) = (40, 2048, 100);
    for kind in [WeightKind::F32, WeightKind::Q8_0] {
        let packed = PackedWeight::pack_f32(kind, &noise(n * k, 7), n, k).unwrap();
        let x = noise(rows * k, 8);
        let all = apply(&packed, &x);
        for row in [0, 23, 24, 47, 99] {
            let one = apply(&packed, &x[row * k..(row + 1) * k]);
            assert_eq!(bits(&one), bits(&all[row * n..(row + 1) * n]), "{kind:?} row {row}");
        }
    }
}

#[test]
fn thread_count_does_not_change_a_bit() {
    for kind in KINDS {
        let (n, k, rows) = (500, whole(kind, 320), 9);
        let packed = packed(kind, n, k, 9);
        let x = noise(rows * k, 10);
        let results: Vec<_> =
            [1, 2, 3, 7].map(|threads| with_threads(threads, || bits(&apply(&packed, &x)))).into();
        assert!(results.iter().all(|r| *r == results[0]), "{kind:?}");
    }
}

/// The rows of two results side by side.
fn beside(a: &[f32], b: &[f32], rows: usize) -> Vec<f32> {
    let pairs = a.chunks_exact(a.len() / rows).zip(b.chunks_exact(b.len() / rows));
    pairs.flat_map(|(a, b)| [a, b].concat()).collect()
}

#[test]
fn several_weights_and_parts_equal_whole_calls() {
    let (k, rows) = (96, 5);
    let x = noise(rows * k, 11);
    let a = PackedWeight::pack_f32(WeightKind::Q8_0, &noise(50 * k, 12), 50, k).unwrap();
    let b = PackedWeight::pack_f32(WeightKind::F32, &noise(21 * k, 13), 21, k).unwrap();
    let (ya, yb) = (apply(&a, &x), apply(&b, &x));
    let mut y = vec![f32::NAN; rows * 71];
    linear_multi(&x, &[a.clone(), b], &mut y).unwrap();
    assert_eq!(bits(&y), bits(&beside(&ya, &yb, rows)));
    for range in [0..50, 0..16, 3..4, 7..45, 48..50, 9..9] {
        let mut part = vec![0.0; rows * range.len()];
        linear_rows(&x, &a, range.clone(), &mut part).unwrap();
        let want: Vec<f32> = ya.chunks_exact(50).flat_map(|row| row[range.clone()].to_vec()).collect();
        assert_eq!(bits(&part), bits(&want), "{range:?}");
    }
}

#[test]
fn norms_and_gates_in_front_have_the_bits_of_calls_of_their_own() {
    const EPS: f32 = 1e-5;
    for kind in KINDS {
        let k = whole(kind, 96);
        let raw = stored(kind, 37, k, 2);
        let ws = [PackedWeight::from_bytes(kind, &raw, 37, k).unwrap(), packed(WeightKind::F32, 20, k, 3)];
        for rows in [1, 3, 8, 33] {
            let (x, weight, gate_up) = (noise(rows * k, 4), noise(k, 5), noise(rows * 2 * k, 6));
            // The left operand as it is left behind, and the product.
            let both = |f: &dyn Fn(&mut [f32], &mut [f32])| {
                same_at_every_level(|| {
                    let (mut left, mut y) = (vec![f32::NAN; rows * k], vec![f32::NAN; rows * 57]);
                    f(&mut left, &mut y);
                    [left, y].concat()
                })
            };
            let normed = both(&|left, y| norm_linear(&x, &weight, EPS, left, &ws, y).unwrap());
            let gated = both(&|left, y| gated_linear(Activation::Silu, &gate_up, left, &ws, y).unwrap());
            let mut lefts = [vec![0.0; rows * k], vec![0.0; rows * k]];
            norm::rms_norm(&x, &weight, EPS, &mut lefts[0]).unwrap();
            activation::gated_mul(Activation::Silu, &gate_up, k, &mut lefts[1]).unwrap();
            for (got, left) in [&normed, &gated].into_iter().zip(&lefts) {
                assert_eq!(bits(&got[..rows * k]), bits(left), "{kind:?} {rows}");
                let y = beside(&expected(kind, left, &raw, k), &apply(&ws[1], left), rows);
                assert_eq!(bits(&got[rows * k..]), bits(&y), "{kind:?} {rows}");
            }
            let (mut left, mut y) = (vec![0.0; rows * k], vec![0.0; rows * 57]);
            with_threads(3, || norm_linear(&x, &weight, EPS, &mut left, &ws, &mut y)).unwrap();
            assert_eq!(bits(&[left, y].concat()), bits(&normed), "{kind:?} {rows} on three threads");
        }
    }
}

#[test]
fn stored_values_survive_repacking() {
    for kind in KINDS {
        let (n, k) = (19, whole(kind, 64));
        let raw = stored(kind, n, k, 21);
        let (packed, values) =
            (PackedWeight::from_bytes(kind, &raw, n, k).unwrap(), dtype::dequantize(kind, &raw).unwrap());
        let mut row = vec![0.0; k];
        for (i, values) in values.chunks_exact(k).enumerate() {
            packed.dequantize_row(i, &mut row).unwrap();
            assert_eq!(bits(&row), bits(values), "{kind:?} row {i}");
        }
    }
}

#[test]
fn packing_floats_equals_packing_their_blocks() {
    for kind in KINDS.into_iter().filter(|kind| kind.has_quantizer()) {
        let (n, k) = (18, whole(kind, 96));
        let (w, x) = (noise(n * k, 22), noise(2 * k, 23));
        let direct = PackedWeight::pack_f32(kind, &w, n, k).unwrap();
        let stored = PackedWeight::from_bytes(kind, &dtype::quantize(kind, &w).unwrap(), n, k).unwrap();
        assert_eq!(bits(&apply(&direct, &x)), bits(&apply(&stored, &x)), "{kind:?}");
    }
}

#[test]
fn quantised_products_are_near_the_float_product() {
    let (n, k) = (64, 512);
    let (w, x) = (noise(n * k, 14), noise(4 * k, 15));
    let exact = reference::linear::dense(&x, &w, k);
    let rms = |v: &[f32]| (v.iter().map(|v| v * v).sum::<f32>() / v.len() as f32).sqrt();
    for (kind, tolerance) in [
        (WeightKind::Bf16, 0.003),
        (WeightKind::Q8_0, 0.01),
        (WeightKind::Q4_1, 0.1),
        (WeightKind::Q4_0, 0.12),
        (WeightKind::F16, 0.001),
        (WeightKind::Q5_1, 0.05),
        (WeightKind::Q5_0, 0.06),
        (WeightKind::Q4K, 0.1),
        (WeightKind::Q5K, 0.05),
        (WeightKind::Q6K, 0.03),
    ] {
        let y = apply(&PackedWeight::pack_f32(kind, &w, n, k).unwrap(), &x);
        let error: Vec<f32> = y.iter().zip(&exact).map(|(a, b)| a - b).collect();
        assert!(rms(&error) < tolerance * rms(&exact), "{kind:?}: {}", rms(&error) / rms(&exact));
    }
}

#[test]
fn a_nan_activation_poisons_its_row_only() {
    for kind in KINDS {
        let (n, k) = (20, whole(kind, 64));
        let packed = packed(kind, n, k, 16);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = noise(3 * k, 17);
            x[k + 5] = bad;
            let y = apply(&packed, &x);
            assert!(y[n..2 * n].iter().all(|v| !v.is_finite()), "{kind:?}");
            assert!(y[..n].iter().chain(&y[2 * n..]).all(|v| v.is_finite()), "{kind:?}");
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let w = PackedWeight::pack_f32(WeightKind::Q8_0, &noise(64, 1), 2, 32).unwrap();
    let mut y = [0.0; 2];
    assert_eq!(
        linear(&[0.0; 33], &w, &mut y),
        Err(KernelError::ShapeMismatch { op: "linear", what: "x", expected: 32, got: 33 })
    );
    assert!(linear(&[0.0; 64], &w, &mut y).is_err());
    assert!(linear_rows(&[0.0; 32], &w, 1..3, &mut y).is_err());
    let (wider, ws) = (packed(WeightKind::Q8_0, 1, 64, 2), std::slice::from_ref(&w));
    assert!(linear_multi(&[0.0; 64], &[w.clone(), wider], &mut [0.0; 5]).is_err());
    assert!(linear_multi(&[], &[], &mut []).is_err());
    assert!(norm_linear(&[0.0; 32], &[0.0; 31], 0.0, &mut [0.0; 32], ws, &mut y).is_err());
    assert!(norm_linear(&[0.0; 32], &[0.0; 32], 0.0, &mut [0.0; 64], ws, &mut y).is_err());
    assert!(gated_linear(Activation::Silu, &[0.0; 63], &mut [0.0; 32], ws, &mut y).is_err());
    assert!(w.dequantize_row(2, &mut [0.0; 32]).is_err());
    assert!(PackedWeight::pack_f32(WeightKind::Q8_0, &[0.0; 66], 2, 33).is_err());
    assert!(PackedWeight::from_bytes(WeightKind::Q8_0, &[0; 33], 1, 32).is_err());
    assert!(PackedWeight::from_bytes(WeightKind::Q4K, &[0; 144], 2, 128).is_err(), "rows of half a block");
    assert_eq!(
        PackedWeight::pack_f32(WeightKind::Q2K, &[0.0; 256], 1, 256).unwrap_err(),
        KernelError::NoQuantizer { kind: WeightKind::Q2K }
    );
    assert_eq!(linear(&[], &w, &mut []), Ok(()));
}

#[test]
fn the_gradient_of_the_input_has_the_bits_of_a_product_with_the_widened_weights() {
    for kind in KINDS {
        for (n, k, rows) in [(1, 32, 3), (37, 96, 5), (50, 64, 40)] {
            let k = whole(kind, k);
            // Two weights, one below the other, of which the second is bf16.
            let (first, second) = (stored(kind, n, k, 2), stored(WeightKind::Bf16, 20, k, 3));
            let mut w = dtype::dequantize(kind, &first).unwrap();
            w.extend(dtype::dequantize(WeightKind::Bf16, &second).unwrap());
            let first = PackedWeight::from_bytes(kind, &first, n, k).unwrap();
            let second = PackedWeight::from_bytes(WeightKind::Bf16, &second, 20, k).unwrap();
            let n = n + 20;
            let across: Vec<f32> = (0..k).flat_map(|i| w.iter().skip(i).step_by(k).copied()).collect();
            let dy = noise(rows * n, 4);
            let expected = reference::linear::dense(&dy, &across, n);
            // Widened at once, and sixteen outputs at a time.
            for bytes in [usize::MAX, 1] {
                let dx = same_at_every_level(|| {
                    let mut dx = vec![f32::NAN; rows * k];
                    backward::in_pieces(&dy, &[&first, &second], &mut dx, bytes).unwrap();
                    dx
                });
                assert_eq!(bits(&dx), bits(&expected), "{kind:?} [{rows}, {n}] x [{n}, {k}]");
            }
            for threads in [1, 3] {
                let mut dx = vec![f32::NAN; rows * k];
                with_threads(threads, || linear_backward(&dy, &[&first, &second], &mut dx)).unwrap();
                assert_eq!(bits(&dx), bits(&expected), "{kind:?} with {threads} threads");
            }
        }
    }
}

#[test]
fn gradients_of_other_shapes_are_refused() {
    let w = packed(WeightKind::Bf16, 3, 4, 1);
    let wider = packed(WeightKind::Bf16, 3, 5, 1);
    let mut dx = [0.0; 8];
    assert!(linear_backward(&[0.0; 5], &[&w], &mut dx).is_err());
    assert!(linear_backward(&[0.0; 9], &[&w], &mut dx).is_err());
    assert!(linear_backward(&[0.0; 12], &[&w, &wider], &mut dx).is_err());
    assert!(linear_backward(&[], &[], &mut []).is_err());
    linear_backward(&[], &[&w], &mut []).unwrap();
    linear_backward(&[0.0; 6], &[&w], &mut dx).unwrap();
    assert_eq!(bits(&dx), [0; 8]);
}
