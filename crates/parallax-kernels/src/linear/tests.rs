//! Linear layers against the reference, and against themselves at other row counts, splits, thread counts and levels.

use super::*;
use crate::dtype::BLOCK;
use crate::reference;
use crate::testing::{bits, noise, same_at_every_level};

const KINDS: [WeightKind; 5] =
    [WeightKind::F32, WeightKind::Bf16, WeightKind::Q8_0, WeightKind::Q4_0, WeightKind::Q4_1];

fn apply(w: &PackedWeight, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / w.k() * w.n()];
    linear(x, w, &mut y).expect("shapes fit");
    y
}

fn expected(kind: WeightKind, x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    match kind {
        WeightKind::F32 => reference::linear::dense(x, w, k),
        WeightKind::Bf16 => {
            let rounded: Vec<f32> = w.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
            reference::linear::dense(x, &rounded, k)
        }
        _ => reference::linear::quantized(kind, x, w, k),
    }
}

#[test]
fn every_kind_has_the_bits_of_the_reference() {
    for kind in KINDS {
        for (n, k, rows) in [(1, 32, 1), (16, 64, 3), (37, 96, 5), (50, 576, 2), (100, 32, 40), (5, 1536, 7)]
        {
            let (w, x) = (noise(n * k, 1), noise(rows * k, 2));
            let packed = PackedWeight::pack_f32(kind, &w, n, k).unwrap();
            let y = same_at_every_level(|| apply(&packed, &x));
            assert_eq!(bits(&y), bits(&expected(kind, &x, &w, k)), "{kind:?} [{rows}, {k}] x [{n}, {k}]");
        }
    }
}

#[test]
fn dense_kinds_take_odd_inner_dimensions() {
    for kind in [WeightKind::F32, WeightKind::Bf16] {
        for (n, k, rows) in [(33, 1, 2), (17, 31, 13), (64, 577, 6)] {
            let (w, x) = (noise(n * k, 3), noise(rows * k, 4));
            let packed = PackedWeight::pack_f32(kind, &w, n, k).unwrap();
            let y = same_at_every_level(|| apply(&packed, &x));
            assert_eq!(bits(&y), bits(&expected(kind, &x, &w, k)), "{kind:?} {n} {k} {rows}");
        }
    }
}

#[test]
fn a_row_does_not_notice_how_many_rows_there_are() {
    let (n, k) = (75, 160);
    for kind in KINDS {
        let packed = PackedWeight::pack_f32(kind, &noise(n * k, 5), n, k).unwrap();
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
    let (n, k, rows) = (500, 320, 9);
    for kind in KINDS {
        let packed = PackedWeight::pack_f32(kind, &noise(n * k, 9), n, k).unwrap();
        let x = noise(rows * k, 10);
        let results: Vec<_> = [1, 2, 3, 7]
            .map(|threads| crate::testing::with_threads(threads, || bits(&apply(&packed, &x))))
            .into();
        assert!(results.iter().all(|r| *r == results[0]), "{kind:?}");
    }
}

#[test]
fn several_weights_and_parts_equal_whole_calls() {
    let (k, rows) = (96, 5);
    let x = noise(rows * k, 11);
    let a = PackedWeight::pack_f32(WeightKind::Q8_0, &noise(50 * k, 12), 50, k).unwrap();
    let b = PackedWeight::pack_f32(WeightKind::F32, &noise(21 * k, 13), 21, k).unwrap();
    let (mut ya, mut yb) = (vec![0.0; rows * 50], vec![0.0; rows * 21]);
    linear_multi(&x, &[&a, &b], &mut [&mut ya, &mut yb]).unwrap();
    assert_eq!((bits(&ya), bits(&yb)), (bits(&apply(&a, &x)), bits(&apply(&b, &x))));
    for range in [0..50, 0..16, 3..4, 7..45, 48..50, 9..9] {
        let mut part = vec![0.0; rows * range.len()];
        linear_rows(&x, &a, range.clone(), &mut part).unwrap();
        let want: Vec<f32> = ya.chunks_exact(50).flat_map(|row| row[range.clone()].to_vec()).collect();
        assert_eq!(bits(&part), bits(&want), "{range:?}");
    }
}

#[test]
fn ggml_blocks_survive_repacking() {
    for (kind, from) in [
        (WeightKind::Q8_0, PackedWeight::from_q8_0_blocks as fn(&[u8], usize, usize) -> _),
        (WeightKind::Q4_0, PackedWeight::from_q4_0_blocks),
        (WeightKind::Q4_1, PackedWeight::from_q4_1_blocks),
    ] {
        let (n, k) = (19, 64);
        let block_bytes = kind.block_bytes().unwrap();
        let mut raw: Vec<u8> = (0..n * k / BLOCK * block_bytes).map(|i| (i * 31 % 251) as u8).collect();
        for block in raw.chunks_exact_mut(block_bytes) {
            // A finite scale and minimum.
            block[1] = block[1] & 0x3f | 0x20;
            if kind == WeightKind::Q4_1 {
                block[3] = block[3] & 0x3f | 0x20;
            }
        }
        let packed: PackedWeight = from(&raw, n, k).unwrap();
        assert_eq!((packed.n(), packed.k(), packed.kind()), (n, k, kind));
        let mut row = vec![0.0; k];
        for i in 0..n {
            packed.dequantize_row(i, &mut row).unwrap();
            for (b, values) in row.chunks_exact(BLOCK).enumerate() {
                let start = (i * k / BLOCK + b) * block_bytes;
                let block = crate::dtype::read_block(kind, &raw[start..start + block_bytes]);
                let want: Vec<f32> = (0..BLOCK).map(|j| block.value(kind, j)).collect();
                assert_eq!(bits(values), bits(&want), "{kind:?} row {i} block {b}");
            }
        }
    }
}

#[test]
fn quantised_products_are_near_the_float_product() {
    let (n, k) = (64, 576);
    let (w, x) = (noise(n * k, 14), noise(4 * k, 15));
    let exact = reference::linear::dense(&x, &w, k);
    let rms = |v: &[f32]| (v.iter().map(|v| v * v).sum::<f32>() / v.len() as f32).sqrt();
    for (kind, tolerance) in [
        (WeightKind::Bf16, 0.003),
        (WeightKind::Q8_0, 0.01),
        (WeightKind::Q4_1, 0.1),
        (WeightKind::Q4_0, 0.12),
    ] {
        let y = apply(&PackedWeight::pack_f32(kind, &w, n, k).unwrap(), &x);
        let error: Vec<f32> = y.iter().zip(&exact).map(|(a, b)| a - b).collect();
        assert!(rms(&error) < tolerance * rms(&exact), "{kind:?}: {}", rms(&error) / rms(&exact));
    }
}

#[test]
fn a_nan_activation_poisons_its_row_only() {
    let (n, k) = (20, 64);
    for kind in KINDS {
        let packed = PackedWeight::pack_f32(kind, &noise(n * k, 16), n, k).unwrap();
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
    assert!(w.dequantize_row(2, &mut [0.0; 32]).is_err());
    assert!(PackedWeight::pack_f32(WeightKind::Q8_0, &[0.0; 66], 2, 33).is_err());
    assert!(PackedWeight::from_q8_0_blocks(&[0; 33], 1, 32).is_err());
    assert_eq!(linear(&[], &w, &mut []), Ok(()));
}
