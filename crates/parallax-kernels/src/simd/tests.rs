//! Every operation of every level against the scalar level, on ordinary and on hostile lanes.

use super::*;
use crate::dispatch::{Isa, simd_kernel};
use crate::testing::{noise, same_at_every_level};

simd_kernel! {
    /// Results of all float operations on the lanes of `a` and `b`.
    fn float_operations(s; a: &[f32; LANES], b: &[f32; LANES], halves: &[u16; LANES]) -> Vec<f32> {
        let (x, y) = (s.load(a), s.load(b));
        let results = [
            s.add(x, y), s.sub(x, y), s.mul(x, y), s.div(x, y), s.fma(x, y, x), s.max(x, y), s.min(x, y),
            s.round(x), s.pow2(s.round(s.min(s.splat(90.0), s.max(s.splat(-90.0), x)))),
            s.widen_f16(halves), s.widen_bf16(halves), exp(s, x), exp_below(s, s.min(s.splat(0.0), x)),
        ];
        let mut out = Vec::new();
        for result in results {
            let mut line = [0.0; LANES];
            s.store(result, &mut line);
            out.extend(line);
        }
        out.extend([s.sum(x), s.max_lane(x), f32::from_bits(s.max_abs_bits(x, 1))]);
        out
    }
}

simd_kernel! {
    /// Byte products of every kind, as floats (all are exact).
    fn byte_products(s; w: &[u8; 64], x: &[i8; 4]) -> Vec<f32> {
        let word = i32::from_ne_bytes(x.map(i8::cast_unsigned));
        let pair = |a: i8, b: i8| i32::from(a) & 0xffff | i32::from(b) << 16;
        let sum = x.iter().map(|&x| i32::from(x)).sum();
        let (low, high) = s.nibbles(w);
        let mut nibbles = s.acc_zero();
        for _ in 0..4 {
            nibbles = s.dot4_nibbles(nibbles, low, word);
            nibbles = s.dot4_nibbles(nibbles, high, word);
        }
        let results = [
            s.to_f32(s.dot4(s.dot_start(sum), s.weights(w), word)),
            s.to_f32(s.dot4_wide(s.zero(), s.weights_wide(w), [pair(x[0], x[2]), pair(x[1], x[3])])),
            s.to_f32(s.acc_total(nibbles)),
        ];
        let mut out = Vec::new();
        for result in results {
            let mut line = [0.0; LANES];
            s.store(result, &mut line);
            out.extend(line);
        }
        out
    }
}

simd_kernel! {
    /// Dot products of the codes that the byte operations make of `w`, as floats, and `scales` widened.
    fn code_operations(s; w: &[u8; 64], scales: &[i8; LANES], x: &[i8; 4]) -> Vec<f32> {
        let word = i32::from_ne_bytes(x.map(i8::cast_unsigned));
        let table = std::array::from_fn(|i| (i * 5 % 16) as u8);
        let plane = s.bytes(w);
        let mut codes = Vec::new();
        for shift in -7..=7i32 {
            let kept = if shift >= 0 { 0xffu8 << shift } else { 0xff >> -shift };
            codes.push(s.bits(plane, shift, kept & 0x3f));
        }
        let low = s.bits(plane, 0, 15);
        codes.push(s.join(low, s.bits(plane, -2, 0x30)));
        codes.push(s.lookup(low, &table));
        let mut out = Vec::new();
        let mut line = [0.0; LANES];
        for codes in codes {
            s.store(s.to_f32(s.acc_total(s.dot4_nibbles(s.acc_zero(), codes, word))), &mut line);
            out.extend(line);
        }
        s.store(s.widen_i8(scales), &mut line);
        out.extend(line);
        out
    }
}

simd_kernel! {
    fn bytes(s; v: &[f32; LANES]) -> Vec<f32> {
        let mut out = [0i8; LANES];
        let sum = s.store_i8(s.load(v), &mut out);
        out.iter().map(|&q| f32::from(q)).chain([sum as f32]).collect()
    }
}

fn line(v: &[f32]) -> [f32; LANES] {
    v.try_into().expect("sixteen elements")
}

fn current() -> Isa {
    crate::dispatch::current()
}

#[test]
fn float_operations_give_the_same_bits() {
    for seed in 0..50 {
        let a = line(&noise(LANES, seed).iter().map(|v| v * 40.0).collect::<Vec<_>>());
        let b = line(&noise(LANES, seed + 1000));
        let halves = std::array::from_fn(|i| (i as u16 * 3000 + seed as u16 * 17) & 0x7bff);
        same_at_every_level(|| float_operations(current(), &a, &b, &halves));
    }
}

#[test]
fn infinities_and_signed_zeros_give_the_same_bits() {
    let mut a = [0.0; LANES];
    a[..8].copy_from_slice(&[-0.0, 0.0, f32::INFINITY, f32::NEG_INFINITY, 1e-40, -1e-40, 88.9, -103.9]);
    same_at_every_level(|| float_operations(current(), &a, &[1.5; LANES], &[0; LANES]));
}

