//! Quantisers against the values they round, and the block layouts that hand calculation reaches.

use half::f16;

use super::*;
use crate::testing::noise;

#[test]
fn quantised_values_stay_within_half_a_step() {
    // Steps from zero to the largest magnitude; the offset kinds may clip the extreme of the other sign by one step.
    for (kind, steps) in [
        (WeightKind::Q8_0, 127.0),
        (WeightKind::Q4_0, 8.0),
        (WeightKind::Q4_1, 7.5),
        (WeightKind::Q5_0, 16.0),
        (WeightKind::Q5_1, 15.5),
        (WeightKind::Q6K, 31.0),
        (WeightKind::Q5K, 15.0),
        (WeightKind::Q4K, 7.3),
    ] {
        let w: Vec<f32> = noise(512, 3).iter().enumerate().map(|(i, v)| v * (1 + i / 100) as f32).collect();
        let values = dequantize(kind, &quantize(kind, &w).unwrap()).unwrap();
        for (block, (w, values)) in w.chunks(256).zip(values.chunks(256)).enumerate() {
            let largest = w.iter().fold(0f32, |a, v| a.max(v.abs()));
            for (i, (w, v)) in w.iter().zip(values).enumerate() {
                let error = (v - w).abs();
                assert!(error <= 1.01 * largest / steps, "{kind:?} block {block} weight {i}: {v} for {w}");
            }
        }
    }
}

#[test]
fn constant_and_zero_blocks_survive() {
    for kind in WeightKind::ALL.into_iter().filter(|kind| kind.has_quantizer()) {
        for value in [0.0f32, 1.0, -1.0] {
            let raw = quantize(kind, &[value; 256]).unwrap();
            let values = dequantize(kind, &raw).unwrap();
            assert!(values.iter().all(|v| (v - value).abs() < 0.01), "{kind:?} {value}: {}", values[5]);
        }
    }
}

#[test]
fn nibbles_are_read_low_half_first() {
    let mut raw = [0u8; 18];
    raw[..2].copy_from_slice(&f16::from_f32(2.0).to_bits().to_le_bytes());
    raw[2] = 0x9F;
    let block = read_block(WeightKind::Q4_0, &raw);
    assert_eq!(block.value(WeightKind::Q4_0, 0), 14.0);
    assert_eq!(block.value(WeightKind::Q4_0, 16), 2.0);
}

#[test]
fn four_bit_floats_have_the_values_of_the_specification() {
    let mut raw = [0u8; 17];
    // Codes 0..16, each in the low nibble; exponent 2^1.
    raw[0] = 128;
    for (i, byte) in raw[1..].iter_mut().enumerate() {
        *byte = i as u8;
    }
    let values = dequantize(WeightKind::Mxfp4, &raw).unwrap();
    let positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for (i, v) in positive.into_iter().enumerate() {
        assert_eq!((values[i], values[i + 8]), (2.0 * v, -2.0 * v));
    }
    raw[0] = 0;
    assert_eq!(dequantize(WeightKind::Mxfp4, &raw).unwrap()[2], 2f32.powi(-127));
}

#[test]
fn ragged_rows_are_refused() {
    assert_eq!(
        check_blocks(WeightKind::Q8_0, 34, 1, 33),
        Err(KernelError::RaggedBlocks { op: "pack", k: 33, block: 32 })
    );
    assert!(quantize(WeightKind::Q4K, &[0.0; 128]).is_err());
    assert!(dequantize(WeightKind::Q4K, &[0; 143]).is_err());
}
