//! Products with packed weights of every format, and rows of packed tables.

use super::{assert_near, device, read};
use crate::{
    WeightKind, dtype,
    gpu::{Values, linear},
    linear::tests::stored,
    reference::noise,
};

/// Products in f64: rows of `x` times rows of `w`.
fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

#[test]
fn products_of_every_format_are_those_of_the_widened_weights() {
    let Some(client) = device() else { return };
    for kind in WeightKind::ALL {
        // Few rows and many, outputs that end inside a cube, blocks that end inside a line of lanes.
        let shapes =
            [(1, 32, 1), (7, 96, 2), (37, 288, 3), (130, 32, 4), (65, 160, 5), (3, 576, 33), (70, 64, 70)];
        for (n, k, rows) in shapes {
            let k = usize::next_multiple_of(k, kind.block().0);
            for seed in [1, 2] {
                let raw = stored(kind, n, k, seed);
                let x = noise(rows * k, 3);
                let weight = linear::DeviceWeight::from_bytes(&client, kind, &raw, n, k).unwrap();
                let y = linear::linear(&client, &Values::upload(&client, &x), &[weight]).unwrap();
                let expected = product(&x, &dtype::dequantize(kind, &raw).unwrap(), k);
                // Each term is rounded a few times, each sum once.
                let bound = (k as f64).sqrt().max(8.0) * f64::from(f32::EPSILON);
                let what = format!("{kind:?} [{rows}, {k}] x [{n}, {k}]");
                assert_near(&read(&client, &y), &expected, bound, &what);
            }
        }
    }
}

#[test]
fn parts_of_different_formats_stand_beside_each_other() {
    let Some(client) = device() else { return };
    let kinds = [(WeightKind::Q8_0, 5), (WeightKind::Q4K, 9), (WeightKind::Bf16, 2)];
    let (k, mut parts, mut widened) = (256, Vec::new(), Vec::new());
    for (seed, (kind, n)) in kinds.into_iter().enumerate() {
        let raw = stored(kind, n, k, seed as u64);
        widened.extend(dtype::dequantize(kind, &raw).unwrap());
        parts.push(linear::DeviceWeight::from_bytes(&client, kind, &raw, n, k).unwrap());
    }
    for rows in [1, 4, 6, 17, 40] {
        let x = noise(rows * k, 9);
        let y = linear::linear(&client, &Values::upload(&client, &x), &parts).unwrap();
        assert_near(&read(&client, &y), &product(&x, &widened, k), 2e-6, &format!("{rows} rows"));
    }
}

#[test]
fn rows_of_a_table_are_its_values() {
    let Some(client) = device() else { return };
    for kind in WeightKind::ALL {
        let (n, k) = (11, 96usize.next_multiple_of(kind.block().0));
        let raw = stored(kind, n, k, 2);
        let values = dtype::dequantize(kind, &raw).unwrap();
        let table = linear::DeviceWeight::from_bytes(&client, kind, &raw, n, k).unwrap();
        let ids = [10, 0, 3, 3, 7];
        let rows = read(&client, &linear::rows(&client, &table, &ids).unwrap());
        let expected: Vec<f64> = ids
            .iter()
            .flat_map(|id| &values[*id as usize * k..(*id as usize + 1) * k])
            .map(|v| f64::from(*v))
            .collect();
        // One rounding of the product, one of the sum with a minimum; the reference fuses them or not.
        assert_near(&rows, &expected, f64::from(f32::EPSILON), &format!("{kind:?}"));
        assert!(linear::rows(&client, &table, &[11]).is_err());
    }
}

#[test]
fn small_scales_do_not_vanish() {
    let Some(client) = device() else { return };
    // Scales of 1e-6 are subnormal as f16, so that many a device would read them as zero.
    let small: Vec<f32> = noise(4 * 64, 5).iter().map(|v| v * 1e-4).collect();
    for kind in [WeightKind::Q8_0, WeightKind::Q4_1, WeightKind::F16] {
        let raw = dtype::quantize(kind, &small).unwrap();
        let weight = linear::DeviceWeight::from_bytes(&client, kind, &raw, 4, 64).unwrap();
        let x = noise(64, 6);
        let y = linear::linear(&client, &Values::upload(&client, &x), &[weight]).unwrap();
        let expected = product(&x, &dtype::dequantize(kind, &raw).unwrap(), 64);
        assert_near(&read(&client, &y), &expected, 2e-6, &format!("{kind:?}"));
    }
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let Some(client) = device() else { return };
    let refuse = |kind, bytes: usize, n, k| {
        linear::DeviceWeight::from_bytes(&client, kind, &vec![0; bytes], n, k).unwrap_err().to_string()
    };
    assert!(refuse(WeightKind::F32, 4 * 40, 1, 40).contains("multiple of 32"));
    assert!(refuse(WeightKind::Q8_0, 33, 1, 32).contains("expected 34"));
    assert!(refuse(WeightKind::Q8_0, 0, 1 << 17, 1 << 16).contains("must be below 4294967295"));
    let raw = stored(WeightKind::Q8_0, 2, 32, 2);
    let weight = linear::DeviceWeight::from_bytes(&client, WeightKind::Q8_0, &raw, 2, 32).unwrap();
    assert!(linear::linear(&client, &Values::upload(&client, &[1.0; 33]), &[weight]).is_err());
}