#[test]
fn byte_products_are_exact_at_the_extremes() {
    for w in [0x80u8, 0x7f, 0x81, 0xff, 0x00] {
        for x in [[127i8; 4], [-127; 4], [127, -127, 127, -127], [1, 2, 3, 4]] {
            let got = same_at_every_level(|| byte_products(current(), &[w; 64], &x));
            let sum: i32 = x.iter().map(|&x| i32::from(x)).sum();
            let signed = i32::from(w.cast_signed()) * sum;
            let nibbles = 4 * (i32::from(w & 15) + i32::from(w >> 4)) * sum;
            assert_eq!((got[0], got[16], got[32]), (signed as f32, 256.0 * signed as f32, nibbles as f32));
        }
    }
}

#[test]
fn byte_products_keep_lanes_and_bytes_apart() {
    let w: [u8; 64] = std::array::from_fn(|i| (i as u8).wrapping_mul(37));
    let x = [3i8, -50, 100, 7];
    let got = same_at_every_level(|| byte_products(current(), &w, &x));
    for output in 0..LANES {
        let dot: i32 = (0..4).map(|j| i32::from(w[4 * output + j].cast_signed()) * i32::from(x[j])).sum();
        assert_eq!(got[output], dot as f32);
        assert_eq!(got[16 + output], 256.0 * dot as f32);
    }
}

#[test]
fn codes_are_cut_joined_and_looked_up_alike() {
    let w: [u8; 64] = std::array::from_fn(|i| (i as u8).wrapping_mul(151).wrapping_add(13));
    let scales = std::array::from_fn(|i| (i as i8).wrapping_mul(17).wrapping_sub(127));
    let x = [127i8, -127, 5, 64];
    let got = same_at_every_level(|| code_operations(current(), &w, &scales, &x));
    let dot = |output: usize, code: &dyn Fn(u8) -> u8| -> f32 {
        (0..4).map(|j| f32::from(code(w[4 * output + j])) * f32::from(x[j])).sum()
    };
    for output in 0..LANES {
        assert_eq!(got[7 * LANES + output], dot(output, &|b| b & 0x3f), "shift 0");
        assert_eq!(got[5 * LANES + output], dot(output, &|b| b >> 2), "right by 2");
        assert_eq!(got[10 * LANES + output], dot(output, &|b| (b << 3) & 0x38), "left by 3");
        assert_eq!(got[15 * LANES + output], dot(output, &|b| (b & 15) | (b >> 2 & 0x30)));
        assert_eq!(got[16 * LANES + output], dot(output, &|b| (b & 15) * 5 % 16));
        assert_eq!(got[17 * LANES + output], f32::from(scales[output]));
    }
}

#[test]
fn rounding_to_bytes_takes_ties_to_even() {
    let v = std::array::from_fn(|i| i as f32 * 8.5 - 63.5);
    let got = same_at_every_level(|| bytes(current(), &v));
    let expected: Vec<f32> = v.iter().map(|v| v.round_ties_even()).collect();
    assert_eq!(got[..LANES], expected);
    assert_eq!(got[LANES], expected.iter().sum::<f32>());
}

#[test]
fn exp_below_is_exp_and_ends_in_zero() {
    let scalar = scalar::Scalar;
    let at = |x: f32| exp_below(scalar, scalar.splat(x))[0];
    for x in (0..=87_000).map(|i| i as f32 / -1000.0) {
        assert_eq!(at(x).to_bits(), exp(scalar, scalar.splat(x))[0].to_bits(), "{x}");
    }
    for x in [-88.0, -89.5, -1e30, f32::NEG_INFINITY] {
        assert_eq!(at(x).to_bits(), 0, "{x}");
    }
    assert!(at(f32::NAN).is_nan());
}

#[test]
fn exp_is_accurate_and_has_the_right_limits() {
    let at = |x: f32| {
        let Isa::Scalar(s) =
            crate::dispatch::with_level(crate::dispatch::Level::Scalar, current).expect("exists")
        else {
            unreachable!("the level was forced")
        };
        exp(s, s.splat(x))[0]
    };
    for i in -8700..8870 {
        let x = i as f32 * 0.01;
        let exact = f64::from(x).exp();
        assert!((f64::from(at(x)) / exact - 1.0).abs() < 2.5e-7, "exp({x}) = {}", at(x));
    }
    assert_eq!(
        (at(0.0), at(-200.0), at(f32::NEG_INFINITY), at(f32::INFINITY)),
        (1.0, 0.0, 0.0, f32::INFINITY)
    );
    assert!(at(f32::NAN).is_nan());
    assert!(at(-95.0) > 0.0, "subnormal results are kept");
}
